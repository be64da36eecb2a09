"""Starting the command line in a process of its own, and stopping it at a chosen moment."""

import os
import signal
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


def stop_at(place: str, call: int, number: signal.Signals, *words: str | Path, log: Path) -> int:
    """Runs a command that gets a signal before the call-th call of `place` (module:name); its exit code (-9: SIGKILL).

    A signal from outside comes at another moment on every machine, and on a busy one too late.
    """
    arranged = [str(STOPS_ITSELF), place, str(call), number.name]
    return start(*words, log=log, script=arranged).wait(TIMEOUT_S)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
