"""Rows that were selected, written in the form in which they were read, with columns added to them.

The columns that were there stay as they are: parquet by its own types and metadata, a JSON line to the byte. A column
that is given anew takes the place of the old one, and then a JSON line is written anew.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rethinker_jax.curation.sources import Row, Source, read_batches
from rethinker_jax.errors import UserError
from rethinker_jax.json_lines import with_keys

ROW_GROUP_BYTES = 64 << 20
TYPES = {"pass_rate": pa.float64(), "num_samples": pa.int64()}  # of added columns; any other is text


@dataclasses.dataclass(frozen=True, slots=True)
class NewRow:
    """A row to write: where it was read, and the columns that are added to it. All have the same columns added."""

    row: Row
    added: Mapping[str, Any]


def write_rows(source: Source, rows: Sequence[NewRow], output: Path) -> None:
    """The rows, which are in the order of the source's; `output` appears whole or not at all.

    A row may be there several times. Raises UserError where the files of a folder have different columns.
    """
    temporary = output.with_name(output.name + ".tmp")
    try:
        if source.suffix == ".jsonl":
            with temporary.open("wb") as file:
                _write_lines(source.files[0], rows, file)
        else:
            _write_parquet(source, rows, temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _write_lines(path: Path, rows: Sequence[NewRow], file: IO[bytes]) -> None:
    place = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            while place < len(rows) and rows[place].row.number == number:
                file.write(with_keys(line, rows[place].added) if rows[place].added else line.rstrip() + b"\n")
                place += 1


def _write_parquet(source: Source, rows: Sequence[NewRow], path: Path) -> None:
    writer: pq.ParquetWriter | None = None
    held: list[pa.Table] = []
    try:
        for table in _tables(source, rows):
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema)
            elif not table.schema.equals(writer.schema):
                raise UserError(f"{source.name}: its files have different columns; select from one file at a time")
            held.append(table)
            if sum(one.nbytes for one in held) >= ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(held))
                held = []
        if writer is not None and held:
            writer.write_table(pa.concat_tables(held))
    finally:
        if writer is not None:
            writer.close()


def _tables(source: Source, rows: Sequence[NewRow]) -> Iterator[pa.Table]:
    """The chosen rows of one batch after the other, with their columns added."""
    place = 0
    for number, file in enumerate(source.files):
        first = 0
        for batch in read_batches(file):
            end = first + batch.num_rows
            chosen = []
            while place < len(rows) and rows[place].row.file == number and rows[place].row.number < end:
                chosen.append(rows[place])
                place += 1
            if chosen:
                kept = pa.table(batch).take(pa.array([one.row.number - first for one in chosen]))
                yield _with_columns(kept, [one.added for one in chosen])
            first = end


def _with_columns(table: pa.Table, added: Sequence[Mapping[str, Any]]) -> pa.Table:
    for name in added[0]:
        column = pa.array([one[name] for one in added], TYPES.get(name, pa.string()))
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table
