"""`verify_file`: lines in, lines out, in order, complete or not at all; and the reward functions."""

import json
from pathlib import Path

import pytest

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.types import Verdict
from rethinker_jax.verify.command import verify_file
from rethinker_jax.verify.rewards import REWARDS, RewardInput

CONFIG = VerifierConfig(num_workers=1)


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    """2,000 lines span several batches in flight; the last one is judged against its own row."""
    rows: list[object] = [{"id": i, "response": rf"\boxed{{{i}}}", "answer": str(i - i % 2)} for i in range(2000)]
    rows.append({"id": "q", "response": r"\boxed{B}", "answer": "2 cm", "choices": ["1 cm", "2 cm"], "type": "mcq"})
    rows.append({"id": "n", "response": "no box", "answer": 7})
    output = tmp_path / "out.jsonl"
    assert verify_file(write_lines(tmp_path / "in.jsonl", rows), output, CONFIG) == 2002
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in written] == [*range(2000), "q", "n"]
    assert [row["reward"] for row in written[:4]] == [1.0, 0.0, 1.0, 0.0]
    assert set(written[0]) == {"id", "verdict", "reward", "extracted", "rule", "ms"}
    assert written[-2]["verdict"] == "correct"
    assert (written[-1]["verdict"], written[-1]["extracted"]) == ("no_answer", None)


def test_without_an_output_the_lines_go_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"id": "a", "response": r"\boxed{5}", "answer": "5"}])
    assert verify_file(source, None, CONFIG) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "correct"


def test_malformed_lines_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    """Catches a run that stops half-way through, and a message without line numbers."""
    source = tmp_path / "in.jsonl"
    good = json.dumps({"id": "a", "response": "x", "answer": "5"})
    bad = ["{", "[1]", '{"id": "b", "response": "x"}', '{"id": "c", "response": 3, "answer": "5"}']
    bad.append('{"id": "c", "response": "x", "answer": "5", "choices": "AB"}')
    source.write_text("\n".join([good, *bad[:2], "", *bad[2:], good]) + "\n")
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError) as error:
        verify_file(source, output, CONFIG)
    message = str(error.value)
    assert "5 malformed" in message and "missing answer" in message
    assert all(f"line {number}:" in message for number in (2, 3, 5, 6, 7))
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_input_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        verify_file(tmp_path / "nowhere.jsonl", None, CONFIG)


def test_an_output_in_a_missing_folder_is_a_message(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"id": "a", "response": "x", "answer": "5"}])
    with pytest.raises(UserError, match="--output"):
        verify_file(source, tmp_path / "no" / "out.jsonl", CONFIG)


CORRECT = Verdict("correct", 1.0, "5", "number:integer")
WRONG = Verdict("wrong", 0.0, "6", "number:integer")
TIMEOUT = Verdict("timeout", 0.0, "6", "cpu_limit")
BOX = r"so \boxed{5}"


@pytest.mark.parametrize(
    ("name", "given", "reward"),
    [
        ("accuracy", RewardInput(CORRECT, BOX), 1.0),
        ("accuracy", RewardInput(WRONG, BOX), 0.0),
        ("accuracy", RewardInput(CORRECT, BOX, stopped=False), 1.0),
        ("accuracy_and_format", RewardInput(CORRECT, BOX), 1.0),
        ("accuracy_and_format", RewardInput(WRONG, BOX), 0.1),
        ("accuracy_and_format", RewardInput(WRONG, "<answer>6</answer>"), 0.0),  # the tag is no box
        ("accuracy_and_format", RewardInput(TIMEOUT, BOX), 0.0),  # an attack earns no bonus for its box
        ("accuracy_and_format", RewardInput(WRONG, BOX, stopped=False), 0.0),
        ("vl_rethinker_code", RewardInput(CORRECT, BOX), 1.0),
        ("vl_rethinker_code", RewardInput(CORRECT, "Wait, " + BOX), 1.1),
        ("vl_rethinker_code", RewardInput(CORRECT, "Wait, " * 3 + BOX), 0.4),  # 1 - 0.2 x 3
        ("vl_rethinker_code", RewardInput(CORRECT, "wait, alternatively wait a " + BOX), 0.4),
        ("vl_rethinker_code", RewardInput(CORRECT, "Wait, " * 6 + BOX), -0.1),  # more than five: invalid
        ("vl_rethinker_code", RewardInput(CORRECT, "Wait, " + BOX, stopped=False), -0.1),  # the code paid 1.1 here
        ("vl_rethinker_code", RewardInput(CORRECT, "Wait, " + BOX, forced=True), 1.0),
        ("vl_rethinker_code", RewardInput(WRONG, "Wait, " + BOX), 0.0),
    ],
)
def test_rewards(name: str, given: RewardInput, reward: float) -> None:
    assert REWARDS[name](given) == pytest.approx(reward)
