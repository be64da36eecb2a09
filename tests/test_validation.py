"""Validation inside an RL run: where the curve has points, which checkpoints stay, and what is exported as the best."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import TIMEOUT_S, start, stop_at
from rich.console import Console

from rethinker_jax.config import Config, EvaluationConfig, RunConfig
from rethinker_jax.config_file import load_config
from rethinker_jax.console import summary_table
from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.weights import load_params
from rethinker_jax.report.charts import SPECS, draw
from rethinker_jax.report.read import Metrics
from rethinker_jax.step_metrics import CLOCKS
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.update import TrainState
from rethinker_jax.validation import best_step, is_due

# Steps of this size spoil the weights before long, so that the best checkpoint is not the last one.
SMALL = """
base: package:example
run: {num_steps: 7, save_every: 100, rollouts_every: 100, keep_checkpoints: 1, seed: 2}
data: {train: train.parquet, validation: validation.parquet}
sampling: {max_new_tokens: 24}
rollout: {prompts_per_step: 2, samples_per_prompt: 4}
training: {batch_size: 8}
replay: {mode: none}
rethink: {rule: "off"}
optimizer: {learning_rate: 5.0e-4, warmup_steps: 0}
evaluation: {num_problems: 0, num_sampled_problems: 0, batch_size: 12, validate_every: 2, num_validation_problems: 12}
"""
TRAIN = ("train", "small.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with rows and small.yaml; processes started meanwhile compile quickly."""
    folder = tmp_path_factory.mktemp("user")
    write_split(folder / "train.parquet", "train", 16)
    write_split(folder / "validation.parquet", "validation", 16)
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield folder


@pytest.fixture(scope="module")
def straight(place: Path) -> Path:
    """Seven steps in one go, measured before them and after 2, 4, 6 and 7."""
    log = place / "straight.log"
    assert start(*TRAIN, "run.dir=straight", log=log).wait(TIMEOUT_S) == 0, log.read_text()
    return place / "straight"


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The metrics, line by line, without what the clock says and where a process began."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def validation_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())["validation"]


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def weights_of(run: Path, step: int) -> Any:
    with contextlib.closing(ocp.CheckpointManager(run.resolve() / "checkpoints")) as manager:
        found: Any = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return jax.tree.map(np.asarray, found.state["params"])


def test_the_curve_is_where_it_should_be(straight: Path) -> None:
    """Catches a step too many or too few, no measurement behind the last step, and a summary of other numbers."""
    rows = metrics_of(straight)
    measured = {row["step"] + 1: row for row in rows if "validation_reward" in row}
    assert len(rows) == 7 and list(measured) == [2, 4, 6, 7]
    rewards = {step: row["validation_reward"] for step, row in measured.items()}
    # A reward of 0 or 1 by the verdict alone, over 12 rows.
    assert all(row["validation_accuracy"] == rewards[step] for step, row in measured.items())
    assert all(round(12 * reward, 9) in range(13) for reward in rewards.values()) and len(set(rewards.values())) > 1
    found, best = validation_of(straight), max(rewards.values())
    assert found["best_step"] == min(step for step, reward in rewards.items() if reward == best)
    assert found["best"]["reward"] == best and found["last"]["reward"] == rewards[7]
    assert 0 < found["before"]["reward"] == found["before"]["accuracy"] < 1
    assert 'data-chart="validation"' in (straight / "report.html").read_text()
    log = (straight.parent / "straight.log").read_text()
    assert "in validation" in log and f"validation after step 2: reward {rewards[2]:.3f}" in log


def test_the_best_checkpoint_stays_while_newer_ones_go(straight: Path) -> None:
    """Catches the best one deleted as an old one, one that was the best earlier kept for good, and 6 kept beside 7."""
    best = validation_of(straight)["best_step"]
    assert best < 7, "the newest is the best one: this shows nothing"
    assert steps_of(straight) == [best, 7] and best_step(straight) == best


def test_stopped_and_killed_runs_choose_what_the_straight_one_does(straight: Path, place: Path) -> None:
    """Catches a measurement lost to a stop inside of it, the reward of an earlier process forgotten, and a second
    measurement before the first step, of weights that have moved."""
    words, log, broken = (*TRAIN, "run.dir=broken"), place / "broken.log", place / "broken"
    # The calls: before the first step, after 2, after 4.
    assert stop_at("rethinker_jax.validation:measure", 3, signal.SIGTERM, *words, log=log) == 75, log.read_text()
    assert len(metrics_of(broken)) == 4 and "validation_reward" in metrics_of(broken)[3] and 4 in steps_of(broken)
    assert stop_at("rethinker_jax.loop:train_step", 2, signal.SIGKILL, *words, log=log) == -signal.SIGKILL
    assert len(metrics_of(broken)) == 5  # of which the last is done again: nothing was saved behind it
    assert best_step(broken) in (2, 4)
    assert start(*words, log=log).wait(TIMEOUT_S) == 0, log.read_text()
    assert metrics_of(broken) == metrics_of(straight)
    assert validation_of(broken) == validation_of(straight) and steps_of(broken) == steps_of(straight)
    best = best_step(straight)
    jax.tree.map(np.testing.assert_array_equal, weights_of(broken, best), weights_of(straight, best))


def test_export_gives_the_weights_of_the_checkpoint_that_is_asked_for(
    straight: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the last one exported as the best, and a name that is no checkpoint taken for the last."""
    best = best_step(straight)
    for asked, step in (("best", best), ("7", 7)):
        output = place / f"model-{asked}"
        words = ["export", str(straight), "--checkpoint", asked, "--output", str(output)]
        assert main(words) == 0, capsys.readouterr().err
        exported = load_params(output, read_config(output), jnp.float32)[1]
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, exported), weights_of(straight, step))
    for path, asked, said in (
        (straight, "6", f"there: {best}, 7"),
        (straight, "newest", "wanted best, last or the number"),
        (straight / "checkpoints" / "7", "best", "leave one out"),
    ):
        words = ["export", str(path), "--checkpoint", asked, "--output", str(place / "none")]
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_other_validation_rows_are_refused(straight: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a curve whose halves are measured on different rows."""
    write_split(place / "other.parquet", "test", 16)
    rows = (place / "validation.parquet").read_bytes()
    (place / "validation.parquet").write_bytes((place / "other.parquet").read_bytes())
    with contextlib.chdir(place):
        code = main([*TRAIN, "run.dir=straight", "run.num_steps=8"])
    (place / "validation.parquet").write_bytes(rows)
    assert code == 2
    assert "data.validation: validation.parquet does not hold the rows" in capsys.readouterr().err


def test_of_equal_rewards_the_earliest_counts_also_after_a_restart(tmp_path: Path) -> None:
    """Catches orbax's own order, by which the latest of equal ones stays, and rewards that a new process forgets."""
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params={"w": jnp.ones(2)}, opt_state=(), num_updates=zero, num_skipped=zero, average={})
    rewards = {1: 0.25, 2: 0.5, 3: 0.5, 4: None, 5: 0.5, 6: 0.75, 7: 0.5, 8: None}
    # keep 1 newest and 1 best: after each step, what is there.
    wanted = {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [2, 5], 6: [6], 7: [6, 7], 8: [6, 8]}
    lines = []
    for step, reward in rewards.items():
        lines.append(json.dumps({"step": step - 1, "validation_reward": reward, "validation_accuracy": 0.0}))
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        with contextlib.closing(CheckpointStore(tmp_path / "checkpoints", 1, 1)) as store:
            store.save(step, Saved(state, {}, {}), reward)
            store.wait()
            assert store.steps == wanted[step]
        assert best_step(tmp_path) == wanted[step][0]
    # Lines behind the last checkpoint belong to steps that will be done again.
    lines.append(json.dumps({"step": 8, "validation_reward": 1.0, "validation_accuracy": 1.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert best_step(tmp_path) == 6
    with contextlib.closing(CheckpointStore(tmp_path / "checkpoints", 1, 0)) as store:
        store.save(9, Saved(state, {}, {}), 0.25)
        store.wait()
        assert store.steps == [9]
    lines[-1] = json.dumps({"step": 8, "validation_reward": 0.25, "validation_accuracy": 0.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"checkpoint 6 has the best validation reward \(0.75\) and was not kept"):
        best_step(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n')
    with pytest.raises(UserError, match="no checkpoint was measured on validation rows"):
        best_step(tmp_path)


def test_a_run_without_validation_keeps_the_newest_alone(tmp_path: Path) -> None:
    """Catches orbax's rule that checkpoints without a score stay."""
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params={"w": jnp.ones(2)}, opt_state=(), num_updates=zero, num_skipped=zero, average={})
    with contextlib.closing(CheckpointStore(tmp_path / "checkpoints", 2)) as store:
        for step in range(1, 6):
            store.save(step, Saved(state, {}, {}))
        store.wait()
        assert store.steps == [4, 5]


def test_which_steps_are_measured() -> None:
    """Catches the first or last step left out, and a measurement where there is no validation."""

    def steps(every: int, num_steps: int) -> list[int]:
        settings = EvaluationConfig(validate_every=every)
        config = Config(run=RunConfig(num_steps=num_steps), evaluation=settings)
        return [step for step in range(num_steps + 1) if is_due(config, step)]

    assert (steps(3, 7), steps(10, 4), steps(2, 4), steps(0, 4)) == ([0, 3, 6, 7], [0, 4], [0, 2, 4], [])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.validation=example:validation", "evaluation.validate_every 0, by which nothing is measured"),
        ("evaluation.validate_every=5", "data.validation is empty"),
    ],
)
def test_rows_and_interval_are_said_together(override: str, said: str) -> None:
    """Catches validation that a user asked for and that never comes."""
    with pytest.raises(UserError, match=said):
        load_config(None, [override])


def test_rows_that_are_not_there_are_said_before_the_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches minutes of loading before a typing error is found."""
    words = [f"run.dir={tmp_path / 'run'}", "model.path=no/such/model", "data.train=example:test"]
    words += ["data.validation=nothing.parquet", "evaluation.validate_every=5", "evaluation.num_problems=0"]
    assert main(["train", *words, "evaluation.num_sampled_problems=0"]) == 2
    assert "nothing.parquet" in (said := capsys.readouterr().err) and "no/such/model" not in said


def test_the_chart_joins_what_was_measured_and_begins_before_the_first_step() -> None:
    """Catches a line that breaks at steps without a measurement, one that is smoothed, and a start that is left out."""
    values = [0.25 if step % 4 == 3 else None for step in range(12)]
    metrics = Metrics(tuple(range(12)), {"validation_reward": tuple(values)})
    [spec] = [spec for spec in SPECS if spec.id == "validation"]
    chart = draw(spec, metrics, 360, 190, {"validation_reward": 0.75, "validation_accuracy": 0.5})
    assert chart is not None and draw(spec, Metrics((0,), {"reward": (1.0,)}), 360, 190) is None
    line = chart.svg.split('class="line s0" d="')[1].partition('"')[0]
    left, right, top, bottom = chart.readout["frame"]
    # x from step -1 to 11; y from 0 to 1: 0.75 stands a quarter below the top.
    assert line.startswith(f"M{left:.1f} {top + (bottom - top) / 4:.1f}L") and line.count("L") == 3
    assert line.endswith(f"L{right:.1f} {bottom - (bottom - top) / 4:.1f}")
    assert ">-1<" not in chart.svg


def test_the_table_has_before_last_and_best() -> None:
    """Catches a change that is taken from the wrong pair, and rewards shown as shares."""
    scores = {name: {"reward": reward, "accuracy": 0.5} for name, reward in (("before", 1.2), ("last", 0.9))}
    console = Console(width=100)
    with console.capture() as captured:
        found = {**scores, "best": {"reward": 1.5, "accuracy": 0.75}, "best_step": 4}
        console.print(summary_table({"validation": found}))
    lines = [" ".join(line.split()) for line in captured.get().replace("│", " ").splitlines()]
    assert "reward, last 1.200 0.900 -0.300" in lines
    assert "reward, best, checkpoint 4 1.200 1.500 +0.300" in lines
    assert "accuracy, best, checkpoint 4 50.0% 75.0% +25.0 points" in lines
