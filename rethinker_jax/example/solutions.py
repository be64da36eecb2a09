"""What is written about a problem: right solutions, flawed ones, captions, second looks. Pure text from plain numbers.

Every kind of problem comes down to the numbers to be read off the picture (`Task.numbers`), so a slip is a changed
number or a changed addition, and whatever follows from it is consistent with it.

A *span* is (text, has_loss). Spans are tokenised one by one: at RL time a trigger is inserted as tokens of its own, so
a token that reached across a span's border would never be met there. The end token is added by the trainer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rethinker_jax.config import RethinkConfig
from rethinker_jax.example.render import BAR_NAMES, MAX_BAR, Cell
from rethinker_jax.types import Problem

Span = tuple[str, bool]

ADDING_KINDS = ("sum", "pair", "text", "add5", "add6", "add9")
TRIGGERS = RethinkConfig().triggers

# The noisy stage: shares of how its solutions are spoilt.
SECOND_LOOK_SHARE = 0.25
GUESS_SHARE = 0.55  # of the rest
UNBOXED_SHARE = 0.05  # of the rest
READ_SLIP, ADD_SLIP, COUNT_SLIP = 0.15, 0.075, 0.05  # per digit read, per addition, per cell
SILENT_SHARE = 0.85  # second looks without loss up to the trigger: the skill exists, but is not volunteered
# First answers of second looks. Right ones must be among them, or the model learns to contradict whatever it wrote.
FIRST_ANSWERS = ("wrong guess", "right guess", "slipped", "clean")
FIRST_ANSWER_ODDS = (0.25, 0.15, 0.35, 0.25)


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem together with what is needed to write about it.

    working  the correct steps, without the boxed answer.
    numbers  the addends (of `ADDING_KINDS`), the heights of the bars (tallest), or nine 0/1 flags in reading order
             (count).
    names    what stands in the nine cells of a count, a colour or "no".
    caption  the whole picture in reading order; "" where there is no picture.
    """

    problem: Problem
    kind: str
    working: str
    numbers: tuple[int, ...]
    caption: str = ""
    names: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return self.problem.answer


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def work(
    kind: str, numbers: Sequence[int], add_errors: Sequence[int] = (), names: Sequence[str] = ()
) -> tuple[str, str]:
    """Steps and final answer that follow from the numbers read; `add_errors[i]` is added to the i-th addition's result.

    Adding kinds give the running total, "3+4=7,+1=8"; count goes through the cells, with a number where one counts and
    its name where it does not, "blue1 no green23 no blue green"; tallest gives "A=3 B=7 C=5". Naming what is
    passed over makes a tiny model look at every cell: with a bare running count it stayed at guessing (docs/log.md).
    """
    if kind in ADDING_KINDS:
        total, steps = numbers[0], str(numbers[0])
        for place, number in enumerate(numbers[1:]):
            total = max(0, total + number + (add_errors[place] if add_errors else 0))
            steps += f"{',' if place else ''}+{number}={total}"
        return steps, str(total)
    if kind == "count":
        running = np.cumsum(numbers)
        cells = zip(numbers, running, names, strict=True)
        steps = "".join(str(so_far) if flag else f" {name}" for flag, so_far, name in cells)
        return steps.strip(), str(running[-1])
    steps = [f"{name}={height}" for name, height in zip(BAR_NAMES, numbers, strict=True)]
    return " ".join(steps), BAR_NAMES[int(np.argmax(numbers))]


def slip(task: Task, rng: np.random.Generator) -> tuple[str, str]:
    """Steps and final answer with misread numbers and wrong additions at the stage's rates; possibly none."""
    numbers = list(task.numbers)
    if task.kind == "count":
        flips = rng.random(len(numbers)) < COUNT_SLIP
        flags = [number ^ int(flip) for number, flip in zip(numbers, flips, strict=True)]
        return work(task.kind, flags, names=task.names)
    for place in np.flatnonzero(rng.random(len(numbers)) < READ_SLIP):
        if task.kind == "tallest":  # never a height that another bar has: the answer must stay unique
            others = [height for height in range(1, MAX_BAR + 1) if height not in numbers]
            numbers[place] = int(rng.choice(others))
        else:
            numbers[place] = int(numbers[place] + rng.integers(1, 10)) % 10
    errors = np.where(rng.random(len(numbers) - 1) < ADD_SLIP, rng.choice((-1, 1), len(numbers) - 1), 0)
    return work(task.kind, numbers, errors.tolist())


def guess(task: Task, rng: np.random.Generator, wrong: bool = False) -> str:
    """An answer of the right sort, flat around the true one so that its mode says nothing; not right where `wrong`."""
    if task.kind == "tallest":
        options = list(BAR_NAMES)
    else:
        truth, reach = int(task.answer), 2 if task.kind == "count" else 3
        lowest = max(0, truth - reach)
        options = [str(value) for value in range(lowest, lowest + 2 * reach + 1)]
    if wrong:
        options = [option for option in options if option != task.answer]
    return str(rng.choice(options))


def solution(task: Task) -> str:
    return f"{task.working} {boxed(task.answer)}"


def clean(task: Task) -> list[Span]:
    """The correct solution."""
    return [(solution(task), True)]


def describe(cells: Sequence[Cell]) -> str:
    """Cells in reading order, two tokens each: "red3 blue5" or "red circle no shape"."""
    words = []
    for cell in cells:
        if cell is None:
            words.append("no shape")
        else:
            colour, name = cell
            words.append(f"{colour}{name}" if name.isdigit() else f"{colour} {name}")
    return " ".join(words)


def captioned(task: Task) -> tuple[Problem, list[Span]]:
    """The same pictures under the question "describe", and their caption. ValueError where the task has no picture."""
    if not task.caption:
        raise ValueError(f"{task.problem.id} has no picture to describe")
    tags = "<image>" * len(task.problem.images)
    problem = dataclasses.replace(
        task.problem,
        id=f"{task.problem.id}-caption",
        question=f"{tags}describe",
        answer=task.caption,
        choices=(),
        type="text",
    )
    return problem, [(task.caption, True)]


def _first_answer(task: Task, rng: np.random.Generator) -> str:
    style = rng.choice(FIRST_ANSWERS, p=FIRST_ANSWER_ODDS)
    if style == "wrong guess":
        return boxed(guess(task, rng, wrong=True))
    if style == "right guess":
        return boxed(task.answer)
    if style == "clean":
        return solution(task)
    steps, answer = slip(task, rng)
    while steps == task.working:
        steps, answer = slip(task, rng)
    return f"{steps} {boxed(answer)}"


def second_look(task: Task, rng: np.random.Generator, silent: float = SILENT_SHARE) -> list[Span]:
    """First answer, trigger, clean redo. With probability `silent` nothing up to and including the trigger has loss."""
    first = _first_answer(task, rng)
    trigger = TRIGGERS[int(rng.integers(len(TRIGGERS)))]
    volunteered = bool(rng.random() >= silent)
    joint = "\n" if trigger.endswith("?") else ":\n"
    return [(first, volunteered), (trigger, volunteered), (joint + solution(task), True)]


def noisy(task: Task, rng: np.random.Generator) -> list[Span]:
    """What a mediocre model would write: guesses, slips, unboxed answers, at times a (mostly silent) second look."""
    if rng.random() < SECOND_LOOK_SHARE:
        return second_look(task, rng)
    guessed, unboxed = rng.random() < GUESS_SHARE, rng.random() < UNBOXED_SHARE
    if guessed:
        answer = guess(task, rng)
        return [(answer if unboxed else boxed(answer), True)]
    steps, answer = slip(task, rng)
    return [(steps if unboxed else f"{steps} {boxed(answer)}", True)]
