"""Reward functions of your own, as the trainer sees them: rows in, values out, or a UserError that says what is wrong.

They run in a process of their own (`rewards.worker`), one call after the other. Whatever goes wrong there stops the
run: a reward that is silently 0 would be learned. Their deadline is of plain wall clock: a function may wait for a
network or a file, so its CPU time says nothing.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.rewards.inputs import RewardInput, TermValue
from rethinker_jax.types import SEGMENT_NAMES
from rethinker_jax.verify.process import DeadlinePassed, WorkerGone, WorkerProcess

MODULE = "rethinker_jax.rewards.worker"


class UserFunctions:
    """The process with the functions `names`, each a `path.py:function`. Not thread-safe but for `kill`."""

    def __init__(self, names: Sequence[str], kwargs: Mapping[str, Mapping[str, Any]], deadline_s: float):
        """Starts the process and loads the functions. Raises UserError for one that cannot be used.

        On Linux the process ends with the thread that calls this.
        """
        self._names = tuple(names)
        self._deadline_s = deadline_s
        self._fault: UserError | None = None  # once there is one, there are no more values
        wanted = json.dumps([(name, dict(kwargs.get(name, {}))) for name in names])
        self._process = WorkerProcess(VerifierConfig(), (MODULE, wanted))
        try:
            ready = self._process.wait_ready()
            if "error" in ready:
                raise self._failed(f"{_called(self._names[ready['function']])}: {ready['error']['what']}", "")
        except (WorkerGone, DeadlinePassed) as error:
            what = "its process ended" if isinstance(error, WorkerGone) else "it takes more than two minutes"
            raise self._failed(f"{' and '.join(map(_called, names))}: {what} while the file was loaded") from None
        self._batched: list[bool] = ready["batched"]

    def values(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[TermValue]:
        """What the function gives each row. Raises UserError and ends the process where it gives none."""
        if self._fault is not None:
            raise self._fault
        number = self._names.index(name)
        self._process.send({"function": number, "rows": rows})
        values: list[TermValue] = []
        while len(values) < len(rows):
            left = rows[len(values) :]
            where = _place(name, left if self._batched[number] else left[:1])
            try:
                reply = self._process.read_line(self._deadline_s)
            except DeadlinePassed:
                raise self._failed(f"{where}: no value after {self._deadline_s:g} s (reward.user_deadline_s)") from None
            except WorkerGone:
                raise self._failed(f"{where}: its process ended") from None
            if "error" in reply:
                error = reply["error"]
                raise self._failed(f"{_called(name)}: row {error['row']!r}: {error['what']}", "")
            values += reply["values"]
        return values

    def kill(self) -> None:
        """From any thread; a call that is under way raises."""
        self._process.kill()

    def close(self) -> None:
        self._process.close()

    def _failed(self, what: str, words: str | None = None) -> UserError:
        """Ends the process; `words` is what to say of its output, by default its last lines."""
        words = self._process.error_tail()[-500:] if words is None else words
        self.close()
        self._fault = UserError(f"{what}." + (f" Its last words: {words}" if words else ""))
        return self._fault


def _called(name: str) -> str:
    file, _, function = name.rpartition(":")
    return f"reward function {function} in {file}"


def _place(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    ids = list(dict.fromkeys(str(row["id"]) for row in rows))
    shown = ", ".join(repr(one) for one in ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return f"{_called(name)}: {'row' if len(ids) == 1 else 'rows'} {shown}"


def user_row(given: RewardInput) -> dict[str, Any]:
    """What a function of your own is given of a response: plain values, the whole dataset row under `row`.

    `response`, `response_length` and `ground_truth` are EasyR1's names. Images themselves are left out; `images` holds
    their sizes as (width, height).
    """
    problem, verdict = given.problem, given.verdict
    return {
        "id": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "ground_truth": problem.answer,
        "choices": list(problem.choices),
        "type": problem.type,
        "source": problem.source,
        "row": {str(name): plain(value) for name, value in problem.row.items()},
        "response": given.response,
        "response_length": given.num_tokens,
        "segments": [[SEGMENT_NAMES[number], text] for number, text in given.parts],
        "stopped": given.stopped,
        "forced": given.forced,
        "images": [{"original": size.original, "resized": size.resized} for size in given.images],
        "extracted": verdict.extracted,
        "verdict": verdict.verdict,
        "correct": verdict.correct,
        "rule": verdict.rule,
    }


def plain(value: Any) -> Any:
    """A column's value as JSON has it. Bytes are left out (None); what JSON does not know is written as text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return None
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return str(value)
