"""Replay in the trainer's own steps: the example's model, real rollouts and verdicts, step after step."""

import dataclasses
from collections.abc import Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

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
from rethinker_jax.example.tasks import make_tasks
from rethinker_jax.loop import Progress, train_step
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.replay import from_arrays, to_arrays
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rollout import Group
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.system import System, load_system
from rethinker_jax.training.layout import PackedText, TrainBatch
from rethinker_jax.training.optimizer import make_optimizer
from rethinker_jax.training.update import TrainState, Updater, UpdateRule
from rethinker_jax.verify.pool import VerifierPool

NUM_STEPS, BATCH = 6, 8
PROBLEMS = [task.problem for task in make_tasks(0, 60) if task.kind == "sum"]
pytestmark = pytest.mark.usefixtures("quick_compilation")
REPLAYS = {
    "none": ReplayConfig(mode="none"),
    "filter": ReplayConfig(mode="filter"),
    "top_up": ReplayConfig(),
    "bootstrap": ReplayConfig(form="bootstrap"),
    "deque": ReplayConfig(form="deque", max_age=3, replacement=True, importance=1.0),
}


@dataclasses.dataclass(frozen=True)
class Taught:
    """A row as it lay in an update, or as a rollout would put it there."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    old_log_probs: tuple[float, ...]
    advantage: float

    @property
    def text(self) -> tuple[object, ...]:
        return self.prompt, self.completion, self.old_log_probs


class RecordingUpdater(Updater):
    """The updater, which also keeps the rows of every optimizer step."""

    def __init__(self, rule: UpdateRule, params: Params, mesh: Mesh):
        super().__init__(rule, params, mesh)
        self.seen: list[list[Taught]] = []

    def step(
        self, state: TrainState, batches: Sequence[TrainBatch], kl_coefficient: float | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        [batch] = batches
        self.seen.append([row_of(batch, place) for place in range(BATCH) if batch.completion_mask[place].any()])
        return super().step(state, batches, kl_coefficient)


def row_of(batch: TrainBatch, place: int) -> Taught:
    length = int(batch.completion_mask[place].sum())
    targets = batch.token_index[place, :length]
    return Taught(
        tuple(seen_by(batch.text, int(batch.target_index.flat[targets[0]]))),
        tuple(batch.target_ids.flat[targets].tolist()),
        tuple(batch.old_log_probs[place, :length].tolist()),
        float(batch.advantages[place]),
    )


def seen_by(text: PackedText, place: int) -> list[int]:
    """The tokens that the one at `place` of the only shard sees, itself included: its prompt, if it predicts first."""
    row, column = divmod(place, text.token_ids.shape[-1])
    prefix = text.prefix_index[0, row][text.prefix_segments[0, row] == text.query_segments[0, row, column]]
    if not text.query_segments[0, row, column]:
        prefix = prefix[:0]
    own = np.flatnonzero(text.segments[0, row, : column + 1] == text.segments[0, row, column])
    return [*text.token_ids[0].flat[prefix].tolist(), *text.token_ids[0, row, own].tolist()]


def rows_of(groups: Sequence[Group]) -> list[Taught]:
    return [
        Taught(
            tuple(one.prompt.token_ids.tolist()),
            tuple(one.completion.token_ids.tolist()),
            tuple(one.completion.log_probs.tolist()),
            one.advantage,
        )
        for group in groups
        for one in group.rollouts
    ]


@dataclasses.dataclass(frozen=True)
class Trainer:
    config: Config
    system: System
    updater: RecordingUpdater
    scorer: Scorer
    run: RunDirectory

    def go(self, settings: ReplayConfig) -> list["Step"]:
        """A run from the start; after every step the buffer goes through its checkpoint."""
        config = dataclasses.replace(self.config, replay=settings)
        state = self.updater.init(jax.tree.map(jnp.copy, self.system.params))
        progress = Progress(0, state, (), None, (0.0, 0.0), 0.0)
        order = DataOrder(len(PROBLEMS), 0, True)
        steps = []
        for _ in range(NUM_STEPS):
            self.updater.seen = []
            metrics, groups = train_step(
                config, self.system, self.updater, PROBLEMS, order, self.scorer, progress, self.run
            )
            assert not int(progress.state.num_skipped)
            steps.append(Step(metrics, rows_of(groups), self.updater.seen))
            progress.buffer = from_arrays(to_arrays(progress.buffer))
        return steps


@dataclasses.dataclass(frozen=True)
class Step:
    metrics: dict[str, float]
    drawn: list[Taught]
    updates: list[list[Taught]]

    def effective(self, update: int) -> list[Taught]:
        """Of the rows of an optimizer step those with an advantage."""
        return [row for row in self.drawn[update * BATCH : (update + 1) * BATCH] if abs(row.advantage) > 1e-6]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Generator[Trainer]:
    config = Config(
        model=ModelConfig(dtype="float32"),
        data=DataConfig(prompt_template="none"),
        sampling=SamplingConfig(max_new_tokens=32, num_slots=16, temperature=0.5),  # so that some groups agree
        rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=4),
        training=TrainingConfig(batch_size=BATCH),
        buckets=BucketsConfig(prompt_tokens=(64,), row_tokens=(96,), vision=((8, 4),)),  # so that little is compiled
    )
    system = load_system(config)
    rule = UpdateRule(system.model, make_optimizer(config.optimizer, 100), config.loss, system.dtype)
    updater = RecordingUpdater(rule, system.params, system.mesh)
    run = RunDirectory(tmp_path_factory.mktemp("run"), "rl")
    with VerifierPool(config.verifier) as pool, Scorer(config, pool) as scorer:
        yield Trainer(config, system, updater, scorer, run)


def older_than_their_rollout(steps: list[Step]) -> list[int]:
    """How many steps ago the rows of the updates were drawn that are not of the rollout before them; never another's.

    A row that came in several rollouts alike counts as of the last one.
    """
    origin: dict[tuple[object, ...], int] = {}
    ages = []
    for number, step in enumerate(steps):
        origin |= {row.text: number for row in step.drawn}
        ages += [number - origin[row.text] for rows in step.updates for row in rows]
    return [age for age in ages if age]


def test_without_a_buffer(trainer: Trainer) -> None:
    """Catches a run in which `none` loses rows or `filter` keeps those without advantage or fills up."""
    steps = trainer.go(REPLAYS["none"])
    for step in steps:
        assert [row for rows in step.updates for row in rows] == step.drawn
    assert 0 < sum(len(step.effective(update)) for step in steps for update in (0, 1)) < 16 * NUM_STEPS - BATCH
    for step in trainer.go(REPLAYS["filter"]):
        assert step.updates == [rows for rows in map(step.effective, (0, 1)) if rows]


def test_top_up(trainer: Trainer) -> None:
    """Two optimizer steps of 8 rows a rollout. Catches replay that adds nothing in the real run though it does behind
    made-up rows, or adds rows that teach nothing, with another's prompt, or with log-probs of today's policy."""
    steps = trainer.go(REPLAYS["top_up"])
    known: dict[tuple[object, ...], set[float]] = {}
    for step in steps:
        for row in step.drawn:
            known.setdefault(row.text, set()).add(row.advantage)
        for update, rows in enumerate(step.updates):
            own = step.effective(update)
            assert len(rows) == BATCH and rows[: len(own)] == own
            assert all(abs(row.advantage) > 1e-6 and row.advantage in known[row.text] for row in rows)
        replayed = sum(BATCH - len(step.effective(update)) for update in (0, 1))
        assert step.metrics["replay_share"] == replayed / 16 and step.metrics["effective_share"] == 1
        assert step.metrics["replay_size"] <= 16 * NUM_STEPS
    assert max(older_than_their_rollout(steps)) > 1


def test_bootstrap(trainer: Trainer) -> None:
    """Catches draws that leave the rollout, that never repeat or drop a row, or that no metric shows."""
    steps = trainer.go(REPLAYS["bootstrap"])
    repeated = []
    for step in steps:
        pool = [*step.effective(0), *step.effective(1)]
        assert [len(rows) for rows in step.updates] == [BATCH, BATCH]
        assert all(row in pool for rows in step.updates for row in rows)
        assert (step.metrics["replay_share"], step.metrics["replay_size"]) == (0, 0)
        repeated.append(step.metrics["repeated_share"])
    # 8 draws of at most 16 rows repeat 1 - 2·(1 - (15/16)^8) = 0.19 of them or more in the mean.
    assert np.mean(repeated) > 0.1
    assert not older_than_their_rollout(steps)


def test_deque(trainer: Trainer) -> None:
    """At alpha and importance 1, |A_j|·w_j = |A_j| · Σ|A| / (n·|A_j|), the mean |A| of what was drawn from. Catches
    weights that do not reach the update, and an age limit of 3 optimizer steps that is not held: of the rollout before
    this one at most."""
    steps = trainer.go(REPLAYS["deque"])
    for step in steps:
        for update, rows in enumerate(step.updates):
            own = step.effective(update)
            sizes = [abs(row.advantage) for row in rows]
            assert len(rows) == BATCH
            assert {row.text for row in rows[: len(own)]} <= {row.text for row in own}
            if own:
                mean = float(np.mean([abs(row.advantage) for row in own]))
                assert sizes[: len(own)] == pytest.approx([mean] * len(own))
            assert sizes[len(own) :] == pytest.approx(sizes[len(own) : len(own) + 1] * (BATCH - len(own)))
    assert set(older_than_their_rollout(steps)) == {1}
