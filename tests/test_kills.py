"""Nothing is lost: a run that is killed, or whose checkpoint is damaged, ends as the one that was left alone.

scripts/kill_runs.py does the same more often; docs/reliability.md has what came of it.
"""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from commands import REPOSITORY, TIMEOUT_S, num_lines, start

# Of the places in CHOSEN, those that are worth a process in every run of the tests.
HERE = (
    "prefill",
    "decode",
    "a checkpoint before its rename",
    "verification",
    "replay",
    "update",
    "metrics written, not yet a checkpoint",
    "rollouts, before their rename",
    "an old checkpoint half deleted",
    "evaluation after",
)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_runs", REPOSITORY / "scripts" / "kill_runs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_runs"] = module
    spec.loader.exec_module(module)
    return module


kills = load_script()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that was left alone, and the CPU seconds it took."""
    folder = tmp_path_factory.mktemp("kills")
    kills.prepare(folder)
    began = kills.cpu_of_children()
    kills.finish(folder / "straight")
    return folder / "straight", kills.cpu_of_children() - began


def test_the_run_has_what_could_be_lost(straight: tuple[Path, float]) -> None:
    """Catches a comparison that shows nothing: no replayed row, no second look, no checkpoint but the last."""
    run, _ = straight
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and sum("validation_reward" in row for row in rows) == 2
    assert max(row["replay_share"] for row in rows) > 0 and max(row["forced_share"] for row in rows) > 0
    assert len(kills.steps_of(run)) >= 2 and kills.steps_of(run)[-1] == 4
    assert kills.differences(run, run) == []


def test_a_difference_is_found(straight: tuple[Path, float], tmp_path: Path) -> None:
    """Catches a comparison that is blind to a file."""
    run, _ = straight
    other = Path(shutil.copytree(run, tmp_path / "other"))
    lines = (other / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[2]) | {"reward": 7, "seconds_update": 7}
    (other / "metrics.jsonl").write_text("\n".join([*lines[:2], json.dumps(changed), *lines[3:]]) + "\n")
    (other / "rollouts" / "step_000001.jsonl").write_text("{}\n")
    (other / "evaluations" / "before.jsonl").unlink()
    (other / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    shutil.rmtree(other / "checkpoints" / "3")
    assert kills.differences(other, run) == [
        "metrics.jsonl step 2: reward",
        "rollouts/step_000001.jsonl",
        "evaluations/before.jsonl",
        "checkpoint 3 is missing",
        "checkpoints: a half-written one is left",
    ]
    assert kills.differences(run, other) != []


def test_killed_at_chosen_places(straight: tuple[Path, float]) -> None:
    """One run, killed in each phase and within what it writes. Catches anything that is lost or done twice."""
    reference, _ = straight
    run = reference.with_name("chosen")
    chosen = [one for one in kills.CHOSEN if one[0] in HERE]
    assert len(chosen) == len(HERE)
    for title, place, call in chosen:
        assert kills.kill_at(run, place, call), f"never came to: {title}"
        if title.startswith("metrics"):  # a disk that loses power may keep half of a line
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 2, "rew')
    kills.finish(run)
    assert kills.differences(run, reference) == []


def test_killed_at_random(straight: tuple[Path, float]) -> None:
    """One run, killed four times. Catches what nobody thought of; the seed is printed where it differs."""
    reference, seconds = straight
    seed, run = random.randrange(10**6), reference.with_name("random")
    hits: list[str] = []
    while not hits:  # the first moment may be behind the end, the more so where the first run had to compile
        shutil.rmtree(run, ignore_errors=True)
        seed, began = seed + 1, kills.cpu_of_children()
        hits = kills.kill_at_random(run, random.Random(seed), seconds, most=4)
        seconds = seconds if hits else kills.cpu_of_children() - began
    assert kills.differences(run, reference) == [], f"seed {seed}, {seconds} s, killed in {hits}"


def test_a_limit_on_the_size_of_files_loses_nothing(straight: tuple[Path, float]) -> None:
    """A file grows to `ulimit -f` within a checkpoint. Catches a traceback, half a checkpoint taken for a whole one,
    and a run that cannot go on once there is room."""
    reference, _ = straight
    run = reference.with_name("limited")
    script = [
        "-c",
        f"ulimit -f 1500; exec {sys.executable} -m rethinker_jax.main {' '.join(kills.WORDS)} run.dir=limited",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", *script], cwd=run.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: the disk is full, or a limit on the size of files" in done.stderr
    assert "Traceback" not in done.stderr and kills.steps_of(run) == []
    kills.finish(run)
    assert kills.differences(run, reference) == []


def test_damaged_checkpoints_are_done_again(straight: tuple[Path, float]) -> None:
    """Catches a run that goes on from half a checkpoint, keeps the metrics behind the one that it goes on from, or
    begins anew over its past."""
    reference, _ = straight
    run = Path(shutil.copytree(reference, reference.with_name("damaged")))
    (run / "summary.json").unlink()
    cut: dict[int, Path] = {}
    for step in kills.steps_of(run):
        cut[step] = data = max(
            (run / "checkpoints" / str(step) / "state").rglob("*"), key=lambda path: path.stat().st_size
        )
        shutil.copyfile(data, run.with_name(f"data{step}"))
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    words, log = (*kills.WORDS, "run.dir=damaged"), run.with_suffix(".log")
    own = (".lock", "config.yaml")  # the lock, and a config that names the directory from which this was copied
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in own}
    assert start(*words, log=log).wait(TIMEOUT_S) == 2
    said = log.read_text()
    assert "No complete checkpoint is left. Nothing was changed" in said and said.count("error: ") == 1
    assert "Traceback" not in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in own} == kept

    first, *_ = kills.steps_of(run)  # the best one or the one before the last: its data is put back
    shutil.copyfile(run.with_name(f"data{first}"), cut[first])
    assert start(*words, log=log).wait(TIMEOUT_S) == 0, log.read_text()
    said = log.read_text()
    assert f"going on from checkpoint {first}" in said and "moved to 4.damaged" in said and "Traceback" not in said
    assert (run / "checkpoints" / "4.damaged").is_dir() and num_lines(run / "metrics.jsonl") == 4
    assert kills.differences(run, reference) == []
