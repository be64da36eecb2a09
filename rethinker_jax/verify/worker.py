"""One verifier process: JSON lines in on stdin, one line out per item on stdout. Started as a module, never forked.

    in   {"n": 7, "extracted": "12", "rule": "boxed", "answer": "12", "choices": [], "type": "auto"}
    out  {"n": 7, "verdict": "correct", "rule": "number:integer", "ms": 0.02, "cpu_s": 0.613, "last": false}

The first line out is `{"ready": true}`, after the libraries are loaded. `cpu_s` is the CPU time of the process so far.
`last` says that the process ends after this line, because the item left it in doubt (CPU or memory limit), because it
has grown, or because it has served enough; what was sent after it is unread. Memory is bounded by RLIMIT_AS, CPU time
per item by a profiling timer whose signal raises between bytecodes, and, for code that does not return to Python, by
the parent, with RLIMIT_CPU behind it. The protocol has descriptors of its own: what libraries print goes to stderr, and
what reads stdin finds its end. On Linux the kernel kills the process when its parent ends; elsewhere it ends when it
next reads, and not before.
"""

import argparse
import ctypes
import json
import logging
import math
import os
import resource
import signal
import sys
import time
import warnings
from typing import Any, BinaryIO

CPU_LIMIT = "cpu_limit"
MEMORY_LIMIT = "memory_limit"
MAX_ITEMS = 50_000  # then a fresh process takes over
MAX_GROWTH = 0.25  # of the memory limit: what a process may have grown and still serve the next item


PR_SET_PDEATHSIG = 1  # linux/prctl.h


class CpuLimitReached(BaseException):
    """Not an Exception, so that no library's `except Exception` takes it for its own."""


class CpuTimer:
    """Raises `CpuLimitReached` in the main thread after `limit_s` seconds of CPU time, repeatedly until stopped."""

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self.armed = False
        self.fired = False
        signal.signal(signal.SIGPROF, self._on_signal)

    def start(self) -> None:
        self.fired = False
        self.armed = True
        signal.setitimer(signal.ITIMER_PROF, self.limit_s, 0.05)

    def stop(self) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_PROF, 0.0)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.armed:
            self.fired = True
            raise CpuLimitReached


class AddressSpace:
    """Whether this process has grown by more than `max_growth` bytes since now, by what RLIMIT_AS counts."""

    def __init__(self, max_growth: float):
        try:
            self._file = os.open("/proc/self/statm", os.O_RDONLY)  # kept open: a look costs microseconds
        except FileNotFoundError:  # no Linux: only the limit itself holds
            self._file = None
        self._limit = self._size() + max_growth

    def grown(self) -> bool:
        return self._size() > self._limit

    def _size(self) -> int:
        return 0 if self._file is None else int(os.pread(self._file, 64, 0).split()[0]) * resource.getpagesize()


class CpuBackstop:
    """Has the kernel end this process (SIGXCPU) once it has used `limit_s` more seconds of CPU than at the last `move`.

    It is for code that does not return to Python while nobody watches, so whole seconds are fine enough.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._hard = resource.getrlimit(resource.RLIMIT_CPU)[1]

    def move(self) -> None:
        soft = math.ceil(time.process_time() + self._limit_s)
        if self._hard != resource.RLIM_INFINITY:
            soft = min(soft, self._hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, self._hard))


def end_with_parent(parent: int) -> None:
    """On Linux, has the kernel kill this process as soon as the thread that started it ends, whatever runs here.

    That thread therefore has to live as long as the process is wanted. Ends the process if `parent` is gone already.
    On other systems only the end of stdin tells of the parent's.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request above
        os._exit(1)


def take_protocol() -> tuple[BinaryIO, BinaryIO]:
    """Where the items come from and where the replies go to: what stdin and stdout were until now.

    After it a read of stdin finds nothing and a print goes to stderr, so neither can touch the protocol, and child
    processes do not inherit it.
    """
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return source, sink


def judge_line(item: dict[str, Any], timer: CpuTimer) -> dict[str, Any]:
    """The reply to one item. Never raises: this is where untrusted text is met."""
    from rethinker_jax.verify.judge import judge_extracted

    reply: dict[str, Any] = {"n": item["n"], "verdict": "crash", "rule": "error", "ms": 0.0, "last": False}
    started = time.perf_counter()
    try:
        try:
            timer.start()
            verdict = judge_extracted(
                item["extracted"], item["rule"], item["answer"], tuple(item["choices"]), item["type"]
            )
        finally:
            timer.stop()
        reply.update(verdict=verdict.verdict, rule=verdict.rule, ms=verdict.ms)
    except CpuLimitReached:
        pass
    except MemoryError:
        reply.update(rule=MEMORY_LIMIT, last=True)
    except RecursionError:
        reply.update(rule="recursion_limit", last=True)
    except Exception as error:
        reply.update(rule=f"error_{type(error).__name__}")
    timer.stop()  # again: the signal may have come before the first one did its work
    if timer.fired:  # also where a library swallowed the signal's exception and made something of it
        reply.update(verdict="timeout", rule=CPU_LIMIT, last=True)
    if reply["verdict"] in ("timeout", "crash"):
        reply.update(ms=(time.perf_counter() - started) * 1000)
    return reply


def serve(
    source: BinaryIO, sink: BinaryIO, cpu_limit_s: float, max_growth: float, backstop: CpuBackstop | None = None
) -> None:
    """Answers items until the source ends or a reply is the last.

    What one item may use should not depend on what came before it: where the process has grown by more than
    `max_growth` bytes, a fresh one takes over.
    """
    timer, space = CpuTimer(cpu_limit_s), AddressSpace(max_growth)
    for served, line in enumerate(source, 1):
        if backstop is not None:
            backstop.move()
        reply = judge_line(json.loads(line), timer)
        reply["last"] = reply["last"] or served >= MAX_ITEMS or space.grown()
        reply["cpu_s"] = time.process_time()
        sink.write(json.dumps(reply).encode() + b"\n")
        sink.flush()
        if reply["last"]:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description="verifier worker; started by rethinker_jax.verify.pool")
    parser.add_argument("--cpu-limit-s", type=float, required=True)
    parser.add_argument("--cpu-backstop-s", type=float, required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()

    end_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    source, sink = take_protocol()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    limit = options.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    from rethinker_jax.verify.symbolic import import_libraries

    import_libraries()
    loaded = [name for name in ("jax", "jaxlib", "flax", "torch") if name in sys.modules]
    ready = {"ready": True, "cpu_s": time.process_time(), "accelerator_modules": loaded}
    sink.write(json.dumps(ready).encode() + b"\n")
    sink.flush()
    serve(source, sink, options.cpu_limit_s, MAX_GROWTH * limit, CpuBackstop(options.cpu_backstop_s))


if __name__ == "__main__":
    main()
