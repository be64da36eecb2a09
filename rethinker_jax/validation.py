"""Validation inside an RL run: held-out rows measured as training goes on, and the checkpoint that they choose.

Checkpoints are named by the steps done before them: the line of `metrics.jsonl` with `step` 9 measures checkpoint 10.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.config import Config
from rethinker_jax.errors import UserError
from rethinker_jax.evaluate import mean_scores
from rethinker_jax.metrics import read_metrics
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.run_data import usable_prompts
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.system import System
from rethinker_jax.training.checkpoint import CheckpointStore
from rethinker_jax.training.update import TrainState
from rethinker_jax.types import Problem

PREFIX = "validation_"  # of what is measured, as a metric of a step


@dataclasses.dataclass(frozen=True)
class Measured:
    """Mean `reward` and `accuracy` under the weights of checkpoint `step`."""

    step: int
    scores: Mapping[str, float]


def is_due(config: Config, step: int) -> bool:
    """Whether the weights after `step` steps are measured; 0 is before the first one."""
    every = config.evaluation.validate_every
    return every > 0 and (step % every == 0 or step == config.run.num_steps)


def measure(
    config: Config, system: System, problems: Sequence[Problem], state: TrainState, scorer: Scorer, run: RunDirectory
) -> dict[str, float]:
    """Mean reward and accuracy of a greedy response to each problem, without second looks being forced.

    Prompts are made anew each time: their pixels would otherwise lie in memory through the whole run.
    """
    prompts = [prompt for _, prompt in usable_prompts(config, system, list(enumerate(problems)), -1, run)]
    if not prompts:
        raise UserError(
            f"data.validation: {config.data.validation}: none of its rows can be used; see "
            f"{run.path / 'bad_rows.jsonl'}."
        )
    return mean_scores(system, system.sampling_params(state.params), prompts, config, scorer)


def as_metrics(measured: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step behind which it was measured."""
    return {PREFIX + key: value for key, value in measured.items()}


def as_line(step: int, measured: Mapping[str, float]) -> str:
    return f"validation after step {step}: reward {measured['reward']:.3f}, accuracy {measured['accuracy']:.1%}"


def curve(rows: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """What the lines of a `metrics.jsonl` say of validation, in their order; most have nothing of it."""
    return [
        Measured(row["step"] + 1, {key: row[PREFIX + key] for key in ("reward", "accuracy")})
        for row in rows
        if row.get(f"{PREFIX}reward") is not None
    ]


def best_of(measured: Sequence[Measured]) -> Measured | None:
    """That of the largest mean reward, of equal ones the earliest; None of none."""
    return max(measured, key=lambda one: (one.scores["reward"], -one.step), default=None)


def summary_of(before: Mapping[str, float] | None, measured: Sequence[Measured]) -> dict[str, Any]:
    """What `summary.json` says of validation. The weights before the first step are no checkpoint, so never `best`."""
    best = best_of(measured)
    return {
        "before": before,
        "last": measured[-1].scores if measured else None,
        "best": best.scores if best else None,
        "best_step": best.step if best else None,
    }


def best_step(run: Path) -> int:
    """The checkpoint of a run with the best mean reward on validation rows, so far if it is not finished.

    Raises UserError where nothing was measured, and where that checkpoint was not kept.
    """
    metrics = run / "metrics.jsonl"
    with contextlib.closing(CheckpointStore(run / "checkpoints", keep=0)) as store:
        steps = store.steps
    measured = curve(read_metrics(metrics)) if metrics.is_file() else []
    # What a killed run wrote behind its last checkpoint is done again.
    best = best_of([one for one in measured if steps and one.step <= steps[-1]])
    if best is None:
        raise UserError(
            f"{run}: no checkpoint was measured on validation rows, so none is the best. The run wants data.validation "
            "and evaluation.validate_every; or name a step."
        )
    if best.step not in steps:
        raise UserError(
            f"{run}: checkpoint {best.step} has the best validation reward ({best.scores['reward']:.4g}) and was not "
            f"kept. There: {', '.join(map(str, steps))}. Name one of them, and set run.keep_best=1 before a run."
        )
    return best.step
