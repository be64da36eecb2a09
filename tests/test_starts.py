"""How often a run may be started without making a step."""

from pathlib import Path

import pytest

from rethinker_jax.starts import count_start, run_directory, steps_made

REPOSITORY = Path(__file__).parent.parent


def test_starts_are_counted_from_the_last_step(tmp_path: Path):
    """A run that was resumed from a checkpoint makes its last steps again (8 → 6 → 8): that is no step forward."""
    file = tmp_path / "deep" / "starts"
    assert [count_start(file, steps) for steps in (0, 0, 8, 6, 8, 8, 9, 9)] == [1, 2, 1, 2, 3, 4, 1, 2]
    file.write_text("torn", encoding="utf-8")
    assert count_start(file, 9) == 1


def test_steps_are_those_of_the_run_and_of_the_stages_of_a_pipeline(tmp_path: Path):
    assert steps_made(tmp_path / "none") == 0
    (tmp_path / "stages" / "rl").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n{", encoding="utf-8")  # the last line is not whole
    (tmp_path / "stages" / "rl" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    assert steps_made(tmp_path) == 3


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", "runs/example"),
        ("sft mine.yaml --mesh fsdp=4", "HERE/there"),  # as the file says
        ("mine.yaml run.dir=a run.dir=/b", "/b"),
        ("missing.yaml", "runs/missing"),
        (f"pipeline {REPOSITORY}/configs/example_pipeline.yaml", "runs/example_pipeline"),
        ("package:example run.seed=1", "runs/example"),
    ],
)
def test_the_directory_of_a_run_is_found_as_the_program_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, wanted: str
):
    """One that looks elsewhere sees no steps, and stops a run that is well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"run: {{dir: {tmp_path}/there}}\n", encoding="utf-8")
    assert run_directory(words.split()) == Path(wanted.replace("HERE", str(tmp_path)))
