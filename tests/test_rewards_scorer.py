"""The scorer as the loop uses it: order, parts, types, functions of your own and the judge in one submit."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import TIMEOUT_S
from test_rewards_judge import Server

from rethinker_jax.config import Config, RethinkConfig, SamplingConfig, VerifierConfig
from rethinker_jax.config_rewards import RewardConfig
from rethinker_jax.errors import UserError
from rethinker_jax.rewards.scorer import Scorer, with_room
from rethinker_jax.step_metrics import reward_metrics
from rethinker_jax.types import FIRST, Completion, ImagePatches, Problem, Prompt, Verdict
from rethinker_jax.verify.pool import VerifierPool

NO_IMAGE = np.zeros((0, 1), np.float32)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig(num_workers=1)) as opened:
        yield opened


def response(
    text: str, answer: str = "5", name: str = "row", length: int = 8, **problem: Any
) -> tuple[Prompt, Completion]:
    images = (ImagePatches(NO_IMAGE, (1, 0, 0), (200, 100), (100, 100)),) if problem.pop("image", False) else ()
    prompt = Prompt(
        Problem(name, "q", answer, **problem), np.zeros(1, np.int32), np.zeros((3, 1), np.int32),
        np.zeros(1, np.int32), 1, images,
    )  # fmt: skip
    completion = Completion(
        np.zeros(length, np.int32), np.zeros(length, np.float32), np.full(length, FIRST, np.int8), "stop", text,
        ((FIRST, text),),
    )  # fmt: skip
    return prompt, completion


def config(**reward: Any) -> Config:
    return Config(reward=RewardConfig(**reward), sampling=SamplingConfig(max_new_tokens=100))


def test_verdicts_come_in_order_with_reward_and_parts(pool: VerifierPool) -> None:
    """Catches a verdict with another response's parts. 0.9 for the answer, 0.1 for the box, -1/2 for length."""
    settings = config(
        terms={"accuracy": 0.9, "format": 0.1, "soft_overlong": 0.5},
        soft_overlong=dataclasses.replace(RewardConfig().soft_overlong, buffer_tokens=50),
    )
    with Scorer(settings, pool) as scorer:
        texts = [rf"\boxed{{{number % 7}}}" if number % 3 else "none" for number in range(60)]
        pending = scorer.submit([response(text) for text in texts] + [response(r"\boxed{5}", length=75)])
        verdicts = pending.result()
        assert pending.done() and scorer.submit([]).result() == []
    for number, verdict in enumerate(verdicts[:-1]):
        right, boxed = float(number % 3 != 0 and number % 7 == 5), float(number % 3 != 0)
        assert verdict.parts == {"accuracy": right, "format": boxed, "soft_overlong": 0.0}
        assert verdict.reward == pytest.approx(0.9 * right + 0.1 * boxed)
    assert verdicts[-1].reward == pytest.approx(1.0 - 0.5 * 0.5)  # 25 of the last 50 tokens of 100


def test_rows_of_a_type_have_their_own_terms(pool: VerifierPool) -> None:
    """Catches terms that are added to the default ones; and boxes in the pixels of another image, also in accuracy."""
    with Scorer(config(by_type={"bbox": {"iou": 1.0, "accuracy": 0.0}}), pool) as scorer:
        gold = '{"bbox_2d": [100, 0, 200, 50]}'
        boxed, plain, badly = scorer.submit(
            [
                response(r"\boxed{[50, 0, 100, 50]}", gold, type="bbox", image=True),
                response(r"\boxed{5}"),
                response(r"\boxed{[100, 0, 200, 50]}", gold, type="bbox", image=True),
            ]
        ).result()
    assert boxed.parts == {"iou": pytest.approx(1.0), "accuracy": 1.0} and boxed.reward == pytest.approx(1.0)
    assert plain.parts == {"accuracy": 1.0}
    assert badly.parts == {"iou": 0.0, "accuracy": 0.0}


def test_functions_of_your_own_see_the_verdict_and_the_row(pool: VerifierPool, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def level(row): return row['row']['level'] * row['correct']\n"
        "def batch(reward_inputs): return [{'overall': len(reward_inputs), 'n': 1} for _ in reward_inputs]\n"
    )
    settings = config(terms={f"{path}:level": 1.0, "accuracy": 0.5}, by_type={"text": {f"{path}:batch": 1.0}})
    with Scorer(settings, pool) as scorer:
        rows: list[dict[str, Any]] = [{"row": {"level": 3}}, {"type": "text"}, {"row": {"level": 4}}, {"type": "text"}]
        verdicts = scorer.submit([response(r"\boxed{5}", **row) for row in rows]).result()
    assert [verdict.reward for verdict in verdicts] == [3.5, 2.0, 4.5, 2.0]
    assert verdicts[1].parts == {f"{path}:batch": 2.0, f"{path}:batch/n": 1.0}


def test_submitting_does_not_wait_for_a_function_of_your_own(pool: VerifierPool, tmp_path: Path) -> None:
    """Catches verification that stops generation. Three submits are under way at once, in order; the function returns
    when all are."""
    path, all_are = tmp_path / "mine.py", tmp_path / "all are under way"
    path.write_text(
        "import pathlib, time\n"
        "def f(row):\n"
        f"    while not pathlib.Path({str(all_are)!r}).exists(): time.sleep(0.01)\n"
        "    return float(row['response'])"
    )
    with Scorer(config(terms={f"{path}:f": 1.0}), pool) as scorer:
        pending = [scorer.submit([response(str(number))]) for number in range(3)]
        assert not any(one.done() for one in pending)
        all_are.touch()
        assert [one.result()[0].reward for one in pending] == [0.0, 1.0, 2.0]


def test_a_fault_of_a_function_reaches_the_loop(pool: VerifierPool, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def f(row):\n    return row['extracted'] + 1")
    with Scorer(config(terms={f"{path}:f": 1.0}), pool) as scorer:
        with pytest.raises(UserError, match=r"row 'row': TypeError: .*, at line 2: return row\['extracted'\] \+ 1"):
            scorer.submit([response(r"\boxed{5}")]).result()
        with pytest.raises(UserError, match="TypeError"):
            scorer.submit([response(r"\boxed{6}")]).result()
    with pytest.raises(UserError, match="no function g"), Scorer(config(terms={f"{path}:g": 1.0}), pool):
        pass


def test_closing_ends_a_call_that_is_under_way(pool: VerifierPool, tmp_path: Path) -> None:
    """Catches a run that is asked to stop and waits for the deadline of a hanging function."""
    path, begun = tmp_path / "mine.py", tmp_path / "begun"
    path.write_text(
        f"import pathlib, time\ndef f(row):\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(6000)"
    )
    with Scorer(config(terms={f"{path}:f": 1.0}, user_deadline_s=600.0), pool) as scorer:
        pending = scorer.submit([response(r"\boxed{5}")])
        end = time.monotonic() + TIMEOUT_S
        while not begun.exists():
            assert time.monotonic() < end, "the function was not called"
            time.sleep(0.01)
        started = time.monotonic()
    with pytest.raises(UserError, match="its process ended"):
        pending.result()
    assert time.monotonic() - started < 300


def test_the_judge_is_asked_at_once_and_its_failures_are_metrics(
    pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failure that counts as 0 in the mean, and one that nobody sees."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    together = threading.Barrier(2, timeout=120)

    def reply(prompt: str) -> tuple[int, str]:
        together.wait()  # both requests are under way at the same time
        return (200, "0.5") if "one" in prompt else (404, "")

    with Server(reply) as server:
        settings = config(
            terms={"accuracy": 1.0, "judge": 2.0},
            judge=server.config(retries=0, timeout_s=120.0),
            by_type={"text": {"accuracy": 1.0}},
        )
        with Scorer(settings, pool) as scorer:
            asked = [response(r"one \boxed{5}"), response(r"two \boxed{5}"), response(r"three \boxed{5}", type="text")]
            verdicts = scorer.submit(asked).result()
    assert [verdict.reward for verdict in verdicts] == [2.0, 1.0, 1.0]  # 1 + 2 * 0.5; no value; not asked
    assert verdicts[1].missing == {"judge": "http_404"} and "judge" not in verdicts[1].parts
    found = reward_metrics(verdicts)
    assert found["reward/judge"] == 0.5 and found["judge_failures"] == 1.0
    assert found["reward/accuracy"] == 1.0


def test_metrics_name_each_part_once() -> None:
    verdicts = [
        Verdict("correct", 1.0, "5", "x", parts={"accuracy": 1.0}),
        Verdict("wrong", 0.0, "5", "x", parts={"accuracy": 0.0, "iou": 0.25}),
    ]
    assert reward_metrics(verdicts) == {"reward/accuracy": 0.5, "reward/iou": 0.25}


def test_room_of_a_completion() -> None:
    """0 means all the room there is: with a second look, that of both."""
    assert with_room(config()).soft_overlong.max_tokens == 100
    both = dataclasses.replace(config(), rethink=RethinkConfig("random", max_new_tokens=30))
    assert with_room(both).length.max_tokens == 130


def test_importing_the_scorer_loads_no_jax() -> None:
    code = (
        "import sys, rethinker_jax.rewards.scorer, rethinker_jax.rewards.worker\n"
        "assert not {'jax', 'jaxlib', 'flax', 'sympy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S)
