"""Rows → problems: parquet, JSON lines, folders of parquet files, hub ids and the built-in example."""

import collections
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.rows import REQUIRED, BadField, match_columns, read_row
from rethinker_jax.terminal import printable
from rethinker_jax.types import Problem

EXAMPLE_CACHE = "~/.cache/rethinker_jax/example"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that was left out. `where` names file and row, `kind` is what to count by, `why` is a sentence."""

    where: str
    kind: str
    why: str


@dataclasses.dataclass(frozen=True)
class Problems:
    """What a source holds: problems in the order of its rows, ids unique, and the rows that were left out."""

    problems: tuple[Problem, ...]
    bad_rows: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def bad_kinds(self) -> dict[str, int]:
        """How many rows were left out, by kind."""
        return dict(collections.Counter(row.kind for row in self.bad_rows))


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a source. `rows` holds a BadRow where a row could not be read; `folder` is where its paths start."""

    name: str
    columns: list[str]
    rows: list[dict[str, Any] | BadRow]
    folder: Path | None


def read_problems(
    source: str,
    *,
    image_root: str = "",
    columns: Mapping[str, str] | None = None,
    max_bad_rows: int = 100,
    answers: bool = True,
) -> Problems:
    """Reads all problems of a source.

    source        a .parquet or .jsonl file, a folder of parquet files (its own, not those of folders in it), a hub id
                  "owner/name" or "owner/name:split" (split train by default), or "example:SPLIT".
    image_root    folder that relative paths start from and that no path may leave; "" = the folder of the rows file.
    columns       field → column, for layouts that `rows.ALIASES` does not know.
    answers       whether a row needs an answer; without, answers are not read.
    max_bad_rows  more rows than this that cannot be used are an error; fewer are left out and listed.

    A source without an id column gets ids from file name and row number. An id that occurs twice is an error, because
    ids name the random stream, the replayed rows and the results. Images are checked to exist, not decoded.
    Raises UserError for anything that cannot be used.
    """
    if image_root and not os.path.isdir(os.path.expanduser(image_root)):
        raise UserError(f"data.image_root: {image_root} is not a folder")
    problems: list[Problem] = []
    bad_rows: list[BadRow] = []
    where_of: dict[str, str] = {}
    required = REQUIRED if answers else ("question",)
    for part in parts_of(source):
        folder = Path(image_root).expanduser() if image_root else part.folder
        root = os.path.realpath(folder) if folder is not None else None
        for problem, where in _part_problems(part, columns or {}, root, bad_rows, required):
            if problem.id in where_of:
                raise UserError(
                    f"the id {problem.id!r} occurs twice, in {where_of[problem.id]} and {where}: ids must differ; make "
                    f"them so, or name another column for the id"
                )
            where_of[problem.id] = where
            problems.append(problem)
    found = Problems(tuple(problems), tuple(bad_rows))
    if len(bad_rows) > max_bad_rows:
        raise UserError(f"{source}: {_describe(found)}; more than max_bad_rows={max_bad_rows} (run.max_bad_rows)")
    if not problems:
        raise UserError(f"{source} holds no usable problem: {_describe(found)}")
    return found


def _part_problems(
    part: Part, columns: Mapping[str, str], root: str | None, bad_rows: list[BadRow], required: Sequence[str]
) -> Iterator[tuple[Problem, str]]:
    """(problem, where) of each usable row; the others are added to `bad_rows`."""
    if all(isinstance(row, BadRow) for row in part.rows):  # no row has columns that could be matched
        bad_rows.extend(row for row in part.rows if isinstance(row, BadRow))
        return
    matched = match_columns(part.columns, columns, part.name, required)
    stem = Path(part.name).stem
    for number, row in enumerate(part.rows):
        if isinstance(row, BadRow):
            bad_rows.append(row)
            continue
        where = f"{part.name} row {number}"
        try:
            row_id = f"{stem}-{number}"
            yield read_row(row, matched, where=where, row_id=row_id, image_root=root, required=required), where
        except BadField as error:
            bad_rows.append(BadRow(where, error.kind, printable(error.why)))


def _describe(found: Problems) -> str:
    """What was left out, by kind and with one example each: "1 of 3 rows cannot be used: 1 empty_answer (...)"."""
    if not found.bad_rows:
        return "it has no rows"
    first = {row.kind: row for row in reversed(found.bad_rows)}
    kinds = sorted(found.bad_kinds.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {kind} ({first[kind].where}: {first[kind].why})" for kind, count in kinds)
    return f"{len(found.bad_rows)} of {len(found.bad_rows) + len(found)} rows cannot be used: {listed}"


def parts_of(source: str) -> Iterator[Part]:
    """The files of a source, in the order of their names. Raises UserError."""
    path = Path(source).expanduser()
    if source.startswith("example:"):
        from rethinker_jax.example.dataset import example_path  # makes pictures: only who asks for them pays

        yield _parquet_part(example_path(source, os.path.expanduser(EXAMPLE_CACHE)))
    elif path.is_dir():
        for file in _parquet_files(path):
            yield _parquet_part(file)
    elif path.suffix == ".parquet" and path.is_file():
        yield _parquet_part(path)
    elif path.suffix == ".jsonl" and path.is_file():
        yield _json_lines_part(path)
    elif path.exists():
        raise UserError(f"{source}: wanted a .parquet or .jsonl file, a folder of parquet files, or a hub id")
    elif HUB_ID.fullmatch(source) and path.suffix not in (".parquet", ".jsonl", ".json"):
        yield _hub_part(source)
    else:
        raise UserError(
            f"there is no {source}{_near_file(path)}; wanted a .parquet or .jsonl file, a folder of them, a "
            f"hub id owner/name[:split], or example:train"
        )


def _near_file(path: Path) -> str:
    """The file of the same folder whose name is nearest."""
    if not path.parent.is_dir():
        return f" (nor the folder {path.parent})"
    close = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=1, cutoff=0.6)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _parquet_files(folder: Path) -> list[Path]:
    """The folder's own parquet files. Raises UserError for none, and for a folder that mixes splits."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(f"there are no .parquet files in the folder {folder}: name the folder that holds them")
    splits = {match.group(1).lower() for match in map(SPLIT_NAME.match, (file.name for file in files)) if match}
    if len(splits) > 1:
        raise UserError(
            f"the folder {folder} holds files of several splits ({', '.join(sorted(splits))}), and reading them "
            f"together would train on test rows: name one file, or put the files of one split into a folder"
        )
    return files


def _parquet_part(path: Path) -> Part:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            rows = [row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist()]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as parquet: {error}") from error
    return Part(path.name, columns, rows, path.parent)


def _json_lines_part(path: Path) -> Part:
    """Blank lines are skipped but counted, so that row numbers are line numbers from 0."""
    rows: list[dict[str, Any] | BadRow] = []
    columns: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file):
            where = f"{path.name} row {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                rows.append(BadRow(where, "bad_json", f"{error}" if line.strip() else "an empty line"))
                continue
            if not isinstance(row, dict):
                rows.append(BadRow(where, "bad_json", f"wanted an object, found {type(row).__name__}"))
                continue
            if b"\\ud" in line.lower() and _has_half_character(row):
                rows.append(BadRow(where, "bad_json", "a text holds half of a character, which no file can"))
                continue
            columns.update(dict.fromkeys(row))
            rows.append(row)
    while rows and isinstance(rows[-1], BadRow) and rows[-1].why == "an empty line":
        rows.pop()
    return Part(path.name, list(columns), rows, path.parent)


def _has_half_character(row: Mapping[str, Any]) -> bool:
    """Whether a text in the row, or a name in it, has a lone surrogate: JSON can write one, UTF-8 cannot."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _hub_part(source: str) -> Part:
    """A split of a dataset on the Hugging Face hub, through its local cache. Raises UserError when it cannot be had."""
    name, _, split = source.partition(":")
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(
            f"{source} looks like a hub id, which needs the package datasets: pip install datasets"
        ) from error
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"cannot load {source!r} from the Hugging Face hub ({type(error).__name__}: {error}). There is no local "
            f"file of that name either. Check the name and the connection, or download the parquet files and name them"
        ) from error
    return _hub_rows(source, table)


def _hub_rows(source: str, table: Any) -> Part:
    """Rows of a `datasets.Dataset`. As arrow, images come as the {bytes, path} they are stored as, not decoded."""
    rows = [row for batch in table.with_format("arrow").iter(batch_size=1024) for row in batch.to_pylist()]
    return Part(source.replace("/", "-").replace(":", "-"), list(table.column_names), rows, None)
