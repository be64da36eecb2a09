"""One worker process as the pool sees it: started, fed, listened to, killed. All of it runs in one pool thread."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rethinker_jax.config import VerifierConfig

START_TIMEOUT_S = 120.0  # importing the libraries on a busy machine
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class WorkerGone(Exception):
    """The process ended, or closed its pipe."""


class DeadlinePassed(Exception):
    """No line arrived in time."""


def worker_environment() -> dict[str, str]:
    """The parent's, with what makes a worker deterministic, single-threaded and free of native big integers."""
    environment = dict(os.environ)
    environment.update(
        SYMPY_GROUND_TYPES="python", PYTHONHASHSEED="0", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONUTF8="1"
    )
    inherited = environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(part for part in (_PACKAGE_ROOT, inherited) if part)
    return environment


class WorkerProcess:
    """Starts at construction; `wait_ready` returns when it listens. Not thread-safe but for `kill`."""

    def __init__(self, config: VerifierConfig):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        command = [sys.executable, "-P", "-m", "rethinker_jax.verify.worker"]
        command += ["--cpu-limit-s", str(config.cpu_limit_s), "--memory-mb", str(config.memory_mb)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=worker_environment(),
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._unread = b""
        self._unsent = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> dict[str, Any]:
        """Raises WorkerGone or DeadlinePassed where the worker does not come up."""
        return self.read_line(START_TIMEOUT_S)

    def send(self, message: dict[str, Any]) -> None:
        """Queues a message; it is written while `read_line` waits, so that a full pipe cannot block the caller."""
        self._unsent += json.dumps(message, ensure_ascii=True).encode() + b"\n"

    def read_line(self, timeout_s: float) -> dict[str, Any]:
        """The next line from the worker, within `timeout_s` seconds of wall clock."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlinePassed
            writers = [self._in] if self._unsent else []
            readable, writable, _ = select.select([self._out], writers, [], left)
            if writable:
                self._write()
            if readable:
                chunk = os.read(self._out, 65536)
                if not chunk:
                    raise WorkerGone
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:  # killed in the middle of a line
            raise WorkerGone from error

    def _write(self) -> None:
        try:
            sent = os.write(self._in, self._unsent)
        except BrokenPipeError:
            self._unsent = b""  # the end of the other pipe says the rest
            return
        self._unsent = self._unsent[sent:]

    def cpu_seconds(self) -> float | None:
        """CPU time that the process has used, or None where the system does not say."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def error_tail(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:].decode(errors="replace").strip()

    def kill(self) -> None:
        """Ends the process now; safe to call from any thread and twice."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kills the process, reaps it and closes its pipes."""
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()
