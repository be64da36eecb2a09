"""Lines of samples: those of `sample`, of `verify --data`, and the generations of `evaluate`, one at a time.

Text of models and files of strangers: a line is what it should be, or is refused by its number.
"""

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from rethinker_jax.errors import UserError
from rethinker_jax.json_lines import object_of
from rethinker_jax.types import FinishReason, VerdictName

MAX_CHARS = 1_000_000  # of one completion


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """What counts of one line. `row` is the place of its problem; `verdict` None: nobody judged it yet."""

    row: int
    number: int
    completion: str
    verdict: VerdictName | None
    finish_reason: FinishReason | None
    num_tokens: int | None
    mean_log_prob: float | None


def read_lines(lines: Iterable[bytes], name: str, row_of: Mapping[str, int], data: str) -> Iterator[Line]:
    """The lines that hold something, in their order. Per-token arrays are read for their mean and length alone.

    row_of  problem id → its place, of the rows of `data`.
    Raises UserError naming the line: for what is no sample, for an id that no row has, for a sample that came before.
    """
    seen: dict[tuple[int, int], int] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = _read(text, row_of, data)
        except ValueError as error:
            raise UserError(
                f"{name}, line {number}: {error}. Wanted one sample a line, as `sample` writes them or `verify --data` "
                f"judges them; mend or remove the line."
            ) from error
        before = seen.setdefault((line.row, line.number), number)
        if before != number:
            raise UserError(
                f"{name}, line {number}: sample {line.number} of this problem is in line {before} already; remove one "
                f"of the two."
            )
        yield line


def _read(text: bytes, row_of: Mapping[str, int], data: str) -> Line:
    """Raises ValueError that says what is wrong with which key."""
    found = object_of(text)
    missing = [key for key in ("id", "sample", "completion") if key not in found]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing")
    identity = found["id"]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise ValueError(f"id is neither text nor a whole number, came {reprlib.repr(identity)}")
    row = row_of.get(str(identity).strip())
    if row is None:
        raise ValueError(f"{data} has no usable row with the id {reprlib.repr(identity)}")
    completion = found["completion"]
    if not isinstance(completion, str) or len(completion) > MAX_CHARS:
        raise ValueError(f"completion is no text of at most {MAX_CHARS} characters, came {reprlib.repr(completion)}")
    if not completion.isascii() and any("\ud800" <= char <= "\udfff" for char in completion):
        raise ValueError("completion holds half of a character (a lone surrogate), which no file of text can hold")
    return Line(
        row,
        _count(found["sample"], "sample"),
        completion,
        _one_of(found.get("verdict"), "verdict", get_args(VerdictName)),
        _one_of(found.get("finish_reason"), "finish_reason", get_args(FinishReason)),
        _num_tokens(found),
        _mean_log_prob(found.get("log_probs")),
    )


def _num_tokens(found: Mapping[str, Any]) -> int | None:
    ids = found.get("completion_ids")
    if ids is not None:
        if not isinstance(ids, list):
            raise ValueError(f"completion_ids is not a list, came {reprlib.repr(ids)}")
        return len(ids)
    return None if found.get("num_tokens") is None else _count(found["num_tokens"], "num_tokens")


def _mean_log_prob(values: Any) -> float | None:
    if values is None or values == []:
        return None
    if not isinstance(values, list) or not all(type(value) in (float, int) for value in values):
        raise ValueError(f"log_probs is not a list of numbers, came {reprlib.repr(values)}")
    try:
        mean = math.fsum(values) / len(values)
    except (OverflowError, ValueError) as error:  # fsum refuses sums that no float holds, and inf with -inf
        raise ValueError(f"log_probs have no mean ({error})") from error
    if not math.isfinite(mean):
        raise ValueError(f"log_probs have the mean {mean}")
    return mean


def _count(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is not a whole number of at least 0, came {reprlib.repr(value)}")
    return value


def _one_of(value: Any, key: str, names: tuple[str, ...]) -> Any:
    if value is not None and (not isinstance(value, str) or value not in names):
        raise ValueError(f"{key} is none of {', '.join(names)}, came {reprlib.repr(value)}")
    return value
