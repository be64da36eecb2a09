"""The files of rows that are selected from, read one row at a time.

Nothing of a row is kept in memory but what filters and the verifier look at; images are read again when it is written.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.dataset import EXAMPLE_CACHE, SPLIT_NAME, BadRow
from rethinker_jax.prompts.rows import BadField, Columns, match_columns, read_row
from rethinker_jax.verify.judge import JudgeItem

READ_ROWS = 64  # of parquet at once: rows may hold images
REQUIRED = ("question",)  # a row without an answer has no right samples, which is said by its verdicts


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of `--data`, all parquet or one of JSON lines. `suffix` says which, and that of what is written."""

    name: str
    files: tuple[Path, ...]
    suffix: str


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One usable row. `file` and `number` are its place, `columns` what filters asked for."""

    id: str
    source: str
    gold: JudgeItem
    file: int
    number: int
    columns: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The usable rows in the order of the files.

    id_column  "" where rows are named by file and number.
    path_root  the folder that image paths start from; None where no row has a path.
    """

    rows: tuple[Row, ...]
    bad_rows: tuple[BadRow, ...]
    id_column: str
    path_root: Path | None


def open_source(data: str) -> Source:
    """Raises UserError for what is no file of rows."""
    path = Path(data).expanduser()
    if data.startswith("example:"):
        from rethinker_jax.example.dataset import example_path  # makes pictures: only who asks for them pays

        return Source(data, (example_path(data, os.path.expanduser(EXAMPLE_CACHE)),), ".parquet")
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        splits = {match.group(1).lower() for match in map(SPLIT_NAME.match, (file.name for file in files)) if match}
        if not files or len(splits) > 1:
            held = f"files of several splits ({', '.join(sorted(splits))})" if files else "no parquet files"
            raise UserError(f"--data {data}: the folder holds {held}; name one file, or a folder of one split")
        return Source(data, tuple(files), ".parquet")
    if path.suffix in (".parquet", ".jsonl") and path.is_file():
        return Source(data, (path,), path.suffix)
    raise UserError(
        f"--data {data}: wanted a .parquet or .jsonl file, a folder of parquet files, or example:SPLIT. Rows of a hub "
        f"id are downloaded first."
    )


def read_rows(source: Source, image_root: str, columns: Sequence[str], max_bad_rows: int) -> Rows:
    """The rows, read by the rules of training, so that ids and the rows left out are the same as there.

    `columns` are kept of every row for filters; one that no row has is an error. Raises UserError, also for an id that
    occurs twice and for more bad rows than `max_bad_rows`.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    where_of: dict[str, str] = {}
    id_column, path_root = "", None
    for file, path in enumerate(source.files):
        names = column_names(path)
        matched = match_columns(names, {}, path.name, REQUIRED)
        id_column = matched.of.get("id", "")
        root = os.path.realpath(os.path.expanduser(image_root) if image_root else path.parent)
        for column in columns:
            if column not in names:
                raise UserError(f"{path} has no column {column!r}, which the filter column asks for")
        for number, values in enumerate(_values(path)):
            where = f"{path.name} row {number}"
            try:
                if values is None:
                    continue
                row, has_path = _row(values, matched, where, f"{path.stem}-{number}", root, columns, (file, number))
            except BadField as error:
                bad.append(BadRow(where, error.kind, error.why))
                continue
            if row.id in where_of:
                raise UserError(f"the id {row.id!r} occurs twice, in {where_of[row.id]} and {where}: ids must differ")
            where_of[row.id] = where
            path_root = Path(root) if has_path else path_root
            rows.append(row)
    if len(bad) > max_bad_rows or not rows:
        said = f"; the first: {bad[0].where}: {bad[0].why}" if bad else ""
        raise UserError(
            f"{source.name}: {len(bad)} of {len(bad) + len(rows)} rows cannot be used{said}. At most "
            f"{max_bad_rows} may be left out (run.max_bad_rows), and one row must be there"
        )
    return Rows(tuple(rows), tuple(bad), id_column, path_root)


def read_golds(data: str, image_root: str, max_bad_rows: int) -> dict[str, JudgeItem]:
    """Problem id → what a response to it is judged by. Raises UserError as `read_rows` does."""
    rows = read_rows(open_source(data), image_root, (), max_bad_rows)
    return {row.id.strip(): row.gold for row in rows.rows}


def _row(
    values: Mapping[str, Any] | BadField,
    matched: Columns,
    where: str,
    row_id: str,
    root: str,
    columns: Sequence[str],
    place: tuple[int, int],
) -> tuple[Row, bool]:
    """The row, and whether an image of it is a path. Raises BadField."""
    if isinstance(values, BadField):
        raise values
    problem = read_row(values, matched, where=where, row_id=row_id, image_root=root, required=REQUIRED)
    answer = matched.value(values, "answer")
    is_answer = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    gold = JudgeItem("", str(answer) if is_answer else "", problem.choices, problem.type)
    kept = {column: values.get(column) for column in columns}
    has_path = any(isinstance(image, str) for image in problem.images)
    return Row(problem.id, problem.source, gold, *place, kept), has_path


def column_names(path: Path) -> list[str]:
    """Of a JSON lines file those of all its rows."""
    if path.suffix == ".jsonl":
        names: dict[str, None] = {}
        for values in _values(path):
            if isinstance(values, dict):
                names.update(dict.fromkeys(values))
        return list(names)
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def _values(path: Path) -> Iterator[dict[str, Any] | BadField | None]:
    """The rows of a file by number; a BadField where one cannot be read, None for an empty line."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for line in file:
                yield _json_row(line) if line.strip() else None
        return
    for batch in read_batches(path):
        yield from batch.to_pylist()


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A parquet file, few rows at a time. Raises UserError."""
    try:
        with _parquet(path) as file:
            yield from file.iter_batches(batch_size=READ_ROWS)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {error}") from error


def _json_row(line: bytes) -> dict[str, Any] | BadField:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadField("bad_json", f"{error}")
    return row if isinstance(row, dict) else BadField("bad_json", f"wanted an object, found {type(row).__name__}")


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {error}") from error
