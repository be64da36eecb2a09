"""Forced Rethinking by addition: a kept second look is a row beside its first response, from advantage to update."""

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rethink_forms import FIRST_ONE, LOOK, PAPER, PROMPT, RIGHT, WRONG

from rethinker_jax.advantage import WHITENED, advantages_with_added, group_advantages
from rethinker_jax.config import (
    BucketsConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    ReplayConfig,
    RethinkConfig,
    RolloutConfig,
    SamplingConfig,
    TrainingConfig,
)
from rethinker_jax.config_file import load_defaults
from rethinker_jax.config_rewards import ConsistencyConfig, RewardConfig
from rethinker_jax.errors import UserError
from rethinker_jax.example.tasks import make_tasks
from rethinker_jax.experience import cut_batches, experience_of, with_advantages, with_consistency
from rethinker_jax.loop import Progress, train_step
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.replay import Experience, from_arrays, select, share_out, to_arrays, young_enough
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rollout import Group, as_rows, keep
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.step_metrics import rollout_metrics
from rethinker_jax.system import System, load_system
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.layout import TrainBatch
from rethinker_jax.training.optimizer import make_optimizer
from rethinker_jax.training.update import TrainState, Updater, UpdateRule
from rethinker_jax.types import TRIGGER, Rollout
from rethinker_jax.verify.pool import VerifierPool

EPSILON, PROMPTS, SAMPLES, BATCH = 1e-6, 4, 4, 8
ADD = dataclasses.replace(PAPER, kept_as="addition")

# --- advantages -----------------------------------------------------------------------------------------------------

# First responses 0 0 0 1; the second looks of the first two samples are right and kept.
REWARDS = np.array([0, 1, 0, 1, 0, 1], np.float32)
ADDED = np.array([False, True, False, True, False, False])
LENGTHS = np.array([2, 4, 2, 4, 2, 2])
# Φ⁻¹ of 1/8, 3/8, 5/8, 7/8: ∓1.150349 and ∓0.318639; of 1/12, 3/12, 5/12: -1.382994, -0.674490, -0.210428.
BY_FIRST = {
    # (a wrong first response, an added right one, the right first response)
    "group_mean": (-1 / 4, 3 / 4, 3 / 4),  # less the mean of the first responses, 1/4
    "rloo": (-1 / 3, 2 / 3, 1.0),  # less the mean of the others: 0 0 1 for whoever stands in a wrong one's place
    # Without rethinking the std is sqrt(3)/4. In its place, the two added being there: over 1 1 0 1 and 0 0 0 1, 1/2.
    "group_std": (-1 / 3**0.5, 3 / 2, 3**0.5),
    # k = 2, 0 0 0 1: half of the pairs are worth 1, std 1/2; with a wrong one a third of them. An added one finds
    # 1 0 0 1: 5 of 6 pairs, std sqrt(5)/6, and all of its own.
    "pass_at_k": ((1 / 3 - 1 / 2) / 0.5, (1 / 6) / (5**0.5 / 6), (1 / 2) / 0.5),
    "best_of_n": (0.0, 0.0, 4 / 3**0.5),  # an added one is as good as the right first response, and no better
    "g2rpo": ((-1.150349 - 0.318639 + 0.318639) / 3, (0.318639 + 1.150349) / 2, 1.150349),
    "remax": (-1 / 2, 1 / 2, 1 / 2),  # the greedy response has 1/2
    # 6 tokens of reward 0 and 4 + 4 + 2 of reward 1: mean 5/8, std sqrt(15)/8. Shifted by a constant, the same.
    "reinforce_plus_plus": (-5 / 15**0.5, 3 / 15**0.5, 3 / 15**0.5),
    "reinforce_plus_plus_baseline": (-5 / 15**0.5, 3 / 15**0.5, 3 / 15**0.5),
}
BY_FINAL = BY_FIRST | {
    # A group of six rows, three of each reward.
    "group_mean": (-1 / 2, 1 / 2, 1 / 2),
    "rloo": (-3 / 5, 3 / 5, 3 / 5),
    "group_std": (-1.0, 1.0, 1.0),
    "pass_at_k": (-1 / 2, 1 / 2, 1 / 2),  # 12 of 15 pairs, std 2/5; with a right one all, with a wrong one 3 of 5
    "best_of_n": (0.0, 0.0, 0.0),
    "g2rpo": (-(1.382994 + 0.674490 + 0.210428) / 3, *[(1.382994 + 0.674490 + 0.210428) / 3] * 2),
}


@pytest.mark.parametrize("estimator", BY_FIRST)
@pytest.mark.parametrize(("baseline", "wanted"), [("first", BY_FIRST), ("final", BY_FINAL)])
def test_advantages_of_a_group_with_added_rows(estimator: Any, baseline: Any, wanted: dict[str, Any]) -> None:
    """Catches added rows that move the first responses' baseline, that are compared with their own first response, or
    that whiten by no or by the wrong weight."""
    [found] = advantages_with_added(
        [REWARDS], [ADDED], estimator, baseline, lengths=[LENGTHS], greedy_rewards=np.array([0.5]), k=2
    )
    wrong, added, right = wanted[estimator]
    np.testing.assert_allclose(found, [wrong, added, wrong, added, wrong, right], rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("estimator", BY_FIRST)
def test_by_first_rewards_nobody_loses_by_an_added_row(estimator: Any) -> None:
    """Groups of 5 with 0, 2 and 5 added rows, graded rewards. First responses have what they have without rethinking,
    added rows what they would have by replacement. Catches rows of one group among another's, and sizes that must
    agree."""
    rng = np.random.default_rng(0)
    first, final = rng.choice([0.0, 0.5, 1.0, 1.1], (2, 3, 5)).astype(np.float32)
    looks = [[], [1, 4], [0, 1, 2, 3, 4]]
    greedy = rng.random(3)
    rewards, added = [], []
    for group, kept in enumerate(looks):
        rows = [(value, False) for sample in range(5) for value in [first[group, sample]]]
        for sample in reversed(kept):
            rows.insert(sample + 1, (final[group, sample], True))
        rewards.append(np.array([value for value, _ in rows], np.float32))
        added.append(np.array([more for _, more in rows], bool))
    lengths = [rng.integers(1, 9, len(one)) for one in rewards]
    found = advantages_with_added(rewards, added, estimator, "first", lengths=lengths, greedy_rewards=greedy, k=2)
    assert [len(one) for one in found] == [5, 7, 10]
    if estimator in WHITENED:
        values, weights = np.concatenate(found), np.concatenate(lengths)
        assert np.average(values, weights=weights) == pytest.approx(0, abs=1e-6)
        assert np.average(values**2, weights=weights) == pytest.approx(1, rel=1e-5)
        return
    without = group_advantages(first, first, estimator, greedy_rewards=greedy, k=2)
    replaced = first.copy()
    for group, kept in enumerate(looks):
        replaced[group, kept] = final[group, kept]
    by_replacement = group_advantages(replaced, first, estimator, greedy_rewards=greedy, k=2)
    for group, kept in enumerate(looks):
        np.testing.assert_array_equal(found[group][~added[group]], without[group])
        np.testing.assert_array_equal(found[group][added[group]], by_replacement[group, kept])


def test_remax_wants_its_greedy_rewards() -> None:
    """Catches advantages that are not a number."""
    with pytest.raises(ValueError, match="remax wants"):
        advantages_with_added([REWARDS], [ADDED], "remax", "first", lengths=[LENGTHS])


# --- the rows of a group --------------------------------------------------------------------------------------------


def make_group(firsts: str, seconds: str, config: RethinkConfig) -> Group:
    """A letter a sample: r(ight), w(rong), and . for no second look."""
    of = {"r": RIGHT, "w": WRONG}
    rollouts = [
        Rollout(PROMPT, sample, FIRST_ONE, of[one], LOOK if two in of else None, of.get(two))
        for sample, (one, two) in enumerate(zip(firsts, seconds, strict=True))
    ]
    return Group(0, PROMPT, as_rows(keep(rollouts, Config(rethink=config)), config), config)


def test_a_kept_second_look_is_a_row_behind_its_first_response() -> None:
    """Of 5 samples the second and fifth are kept, by a limit of two; masks are those of a replaced row. Catches rows
    that lose their first response, first responses with the reward of the second look, and rows of what is not kept."""
    rule = dataclasses.replace(ADD, baseline="first", keep="correct")
    (group,) = with_advantages([make_group("wwrrw", "wr.rr", rule)], Config(rethink=rule))
    assert [one.sample for one in group.rollouts] == [0, 1, 1, 2, 3, 3, 4]
    assert group.added.tolist() == [False, False, True, False, False, True, False]
    assert group.rewards.tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert group.first_rewards.tolist() == [0, 0, 1, 1, 0]
    assert [one.sample for one in group.samples] == [one.sample for one in group.drawn] == [0, 1, 2, 3, 4]
    assert [len(one.completion) for one in group.drawn] == [3, 7, 3, 7, 3]
    assert group.not_kept == ["wrong", None, None, "full"]
    # Less the mean of the first responses, 2/5.
    assert [one.advantage for one in group.rollouts] == pytest.approx([-0.4, -0.4, 0.6, 0.6, 0.6, 0.6, -0.4])
    rows = [experience_of(group, one, 3) for one in group.rollouts]
    assert [row.added for row in rows] == group.added.tolist()
    assert rows[1].loss_mask.tolist() == [True] * 3 and not rows[1].nll_mask.any()
    assert rows[2].loss_mask.tolist() == [False] * 4 + [True] * 3
    assert rows[2].nll_mask.tolist() == [False] * 2 + [True] * 5


def test_metrics_count_a_second_look_once() -> None:
    """The group above. Catches shares of rows where samples are meant, and second looks that are counted with their
    first responses' rows again."""
    found = rollout_metrics([make_group("wwrrw", "wr.rr", ADD)], EPSILON)
    wanted = {
        "accuracy": 2 / 5,
        "wrong_share": 3 / 5,
        "forced_share": 4 / 5,
        "kept_share": 2 / 4,
        "not_kept/wrong": 1 / 4,
        "not_kept/full": 1 / 4,
        "forced_first_accuracy": 1 / 4,
        "forced_final_accuracy": 3 / 4,
        "rethink_gain": 1 / 2,
        "wrong_to_right": 2 / 3,
        "right_to_wrong": 0.0,
        "selectivity": (3 / 4) / (3 / 5),
        "reward": 4 / 7,  # of rows: 2 of 5 first responses, 2 added
        "completion_length": (5 * 3 + 2 * 7) / 7,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


# --- optimizer batches and the buffer -------------------------------------------------------------------------------


def row(problem: int, advantage: float, added: bool = False, update: int = 0) -> Experience:
    policy = np.ones(3, bool)
    return Experience(problem, np.arange(3), policy, policy & added, -0.5 * policy, advantage, update, added=added)


@pytest.mark.parametrize("cut", ["group", "sample"])
def test_an_added_row_goes_with_its_first_response(cut: Any) -> None:
    """8 groups of 4 samples, two of which have a row more, in batches of 8 samples. Catches an optimizer step more, and
    batches that are cut between a first response and what was added to it."""
    groups = [[row(n * 4 + s, 0.5, added) for s in range(4) for added in (False, True)[: 1 + s % 2]] for n in range(8)]
    rows = [one for group in groups for one in group]
    config = dataclasses.replace(Config(), training=TrainingConfig(batch_size=8, cut=cut))
    batches = cut_batches(config, rows, 3)
    assert sorted(id(one) for batch in batches for one in batch) == sorted(map(id, rows))
    assert [sum(not one.added for one in batch) for batch in batches] == [8] * 4
    for batch in batches:
        for before, one in itertools.pairwise(batch):
            assert not one.added or before.problem == one.problem
        assert not batch[0].added
    assert (list(map(len, batches)) == [12] * 4) == (cut == "group")
    again, other = (cut_batches(config, rows, step) for step in (3, 4))
    assert list(map(id, again[0])) == list(map(id, batches[0]))
    assert (list(map(id, other[0])) == list(map(id, batches[0]))) == (cut == "group")


def test_replay_fills_what_the_batch_has_less() -> None:
    """A batch of 4 samples and 2 added rows, of which one sample and one added row have an advantage; the other added
    one rides along for its supervised loss. 6 rows, less the rider: 5 places, 2 taken. Catches a batch that shrinks to
    4, added rows that push replayed ones out, and a buffer that refuses added rows or forgets what they are."""
    raw = [row(0, 0.5), row(1, 0.0), row(1, 0.0, True), row(2, 0.0), row(2, -0.25, True), row(3, 0.0)]
    found = select(raw, [row(9, 0.5, update=-1), row(8, 0.5, True, update=-1)], ReplayConfig(), EPSILON, (0, 1))
    assert [(one.problem, one.added) for one in found.fresh] == [(0, False), (2, True), (1, True)]
    assert [one.loss_mask.any() for one in found.fresh] == [True, True, False]
    assert len(found.replayed) == 3
    assert [(one.problem, one.added) for one in found.buffer] == [(9, False), (8, True), (0, False), (2, True)]
    back = from_arrays(to_arrays(found.buffer))
    assert [one.added for one in back] == [False, True, False, True]
    assert "added" not in to_arrays(found.buffer[:1])  # as in checkpoints from before there was addition


def test_places_of_a_dynamic_step_are_samples() -> None:
    """Places for two groups of two, one of three rows carried. Catches a cut by rows: the last of group 1 would
    wait."""
    carried = [row(9, 0.5), row(9, 0.5, True), row(9, -0.5)]
    drawn = [
        [row(0, 0.0), row(0, 0.0)],
        [row(1, -0.5), row(1, 0.5), row(1, 0.5, True)],
        [row(2, 0.5, update=1), row(2, -0.5, update=1), row(2, 0.5, True, update=1)],
        [row(3, -0.5, update=2), row(3, 0.5, update=2)],
    ]
    shared = share_out(drawn, carried, 4, EPSILON)
    assert [one.problem for one in shared.fresh] == [1, 1, 1]
    assert [one.problem for one in shared.surplus] == [2, 2, 2, 3, 3]
    # Each leaves whole. Catches groups of two rows.
    config = ReplayConfig(mode="dynamic", max_age=3)
    assert [one.problem for one in young_enough(shared.surplus, config, 2, 5)] == [3, 3]
    assert [one.problem for one in young_enough(shared.surplus, config, 2, 4)] == [2, 2, 2, 3, 3]
    # A group without advantage fills up whole.
    assert [one.problem for one in share_out(drawn[:2], carried, 6, EPSILON).fresh] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["rethink.kept_as=add"], "rethink.kept_as"),
        (["rethink.rule=random", "rethink.kept_as=addition", "advantage.estimator=remax", "rethink.baseline=final"],
         "rethink.baseline is final with advantage.estimator remax"),
    ],
)  # fmt: skip
def test_what_is_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as error:
        load_defaults(overrides)
    assert part in str(error.value)


@pytest.mark.parametrize("mode", ["none", "filter", "ssr", "dynamic"])
def test_every_mode_of_replay_takes_it(mode: str) -> None:
    assert load_defaults(["rethink.rule=paper", "rethink.kept_as=addition", f"replay.mode={mode}"])


# --- in a run -------------------------------------------------------------------------------------------------------

PROBLEMS = [task.problem for task in make_tasks(0, 60) if task.kind == "sum"]
REPLAYS = {
    "none": ReplayConfig(mode="none"),
    "top_up": ReplayConfig(),
    "dynamic": ReplayConfig(mode="dynamic", max_resamples=2),
}


@dataclasses.dataclass(frozen=True)
class Learned:
    """A row as it lay in an update, or as a rollout would put it there."""

    completion: tuple[int, ...]
    policy: tuple[bool, ...]
    supervised: tuple[bool, ...]
    old_log_probs: tuple[float, ...]
    advantage: float


class RecordingUpdater(Updater):
    """The updater, which also keeps the rows of every optimizer step."""

    seen: list[list[Learned]]

    def step(
        self, state: TrainState, batches: Sequence[TrainBatch], kl_coefficient: float | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        [batch] = batches
        self.seen.append([learned(batch, place) for place in np.flatnonzero(batch.completion_mask.any(axis=1))])
        return super().step(state, batches, kl_coefficient)


def learned(batch: TrainBatch, place: int) -> Learned:
    length = int(batch.completion_mask[place].sum())
    arrays = (batch.loss_mask, batch.nll_mask, batch.old_log_probs)
    ids = batch.target_ids.flat[batch.token_index[place, :length]]
    parts = [tuple(array[place, :length].tolist()) for array in arrays]
    return Learned(tuple(ids.tolist()), *parts, float(batch.advantages[place]))


def rows_of(groups: Sequence[Group]) -> list[Learned]:
    return [
        Learned(
            tuple(one.completion.token_ids.tolist()),
            *(tuple(mask.tolist()) for mask in group.masks(one)),
            tuple(one.completion.log_probs.tolist()),
            one.advantage,
        )
        for group in groups
        for one in group.rollouts
    ]


@dataclasses.dataclass(frozen=True)
class Step:
    metrics: dict[str, float]
    groups: list[Group]
    updates: list[list[Learned]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    config: Config
    system: System
    updater: RecordingUpdater
    scorer: Scorer
    run: RunDirectory

    def start(self) -> Progress:
        return Progress(0, self.updater.init(jax.tree.map(jnp.copy, self.system.params)), (), None, (0.0, 0.0), 0.0)

    def go(self, progress: Progress, num_steps: int, settings: ReplayConfig, **rethink: Any) -> list[Step]:
        config = dataclasses.replace(
            self.config, replay=settings, rethink=dataclasses.replace(self.config.rethink, **rethink)
        )
        order, steps = DataOrder(len(PROBLEMS), 0, True), []
        for _ in range(num_steps):
            self.updater.seen = []
            metrics, groups = train_step(
                config, self.system, self.updater, PROBLEMS, order, self.scorer, progress, self.run
            )
            assert not int(progress.state.num_skipped)
            steps.append(Step(metrics, groups, self.updater.seen))
        return steps


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Generator[Trainer]:
    config = Config(
        model=ModelConfig(dtype="float32"),
        data=DataConfig(prompt_template="none"),
        sampling=SamplingConfig(max_new_tokens=32, num_slots=16, temperature=0.5),
        rollout=RolloutConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES),
        rethink=RethinkConfig(
            rule="paper", fraction=1.0, group_rule="any", max_new_tokens=24, keep="all", kept_as="addition"
        ),
        loss=LossConfig(nll_coefficient=0.05),
        training=TrainingConfig(batch_size=BATCH),
        buckets=BucketsConfig(prompt_tokens=(64,), row_tokens=(96,), vision=((8, 4),)),  # so that little is compiled
    )
    system = load_system(config)
    rule = UpdateRule(system.model, make_optimizer(config.optimizer, 100), config.loss, system.dtype)
    updater = RecordingUpdater(rule, system.params, system.mesh)
    run = RunDirectory(tmp_path_factory.mktemp("run"), "rl")
    with VerifierPool(config.verifier) as pool, Scorer(config, pool) as scorer:
        yield Trainer(config, system, updater, scorer, run)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_update_sees_the_first_responses_and_the_added_rows(trainer: Trainer) -> None:
    """Two optimizer steps of 8 samples and what was added to them. Catches added rows that are lost, that take a place,
    that make an optimizer step more or go into the other one, and masks on triggers or first responses."""
    num_added = 0
    for step in trainer.go(trainer.start(), 2, REPLAYS["none"]):
        halves = [rows_of(step.groups[:2]), rows_of(step.groups[2:])]
        assert step.updates == halves
        for group in step.groups:
            assert len(group.samples) == SAMPLES and group.rethinking.kept_as == "addition"
            mean = statistics.fmean(one.first_verdict.reward for one in group.samples)
            for one, added in zip(group.rollouts, group.added, strict=True):
                assert one.advantage == pytest.approx(one.reward - mean, abs=1e-6)
                assert added == (one.completion.segments == TRIGGER).any()
                own, supervised = group.masks(one)
                segments = one.completion.segments
                assert own.tolist() == (segments == (2 if added else 0)).tolist()
                assert supervised.any() == (added and one.verdict.correct) and not supervised[segments == 0].any()
        extra = sum(len(rows) for rows in halves) - PROMPTS * SAMPLES
        num_added += extra
        assert step.metrics["kept_share"] * step.metrics["forced_share"] * PROMPTS * SAMPLES == pytest.approx(extra)
        supervised = [statistics.fmean(any(one.supervised) for one in half) for half in halves]
        assert step.metrics["forced_in_batch_share"] == pytest.approx(statistics.fmean(supervised))
    assert num_added > 4  # else nothing was tried


def test_first_responses_learn_what_they_learn_without_rethinking(trainer: Trainer) -> None:
    """The same first step with and without second looks. Catches advantages that the added rows move."""
    [with_looks] = trainer.go(trainer.start(), 1, REPLAYS["none"])
    [without] = trainer.go(trainer.start(), 1, REPLAYS["none"], rule="off")
    firsts = [one for group in with_looks.groups for one in group.samples]
    plain = [one for group in without.groups for one in group.rollouts]
    for ours, theirs in zip(firsts, plain, strict=True):
        assert ours.completion.token_ids.tolist() == theirs.completion.token_ids.tolist()
        assert ours.advantage == theirs.advantage
    assert any(group.added.any() for group in with_looks.groups) and any(one.advantage for one in firsts)


def test_the_buffer_gives_added_rows_back(trainer: Trainer) -> None:
    """Five steps under SSR, the buffer through its checkpoint's arrays. Catches a batch that is not filled up to its
    samples and added rows, and added rows that never return or return with other masks."""
    progress, known, replayed = trainer.start(), set(), 0
    for _ in range(5):
        [step] = trainer.go(progress, 1, REPLAYS["top_up"])
        progress.buffer = from_arrays(to_arrays(progress.buffer))
        known |= set(rows_of(step.groups))
        for update, rows in enumerate(step.updates):
            own = rows_of(step.groups[2 * update : 2 * update + 2])
            riders = [one for one in own if abs(one.advantage) <= EPSILON and any(one.supervised)]
            bare = [dataclasses.replace(one, policy=(False,) * len(one.policy)) for one in riders]
            assert len(rows) == len(own)
            taught = [one for one in own if abs(one.advantage) > EPSILON]
            assert rows[: len(taught) + len(bare)] == taught + bare
            again = rows[len(taught) + len(bare) :]
            assert set(again) <= known and all(abs(one.advantage) > EPSILON for one in again)
            replayed += sum(not all(one.policy) for one in again)
        assert step.metrics["effective_share"] == 1
    assert replayed > 0


def test_a_dynamic_run_hands_groups_on_whole(trainer: Trainer) -> None:
    """Catches a surplus that is cut by rows, so that later steps take a sample of one group with those of another."""
    progress, waiting = trainer.start(), []
    for _ in range(3):
        [step] = trainer.go(progress, 1, REPLAYS["dynamic"])
        teaching = [one for one in step.groups if any(abs(row.advantage) > EPSILON for row in one.rollouts)]
        groups = [*waiting, *teaching]
        trained, waiting = groups[:PROMPTS], groups[PROMPTS:]
        seen = [one for rows in step.updates for one in rows if abs(one.advantage) > EPSILON]
        taught = [one for one in rows_of(trained) if abs(one.advantage) > EPSILON]
        assert sorted(map(repr, seen)) == sorted(map(repr, taught))
        assert step.metrics["carried_groups"] == len(waiting)
        assert step.metrics["replay_size"] == len(rows_of(waiting)) == len(progress.buffer)


@pytest.mark.parametrize("replay", ["top_up", "dynamic"])
def test_a_run_that_was_stopped_goes_on_the_same(trainer: Trainer, tmp_path: Path, replay: str) -> None:
    """Bit for bit, through a checkpoint. Catches rows of the buffer that forget that they were added."""
    progress = trainer.start()
    trainer.go(progress, 2, REPLAYS[replay])
    with contextlib.closing(CheckpointStore(tmp_path / "checkpoints", 1)) as store:
        store.save(2, Saved(progress.state, to_arrays(progress.buffer), {"cursor": progress.cursor}))
        store.wait()
        found = store.restore(trainer.updater.shapes(trainer.system.params), trainer.system.mesh)
    buffer, cursor = from_arrays(found.arrays), found.meta["cursor"]
    assert [one.added for one in buffer] == [one.added for one in progress.buffer]
    again = Progress(2, found.state, buffer, None, (0.0, 0.0), 0.0, cursor)
    ours, theirs = trainer.go(progress, 2, REPLAYS[replay]), trainer.go(again, 2, REPLAYS[replay])
    assert [one.updates for one in ours] == [one.updates for one in theirs]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), progress.state.params, again.state.params))


def test_the_rollout_file_has_a_line_of_its_own_for_each_row(trainer: Trainer) -> None:
    """Catches a first response that is shown with its second look's text or reward."""
    [step] = trainer.go(trainer.start(), 1, REPLAYS["none"])
    trainer.run.write_rollouts(0, step.groups)
    lines = (trainer.run.path / "rollouts" / "step_000000.jsonl").read_text().splitlines()
    for line, group in zip(lines, step.groups, strict=True):
        samples = json.loads(line)["samples"]
        for shown, one, added in zip(samples, group.rollouts, group.added, strict=True):
            assert (shown["sample"], shown["kept"], shown["advantage"]) == (one.sample, added, one.advantage)
            if added or not shown["forced"]:
                text = "".join(part["text"] for part in shown["segments"])
                assert (text, shown["reward"]) == ("".join(part for _, part in one.completion.parts), one.reward)


def test_the_trainers_bonus_goes_to_the_row_that_earns_it(trainer: Trainer) -> None:
    """Groups of unlike sizes. Catches groups that must agree in size, the bonus of an added row on its first response,
    and first rewards without their own."""
    [step] = trainer.go(trainer.start(), 1, REPLAYS["none"], keep="correct", max_kept_per_problem=4)
    assert len({len(group.rollouts) for group in step.groups}) > 1  # else nothing was tried
    settings = ConsistencyConfig(weight=0.5, model="policy", margin=0.01)
    config = dataclasses.replace(trainer.config, reward=RewardConfig(consistency=settings))
    state = trainer.updater.init(jax.tree.map(jnp.copy, trainer.system.params))
    found, _ = with_consistency(step.groups, config, trainer.system, trainer.updater, state)
    num_bonuses = 0
    for before, after in zip(step.groups, found, strict=True):
        gains = after.rewards - before.rewards
        right = np.array([one.verdict.correct for one in before.rollouts])
        assert set(gains.tolist()) <= {0.0, 0.5} and not gains[~right].any()
        assert not right.any() or gains.any()  # the likeliest of the accurate is no less likely than their mean
        np.testing.assert_array_equal(after.first_rewards - before.first_rewards, gains[~before.added])
        num_bonuses += int(gains.astype(bool).sum())
    assert num_bonuses
