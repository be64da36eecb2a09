"""One verifier process: JSON lines in on stdin, one line out per item on stdout. Started as a module, never forked.

    in   {"n": 7, "extracted": "12", "rule": "boxed", "answer": "12", "choices": [], "type": "auto"}
    out  {"n": 7, "verdict": "correct", "rule": "number:integer", "ms": 0.02, "last": false}

The first line out is `{"ready": true}`, after the libraries are loaded. `last` says that the process ends after this
line, because the item left it in doubt (CPU or memory limit) or because it has served enough; what was sent after it
is unread. Memory is bounded by RLIMIT_AS, CPU time per item by a profiling timer whose signal raises between
bytecodes, and, for code that does not return to Python, by the parent. Stdout belongs to the protocol: what libraries
print goes to stderr.
"""

import argparse
import json
import logging
import os
import resource
import signal
import sys
import warnings
from typing import Any, BinaryIO

CPU_LIMIT = "cpu_limit"
MEMORY_LIMIT = "memory_limit"
MAX_ITEMS = 50_000  # then a fresh process takes over


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


def judge_line(item: dict[str, Any], timer: CpuTimer) -> dict[str, Any]:
    """The reply to one item. Never raises: this is where untrusted text is met."""
    from rethinker_jax.verify.judge import judge_extracted

    reply: dict[str, Any] = {"n": item["n"], "verdict": "crash", "rule": "error", "ms": 0.0, "last": False}
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
    if timer.fired:  # also where a library swallowed the signal's exception and made something of it
        reply.update(verdict="timeout", rule=CPU_LIMIT, ms=timer.limit_s * 1000, last=True)
    return reply


def serve(source: BinaryIO, sink: BinaryIO, cpu_limit_s: float) -> None:
    """Answers items until the source ends or a reply is the last."""
    timer = CpuTimer(cpu_limit_s)
    for served, line in enumerate(source, 1):
        reply = judge_line(json.loads(line), timer)
        reply["last"] = reply["last"] or served >= MAX_ITEMS
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
    sink.write(json.dumps({"ready": True, "pid": os.getpid(), "accelerator_modules": loaded}).encode() + b"\n")
    sink.flush()
    serve(sys.stdin.buffer, sink, options.cpu_limit_s)


if __name__ == "__main__":
    main()
