"""The pool under fire: hanging, killed and stopped workers lose no item, harm no other, and never reach the caller."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import TIMEOUT_S

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.verify import process
from rethinker_jax.verify.extract import extract
from rethinker_jax.verify.judge import JudgeItem, judge
from rethinker_jax.verify.pool import VerifierPool
from rethinker_jax.verify.process import CpuLimitPassed, DeadlinePassed, WorkerProcess, worker_environment
from rethinker_jax.verify.worker import AddressSpace, serve

# Limits of CPU time are what ends an item here; the deadline is far away, for a busy machine.
CONFIG = VerifierConfig(num_workers=1, deadline_s=20.0, cpu_limit_s=0.4)


@pytest.fixture
def far_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many deadlines as it takes: how long an item may wait for a core has a test of its own."""
    monkeypatch.setattr(process, "MAX_DEADLINES", 1000)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(CONFIG) as opened:
        yield opened


def boxed(answer: object, gold: object) -> JudgeItem:
    return JudgeItem(rf"\boxed{{{answer}}}", str(gold))


def slow(num_options: int, start: int = 1000) -> JudgeItem:
    """About 70 ms of CPU for each option (up to 64): a list whose items are tried one by one against the answer's."""
    shared = [rf"\sqrt{{{n}}}+x" for n in range(start, start + 23)]
    options = tuple(", ".join([*shared, rf"\sqrt{{{start + 100 + k}}}+x"]) for k in range(num_options))
    answer = ", ".join(rf"x+\sqrt{{{n}}}" for n in (7, *reversed(range(start, start + 23))))
    return JudgeItem(rf"\boxed{{{answer}}}", "A", options)


SLOW = slow(64)


def message(item: JudgeItem, number: int = 0) -> dict[str, object]:
    """What the pool sends to a worker."""
    found = extract(item.response)
    return {
        "n": number, "extracted": found.text, "rule": found.rule,
        "answer": item.answer, "choices": item.choices, "type": item.type,
    }  # fmt: skip


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie: who adopts orphans may be slow to wait for them."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition, seconds: float = TIMEOUT_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_order_is_kept_and_equals_the_pure_function(pool: VerifierPool) -> None:
    """Catches verdicts that are attached to the wrong item."""
    items = [boxed(i, i if i % 3 else i + 1) for i in range(300)] + [
        JudgeItem("nothing", "1"),
        JudgeItem(r"\boxed{1}", ""),
    ]
    verdicts = pool.judge_many(items)
    expected = [judge(item.response, item.answer) for item in items]
    assert [(v.verdict, v.rule, v.extracted, v.reward) for v in verdicts] == [
        (v.verdict, v.rule, v.extracted, v.reward) for v in expected
    ]
    assert [v.verdict for v in verdicts[:3]] == ["wrong", "correct", "correct"]
    assert verdicts[-2].verdict == "no_answer" and verdicts[-1].verdict == "bad_gold"


def test_an_answer_that_burns_cpu_is_a_timeout_and_the_rest_is_judged(pool: VerifierPool) -> None:
    """Catches a hang, a silent "wrong", and a victim among the items queued behind it; the verdict is remembered."""
    before = pool.counts
    verdicts = pool.judge_many([boxed(1, 1), SLOW, boxed(2, 2), boxed(r"\sqrt{8}", r"2\sqrt{2}")])
    assert [v.verdict for v in verdicts] == ["correct", "timeout", "correct", "correct"]
    assert verdicts[1].rule == "cpu_limit" and verdicts[1].reward == 0.0
    judged = pool.counts["judged"]
    assert pool.judge_many([SLOW])[0].verdict == "timeout"
    assert pool.counts["judged"] == judged
    assert pool.counts["cpu_timeouts"] == before.get("cpu_timeouts", 0) + 1
    assert pool.counts["wall_timeouts"] == before.get("wall_timeouts", 0)


def test_a_stopped_worker_is_replaced_and_the_second_stop_is_a_timeout_that_is_not_remembered(far_limit: None) -> None:
    """Catches waiting for ever on a worker that does nothing, blaming the item at once, and a cached verdict of it."""
    with VerifierPool(VerifierConfig(num_workers=1, deadline_s=0.4, cpu_limit_s=30.0)) as pool:
        assert pool.judge_many([boxed(1, 1)])[0].correct
        os.kill(pool.worker_pids[0], signal.SIGSTOP)
        verdicts = pool.judge_many([boxed(2, 2), boxed(3, 3)])
        assert [v.verdict for v in verdicts] == ["correct", "correct"] and pool.counts["retries"] == 1

        at_item = 2 * cpu_seconds(pool.worker_pids[0])  # more than starting takes
        pending = pool.submit([SLOW, boxed(4, 4)])
        for _ in range(2):
            wait_until(lambda: bool(pool.worker_pids))
            pid = pool.worker_pids[0]
            wait_until(lambda pid=pid: cpu_seconds(pid) > at_item)
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: pid not in pool.worker_pids)
        assert [(v.verdict, v.rule) for v in pending.result()] == [
            ("timeout", "deadline"),
            ("correct", "number:integer"),
        ]
        assert pool.counts["wall_timeouts"] == 1
        assert not pool.submit([SLOW]).done()


def test_a_busy_machine_times_nothing_out(far_limit: None) -> None:
    """Four workers and four other processes share one core; an item needs 0.14 s of CPU, and so at least 1.1 s of wall
    clock: two of its deadlines.

    Catches a deadline that counts the time in which the worker waits for the core, or its items in the queue.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others: list[subprocess.Popen[bytes]] = []
    try:
        with VerifierPool(VerifierConfig(num_workers=4, deadline_s=0.5, cpu_limit_s=10.0)) as pool:
            assert pool.judge_many([boxed(1, 1)])[0].correct
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
            verdicts = pool.judge_many([slow(2, start=1000 + 100 * i) for i in range(12)])
            assert {v.verdict for v in verdicts} == {"wrong"}
            assert pool.counts.get("retries", 0) == pool.counts.get("wall_timeouts", 0) == 0
            assert max(v.ms for v in verdicts) > 500, "no item ran past the deadline: the machine was not busy"
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()


class Counting(WorkerProcess):
    """Notes how long it waited for each line."""

    def __init__(self, config: VerifierConfig):
        super().__init__(config)
        self.waits: list[float] = []

    def read_line(self, timeout_s: float) -> dict[str, Any]:
        self.waits.append(timeout_s)
        return super().read_line(timeout_s)


def test_waiting_for_a_core_has_an_end() -> None:
    """A worker that runs on and has CPU time left gets five deadlines. Catches more of them, and a single one."""
    worker = Counting(VerifierConfig(cpu_limit_s=100.0))
    try:
        worker.wait_ready()
        worker.send(message(SLOW))
        worker.waits.clear()
        with pytest.raises(DeadlinePassed):
            worker.read_reply(deadline_s=0.2, cpu_limit_s=100.0)
        assert worker.waits == [0.2] * 5
    finally:
        worker.close()


def test_code_that_does_not_return_to_python_is_ended_by_the_parent(far_limit: None) -> None:
    """The worker's own limit is out of reach here, as its signal is where a library computes in C."""
    worker = WorkerProcess(VerifierConfig(cpu_limit_s=100.0))
    try:
        worker.wait_ready()
        worker.send(message(SLOW))
        with pytest.raises(CpuLimitPassed):
            worker.read_reply(deadline_s=0.8, cpu_limit_s=0.3)
    finally:
        worker.close()


def test_a_worker_that_nobody_watches_is_ended_by_its_limit_on_cpu_time() -> None:
    """Nobody reads the reply, and the worker's own timer is out of reach. Catches an item that runs for ever where the
    kernel does not end orphans, and a limit that counts all items together: the first ones use most of it."""
    limits = ("--cpu-limit-s", "100", "--cpu-backstop-s", "1", "--memory-mb", "1024", "--parent", str(os.getpid()))
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "rethinker_jax.verify.worker", *limits],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=worker_environment(),
    )  # fmt: skip
    items = [*(message(slow(4, start=1000 + 100 * i), i) for i in range(8)), message(SLOW, 8)]
    said, _ = worker.communicate("".join(json.dumps(item) + "\n" for item in items).encode(), timeout=TIMEOUT_S)
    assert worker.returncode == -signal.SIGXCPU
    replies = [json.loads(line) for line in said.splitlines()]
    assert [reply.get("n") for reply in replies] == [None, *range(8)]
    assert replies[-1]["cpu_s"] - replies[0]["cpu_s"] > 1.5, "the first items used too little to show anything"


def test_a_worker_has_nothing_to_read_but_through_the_protocol() -> None:
    """Catches a library, or a child process, that takes the pool's items off stdin."""
    worker = WorkerProcess(CONFIG)
    try:
        worker.wait_ready()
        assert os.readlink(f"/proc/{worker.pid}/fd/0") == os.devnull
    finally:
        worker.close()


def test_a_worker_that_has_grown_serves_no_further_item(tmp_path: Path) -> None:
    """Catches memory that adds up over items until an innocent one meets the limit."""
    space = AddressSpace(max_growth=2**25)
    assert not space.grown()
    block = bytearray(2**27)
    assert space.grown()
    del block
    items, replies = tmp_path / "items", tmp_path / "replies"
    items.write_text("".join(json.dumps(message(boxed(i, i), i)) + "\n" for i in range(3)))
    for max_growth, last in ((2**30, [False] * 3), (-1, [True])):
        with items.open("rb") as source, replies.open("wb") as sink:
            serve(source, sink, cpu_limit_s=5.0, max_growth=max_growth)
        assert [json.loads(line)["last"] for line in replies.read_text().splitlines()] == last


def test_killed_workers_lose_no_item() -> None:
    """Catches items that vanish with the process that held them, innocent ones called `crash`, verdicts in the wrong
    place, and a pool that gives up because workers were also killed while they started."""
    rng = random.Random(0)
    right = [rng.random() < 0.5 for _ in range(2000)]
    items = [boxed(f"x^2+{i}", f"{i + (not right[i])}+x^2") for i in range(2000)]
    expected = [("correct" if right[i] else "wrong", f"x^2+{i}") for i in range(2000)]
    with VerifierPool(VerifierConfig(num_workers=3)) as pool:
        pending = pool.submit(items)
        for target in range(250, 2000, 250):
            wait_until(lambda target=target: pending.num_done() >= target)
            os.kill(rng.choice(pool.worker_pids), signal.SIGKILL)
        verdicts = pending.result()
        wait_until(lambda: pool.counts["restarts"] >= 7)
        assert pool.counts["retries"] >= 1, "no kill met an item"
    assert [(v.verdict, v.extracted) for v in verdicts] == expected


def test_being_killed_is_not_the_items_fault_but_dying_is() -> None:
    """A kill and two segmentation faults are borne, the third fault at one item is its `crash`.

    Catches a count that takes the kill for the item's own (`crash` at the second fault), and one that never ends.
    """
    with VerifierPool(VerifierConfig(num_workers=1, cpu_limit_s=30.0)) as pool:
        assert pool.judge_many([boxed(1, 1)])[0].correct
        at_item = 2 * cpu_seconds(pool.worker_pids[0])  # more than starting takes
        pending = pool.submit([SLOW, boxed(2, 2)])
        for number, sent in enumerate([signal.SIGKILL] + [signal.SIGSEGV] * 3):
            wait_until(lambda: bool(pool.worker_pids))
            pid = pool.worker_pids[0]
            wait_until(lambda pid=pid: cpu_seconds(pid) > at_item)
            assert pool.counts.get("retries", 0) == number
            os.kill(pid, sent)
            wait_until(lambda pid=pid: pid not in pool.worker_pids)
        verdicts = pending.result()
        assert [(v.verdict, v.rule) for v in verdicts] == [("crash", "worker_died"), ("correct", "number:integer")]
        assert verdicts[0].reward == 0.0 and pool.counts["crash"] == 1


def test_an_idle_worker_that_died_is_replaced() -> None:
    with VerifierPool(CONFIG) as pool:
        assert pool.judge_many([boxed(1, 1)])[0].correct
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        assert pool.judge_many([boxed(2, 2)])[0].correct
        assert "crash" not in pool.counts


def test_equal_answers_are_judged_once(pool: VerifierPool) -> None:
    """Catches a cache that ignores the gold, the choices or the type, and one that is never hit."""
    before = pool.counts
    pool.judge_many([boxed("4711", "4711")] * 50 + [JudgeItem(r"other words \boxed{4711}", "4711")])
    after = pool.counts
    assert after["judged"] - before["judged"] == 1
    assert after["cache_hits"] - before.get("cache_hits", 0) == 50
    by_choices = [JudgeItem(r"\boxed{A}", "A", choices) for choices in (("1", "2"), ("2", "1"))]
    pool.judge_many(by_choices)
    assert pool.counts["judged"] - after["judged"] == 2


def test_counts_add_up(pool: VerifierPool) -> None:
    names = ("correct", "wrong", "no_answer", "bad_gold", "timeout", "crash")
    counts = pool.counts
    assert sum(counts.get(name, 0) for name in names) == counts["items"]


def test_submitting_does_not_wait() -> None:
    """Catches a submit that judges in the caller's thread: generation could not go on meanwhile."""
    with VerifierPool(CONFIG) as pool:
        pending = pool.submit([SLOW, boxed(1, 1)])
        assert not pending.done()
        assert [v.verdict for v in pending.result()] == ["timeout", "correct"]
        assert pending.done() and len(pending) == 2


def test_many_threads_may_share_a_pool(pool: VerifierPool) -> None:
    results: dict[int, list[bool]] = {}

    def work(k: int) -> None:
        results[k] = [v.correct for v in pool.judge_many([boxed(f"{k}{i}", f"{k}{i + i % 2}") for i in range(50)])]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=TIMEOUT_S)
    assert results == {k: [i % 2 == 0 for i in range(50)] for k in range(1, 5)}


def test_closing_ends_the_processes_and_what_is_pending() -> None:
    """Catches orphans, and a caller that waits for ever on a closed pool."""
    pool = VerifierPool(VerifierConfig(num_workers=1, cpu_limit_s=30.0))
    assert pool.judge_many([boxed(1, 1)])[0].correct
    pids = pool.worker_pids
    pending = pool.submit([SLOW, boxed(2, 2)])
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        pending.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit([boxed(1, 1)])


def test_a_worker_that_cannot_start_is_said_with_the_reason() -> None:
    """Catches waiting for ever, or zero rewards for everything, when the memory limit is below what Python needs."""
    with (
        VerifierPool(VerifierConfig(num_workers=1, memory_mb=40)) as pool,
        pytest.raises(UserError, match="memory_mb"),
    ):
        pool.judge_many([boxed(1, 1)])


def test_a_pool_that_may_open_no_files_says_so() -> None:
    """Catches a thread that ends with the error while its caller waits for ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
    try:
        with VerifierPool(CONFIG) as pool, pytest.raises(UserError, match="Too many open files"):
            pool.judge_many([boxed(1, 1)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("stopped", [False, True])
def test_workers_end_with_a_parent_that_was_killed(stopped: bool) -> None:
    """Catches orphans that sit on memory after `kill -9` of a run. A stopped one stands for one inside a long
    computation in C: it does not see that its stdin has ended."""
    code = (
        "import os\n"
        "from rethinker_jax.config import VerifierConfig\n"
        "from rethinker_jax.verify.pool import JudgeItem, VerifierPool\n"
        "pool = VerifierPool(VerifierConfig())\n"
        "pool.judge_many([JudgeItem('1', '1')])\n"
        "print(pool.worker_pids[0], flush=True)\n"
        f"if {stopped}: os.kill(pool.worker_pids[0], 19)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=TIMEOUT_S)
    assert said.returncode == -signal.SIGKILL
    try:
        wait_until(lambda: not is_alive(int(said.stdout)), 60.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(said.stdout), signal.SIGKILL)


def test_a_worker_whose_parent_is_gone_does_not_start() -> None:
    """Catches the parent that ends before the worker could ask to end with it. `1` stands for another parent."""
    limits = ("--cpu-limit-s", "1", "--cpu-backstop-s", "9", "--memory-mb", "1024", "--parent", "1")
    command = [sys.executable, "-P", "-m", "rethinker_jax.verify.worker", *limits]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=worker_environment(), timeout=TIMEOUT_S
    )
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_a_pool_outlives_the_thread_that_opened_it() -> None:
    """Catches workers that end with a thread of the caller's instead of the pool's: each would be a restart."""
    opened: list[VerifierPool] = []
    thread = threading.Thread(target=lambda: opened.append(VerifierPool(CONFIG)))
    thread.start()
    thread.join()
    with opened[0] as pool:
        wait_until(lambda: bool(pool.worker_pids))
        pids = pool.worker_pids
        assert [v.correct for v in pool.judge_many([boxed(1, 1), boxed("x+1", "1+x")])] == [True, True]
        assert pool.worker_pids == pids and pool.counts.get("restarts", 0) == 0


def test_the_worker_never_loads_an_accelerator_library() -> None:
    """A worker that imports jax may seize the TPU from the trainer. It reports from its own `sys.modules`."""
    worker = WorkerProcess(CONFIG)
    try:
        assert worker.wait_ready()["accelerator_modules"] == []
        worker.send(message(boxed("x+1", "1+x")))
        assert worker.read_reply(60.0, 60.0)["verdict"] == "correct"
    finally:
        worker.close()


def test_importing_the_pool_and_the_command_loads_no_jax() -> None:
    code = (
        "import sys, rethinker_jax.verify.pool, rethinker_jax.verify.command, rethinker_jax.rewards.scorer\n"
        "assert not {'jax', 'jaxlib', 'flax', 'sympy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S)
