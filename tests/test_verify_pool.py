"""The pool under fire: hanging, killed and stopped workers lose no item, harm no other, and never reach the caller."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.verify.judge import JudgeItem, judge
from rethinker_jax.verify.pool import VerifierPool
from rethinker_jax.verify.process import WorkerProcess

CONFIG = VerifierConfig(num_workers=1, deadline_s=2.0, cpu_limit_s=0.4)
# No polynomial, so the comparison solves both equations; that takes many seconds.
SLOW = JudgeItem(r"\boxed{x^{7}+3x^{5}\sin x+e^x=y^x}", "x^2+y=1")


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(CONFIG) as opened:
        yield opened


def boxed(answer: object, gold: object) -> JudgeItem:
    return JudgeItem(rf"\boxed{{{answer}}}", str(gold))


def wait_until(condition, seconds: float = 20.0) -> None:
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
    started = time.monotonic()
    assert pool.judge_many([SLOW])[0].verdict == "timeout"
    assert time.monotonic() - started < 0.2
    assert pool.counts["cpu_timeouts"] == before.get("cpu_timeouts", 0) + 1
    assert pool.counts["wall_timeouts"] == before.get("wall_timeouts", 0)


def test_a_stopped_worker_runs_into_the_wall_clock_and_that_is_not_remembered() -> None:
    """Catches waiting for ever on a worker that does nothing, and a verdict of the machine's load kept in the cache."""
    with VerifierPool(VerifierConfig(num_workers=1, deadline_s=0.4, cpu_limit_s=0.3)) as pool:
        assert pool.judge_many([boxed(1, 1)])[0].correct
        os.kill(pool.worker_pids[0], signal.SIGSTOP)
        verdicts = pool.judge_many([boxed(2, 2), boxed(3, 3)])
        assert [(v.verdict, v.rule) for v in verdicts] == [("timeout", "deadline"), ("correct", "number:integer")]
        assert pool.counts["wall_timeouts"] == 1
        assert pool.judge_many([boxed(2, 2)])[0].correct


def test_killed_workers_lose_no_item() -> None:
    """Catches items that vanish with the process that held them, or that are judged twice into the wrong place."""
    with VerifierPool(VerifierConfig(num_workers=2)) as pool:
        items = [boxed(f"x^2+{i}", f"{i // 2 * 2}+x^2") for i in range(200)]
        pending = pool.submit(items)
        for target in (20, 100):
            wait_until(lambda target=target: pending.num_done() >= target)
            os.kill(pool.worker_pids[0], signal.SIGKILL)
        verdicts = pending.result()
        assert [v.verdict for v in verdicts] == ["correct" if i % 2 == 0 else "wrong" for i in range(200)]
        assert pool.counts["restarts"] >= 2


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
        thread.join(timeout=30)
    assert results == {k: [i % 2 == 0 for i in range(50)] for k in range(1, 5)}


def test_closing_ends_the_processes_and_what_is_pending() -> None:
    """Catches orphans, and a caller that waits for ever on a closed pool."""
    pool = VerifierPool(CONFIG)
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


def test_the_worker_never_loads_an_accelerator_library() -> None:
    """A worker that imports jax may seize the TPU from the trainer. It reports from its own `sys.modules`."""
    worker = WorkerProcess(CONFIG)
    try:
        assert worker.wait_ready()["accelerator_modules"] == []
        worker.send({"n": 0, "extracted": "x+1", "rule": "boxed", "answer": "1+x", "choices": [], "type": "auto"})
        assert worker.read_line(5.0)["verdict"] == "correct"
    finally:
        worker.close()


def test_importing_the_pool_and_the_command_loads_no_jax() -> None:
    code = (
        "import sys, rethinker_jax.verify.pool, rethinker_jax.verify.command, rethinker_jax.verify.rewards\n"
        "assert not {'jax', 'jaxlib', 'flax', 'sympy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


ATTACKS = [
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "2^{10^9}",
    "1000000!",
    "((10!)!)!",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\sum_{k=1}^{10^9} 1/k^2",
    r"\prod_{k=1}^{10^7} k",
    r"\sin(10^{10^8})",
    "(x+1)^{10^6}",
    "(1+i)^{1000001}",
    "x^{10^9}=1",
    "{" * 2000 + "1" + "}" * 2000,
    "(" * 800 + "1" + ")" * 800,
    r"\sin(" * 100 + "1" + ")" * 100,
    "1+" * 30000 + "1",
    "a" * 100000,
    r"\frac{" * 3000,
    "1 " * 30000,
    "9" * 100000,
    "9" * 4301,
    r"\boxed{" * 1000 + "1" + "}" * 1000,
    "\x00\x01",
    r"e^{e^{e^{e^{10}}}}",
    "1e999999999",
    "10^{999999}",
    r"\frac{1}{0}",
    "0^{-1}",
    "x^{x^{x^{x}}}",
    "a," * 9000,
    r"10^{(5^{5^{5^{5^5}}} \cdot \log_{10}(5)} - 4)}",
    "(((2^{400})^{400})^{400})^{400}",
]


def test_no_attack_passes_or_lasts(pool: VerifierPool) -> None:
    """Towers, factorials, nesting, length: all false, and each within the deadline."""
    golds = ("5", "x^2+1", "B", "1, 2", "x=3", "3 cm", "cat")
    started = time.monotonic()
    verdicts = pool.judge_many([boxed(attack, gold) for attack in ATTACKS for gold in golds])
    seconds = time.monotonic() - started
    right = [v.extracted for v in verdicts if v.correct]
    assert right == []
    assert {v.verdict for v in verdicts} <= {"wrong", "no_answer", "timeout"}
    assert max(v.ms for v in verdicts) <= 2000 and seconds < 20


PIECES = st.sampled_from(
    [
        r"\frac{",
        "}",
        "{",
        r"\sqrt",
        "^",
        "_",
        "1",
        "23",
        "x",
        "y",
        "(",
        ")",
        "[",
        "]",
        ",",
        "=",
        "<",
        r"\pi",
        " ",
        "+",
        "-",
        "!",
        "°",
        "½",
        "%",
        r"\text{",
        "cm",
        "or",
        "A",
        r"\boxed{",
        ".",
        "/",
        r"\infty",
        r"\cup",
        "e",
        "\\",
        "$",
        "²",
        ":",
        "\u202e",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    answer=st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=30)),
    gold=st.sampled_from(["7", "x+1", "B", "1,2", "5 cm", "cat", "x<3"]),
)
def test_nonsense_gets_a_verdict(pool: VerifierPool, answer: str, gold: str) -> None:
    """Catches an exception of a parser that reaches the worker's border as a crash."""
    verdict = pool.judge_many([JudgeItem(rf"\boxed{{{answer}}}", gold)])[0]
    assert verdict.verdict in ("correct", "wrong", "no_answer", "timeout"), verdict
