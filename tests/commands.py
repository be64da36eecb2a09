"""Starting the command line in a process of its own, and stopping it at a chosen moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TIMEOUT_S = 600


def start(*words: str | Path, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a command in the folder of `log`, to which it prints."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "rethinker_jax.main", *map(str, words)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def stop_when(ready: Callable[[], bool], number: signal.Signals, *words: str | Path, log: Path) -> int:
    """Starts a command, sends it a signal as soon as `ready()`, and returns its exit code (-9 for SIGKILL)."""
    process = start(*words, log=log)
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process.poll() is None, f"ended before it could be stopped:\n{log.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(TIMEOUT_S)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
