"""`FILE.generations.jsonl`: judged generations as JSON lines, read strictly."""

import dataclasses
import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from rethinker_jax.benchmarks.records import Record
from rethinker_jax.errors import UserError
from rethinker_jax.json_lines import object_of
from rethinker_jax.types import FinishReason, VerdictName

SUFFIX = ".generations.jsonl"
_REQUIRED = {
    field.name
    for field in dataclasses.fields(Record)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
}
_KNOWN = {field.name for field in dataclasses.fields(Record)}
_TEXTS = ("id", "question", "answer", "type", "cluster", "completion", "rule", "forced")
_LISTS = ("choices", "alternatives")
_COUNTS = ("sample", "num_tokens", "forced_num_tokens")
_TEXTS_OR_NULL = ("extracted", "forced_extracted")
_NAMES = {
    "finish_reason": get_args(FinishReason),
    "verdict": get_args(VerdictName),
    "lenient": get_args(VerdictName),
    "forced_verdict": (*get_args(VerdictName), None),
}


def beside(output: Path, suffix: str) -> Path:
    """The file that belongs to a result: `out.json` → `out` + suffix; any other name is kept whole, so that `a.7b` and
    `a.72b` do not share a file."""
    return output.with_name(output.name.removesuffix(".json") + suffix)


def generations_path(output: Path) -> Path:
    """Where the judged generations behind a result file are: `results.json` → `results.generations.jsonl`."""
    return beside(output, SUFFIX)


def encode_record(record: Record) -> str:
    """One line with its end, in ASCII: model text may hold halves of characters, which no file could."""
    return json.dumps(dataclasses.asdict(record), sort_keys=True, allow_nan=False) + "\n"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes the records in the order given; the file appears whole or not at all. Raises UserError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="ascii") as file:
            file.writelines(map(encode_record, records))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give a path in a folder you may write to") from error


def read_records(path: Path) -> list[Record]:
    """The records of a file, in its order.

    Raises UserError that names the line for anything that is not a record, and for a sample that is there twice.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"wanted a readable file of judged generations, got {path} ({error.strerror})") from error
    records: list[Record] = []
    line_of: dict[tuple[str, int], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = decode_record(line)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: {error}. Wanted one judged generation a line, as `evaluate` writes them; "
                f"mend or remove the line."
            ) from error
        before = line_of.setdefault((record.id, record.sample), number)
        if before != number:
            raise UserError(
                f"{path}, line {number}: sample {record.sample} of item {record.id!r} is in line {before} already; "
                f"remove one of the two"
            )
        records.append(record)
    return records


def decode_record(line: bytes | str) -> Record:
    """The record of one line. Raises ValueError that says what is wrong with which key."""
    row = object_of(line)
    missing, unknown = sorted(_REQUIRED - row.keys()), sorted(row.keys() - _KNOWN)
    if missing or unknown:
        problems = [f"{key} is missing" for key in missing] + [f"{key!r} is not a key of it" for key in unknown]
        raise ValueError("; ".join(problems))
    for key, value in row.items():
        if not _fits(key, value):
            raise ValueError(f"{key} is not what it should be, came {reprlib.repr(value)}")
    fields: dict[str, Any] = {**row, **{key: tuple(row[key]) for key in _LISTS if key in row}}
    return Record(**fields)


def _fits(key: str, value: Any) -> bool:
    if key in _TEXTS:
        return isinstance(value, str)
    if key in _TEXTS_OR_NULL:
        return value is None or isinstance(value, str)
    if key in _COUNTS:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if key in _NAMES:
        return (value is None or isinstance(value, str)) and value in _NAMES[key]
    if key in _LISTS:
        return isinstance(value, list) and _all_texts(value)
    if key == "categories":
        return isinstance(value, dict) and _all_texts(list(value.values()))
    return key == "scored" and isinstance(value, bool)


def _all_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
