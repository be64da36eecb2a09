"""Values of the JSON files of a model directory: each is what its reader promises, or is refused by its key.

Readers raise ValueError; whoever knows the file says which it was. A missing key takes the default. A null does not,
as in transformers: the few keys where it has a meaning there are read by whoever knows that meaning.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError

# The smallest and the largest normal float32: the numbers go into float32 arithmetic.
SMALLEST, LARGEST = 1.18e-38, 3.4e38

Section = Mapping[str, Any]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again from the model it belongs to") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: wanted a JSON object, came {type(found).__name__}: copy it again from the model it belongs to"
        )
    return found


def whole(section: Section, key: str, default: int, least: int = 1) -> int:
    value = section.get(key, default)
    if not _is_whole(value, least):
        raise _refusal(key, f"a whole number of at least {least}", value)
    return value


def whole_list(section: Section, key: str, default: Sequence[int], least: int = 0) -> tuple[int, ...]:
    value = section.get(key, default)
    if not isinstance(value, list | tuple) or not all(_is_whole(item, least) for item in value):
        raise _refusal(key, f"a list of whole numbers of at least {least}", value)
    return tuple(value)


def number(section: Section, key: str, default: float) -> float:
    value = section.get(key, default)
    if not _is_number(value, SMALLEST):
        raise _refusal(key, "a number above 0 that float32 holds", value)
    return float(value)


def three_numbers(
    section: Section, key: str, default: Sequence[float], positive: bool = False
) -> tuple[float, float, float]:
    value = section.get(key, default)
    least = SMALLEST if positive else -LARGEST
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(_is_number(item, least) for item in value):
        raise _refusal(key, f"a list of three numbers{' above 0' if positive else ''} that float32 holds", value)
    return float(value[0]), float(value[1]), float(value[2])


def flag(section: Section, key: str) -> bool:
    """False where it is missing or null."""
    value = section.get(key)
    if value is not None and not isinstance(value, bool):
        raise _refusal(key, "true or false", value)
    return bool(value)


def string(section: Section, key: str) -> str | None:
    """None where it is missing or null."""
    value = section.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise _refusal(key, "a word in quotes", value)
    return value


def mapping(section: Section, key: str) -> Section:
    """Empty where it is missing or null."""
    value = section.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _refusal(key, "an object of keys and values", value)
    return value or {}


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float) -> bool:
    # Compared, not converted: a NaN fails the comparison, and an integer may be too long for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= LARGEST


def _refusal(key: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{key} must be {wanted}, came {reprlib.repr(value)}")
