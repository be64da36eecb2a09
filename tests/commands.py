"""Starting the command line in a process of its own, and stopping it at a chosen moment."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TIMEOUT_S = 600
STOPS_ITSELF = Path(__file__).parent / "stops_itself.py"


def start(
    *words: str | Path, log: Path, script: Sequence[str] = ("-m", "rethinker_jax.main"), **environment: str
) -> subprocess.Popen[bytes]:
    """Starts a command in the folder of `log`, to which it prints."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *script, *map(str, words)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    """Below the ports that systems give to whoever names none (32768 on, or 49152): one of those may be given to
    another process before the one that this is for listens there."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def run_job(folder: Path, name: str, members: Sequence[Sequence[str]], devices: int) -> tuple[list[int], list[str]]:
    """Runs the processes of a job, each with `devices` devices, in `folder`; exit codes and what each printed.

    members: what follows `python`, of each. `name` is that of their logs.
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    # Compiling is most of what this costs.
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if len(members) > 1:
        environment |= {
            # Only the first process would write to the cache, and so not compile what the others do; where it then
            # waits for them for 30 s, gloo gives up.
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(len(members)),
        }
    logs = [folder / f"{name}-{index}.log" for index in range(len(members))]
    job = []
    for index, (words, log) in enumerate(zip(members, logs, strict=True)):
        own = {"JAX_PROCESS_ID": str(index)} if len(members) > 1 else {}
        with log.open("wb") as output:
            job.append(
                subprocess.Popen(
                    [sys.executable, *words], env=environment | own, cwd=folder, stdout=output, stderr=subprocess.STDOUT
                )
            )
    codes = [process.wait(TIMEOUT_S) for process in job]
    return codes, [log.read_text() for log in logs]


def stop_at(place: str, call: int, number: signal.Signals, *words: str | Path, log: Path) -> int:
    """Runs a command that gets a signal before the call-th call of `place` (module:name); its exit code (-9: SIGKILL).

    A signal from outside comes at another moment on every machine, and on a busy one too late.
    """
    arranged = [str(STOPS_ITSELF), place, str(call), number.name]
    return start(*words, log=log, script=arranged).wait(TIMEOUT_S)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
