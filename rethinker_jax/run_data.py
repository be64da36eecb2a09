"""The rows of a run: read, checked, ordered, and made into prompts."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from rethinker_jax.config import Config
from rethinker_jax.curation.curriculum import CurriculumOrder, easiness_of
from rethinker_jax.errors import UserError
from rethinker_jax.phases import during
from rethinker_jax.processes import check_same, exchange, is_mine
from rethinker_jax.prompts.build import BadPrompt, Made
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.prompts_ahead import Order, PromptsAhead, rows_at
from rethinker_jax.rewards.terms import check_row
from rethinker_jax.run_directory import RunDirectory, hash_of
from rethinker_jax.system import System
from rethinker_jax.types import Problem, Prompt
from rethinker_jax.verify.judge import check_gold


@dataclasses.dataclass(frozen=True)
class Splits:
    train: tuple[Problem, ...]
    test: tuple[Problem, ...]
    validation: tuple[Problem, ...] = ()

    @functools.cached_property
    def hash(self) -> str:
        """Of the rows that are trained on: what they are called, ask and want, in their order."""
        return _hash(self.train)

    @functools.cached_property
    def validation_hash(self) -> str:
        return _hash(self.validation)


def _hash(problems: Sequence[Problem]) -> str:
    return hash_of((problem.id, problem.question, problem.answer) for problem in problems)


def load_splits(config: Config, run: RunDirectory) -> Splits:
    """The rows to train, evaluate and validate on. Raises UserError where a step would ask for more than there are."""
    train = load_problems(config, config.data.train, run)
    wanted = config.rollout.prompts_per_step
    if config.run.num_steps and len(train) < wanted:
        raise UserError(
            f"{config.data.train}: wanted at least rollout.prompts_per_step={wanted} usable rows, found {len(train)}. "
            "Lower it (and training.batch_size with it), or add rows."
        )
    settings = config.evaluation
    count = max(settings.num_problems, settings.num_sampled_problems)
    test = load_problems(config, config.data.test, run)[:count] if count else ()
    validation: tuple[Problem, ...] = ()
    if settings.validate_every:
        validation = load_problems(config, config.data.validation, run)
    splits = Splits(train, test, validation[: settings.num_validation_problems or None])
    check_rows(config, splits)
    return splits


def check_rows(config: Config, splits: Splits) -> None:
    """Raises UserError where the processes of a job read different rows: each works on its own by their numbers."""
    for key, problems in (("train", splits.train), ("test", splits.test), ("validation", splits.validation)):
        check_same(f"data.{key}", lambda problems=problems: rows_hash(problems))


def rows_hash(problems: Iterable[Problem]) -> str:
    """Of all that rows hold but the bytes of their pictures: for processes to see that they read the same."""
    return hash_of(map(_content, problems))


def _content(problem: Problem) -> tuple[object, ...]:
    """What a row holds; of a picture, how it is called or how long it is."""
    images = [len(image) if isinstance(image, bytes) else Path(image).name for image in problem.images]
    return problem.id, problem.question, problem.answer, problem.choices, problem.type, images


def load_problems(config: Config, source: str, run: RunDirectory) -> tuple[Problem, ...]:
    """Rows that can be used; the others, also those whose answer nothing could be judged by, are listed in `run`."""
    limit = config.run.max_bad_rows
    found = read_problems(source, image_root=config.data.image_root, max_bad_rows=limit)
    for row in found.bad_rows:
        run.note_bad_row(-1, row.where, row.kind, row.why, limit)
    good = []
    for problem in found.problems:
        trouble = check_gold(problem.answer, problem.choices, problem.type) or check_row(problem, config.reward)
        if trouble:
            run.note_bad_row(-1, problem.id, "bad_gold", f"{trouble}: {problem.answer!r:.80}", limit)
        else:
            good.append(problem)
    if not good:
        raise UserError(f"{source}: wanted at least one usable row, found none; see {run.path / 'bad_rows.jsonl'}.")
    return tuple(good)


def data_order(config: Config, problems: Sequence[Problem]) -> Order:
    """The order in which rows are met. Raises UserError for a curriculum over a column that holds something else."""
    data = config.data
    if data.curriculum == "none":
        return DataOrder(len(problems), config.run.seed, data.shuffle)
    easiness = []
    for problem in problems:
        try:
            easiness.append(easiness_of(problem.row.get(data.curriculum_column)))
        except ValueError as error:
            raise UserError(
                f"{data.train}: row {problem.id!r}: data.curriculum {data.curriculum} goes by the column "
                f"{data.curriculum_column!r}: {error}. Make it with `select`, or name another with "
                "data.curriculum_column."
            ) from error
    return CurriculumOrder(easiness, data.curriculum_stages, config.run.seed)


@during("prompts")
def next_prompts(
    config: Config,
    system: System,
    problems: Sequence[Problem],
    order: Order,
    cursor: int,
    step: int,
    run: RunDirectory,
    taken: Collection[int] = (),
    ahead: PromptsAhead | None = None,
) -> list[tuple[int, Prompt]]:
    """The prompts of a rollout batch with their row numbers, at `rollout.prompts_per_step` places from `cursor` on.

    A row met twice is taken once, and one that was `taken` in this step already not at all: its samples would be the
    same. What was made `ahead` of them is used. Rows that cannot become a prompt are listed in the run's
    bad_rows.jsonl and left out, up to `run.max_bad_rows`. Raises UserError where no row is left and none was taken.
    """
    count = config.rollout.prompts_per_step
    wanted = [row for row in rows_at(order, cursor, count) if row not in taken]
    made = ahead.take(cursor, wanted) if ahead is not None else {}
    prompts = usable_prompts(config, system, [(row, problems[row]) for row in wanted], step, run, made)
    if not prompts and not taken:
        raise UserError(f"step {step}: none of its {count} rows can be used; see {run.path / 'bad_rows.jsonl'}.")
    return prompts


@during("prompts")
def usable_prompts(
    config: Config,
    system: System,
    rows: Sequence[tuple[int, Problem]],
    step: int,
    run: RunDirectory,
    made: Mapping[int, Made] | None = None,
) -> list[tuple[int, Prompt]]:
    """The prompts that can be made of (row number, problem); the others are listed in the run and left out.

    Of several processes each decodes the pictures of some, and what it finds is told to all. `made`: by row number
    what the builder made of some of them already.
    """
    places = {place: made[row] for place, (row, _) in enumerate(rows) if row in made} if made else {}
    prompts, bad = build_prompts(system, [problem for _, problem in rows], places)
    bad = agreed(bad)
    for place, (kind, why) in bad.items():
        run.note_bad_row(step, rows[place][1].id, kind, why, config.run.max_bad_rows)
    return [(row, prompts[place]) for place, (row, _) in enumerate(rows) if place not in bad]


Bad = dict[int, tuple[str, str]]  # place → kind, why
NOTHING_MADE: Mapping[int, Made] = {}


def build_prompts(
    system: System, problems: Sequence[Problem], made: Mapping[int, Made] = NOTHING_MADE
) -> tuple[dict[int, Prompt], Bad]:
    """By place the prompts, and why there is none; with several processes, as far as this one knows. `made`: by place
    what the builder made of some of them already."""
    prompts: dict[int, Prompt] = {}
    bad: Bad = {}
    for place, problem in enumerate(problems):
        try:
            prompts[place] = system.builder.build(problem, made.get(place))
            if is_mine(place):
                system.builder.decode(prompts[place])
        except BadPrompt as error:
            bad[place] = error.kind, str(error)
    return prompts, bad


def agreed(bad: Bad) -> Bad:
    """What any of the processes found to be bad, in the order of places; every process must ask."""
    found: Bad = {}
    for said in exchange([[place, *why] for place, why in bad.items()]):
        found |= {place: (kind, why) for place, kind, why in said if place not in found}
    return dict(sorted(found.items()))
