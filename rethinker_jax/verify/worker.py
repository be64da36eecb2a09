"""One verifier process: JSON lines in on stdin, one line out per item on stdout. Started as a module, never forked.

    in   {"n": 7, "extracted": "12", "rule": "boxed", "answer": "12", "choices": [], "type": "auto"}
    out  {"n": 7, "verdict": "correct", "rule": "number:integer", "ms": 0.02, "cpu_s": 0.613, "last": false}

The first line out is `{"ready": true}`, after the libraries are loaded. `cpu_s` is the CPU time of the process so far.
`last` says that the process ends after this line, because the item left it in doubt (CPU or memory limit), because it
has grown, or because it has served enough; what was sent after it is unread. Memory is bounded by RLIMIT_AS, CPU time
per item by a profiling timer whose signal raises between bytecodes, and, for code that does not return to Python, by
the parent. Stdout belongs to the protocol: what libraries print goes to stderr.
"""

import argparse
import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from typing import IO, Any

CPU_LIMIT = "cpu_limit"
MEMORY_LIMIT = "memory_limit"
MAX_ITEMS = 50_000  # then a fresh process takes over
MAX_GROWTH = 0.25  # of the memory limit: what a process may have grown and still serve the next item


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


def serve(source: IO[bytes], sink: IO[bytes], cpu_limit_s: float, max_growth: float) -> None:
    """Answers items until the source ends or a reply is the last.

    What one item may use should not depend on what came before it: where the process has grown by more than
    `max_growth` bytes, a fresh one takes over.
    """
    timer, space = CpuTimer(cpu_limit_s), AddressSpace(max_growth)
    for served, line in enumerate(source, 1):
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
    parser.add_argument("--memory-mb", type=int, required=True)
    options = parser.parse_args()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
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
    serve(sys.stdin.buffer, sink, options.cpu_limit_s, MAX_GROWTH * limit)


if __name__ == "__main__":
    main()
