"""The parts of `main evaluate`: where an answer stands, which verdict counts, how much is drawn at once, progress."""

import dataclasses
import io
import json
from collections.abc import Generator

import pytest

from rethinker_jax.benchmarks.lenient import lenient_answer, lenient_response
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.config import Config, VerifierConfig
from rethinker_jax.evaluation.command import sampler_sizes
from rethinker_jax.evaluation.judging import Judging, as_judged
from rethinker_jax.evaluation.listener import Listener
from rethinker_jax.evaluation.results import LeftOut
from rethinker_jax.stopping import listening
from rethinker_jax.verify.judge import judge
from rethinker_jax.verify.pool import VerifierPool


@pytest.fixture(scope="module")
def pool() -> Generator[VerifierPool]:
    with VerifierPool(VerifierConfig()) as found:
        yield found


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So \boxed{7}, the answer is 8", "7"),  # the training rule goes first
        ("The answer is 5. I checked it.", "5"),
        ("Its answer is 3.\nNo: the final answer is **(B)** because it is blue.", "(B)"),
        ("**Final Answer:** D", "D"),
        ("Answer: B. 12 cm", "B"),
        ("x = 3\nThus it is 12.5 cm.", "12.5"),
        ("I take option (C).", "C"),
        ("So we get 3/4", "3/4"),
        ("Yes", "Yes"),
        ("I have no idea what this could possibly mean", None),  # no guess
        ("", None),
    ],
)
def test_any_stated_answer(response: str, answer: str | None) -> None:
    """Catches an answer from the wrong place, and one that is made up."""
    assert lenient_answer(response) == answer
    if answer is not None:
        assert judge(lenient_response(response), answer).correct


def record(completion: str, answer: str, alternatives: tuple[str, ...] = ()) -> Record:
    return Record(
        id="q", sample=0, question="?", answer=answer, choices=(), type="auto", categories={}, cluster="", scored=True,
        completion=completion, finish_reason="stop", num_tokens=1, verdict="no_answer", extracted=None, rule="",
        lenient="no_answer", alternatives=alternatives,
    )  # fmt: skip


def test_strict_lenient_and_several_golds(pool: VerifierPool) -> None:
    """Catches a lenient verdict below the strict one, a second gold that is not asked, and tags that are not read."""
    given = [record(r"\boxed{4}", "4"), record("The answer is 4.", "4"), record(r"\boxed{5}", "4", ("6", "5"))]
    given.append(record(r"The answer is 4. \boxed{5}", "4"))  # the box is what it commits to
    tagged = [record(r"\boxed{4} <answer>5</answer>", "5"), record(r"\boxed{4}", "4")]
    judging = Judging(pool)
    judging.submit(given)
    boxed = judging.ready(wait=True)
    judging = Judging(pool, "answer_tag")
    judging.submit(tagged)
    tags = judging.ready(wait=True)
    assert [(one.verdict, one.lenient) for one in boxed] == [
        ("correct", "correct"), ("no_answer", "correct"), ("correct", "correct"), ("wrong", "wrong"),
    ]  # fmt: skip
    assert [(one.verdict, one.lenient) for one in tags] == [("correct", "correct"), ("no_answer", "correct")]
    assert as_judged("Answer: 7\nwell", "boxed_or_line") == ["Answer: 7\nwell", "<answer>7</answer>"]


@pytest.mark.parametrize(
    ("response", "read"),
    [
        ("<answer>4</answer> then <answer>5</answer>", "<answer>5</answer>"),
        ("<answer>5</answer> as I said</answer>", "<answer>5</answer>"),  # up to the end that follows it
        ("<answer>5</answer> and again <answer>6", ""),
        ("</answer>5<answer>", ""),
    ],
)
def test_the_last_answer_tag(response: str, read: str) -> None:
    """Catches text behind the answer that is judged with it, and half an answer."""
    assert as_judged(response, "answer_tag") == [read]


@pytest.mark.parametrize(
    ("response", "answer", "others", "verdict", "extracted"),
    [
        ("Answer: 7", "8", (), "wrong", "7"),  # not no_answer: the line is one
        ("I wonder.", "8", (), "no_answer", None),
        (r"\boxed{7}", "", ("8",), "wrong", "7"),  # not bad_gold: the second gold is judged
        (r"\boxed{8}", "", ("8",), "correct", "8"),
        ("I wonder.", "", ("8",), "no_answer", None),
        (r"\boxed{8}", "", ("",), "bad_gold", "8"),
    ],
)
def test_the_verdict_that_says_most(
    pool: VerifierPool, response: str, answer: str, others: tuple[str, ...], verdict: str, extracted: str | None
) -> None:
    """Catches a share of completions without an answer that counts answers on a line, and a bad gold that hides one."""
    judging = Judging(pool, "boxed_or_line")
    judging.submit([record(response, answer, others)])
    (found,) = judging.ready(wait=True)
    assert (found.verdict, found.extracted) == (verdict, extracted)


@pytest.mark.parametrize(
    ("n", "num_items", "sizes"),
    [
        (1, 1000, (64, 256)),  # 64 slots, 32 requests each: 2,048 items, but no more than 256 pictures at once
        (8, 1000, (512, 256)),
        (8, 5, (512, 5)),
        (1024, 1000, (512, 16)),  # 16 x 1,024 = 512 x 32
    ],
)
def test_slots_stay_busy(n: int, num_items: int, sizes: tuple[int, int]) -> None:
    """Catches a call of the sampler a batch, at whose end most slots wait for the longest, and a slot a sample."""
    assert sampler_sizes(Config(), n, num_items) == sizes
    slots = dataclasses.replace(Config(), sampling=dataclasses.replace(Config().sampling, num_slots=2))
    assert sampler_sizes(slots, n, num_items) == (2, min(num_items, max(1, 64 // n)))


def test_progress_moves_with_every_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bar that stands still for a whole call of the sampler, and one that counts what was there as new."""
    shown: list[int] = []
    listener = Listener("x", 5, 2, frozenset({"kept"}), [LeftOut("long", "item 'long'", "too_long", "?")])
    monkeypatch.setattr(listener.shown, "update", lambda done, numbers: shown.append(done))
    listener.file = io.StringIO()
    with listening() as listener.stop:
        for name, sample in (("kept", 0), ("kept", 1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)):
            listener.records([dataclasses.replace(record("", ""), id=name, sample=sample)])
    assert shown == [4, 4, 5, 6, 7, 8]  # two items of two were done before
    assert [json.loads(line)["id"] for line in listener.file.getvalue().splitlines()] == ["a", "b", "b", "a"]
