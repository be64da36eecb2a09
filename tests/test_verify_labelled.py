"""Labelled cases, one by one, and the attacks under a worker's limits.

Both files of tests/data were labelled by someone who had not seen the judge. It was mended on verifier_cases.jsonl; on
verifier_cases_held_out.jsonl, when it was first run there, 282 of 285 boxed cases came out right and no wrong one
passed. The three were mended since, so neither file is unseen any more.

Labels follow the policy that `judge` states. `boxed` cases must all come out right, so that a false positive or a lost
form is named by its id. `nobox` lines state a right or wrong answer in other ways: prose is no answer, however right,
only `\\fbox` and `<answer>` are read. `attack` lines are all wrong.
"""

import json
from pathlib import Path

import pytest

from rethinker_jax.config import VerifierConfig
from rethinker_jax.verify.judge import JudgeItem, judge
from rethinker_jax.verify.pool import VerifierPool

ROWS = [
    json.loads(line)
    for name in ("verifier_cases.jsonl", "verifier_cases_held_out.jsonl")
    for line in (Path(__file__).parent / "data" / name).read_text(encoding="utf-8").splitlines()
]
# id → why the judge is known to get it wrong; a case that comes out right must leave this list.
EXPECTED_FAILURES: dict[str, str] = {}


def rows_of(group: str) -> list[dict]:
    return [row for row in ROWS if row["group"] == group]


@pytest.mark.parametrize("row", rows_of("boxed"), ids=lambda row: row["id"])
def test_boxed(row: dict) -> None:
    verdict = judge(row["response"], row["gold"], row.get("choices") or ())
    right = verdict.correct == row["label"]
    assert right != (row["id"] in EXPECTED_FAILURES), f"{row['why']}: label {row['label']}, {verdict}"


def test_an_answer_without_box_or_tag_is_none() -> None:
    """Catches prose that rescues a missing box, and a tag that is not read."""
    for row in rows_of("nobox"):
        verdict = judge(row["response"], row["gold"], row.get("choices") or ())
        marked = any(mark in row["response"] for mark in ("<answer>", "box{"))
        assert verdict.correct == (row["label"] and marked), row["id"]
        assert verdict.verdict != "bad_gold", row["id"]


def test_no_attack_passes_or_lasts() -> None:
    """Catches a hack that is paid and a text that holds up the training step; nobody's process dies of one."""
    rows = rows_of("attack")
    with VerifierPool(VerifierConfig(num_workers=1)) as pool:
        verdicts = pool.judge_many([JudgeItem(r["response"], r["gold"], tuple(r.get("choices") or ())) for r in rows])
    passed = [(row["id"], v) for row, v in zip(rows, verdicts, strict=True) if v.correct]
    assert passed == []
    assert {v.verdict for v in verdicts} <= {"wrong", "no_answer", "timeout", "bad_gold"}
    assert max(v.ms for v in verdicts) < 2000


def test_the_file_is_whole() -> None:
    """Catches a file that was cut short, or ids that hide one another."""
    assert len({row["id"] for row in ROWS}) == len(ROWS) >= 800
    assert all(type(row["label"]) is bool for row in ROWS)
    assert not any(row["label"] for row in rows_of("attack"))
