"""What comes out of the drawing: lines in the file, counts, and what a person sees of it."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console

from rethinker_jax.benchmarks.record_files import encode_record
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.console import RunProgress
from rethinker_jax.evaluation.asks import Ask
from rethinker_jax.evaluation.results import LeftOut
from rethinker_jax.prompts.build import BadPrompt
from rethinker_jax.stopping import StopRequest


class Listener:
    """Writes lines as records come, counts, and shows how far it is. `kept`: ids whose lines are in the file."""

    def __init__(self, title: str, num_items: int, num_done: int, kept: frozenset[str], missing: Sequence[LeftOut]):
        self._console = Console(stderr=True)
        self.shown = RunProgress(num_items, num_done, title=title, console=self._console, unit="item")
        self._title = title
        self._kept = kept
        self.num_done = num_done
        self.found: list[Record] = []
        self.missing: list[LeftOut] = []
        self.file: TextIO | None = None
        self.stop: StopRequest | None = None
        for one in missing:
            self._leave_out(one)

    def records(self, records: Sequence[Record]) -> None:
        assert self.file is not None and self.stop is not None, "records before the file was opened"
        self.found += records
        fresh = [record for record in records if record.id not in self._kept]
        if fresh:
            with self.stop.held():
                self.file.write("".join(map(encode_record, fresh)))
                self.file.flush()

    def left_out(self, ask: Ask, error: BadPrompt) -> None:
        name = ask.problem.id
        self._leave_out(LeftOut(name, f"item {name!r}", error.kind, str(error)))

    def drawn(self, num_drawn: int, num_wanted: int) -> None:
        if self._console.is_terminal:
            self.shown.phase(f"{self._title}: {num_drawn} of {num_wanted} completions")

    def batch_done(self, num_items: int) -> None:
        self.num_done += num_items
        right = sum(record.correct for record in self.found)
        self.shown.update(self.num_done, {"accuracy": right / len(self.found) if self.found else float("nan")})

    def _leave_out(self, one: LeftOut) -> None:
        self.missing.append(one)
        self.shown.note(f"left out ({one.kind}): {one.where}: {one.why}")
