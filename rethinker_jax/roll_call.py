"""Before a job begins: is every process there, and are they the same program? Without it, jax waits and then aborts.

Process 0 listens at the coordinator's address, where jax's own service will be a moment later; the others call it and
say who they are. It answers all of them at once, when the last one has called or something is wrong.
"""

import json
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from rethinker_jax.errors import Stopped, UserError

MOST_BYTES = 1 << 16  # of one message
RETRY_S = 0.2


def call_the_roll(address: str, index: int, count: int, program: Mapping[str, str], timeout_s: float) -> None:
    """Return in all processes once all are there. Raises UserError, which names who is different, and Stopped with 75
    for one who is missing: it may be on its way.

    address: HOST:PORT of process 0, the same in all. program: what has to be the same in all (versions, config), by
    what it is called.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the coordinator's address: wanted HOST:PORT, came {address!r}")
    hello = {"index": index, "count": count, "host": socket.gethostname(), "program": dict(program)}
    deadline = time.monotonic() + timeout_s
    if index == 0:
        _listen(int(port), address, hello, deadline, timeout_s)
    else:
        _call(host, int(port), hello, deadline, timeout_s)


def _listen(port: int, address: str, own: Mapping[str, Any], deadline: float, timeout_s: float) -> None:
    """Process 0: hear all others, then answer them. What does not speak our way is hung up on."""
    count = own["count"]
    try:
        server = socket.create_server(("", port), backlog=count, reuse_port=False)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {address} ({error.strerror}). Name an address of this host with a port that "
            "is free; another job may be using it."
        ) from error
    callers: dict[int, tuple[socket.socket, str]] = {}  # number → connection, host
    trouble, code = "", 2
    with server:
        while len(callers) < count - 1 and not trouble:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(number) for number in range(1, count) if number not in callers)
                code = 75
                trouble = (
                    f"waited {timeout_s:.0f} s at {address} for {count} processes; missing: {missing}. Start them all "
                    "with the same address and number of processes, or set JAX_NUM_PROCESSES to how many there are."
                )
                break
            connection.settimeout(5)
            hello = _read(connection)
            if hello is None:
                connection.close()
                continue
            index = hello["index"]
            if index in callers and _has_gone(callers[index][0]):
                callers.pop(index)[0].close()  # it was started again
            trouble = _difference(own, hello, {number: host for number, (_, host) in callers.items()})
            if trouble:
                _write(connection, {"error": trouble, "code": code})
                connection.close()
                break
            callers[index] = connection, hello["host"]
    for connection, _ in callers.values():
        with connection:
            _write(connection, {"error": trouble, "code": code})
    if trouble:
        raise _ending(trouble, code)


def _ending(why: str, code: int) -> Exception:
    return UserError(why) if code == 2 else Stopped(why, code)


def _has_gone(connection: socket.socket) -> bool:
    """Whether the caller has hung up: it says nothing more, so that there is something to read means its end."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)


def _difference(own: Mapping[str, Any], hello: Mapping[str, Any], seen: Mapping[int, str]) -> str:
    """Why this caller does not belong to the job; "" if it does."""
    index, who = hello["index"], f"process {hello['index']} ({hello['host']})"
    if hello["count"] != own["count"]:
        return f"{who} was told of {hello['count']} processes, process 0 of {own['count']}: start all with one number."
    if not 0 < index < own["count"] or index in seen:
        there = f"; {seen[index]} has it too" if index in seen else ""
        return f"{who}: wanted each number from 0 to {own['count'] - 1} once{there}. Correct JAX_PROCESS_ID."
    for name, value in own["program"].items():
        came = hello["program"].get(name)
        if came != value:
            return f"{who} has another {name}: {came}, process 0 has {value}. Start all with the same."
    return ""


def _call(host: str, port: int, hello: Mapping[str, Any], deadline: float, timeout_s: float) -> None:
    """The others: call process 0 until it is there, and wait for its answer."""
    why = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                _write(connection, hello)
                connection.settimeout(max(deadline + 5 - time.monotonic(), 1))
                answer = _read_line(connection)
        except OSError as error:
            why = str(error)
            time.sleep(RETRY_S)
            continue
        if answer is None or "error" not in answer:
            why = "it hung up"
            time.sleep(RETRY_S)
            continue
        if answer["error"]:
            raise _ending(str(answer["error"]), 75 if answer.get("code") == 75 else 2)
        return
    raise Stopped(
        f"process {hello['index']} waited {timeout_s:.0f} s for process 0 at {host}:{port} ({why}). Start it, or "
        "correct the coordinator's address.",
        75,
    )


def _read(connection: socket.socket) -> dict[str, Any] | None:
    """What a process says of itself; None from anybody else."""
    try:
        hello = _read_line(connection)
    except OSError:
        return None
    kinds = {"index": int, "count": int, "host": str, "program": dict}
    good = hello is not None and all(isinstance(hello.get(key), kind) for key, kind in kinds.items())
    return hello if good else None


def _read_line(connection: socket.socket) -> dict[str, Any] | None:
    """One message. Raises OSError where it does not come within the connection's timeout, all of it."""
    data, until = b"", time.monotonic() + (connection.gettimeout() or 0)
    while not data.endswith(b"\n") and len(data) <= MOST_BYTES:
        connection.settimeout(max(until - time.monotonic(), 0.001))
        piece = connection.recv(4096)
        if not piece:
            return None
        data += piece
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write(connection: socket.socket, message: Mapping[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # it is gone; jax will miss it
