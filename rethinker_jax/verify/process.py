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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.config import VerifierConfig

START_TIMEOUT_S = 120.0  # importing the libraries on a busy machine
MAX_DEADLINES = 5  # how many deadlines an item may take in all, on a machine that hardly lets its worker run
BACKSTOP_S = 10.0  # of CPU, beyond what an item can use before this side ends its worker
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class WorkerGone(Exception):
    """The process ended, or closed its pipe."""


class DeadlinePassed(Exception):
    """No line arrived in time."""


class CpuLimitPassed(Exception):
    """No line arrived in time, and the process used up the CPU time of an item: it does not return to Python."""


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
    """Starts at construction; `wait_ready` returns when it listens. Not thread-safe but for `kill`.

    On Linux it is killed when the thread that constructed it ends, so that `kill -9` of this process leaves nothing.
    Raises OSError where the system has no room for a process, its pipes or the file of what it says on standard error.
    """

    def __init__(self, config: VerifierConfig, module: Sequence[str] = ()):
        """`module` is another module than the verifier's that speaks the same lines, with its options.

        It gets `--parent` and the id of this process last.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        backstop_s = config.cpu_limit_s + MAX_DEADLINES * config.deadline_s + BACKSTOP_S
        limits = ("--cpu-limit-s", str(config.cpu_limit_s), "--cpu-backstop-s", str(backstop_s))
        own = module or ("rethinker_jax.verify.worker", *limits, "--memory-mb", str(config.memory_mb))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", *own, "--parent", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=worker_environment(),
                start_new_session=True,
            )
        except OSError:
            self._errors.close()
            raise
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._unread = b""
        self._unsent = bytearray()  # cutting off its front is cheap, however much is left
        self._cpu_s = 0.0  # CPU time that the process had used at its last line

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def was_killed(self) -> bool:
        """Whether the process that is gone was ended by somebody: by `kill -9`, say, or for want of memory."""
        try:
            return self._process.wait(5.0) in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            return False

    def wait_ready(self) -> dict[str, Any]:
        """Raises WorkerGone or DeadlinePassed where the worker does not come up."""
        return self.read_line(START_TIMEOUT_S)

    def send(self, message: dict[str, Any]) -> None:
        """Queues a message; it is written while `read_reply` waits, so that a full pipe cannot block the caller."""
        self._unsent += json.dumps(message, ensure_ascii=True).encode() + b"\n"

    def read_reply(self, deadline_s: float, cpu_limit_s: float) -> dict[str, Any]:
        """The reply to the item that the worker has turned to. Raises WorkerGone, CpuLimitPassed or DeadlinePassed.

        A worker that could go on if it were given a core is waited for beyond the deadline, up to MAX_DEADLINES of
        them, so that what decides is its own CPU time and not the load of the machine.
        """
        turned_at = self._cpu_s
        for _ in range(MAX_DEADLINES):
            try:
                return self.read_line(deadline_s)
            except DeadlinePassed:
                stat = self._stat()
                if stat is None:
                    raise
                state, cpu_s = stat
                if cpu_s - turned_at >= cpu_limit_s:
                    raise CpuLimitPassed from None
                if state != "R":  # it may have answered since
                    return self.read_line(0.0)
        raise DeadlinePassed

    def read_line(self, timeout_s: float) -> dict[str, Any]:
        """The next line within `timeout_s` seconds of wall clock. Raises WorkerGone or DeadlinePassed."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()  # select.select knows no descriptors above 1023
        poll.register(self._out, select.POLLIN)
        if self._unsent:
            poll.register(self._in, select.POLLOUT)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            ready = [descriptor for descriptor, _ in poll.poll(max(left, 0.0) * 1000)]
            if not ready and left <= 0:  # this thread may have slept past the deadline: what is there counts
                raise DeadlinePassed
            if self._in in ready and not self._write():
                poll.unregister(self._in)
            if self._out in ready:
                chunk = os.read(self._out, 65536)
                if not chunk:
                    raise WorkerGone
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:  # killed in the middle of a line
            raise WorkerGone from error
        self._cpu_s = message["cpu_s"]
        return message

    def _write(self) -> bool:
        """Writes what the pipe takes. False: nothing is left to write."""
        try:
            sent = os.write(self._in, self._unsent)
        except BrokenPipeError:
            sent = len(self._unsent)  # the end of the other pipe says the rest
        del self._unsent[:sent]
        return bool(self._unsent)

    def _stat(self) -> tuple[str, float] | None:
        """The state of the process (R: it runs or could run) and its CPU seconds, or None where no /proc says."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def error_tail(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:].decode(errors="replace").strip()

    def kill(self) -> None:
        """Ends the process and its children now; safe to call from any thread and twice.

        Also where the process has died: until it is waited for, its id is that of its group and of nothing else.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter: nothing but a zombie (macOS)
                os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kills the process and its children, reaps it and closes its pipes."""
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()
