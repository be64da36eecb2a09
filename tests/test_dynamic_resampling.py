"""Mode `dynamic` of replay: prompts are drawn until enough groups have an advantage, and what is too much waits."""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_replay_in_run import PROBLEMS, RecordingUpdater, Taught, rows_of

from rethinker_jax.config import (
    BucketsConfig,
    Config,
    DataConfig,
    ModelConfig,
    ReplayConfig,
    RolloutConfig,
    SamplingConfig,
    TrainingConfig,
)
from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.loop import Progress, begin, save, train_step
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.replay import Experience, Selection, select, share_out, young_enough
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rollout import Group
from rethinker_jax.run_data import Splits
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.system import System, load_system
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.optimizer import make_optimizer
from rethinker_jax.training.update import UpdateRule
from rethinker_jax.types import Problem
from rethinker_jax.verify.pool import VerifierPool

EPSILON, PROMPTS, SAMPLES = 1e-6, 4, 4
DYNAMIC = ReplayConfig(mode="dynamic", max_resamples=3)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def group(problem: int, *advantages: float, update: int = 0, supervised: bool = False) -> list[Experience]:
    policy = np.ones(3, bool)
    ids = np.arange(3, dtype=np.int32)
    nll = policy if supervised else ~policy
    return [Experience(problem, ids, policy, nll, -0.5 * policy, one, update) for one in advantages]


def problems(rows: Sequence[Experience]) -> list[int]:
    return [one.problem for one in rows]


def test_what_is_carried_comes_first_and_what_is_too_much_waits() -> None:
    """Places for three groups of two, one carried. Catches surplus that is dropped, as in DAPO's code, groups out of
    their order, and groups without advantage that are trained on though there are others."""
    carried = group(9, 0.5, -0.5)
    drawn = [group(0, 0.5, -0.5), group(1, 0.0, 0.0), group(2, 0.5, -0.5), group(3, 0.25, -0.25)]
    shared = share_out(drawn, carried, 6, EPSILON)
    assert (problems(shared.carried), problems(shared.fresh), problems(shared.surplus)) == (
        [9, 9],
        [0, 0, 2, 2],
        [3, 3],
    )


def test_places_that_are_left_go_to_groups_without_advantage_the_supervised_first() -> None:
    """Catches a step without rows, which has no metrics, a second look that is lost though there is room for it, and
    rows beyond the places, which would make an optimizer step more."""
    drawn = [group(0, 0.0, 0.0), group(1, 0.5, -0.5), group(2, 1e-9, 0.0, supervised=True)]
    shared = share_out(drawn, (), 5, EPSILON)
    assert (problems(shared.fresh), shared.surplus) == ([1, 1, 2, 2, 0], ())
    nothing = share_out([group(0, 0.0, 0.0)], (), 4, EPSILON)
    assert (nothing.carried, problems(nothing.fresh), nothing.surplus) == ((), [0, 0], ())


def test_rows_without_advantage_are_left_out_of_the_update_and_older_ones_count_as_replayed() -> None:
    """Catches fillers in the update, the optimizer step taken for that of the rollout (of which the second batch of a
    step would be old), and a selection that empties or fills the buffer."""
    raw = (*group(9, 0.5, -0.5, update=2), *group(0, 0.5, 0.0, update=4), *group(1, 0.0, update=4, supervised=True))
    waiting = group(7, 0.5, update=4)
    found = select(raw, waiting, DYNAMIC, EPSILON, (0, 5), raw, drawn_at=4)
    assert (problems(found.fresh), problems(found.replayed), problems(found.buffer)) == ([0, 1], [9, 9], [7])
    assert not found.fresh[1].loss_mask.any() and found.fresh[1].nll_mask.any() and found.weights == ()
    assert select((), (), DYNAMIC, EPSILON, (0, 5)) == Selection((), (), ())


@pytest.mark.parametrize(("max_age", "left"), [(0, [1, 1, 2, 2]), (1, []), (2, [2, 2]), (3, [1, 1, 2, 2])])
def test_groups_that_waited_too_long_leave_whole(max_age: int, left: list[int]) -> None:
    """At optimizer step 5, drawn at 2 and at 3: ages 3 and 2. Catches a limit that is off by one, and 0 as a limit."""
    waiting = [*group(1, 0.5, -0.5, update=2), *group(2, 0.5, -0.5, update=3)]
    config = dataclasses.replace(DYNAMIC, max_age=max_age)
    assert problems(young_enough(waiting, config, 2, 5)) == left


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["replay.max_resamples=2"], "replay.max_resamples is 2 with replay.mode ssr; only dynamic reads it"),
        (["replay.mode=dynamic", "replay.form=deque"], "replay.form is deque with replay.mode dynamic"),
        (["replay.mode=dynamic", "replay.importance=1"], "replay.importance is 1.0 with replay.mode dynamic"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as error:
        load_defaults(overrides)
    assert part in str(error.value)
    load_defaults(["replay.mode=dynamic", "replay.max_resamples=0", "replay.max_age=4"])


@dataclasses.dataclass(frozen=True)
class Step:
    metrics: dict[str, float]
    groups: list[Group]
    updates: list[list[Taught]]
    cursor: int


@dataclasses.dataclass(frozen=True)
class Trainer:
    config: Config
    system: System
    updater: RecordingUpdater
    scorer: Scorer
    run: RunDirectory

    def start(self) -> Progress:
        return Progress(0, self.updater.init(jax.tree.map(jnp.copy, self.system.params)), (), None, (0.0, 0.0), 0.0)

    def go(
        self, progress: Progress, num_steps: int, rows: Sequence[Problem] = PROBLEMS, temperature: float = 0.5
    ) -> list[Step]:
        sampling = dataclasses.replace(self.config.sampling, temperature=temperature)
        config, order = dataclasses.replace(self.config, sampling=sampling), DataOrder(len(rows), 0, True)
        steps = []
        for _ in range(num_steps):
            self.updater.seen = []
            metrics, groups = train_step(
                config, self.system, self.updater, rows, order, self.scorer, progress, self.run
            )
            steps.append(Step(metrics, groups, self.updater.seen, progress.cursor))
        return steps


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Generator[Trainer]:
    config = Config(
        model=ModelConfig(dtype="float32"),
        data=DataConfig(prompt_template="none"),
        sampling=SamplingConfig(max_new_tokens=32, num_slots=16),
        rollout=RolloutConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES),
        replay=DYNAMIC,
        training=TrainingConfig(batch_size=8),
        buckets=BucketsConfig(prompt_tokens=(64,), row_tokens=(96,), vision=((8, 4),)),  # so that little is compiled
    )
    system = load_system(config)
    rule = UpdateRule(system.model, make_optimizer(config.optimizer, 100), config.loss, system.dtype)
    updater = RecordingUpdater(rule, system.params, system.mesh)
    run = RunDirectory(tmp_path_factory.mktemp("run"), "rl")
    with VerifierPool(config.verifier) as pool, Scorer(config, pool) as scorer:
        yield Trainer(config, system, updater, scorer, run)


def teaching(groups: Sequence[Group]) -> list[Group]:
    return [one for one in groups if any(abs(rollout.advantage) > EPSILON for rollout in one.rollouts)]


def test_a_run_draws_until_its_batches_are_full(trainer: Trainer) -> None:
    """Five steps. Catches rounds that stop too early or go on with enough; surplus that is lost, trained on twice or
    with log-probs of today's policy; rows of a step that are skipped or met twice; and an accuracy over the kept groups
    alone, which would lie near one half whatever the model can do."""
    steps = trainer.go(trainer.start(), 5)
    order, place = DataOrder(len(PROBLEMS), 0, True), 0
    waiting: list[Taught] = []
    for step in steps:
        places = [order[number] for number in range(place, step.cursor)]
        assert [one.problem for one in step.groups] == list(dict.fromkeys(places))
        rounds, place = (step.cursor - place) // PROMPTS, step.cursor
        assert (step.metrics["resample_rounds"], step.metrics["resampled_groups"]) == (
            rounds - 1,
            len(step.groups) - PROMPTS,
        )
        before = waiting + rows_of(teaching(step.groups[: (rounds - 1) * PROMPTS]))
        own = rows_of(teaching(step.groups))
        assert rounds == 1 or len(before) < PROMPTS * SAMPLES
        assert rounds == 1 + DYNAMIC.max_resamples or len(waiting) + len(own) >= PROMPTS * SAMPLES
        rows = waiting + own
        trained, waiting_next = rows[: PROMPTS * SAMPLES], rows[PROMPTS * SAMPLES :]
        taught = [row for row in trained if abs(row.advantage) > EPSILON]
        seen = list(itertools.chain(*step.updates))
        assert sorted(map(repr, seen)) == sorted(map(repr, taught))
        assert step.metrics["replay_share"] * PROMPTS * SAMPLES == pytest.approx(len(waiting))
        waiting = waiting_next
        assert step.metrics["carried_groups"] * SAMPLES == step.metrics["replay_size"] == len(waiting)
        correct = [rollout.first_verdict.correct for one in step.groups for rollout in one.rollouts]
        assert step.metrics["accuracy"] == np.mean(correct)
        assert step.metrics["zero_advantage_share"] == 1 - len(teaching(step.groups)) / len(step.groups)
    assert (
        max(step.metrics["resample_rounds"] for step in steps)
        > 0
        < max(step.metrics["carried_groups"] for step in steps)
    )


def test_log_probs_of_the_trainer_are_those_of_the_rollout_of_a_row(trainer: Trainer) -> None:
    """Catches waiting rows whose old log-probs are made again after the update, by which their ratio would be 1."""
    loss = dataclasses.replace(trainer.config.loss, old_log_probs="trainer")
    trainer = dataclasses.replace(trainer, config=dataclasses.replace(trainer.config, loss=loss))
    progress = trainer.start()
    while not progress.buffer:
        [step] = trainer.go(progress, 1)
        assert progress.step < 20
    assert step.metrics["sampler_trainer_gap_max"] < 1e-4
    waiting = {tuple(one.old_log_probs.tolist()) for one in progress.buffer if abs(one.advantage) > EPSILON}
    [step] = trainer.go(progress, 1)
    assert waiting <= {row.old_log_probs for rows in step.updates for row in rows}


def test_nothing_qualifies(trainer: Trainer) -> None:
    """Greedy samples agree, so no group has an advantage. Catches a crash, an endless loop, an optimizer step on
    nothing, and a cursor that stays, by which the next step would draw the same prompts again."""
    progress = trainer.start()
    step, again = trainer.go(progress, 2, temperature=0.0)
    assert step.updates == again.updates == [] and progress.buffer == () and int(progress.state.num_updates) == 0
    assert step.cursor == PROMPTS * (1 + DYNAMIC.max_resamples) == again.cursor - step.cursor
    assert step.metrics["resample_rounds"] == DYNAMIC.max_resamples
    assert (step.metrics["effective_share"], step.metrics["zero_advantage_share"]) == (0, 1)
    assert 0 <= step.metrics["accuracy"] <= 1


def test_rows_come_once_a_step(trainer: Trainer) -> None:
    """Six rows, four a round: the second round holds the other two and two of the next epoch. Catches a prompt that is
    drawn twice in a step, with the same samples, and rounds without end where every row was drawn."""
    [step] = trainer.go(trainer.start(), 1, rows=PROBLEMS[:6], temperature=0.0)
    assert sorted(one.problem for one in step.groups) == list(range(6))
    assert step.metrics["resample_rounds"] == 1 and step.metrics["resampled_groups"] == 2


def test_a_run_that_was_stopped_draws_the_same(trainer: Trainer, tmp_path: Path) -> None:
    """Through a checkpoint after the first step with surplus. Catches a cursor or waiting groups that are not in it."""
    progress = trainer.start()
    steps = trainer.go(progress, 1)
    while not progress.buffer:
        steps = trainer.go(progress, 1)
        assert progress.step < 20
    assert progress.cursor != progress.step * PROMPTS and steps
    splits = Splits(tuple(PROBLEMS), ())
    with contextlib.closing(CheckpointStore(tmp_path / "checkpoints", 1)) as store:
        progress.before = {"greedy": 0.5}
        save(store, progress, splits)
        store.wait()
        system = dataclasses.replace(trainer.system, params=jax.tree.map(jnp.copy, trainer.system.params))
        _, again = begin(trainer.config, system, store, splits, (0.0, 0.0))
    assert (again.cursor, again.step, again.kl_coefficient) == (progress.cursor, progress.step, 0.0)
    ours, theirs = trainer.go(progress, 2), trainer.go(again, 2)
    for one, other in zip(ours, theirs, strict=True):
        assert rows_of(one.groups) == rows_of(other.groups)
        assert one.updates == other.updates and one.cursor == other.cursor
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), progress.state.params, again.state.params))


def test_an_older_checkpoint_goes_on_at_its_step(trainer: Trainer, tmp_path: Path) -> None:
    """Catches a run from before there was a cursor that starts over with the first prompts."""
    progress = trainer.start()
    progress.step, progress.before = 3, {"greedy": 0.5}
    splits = Splits(tuple(PROBLEMS), ())

    class Old(CheckpointStore):
        def save(self, step: int, saved: Saved, reward: float | None = None) -> None:
            meta = {key: value for key, value in saved.meta.items() if key != "cursor"}
            super().save(step, dataclasses.replace(saved, meta=meta), reward)

    with contextlib.closing(Old(tmp_path / "checkpoints", 1)) as store:
        save(store, progress, splits)
        store.wait()
        system = dataclasses.replace(trainer.system, params=jax.tree.map(jnp.copy, trainer.system.params))
        _, again = begin(trainer.config, system, store, splits, (0.0, 0.0))
    assert again.cursor == 3 * PROMPTS
