"""The prompts of the next rollout batch, made beside the device's work: read, decoded, cut into patches, tokenised."""

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from rethinker_jax.curation.curriculum import CurriculumOrder
from rethinker_jax.phases import CLOCK
from rethinker_jax.processes import is_mine
from rethinker_jax.prompts.build import Made, PromptBuilder
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.types import Problem

Order = DataOrder | CurriculumOrder


def rows_at(order: Order, cursor: int, count: int) -> list[int]:
    """The row numbers at `count` places of the data order from `cursor` on; one that is met twice comes once."""
    return list(dict.fromkeys(order[cursor + place] for place in range(count)))


class PromptsAhead:
    """One thread, and at most one batch, whose patches lie in memory beside those of the batch under way.

    The thread reads and computes. Whatever processes tell each other, what is written to the run, and what is kept for
    later stays in the main thread, at the place where it would be without this class. Use as a context manager: the
    thread ends with the picture that it is at.
    """

    def __init__(self, builder: PromptBuilder, problems: Sequence[Problem], order: Order, count: int):
        """`count`: places of the data order that a batch has."""
        self._builder, self._problems, self._order, self._count = builder, problems, order, count
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts ahead")
        self._coming: tuple[int, Future[dict[int, Made]], threading.Event] | None = None
        self._num_taken = self._num_thrown_away = 0

    def __enter__(self) -> "PromptsAhead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._drop()
        self._thread.shutdown()

    def begin(self, cursor: int) -> None:
        """Make the prompts of the batch at this place; what was made for another place goes."""
        self._drop()
        unwanted, rows = threading.Event(), rows_at(self._order, cursor, self._count)
        self._coming = cursor, self._thread.submit(self._make, rows, unwanted), unwanted

    def take(self, cursor: int, wanted: Collection[int]) -> dict[int, Made]:
        """By row number what was made of the `wanted` rows of the batch at this place, once it is finished.

        Nothing where another place was guessed. What the thread failed with is raised here.
        """
        if self._coming is None or self._coming[0] != cursor:
            self._drop()
            return {}
        (_, batch, _), self._coming = self._coming, None
        made = batch.result()
        taken = {row: one for row, one in made.items() if row in wanted}
        self._num_taken += len(taken)
        self._num_thrown_away += len(made) - len(taken)
        return taken

    def counts(self) -> dict[str, float]:
        """As metrics, since this was asked last: prompts that were used, and that were made in vain."""
        found = {"prompts_made_ahead": self._num_taken, "prompts_thrown_away": self._num_thrown_away}
        self._num_taken = self._num_thrown_away = 0
        return found

    def _drop(self) -> None:
        if self._coming is None:
            return
        (_, batch, unwanted), self._coming = self._coming, None
        unwanted.set()
        if not batch.cancel() and batch.exception() is None:
            self._num_thrown_away += len(batch.result())

    def _make(self, rows: Sequence[int], unwanted: threading.Event) -> dict[int, Made]:
        made: dict[int, Made] = {}
        with CLOCK.span("prompts ahead"):
            for place, row in enumerate(rows):
                if unwanted.is_set():
                    break
                # Of several processes each decodes the pictures of its share, as in `run_data.build_prompts`.
                one = self._builder.make(self._problems[row], decode=is_mine(place))
                if one is not None:
                    made[row] = one
        return made
