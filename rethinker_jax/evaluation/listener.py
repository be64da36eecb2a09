"""What comes out of the drawing: lines in the file, counts, and what a person sees of it."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console

from rethinker_jax.benchmarks.record_files import encode_record
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.console import RunProgress
from rethinker_jax.evaluation.asks import Ask
from rethinker_jax.evaluation.results import LeftOut
from rethinker_jax.stopping import StopRequest


class Listener:
    """Writes lines as records come, counts, and shows how far it is.

    `num_items` are to be done, with `n` completions each; of `kept` all lines are in the file. `quiet`: another process
    writes and shows.
    """

    def __init__(
        self,
        title: str,
        num_items: int,
        n: int,
        kept: frozenset[str],
        missing: Sequence[LeftOut],
        quiet: bool = False,
    ):
        self._num_done = n * (len(kept) + sum(bool(one.id) for one in missing))
        console = Console(stderr=True, quiet=quiet)
        self.shown = RunProgress(n * num_items, self._num_done, title=title, console=console, unit="completion")
        self._kept = kept
        self._n = n
        self._quiet = quiet
        self._num_right = 0
        self.found: list[Record] = []
        self.missing: list[LeftOut] = []
        self.file: TextIO | None = None
        self.stop: StopRequest | None = None
        for one in missing:
            self._leave_out(one)

    def records(self, records: Sequence[Record]) -> None:
        assert self._quiet or (self.file is not None and self.stop is not None), "records before the file was opened"
        if not records:
            return
        self.found += records
        self._num_right += sum(record.correct for record in records)
        fresh = [record for record in records if record.id not in self._kept]
        if fresh and self.file is not None and self.stop is not None:
            with self.stop.held():
                self.file.write("".join(map(encode_record, fresh)))
                self.file.flush()
                self.stop.agree([self.stop.asked])  # of several processes, one that stops ends all
        self._num_done += len(fresh)
        self.shown.update(self._num_done, {"accuracy": self._num_right / len(self.found)})

    def left_out(self, ask: Ask, kind: str, why: str) -> None:
        name = ask.problem.id
        self._num_done += self._n
        self._leave_out(LeftOut(name, f"item {name!r}", kind, why))

    def _leave_out(self, one: LeftOut) -> None:
        self.missing.append(one)
        self.shown.note(f"left out ({one.kind}): {one.where}: {one.why}")
