"""Throws hostile and broken inputs at the verifier's pool and reports what it could not stand. Exits 1 on a finding.

    PYTHONPATH=tests:. python scripts/fuzz_verifier.py --count 100000 --workers 1
    PYTHONPATH=tests:. python scripts/fuzz_verifier.py --seed 0 --only 4711         # one input, and its verdict

A finding is: an exception in the caller, a `crash`, a verdict past the wall clock, code that did not return to Python
and had to be killed, no verdict at all for a minute, a submit that takes long, and memory that grows. What ends as
`timeout` by its CPU limit is no finding, but is counted and shown among the slowest (wall clock).
"""

import argparse
import collections
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

from verifier_fuzz import make_item, problem_of  # ty: ignore[import-not-found]

from rethinker_jax.config import VerifierConfig
from rethinker_jax.types import Verdict
from rethinker_jax.verify.pool import JudgeItem, PendingVerdicts, VerifierPool

BATCH = 256
BATCHES_IN_FLIGHT = 4
SILENCE_S = 60.0  # without one verdict: something hangs
MAX_SUBMIT_S = 2.0  # of one batch, with responses of up to 300,000 characters in it
MAX_PARENT_GROWTH_MB = 16.0  # after the first fifth
MAX_SHOWN = 40


class Report:
    """What was seen so far. `findings` decide the exit code."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count
        self.findings: list[str] = []
        self.verdicts: collections.Counter[str] = collections.Counter()
        self.rules: collections.Counter[str] = collections.Counter()
        self.slowest: list[tuple[float, int]] = []
        self.submit_s: list[float] = []
        self.parent_mb: list[float] = []
        self.workers_mb: list[float] = []

    def add(self, number: int, verdict: Verdict) -> None:
        self.verdicts[verdict.verdict] += 1
        self.rules[verdict.rule] += verdict.verdict == "timeout"
        self.slowest = sorted([*self.slowest, (verdict.ms, number)], reverse=True)[:10]
        if problem := problem_of(verdict):
            self.find(f"{problem}: {self.describe(number)}")

    def find(self, what: str) -> None:
        self.findings.append(what)
        if len(self.findings) <= MAX_SHOWN:
            print(f"FINDING: {what}", flush=True)

    def describe(self, number: int) -> str:
        name, item = make_item(self.seed, number)
        return f"--seed {self.seed} --only {number} ({name}, {len(item.response)} characters): {shown(item)}"

    def measure(self, pool: VerifierPool) -> None:
        self.parent_mb.append(resident_mb(os.getpid()))
        self.workers_mb += [resident_mb(pid) for pid in pool.worker_pids]


def shown(item: JudgeItem) -> str:
    cut = [
        repr(text if len(text) <= 120 else text[:80] + " ... " + text[-30:]) for text in (item.answer, item.response)
    ]
    return f"gold {cut[0]}, response {cut[1]}, type {item.type}, {len(item.choices)} choices"


def resident_mb(pid: int) -> float:
    """Resident memory of a process; 0 for one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0


def wait(pending: PendingVerdicts, numbers: range, report: Report) -> list[Verdict] | None:
    """The verdicts, or None where none has come for a minute."""
    done, since = -1, time.monotonic()
    while not pending.done():
        if pending.num_done() != done:
            done, since = pending.num_done(), time.monotonic()
        elif time.monotonic() - since > SILENCE_S:
            report.find(f"no verdict for {SILENCE_S:g} s: one of the inputs {numbers.start} to {numbers.stop}")
            return None
        time.sleep(0.01)
    return pending.result()


def fuzz(report: Report, config: VerifierConfig) -> None:
    """Judges all inputs; `report` takes what happens, exceptions included."""
    waiting: collections.deque[tuple[range, PendingVerdicts]] = collections.deque()
    batches = [range(at, min(at + BATCH, report.count)) for at in range(0, report.count, BATCH)]
    with VerifierPool(config) as pool:
        for numbers in [*batches, *[range(0)] * BATCHES_IN_FLIGHT]:
            items = [make_item(report.seed, number)[1] for number in numbers]
            started = time.thread_time()
            try:
                waiting.append((numbers, pool.submit(items)))
            except Exception:  # whatever it is, it would have ended a training run
                report.find(f"submit of {numbers.start} to {numbers.stop} raised: {traceback.format_exc()}")
                continue
            report.submit_s.append((time.thread_time() - started) / max(len(items), 1))
            if time.thread_time() - started > MAX_SUBMIT_S:
                report.find(f"submit of {numbers.start} to {numbers.stop}: {time.thread_time() - started:.1f} s of CPU")
            if len(waiting) > BATCHES_IN_FLIGHT:
                numbers, pending = waiting.popleft()
                verdicts = wait(pending, numbers, report)
                if verdicts is None:
                    return
                for number, verdict in zip(numbers, verdicts, strict=True):
                    report.add(number, verdict)
                report.measure(pool)
                if numbers.start // BATCH % 20 == 0:
                    print(f"{numbers.stop}/{report.count}  {dict(report.verdicts)}", file=sys.stderr, flush=True)
        print(f"pool: {pool.counts}")
        if kills := pool.counts.get("cpu_kills", 0):
            report.find(f"{kills} workers did not return to Python within their CPU limit")


def print_report(report: Report, seconds: float, config: VerifierConfig) -> None:
    total = report.verdicts.total()
    print(f"{total} inputs of seed {report.seed} in {seconds:.0f} s: {total / seconds:.0f} a second")
    print(f"verdicts: {dict(report.verdicts)}; timeouts by rule: {dict(+report.rules)}")
    print(f"submit: {1e6 * statistics.median(report.submit_s):.0f} us of CPU an item")
    warm = report.parent_mb[len(report.parent_mb) // 5 :]
    growth = max(warm) - warm[0]
    print(f"memory: parent {warm[0]:.0f} MB after the first fifth, then at most {growth:+.1f}; ", end="")
    print(f"workers {statistics.median(report.workers_mb):.0f} MB, at most {max(report.workers_mb):.0f}")
    if growth > MAX_PARENT_GROWTH_MB:
        report.find(f"the parent grew by {growth:.0f} MB")
    if max(report.workers_mb) > config.memory_mb / 2:
        report.find(f"a worker used {max(report.workers_mb):.0f} MB")
    print("slowest:")
    for ms, number in report.slowest:
        print(f"  {ms:.0f} ms {report.describe(number)}")
    print(f"{len(report.findings)} findings")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="judge this input alone and print all of it")
    options = parser.parse_args()

    config = VerifierConfig(num_workers=options.workers)
    if options.only is not None:
        _, item = make_item(options.seed, options.only)
        with VerifierPool(config) as pool:
            verdict = pool.judge_many([item])[0]
        print(item, verdict, sep="\n")
        return int(bool(problem_of(verdict)))
    report = Report(options.seed, options.count)
    started = time.monotonic()
    fuzz(report, config)
    print_report(report, time.monotonic() - started, config)
    return int(bool(report.findings))


if __name__ == "__main__":
    sys.exit(main())
