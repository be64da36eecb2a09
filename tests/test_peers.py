"""Processes of a job that die, freeze, hang or fail: the others end soon, say who it was, and exit as the job did."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import REPOSITORY, TIMEOUT_S, free_port

from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.roll_call import call_the_roll

MEMBER = Path(__file__).parent / "job_member.py"
GOES_ON = "the same command in all of them goes on from the last checkpoint"


def run_job(fault: str, index: int) -> tuple[list[int], list[str], float]:
    """Exit codes, what was printed, and the seconds from the fault (or the start) until the other process had ended."""
    address = f"127.0.0.1:{free_port()}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    shared |= {"JAX_PLATFORMS": "cpu", "RETHINKER_STALL_TIMEOUT_S": "15" if fault == "hangs" else "600"}
    started = time.monotonic()
    job = [
        subprocess.Popen(
            [sys.executable, str(MEMBER), fault, str(index)],
            env=os.environ | shared | {"JAX_PROCESS_ID": str(number), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    job[1 - index].wait(TIMEOUT_S)
    ended = time.monotonic()
    if fault == "frozen":
        job[index].kill()
    printed = [process.communicate(timeout=TIMEOUT_S)[0] for process in job]
    met = re.search(r"fault at ([\d.]+)", printed[index])
    return [process.returncode for process in job], printed, ended - (float(met[1]) if met else started)


def test_a_job_without_a_fault_ends_well_in_all_processes() -> None:
    """Catches a process that takes the others' leaving for a fault, or aborts when the coordinator goes."""
    codes, printed, _ = run_job("none", 0)
    assert codes == [0, 0], printed
    assert all("done" in text and "stopped" not in text and "Terminating" not in text for text in printed), printed


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("killed", 75, "process {index} of 2"),
        ("frozen", 75, "process {index} of 2"),
        ("hangs", 75, "furthest behind is process {index} of 2"),
        ("bad_input", 2, "error: the disk of this host is full"),
        ("defect", 1, "ValueError: a defect"),
        ("stop", 75, "asked to stop (SIGTERM)"),
    ],
)
def test_the_other_process_ends_soon_and_names_the_fault(fault: str, code: int, said: str, index: int) -> None:
    """Catches the minutes of silence, the abort without a name, and an exit code that would not be started again."""
    codes, printed, seconds = run_job(fault, index)
    other = printed[1 - index]
    if index == 0 and fault in ("killed", "frozen"):
        # The coordinator's own end is seen by its silence, or by what it no longer answers.
        assert "process 0" in other and GOES_ON in other, other
    else:
        assert said.format(index=index) in other, other
    assert codes[1 - index] == code, printed
    assert seconds < 60, seconds
    assert "done" not in other


def in_threads(address: str, hellos: list[tuple[int, int, dict[str, str]]], timeout_s: float) -> list[str]:
    """What each caller of the roll was told; "" = all are there."""
    told = [""] * len(hellos)

    def call(place: int) -> None:
        index, count, program = hellos[place]
        try:
            call_the_roll(address, index, count, program, timeout_s)
        except (UserError, Stopped) as error:
            told[place] = str(error)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(hellos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_the_roll_is_called_and_everybody_is_there() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert in_threads(address, [(index, 3, {"config": "a"}) for index in (2, 0, 1)], 120) == ["", "", ""]


@pytest.mark.parametrize(
    ("hellos", "said"),
    [
        ([(0, 3, {}), (1, 3, {})], "missing: 2"),
        ([(0, 2, {"config": "a"}), (1, 2, {"config": "b"})], "another config: b, process 0 has a"),
        ([(0, 2, {}), (1, 3, {})], "was told of 3 processes, process 0 of 2"),
        ([(0, 3, {}), (1, 3, {}), (1, 3, {})], "wanted each number from 0 to 2 once"),
    ],
)
def test_the_roll_names_who_is_missing_or_different(hellos: list[tuple[int, int, dict[str, str]]], said: str) -> None:
    """Catches a job that would hang in its first collective, and one of two configs."""
    told = in_threads(f"127.0.0.1:{free_port()}", hellos, 5 if "missing" in said else 120)
    assert all(said in text for text in told), told


def test_a_caller_without_process_0_gives_up_in_time() -> None:
    started = time.monotonic()
    [told] = in_threads(f"127.0.0.1:{free_port()}", [(1, 2, {})], 1)
    assert "process 1 waited 1 s for process 0" in told
    assert time.monotonic() - started < 100  # a job waits for 300 s


def test_a_stranger_at_the_door_does_not_count_and_does_no_harm() -> None:
    """Catches a port scanner, or a browser, that ends the job or is taken for a process."""
    port = free_port()
    told: list[list[str]] = []
    waiting = threading.Thread(target=lambda: told.append(in_threads(f"127.0.0.1:{port}", [(0, 2, {})], 120)))
    waiting.start()
    for message in (b"GET / HTTP/1.1\r\n\r\n\n", b'{"index": "1"}\n', b"[" * 70_000 + b"\n"):
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=60) as stranger:
                    stranger.sendall(message)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
    assert in_threads(f"127.0.0.1:{port}", [(1, 2, {})], 120) == [""]
    waiting.join()
    assert told == [[""]]
