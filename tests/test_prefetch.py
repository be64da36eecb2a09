"""Prompts made beside the device's work: the same rows, numbers and bad rows as without, and no end that hangs."""

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sft_rows import picture

from rethinker_jax.config import (
    BucketsConfig,
    Config,
    DataConfig,
    ModelConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from rethinker_jax.errors import Stopped
from rethinker_jax.loop import Progress, train_step
from rethinker_jax.prompts.build import BadPrompt, Made, PromptBuilder
from rethinker_jax.prompts.images import ImageSettings, LatePatches
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.prompts_ahead import PromptsAhead
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.run_data import usable_prompts
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.step_metrics import CLOCKS
from rethinker_jax.system import EXAMPLE_MODEL, System, load_system, make_updater
from rethinker_jax.training.update import Updater
from rethinker_jax.types import Problem
from rethinker_jax.verify.pool import VerifierPool

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_builder(kind: type[PromptBuilder] = PromptBuilder, **options: Any) -> Any:
    images = ImageSettings.from_directory(EXAMPLE_MODEL)
    geometry = VisionGeometry(images.patch_size, images.merge_size, 4 * images.patch_size * images.merge_size)
    return kind(ChatTokenizer(EXAMPLE_MODEL), images, geometry, "none", **options)


def make_problems(folder: Path, count: int) -> list[Problem]:
    """Sums with a picture each."""
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
    return [
        Problem(f"row-{number}", f"<image>add {number} 5?", str(number + 5), (str(folder / f"{number}.png"),))
        for number in range(count)
    ]


def why(work: Callable[[], object]) -> str:
    with pytest.raises(BadPrompt) as error:
        work()
    return f"{error.value.kind}: {error.value}"


def test_what_was_made_counts_as_long_as_its_files_are_what_they_were(tmp_path: Path) -> None:
    """Catches a picture that is gone, was changed or was mended since, and is used, or found to be bad, all the same:
    the run would differ from one that reads it when it is asked for."""
    builder, (problem, *_) = make_builder(), make_problems(tmp_path, 1)
    path = tmp_path / "0.png"
    made = builder.make(problem, decode=False)
    assert builder.build(problem, made) is made.found

    path.write_bytes(picture(7))
    changed = builder.build(problem, made)
    np.testing.assert_array_equal(changed.images[0].patches, builder.build(problem).images[0].patches)
    assert (changed.images[0].patches != made.found.images[0].patches).any()

    path.unlink()
    assert why(lambda: builder.build(problem, made)) == why(lambda: builder.build(problem))
    made = builder.make(problem, decode=False)
    assert why(lambda: builder.build(problem, made)) == why(lambda: builder.build(problem))
    path.write_bytes(picture(0))
    assert builder.build(problem, made).problem is problem


def test_making_early_keeps_nothing_and_makes_nothing_twice(tmp_path: Path) -> None:
    """With room for two. Catches a prompt that leaves for one which nobody asked for yet, and one that is decoded again
    though it is there."""
    builder, problems = make_builder(cache_size=2), make_problems(tmp_path, 4)
    first, second = builder.build(problems[0]), builder.build(problems[1])
    made = builder.make(problems[2], decode=False)
    assert builder.make(problems[0], decode=False) is None
    assert builder.build(problems[1]) is second and builder.build(problems[0]) is first
    assert builder.build(problems[2], made) is made.found is builder.build(problems[2])
    assert builder.build(problems[0]) is first  # 1 had to go, as it was asked for longest ago
    assert builder.make(problems[1], decode=False) is not None


def test_pictures_that_are_decoded_late_are_decoded_early_where_asked(tmp_path: Path) -> None:
    """As in a job of several processes. Catches a thread that only reads headers, a process that decodes what belongs
    to another, and a torn picture that is found to be bad elsewhere than in `decode`."""
    builder, problems = make_builder(decode_late=True), make_problems(tmp_path, 3)
    (tmp_path / "2.png").write_bytes(picture(2)[:100])
    mine, other, torn = (builder.make(one, decode=place != 1) for place, one in enumerate(problems))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")  # who reads it now fails
    late = [one.found.images[0].patches for one in (mine, other, torn)]
    assert all(isinstance(patches, LatePatches) for patches in late)
    builder.decode(mine.found)
    assert why(lambda: builder.decode(other.found)).startswith("bad_image")
    assert why(lambda: builder.decode(torn.found)).startswith("bad_image")


class Failing(PromptBuilder):
    """Fails in a way that no row can be blamed for."""

    def make(self, problem: Problem, *, decode: bool) -> Made | None:
        if problem.id == "row-1":
            raise MemoryError(problem.id)
        return super().make(problem, decode=decode)


def test_an_error_of_the_thread_comes_up_where_its_batch_is_asked_for(tmp_path: Path) -> None:
    """Catches an error that is lost, one of a batch that nobody wants, and a thread that is left after either."""
    with PromptsAhead(make_builder(Failing), make_problems(tmp_path, 4), DataOrder(4, 0, False), 2) as ahead:
        ahead.begin(0)
        with pytest.raises(MemoryError, match="row-1"):
            ahead.take(0, [0, 1])
        ahead.begin(0)
        ahead.begin(2)
        assert list(ahead.take(2, [2, 3])) == [2, 3]
        ahead.begin(0)
    assert not any(thread.name.startswith("prompts ahead") for thread in threading.enumerate())


class Waiting(PromptBuilder):
    """Is at a picture until the batch that it belongs to is not wanted any more."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **options)
        self.unwanted: queue.Queue[threading.Event] = queue.Queue()
        self.asked = 0

    def make(self, problem: Problem, *, decode: bool) -> Made | None:
        self.asked += 1
        assert self.unwanted.get(timeout=60).wait(60)
        return super().make(problem, decode=decode)


def test_a_stop_waits_for_no_more_than_a_picture(tmp_path: Path) -> None:
    """The first of eight pictures is under way when the run is asked to stop. Catches an end that makes the whole batch
    first, and a stop that gets lost in it."""
    builder = make_builder(Waiting)
    with (
        pytest.raises(Stopped),
        PromptsAhead(builder, make_problems(tmp_path, 8), DataOrder(8, 0, False), 8) as ahead,
    ):
        ahead.begin(0)
        assert ahead._coming is not None
        builder.unwanted.put(ahead._coming[2])
        while not builder.asked:
            time.sleep(0.01)
        raise Stopped("asked to stop", 75)
    assert builder.asked == 1


def test_a_wrong_guess_is_thrown_away_and_counted(tmp_path: Path) -> None:
    """Catches prompts of another place that are taken for those of this one, rows that are used though they were drawn
    in this step before, and a second batch that lies in memory."""
    with PromptsAhead(make_builder(), make_problems(tmp_path, 8), DataOrder(8, 0, False), 2) as ahead:
        ahead.begin(0)
        assert list(ahead.take(0, [1])) == [1]  # 0 was drawn before
        assert ahead.counts() == {"prompts_made_ahead": 1, "prompts_thrown_away": 1}
        assert ahead.take(2, [2, 3]) == {}  # nothing was begun
        ahead.begin(4)
        assert ahead.take(6, [6, 7]) == {} and ahead.take(4, [4, 5]) == {}
        assert ahead.counts()["prompts_made_ahead"] == 0


@dataclasses.dataclass(frozen=True)
class Trainer:
    config: Config
    system: System
    updater: Updater
    scorer: Scorer

    def go(self, replay: ReplayConfig, folder: Path, *, ahead: bool, early: bool = False) -> list[Any]:
        """Three steps over rows of which two are bad from the start and one is torn behind the first step; what they
        drew and learned. `early`: the batch ahead is finished before the picture is torn."""
        folder.mkdir()
        problems = make_problems(folder, 10)
        (folder / "1.png").unlink()
        (folder / "6.png").write_bytes(picture(6)[:100])
        order, run = DataOrder(len(problems), 0, False), RunDirectory(folder, "rl")
        config = dataclasses.replace(self.config, replay=replay)
        system = dataclasses.replace(self.system, builder=make_builder(cache_size=5))
        state = self.updater.init(jax.tree.map(jnp.copy, system.params))
        progress, found = Progress(0, state, (), None, (0.0, 0.0), 0.0), []
        with PromptsAhead(system.builder, problems, order, config.rollout.prompts_per_step) as thread:
            for step in range(config.run.num_steps):
                metrics, groups = train_step(
                    config, system, self.updater, problems, order, self.scorer, progress, run, thread if ahead else None
                )
                assert ahead == ("prompts_made_ahead" in metrics)
                found.append({key: value for key, value in metrics.items() if key not in CLOCKS})
                found.append([(group.problem, [one.completion.text for one in group.rollouts]) for group in groups])
                found.append((progress.cursor, metrics.get("prompts_made_ahead", 0) > 0))
                if step == 0:
                    if early and thread._coming is not None:
                        thread._coming[1].result()
                    (folder / "5.png").write_bytes(picture(5)[:100])
        lines = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
        found.append([(line["step"], line["id"], line["kind"]) for line in lines])
        return [*found, jax.tree.map(np.asarray, progress.state.params)]


@pytest.fixture(scope="module")
def trainer(quick_compilation: None) -> Generator[Trainer]:
    config = Config(
        run=RunConfig(num_steps=3),
        model=ModelConfig(dtype="float32"),
        data=DataConfig(prompt_template="none"),
        sampling=SamplingConfig(max_new_tokens=32, num_slots=16),
        rollout=RolloutConfig(prompts_per_step=4, samples_per_prompt=4),
        training=TrainingConfig(batch_size=8),
        buckets=BucketsConfig(prompt_tokens=(64,), row_tokens=(96,), vision=((8, 4),)),
    )
    system = load_system(config)
    updater = make_updater(config, system, 100, config.loss)
    with VerifierPool(config.verifier) as pool, Scorer(config, pool) as scorer:
        yield Trainer(config, system, updater, scorer)


@pytest.mark.parametrize("mode", ["ssr", "dynamic"])
def test_a_run_is_the_same_with_and_without(mode: Any, trainer: Trainer, tmp_path: Path) -> None:
    """Rows 0 to 9 in order, four a batch, again from 0 on. Under `dynamic` steps draw several batches, the last with
    rows that this step drew before.

    Catches rows that are left out, named or counted in another step than the one that meets them, prompts of another
    row, a cursor that the guess moves, and a picture that was torn after it was read ahead.
    """
    replay = ReplayConfig(mode=mode, max_resamples=2 if mode == "dynamic" else ReplayConfig().max_resamples)
    plain = trainer.go(replay, tmp_path / "plain", ahead=False)
    runs = [trainer.go(replay, tmp_path / f"ahead-{early}", ahead=True, early=early) for early in (False, True)]
    *_, bad, weights = plain
    if mode == "ssr":  # 0 to 3, 4 to 7, and 8, 9, 0, 1
        assert bad == [(0, "row-1", "bad_image"), (1, "row-5", "bad_image"), (1, "row-6", "bad_image"),
                       (2, "row-1", "bad_image")]  # fmt: skip
    for found in runs:
        without_counts = [one[:1] if isinstance(one, tuple) else one for one in found[:-2]]
        for mine, theirs in zip(without_counts, plain[:-2], strict=True):
            theirs = theirs[:1] if isinstance(theirs, tuple) else theirs
            assert repr(mine) == repr(theirs)  # as text: some numbers are NaN
        assert found[-2] == bad
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found[-1], weights))
        used = [one[1] for one in found[:-2] if isinstance(one, tuple)]
        assert any(used) and (mode == "dynamic" or used[0] is False)


def test_the_thread_writes_nothing(tmp_path: Path, trainer: Trainer) -> None:
    """Catches bad rows that are noted when they are read ahead: another process would not know, nor would the step be
    that which met them."""
    problems: Sequence[Problem] = make_problems(tmp_path, 2)
    (tmp_path / "1.png").unlink()
    run = RunDirectory(tmp_path, "rl")
    with PromptsAhead(trainer.system.builder, problems, DataOrder(2, 0, False), 2) as ahead:
        ahead.begin(0)
        made = ahead.take(0, [0, 1])
        assert isinstance(made[1].found, BadPrompt) and not (tmp_path / "bad_rows.jsonl").exists()
        rows = list(enumerate(problems))
        assert [row for row, _ in usable_prompts(trainer.config, trainer.system, rows, 3, run, made)] == [0]
    assert json.loads((tmp_path / "bad_rows.jsonl").read_text())["step"] == 3
