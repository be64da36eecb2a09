"""Files that are gone on with: whoever began them, and only where what is computed is the same."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rethinker_jax.errors import UserError
from rethinker_jax.main import main
from rethinker_jax.output_files import asked_path, check_asked, finished_lines
from rethinker_jax.system import EXAMPLE_MODEL

NOBODY = "0" * 40
Json = dict[str, Any]


def test_what_is_recorded_is_not_compared(tmp_path: Path):
    """Catches a refusal for another commit or place, one that is passed over, and a commit that is forgotten."""
    output = tmp_path / "out.jsonl"
    now = {"commit": "c3", "device": "cpu", "model": "/new", "weights": "w", "n": 2}
    assert check_asked(output, now) == now
    output.write_text("{}\n")
    with pytest.raises(UserError, match="is there without"):
        check_asked(output, now)

    def before(**more: object) -> None:
        asked_path(output).write_text(json.dumps(now | more))

    before()
    assert check_asked(output, now) == now
    before(commit="c2", model="/old", earlier=[{"commit": "c1"}, {"commit": "c3", "device": "cpu", "model": "/new"}])
    wanted = [{"commit": "c1"}, {"commit": "c2", "device": "cpu", "model": "/old"}]
    assert check_asked(output, now)["earlier"] == wanted
    before(weights="v", commit="c2")
    with pytest.raises(UserError, match="another request: weights was 'v', is 'w'") as error:
        check_asked(output, now)
    assert "commit" not in str(error.value)
    for torn in ("[1]", "{", "[" * 100_000):
        asked_path(output).write_text(torn)
        with pytest.raises(UserError, match="wanted JSON"):
            check_asked(output, now)


def test_a_problem_is_finished_with_one_line_of_each_sample(tmp_path: Path):
    """Catches a sample that is there twice and counts for the one that is missing."""
    output = tmp_path / "out.jsonl"
    pairs = [("a", 0), ("a", 1), ("b", 1), ("b", 1), ("c", 0), ("d", 1), ("d", 0)]
    lines = [json.dumps({"id": name, "sample": sample}) for name, sample in pairs]
    output.write_text("\n".join(lines) + "\n" + lines[0][:9])
    assert list(finished_lines(output, 2, "sample")) == ["a", "d"]
    with pytest.raises(UserError, match="more than --n 1"):
        finished_lines(output, 1, "sample")
    for wrong in ("5", "[1]", "[" * 100_000, '{"id": "a"}', '{"id": [], "sample": 0}'):
        output.write_text(wrong + "\n" + lines[0] + "\n")
        with pytest.raises(UserError, match="line 1 is not a line of"):
            finished_lines(output, 2, "sample")


def write_questions(*questions: str) -> None:
    rows = [{"id": f"r{number}", "question": text, "answer": "4"} for number, text in enumerate(questions)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut(lines: Path, keep: int) -> Json:
    """What a stop leaves of finished lines: the first of them, begun at another commit."""
    kept = lines.read_bytes().split(b"\n")[:keep]
    lines.write_bytes(b"\n".join(kept) + b"\n")
    asked = json.loads(asked_path(lines).read_text())
    asked["commit"] = NOBODY
    asked_path(lines).write_text(json.dumps({key: asked[key] for key in asked if key not in ("left_out", "judge")}))
    return asked


def test_samples_and_evaluations_go_on_at_another_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_compilation: None
):
    """Catches a file that nobody can finish after an update or a copy of the model, and one of two models."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EXAMPLE_MODEL, "model")
    write_questions("2 + 2?", "3 + 1?", "1 + 3?")
    short = ["sampling.max_new_tokens=6", "sampling.num_slots=4"]
    drawn = ["sample", "--data", "rows.jsonl", "--n", "2", "--output", "drawn.jsonl", "--model"]
    rated = ["evaluate", "--benchmark", "rows", "--data", "rows.jsonl", "--n", "2", "--output", "rated.json", "--model"]
    samples, generations = Path("drawn.jsonl"), Path("rated.generations.jsonl")
    assert main([*drawn, "model", *short]) == 0 and main([*rated, "model", *short]) == 0, capsys.readouterr().err
    whole = [json.loads(line) for line in samples.read_text().splitlines()]
    generated, numbers = generations.read_bytes(), json.loads(Path("rated.json").read_text())
    cut(samples, 3)
    cut(generations, 3)
    Path("model").rename("moved")
    for file in Path("moved").iterdir():
        os.utime(file, (1, 1))
    assert main([*drawn, "moved", *short]) == 0 and main([*rated, "moved", *short]) == 0, capsys.readouterr().err
    ids = [[(row["id"], row["sample"], row["completion_ids"]) for row in found] for found in (
        whole, [json.loads(line) for line in samples.read_text().splitlines()])]  # fmt: skip
    assert ids[0] == ids[1] and generations.read_bytes() == generated
    (before,) = json.loads(asked_path(samples).read_text())["earlier"]
    assert (before["commit"], before["model"]) == (NOBODY, "model")
    now = json.loads(Path("rated.json").read_text())
    assert [one["commit"] for one in now["made_by"].pop("earlier")] == [NOBODY]
    assert now["made_by"]["model"] == "moved"
    assert {key: now[key] for key in now if key != "made_by"} == {
        key: numbers[key] for key in numbers if key != "made_by"
    }

    capsys.readouterr()
    write_questions("2 + 2?", "3 + 1?", "1 + 4?")
    assert main([*drawn, "moved", *short]) == 2 and "rows was" in capsys.readouterr().err
    assert main([*rated, "moved", *short]) == 2 and "items was" in capsys.readouterr().err
    write_questions("2 + 2?", "3 + 1?", "1 + 3?")
    Path("moved/generation_config.json").write_text("{}")
    assert main([*drawn, "moved", *short]) == 2 and "companions was" in capsys.readouterr().err
    assert main([*rated, "moved", *short]) == 2 and "companions was" in capsys.readouterr().err
