"""The rows of `sft.data` and `sft.validation`: the built-in example's, or a file's in any format that is known."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rethinker_jax.config import Config
from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import SFT_SEED, Stage, sft_examples
from rethinker_jax.output_files import hash_of
from rethinker_jax.prompts.dataset import BadRow, Part, parts_of
from rethinker_jax.prompts.rows import BadField
from rethinker_jax.sft.conversation import SftRow, Turn
from rethinker_jax.sft.formats import Source, columns_of, detect_format, read_sft_row

# The embedded example's stages: clean solutions and captions; the same with second looks; bad habits.
EXAMPLE_STAGES: dict[str, tuple[Stage, float]] = {
    "example:sft-clean": ("clean", 0.0),
    "example:sft-look": ("clean", 0.7),
    "example:sft-noisy": ("noisy", 0.0),
}
SILENT = 0.85  # share of second looks whose trigger is not learned: the skill is there, but not volunteered
EXAMPLE_ROWS = 1 << 20  # the example's rows are made when asked for; this many before they repeat
SPLIT_STREAM = 0x5F7  # names the random stream by which validation rows are chosen

Note = Callable[[BadRow], None]  # takes a row that was left out; may raise UserError when there are too many


@dataclasses.dataclass(frozen=True)
class SftRows:
    """Rows by number. Other rows have another `hash`."""

    count: int
    hash: str
    read: Callable[[int], SftRow]


@dataclasses.dataclass(frozen=True)
class Split:
    train: SftRows
    validation: tuple[SftRow, ...]


def open_split(config: Config, note: Note) -> Split:
    """The rows to learn, and those of `sft.validation` or `sft.validation_fraction` to measure on.

    Rows that cannot be used go to `note`. Raises UserError where none is left.
    """
    sft = config.sft
    if sft.validation and sft.validation_fraction:
        raise UserError("sft.validation and sft.validation_fraction are both set; wanted one of them.")
    rows, limit = open_rows(config, sft.data, "sft.data", note), sft.validation_rows
    if sft.validation:
        other = open_rows(config, sft.validation, "sft.validation", note)
        return Split(rows, tuple(other.read(number) for number in range(min(other.count, limit or other.count))))
    if not sft.validation_fraction:
        return Split(rows, ())
    held = int(np.ceil(rows.count * sft.validation_fraction))
    if held >= rows.count:
        raise UserError(
            f"sft.validation_fraction {sft.validation_fraction} of {rows.count} rows leaves none to learn; lower it."
        )
    order = np.random.default_rng([config.run.seed, SPLIT_STREAM]).permutation(rows.count)
    kept, chosen = np.sort(order[held:]), np.sort(order[: min(held, limit or held)])
    train = SftRows(len(kept), f"{rows.hash} without {held}", lambda number: rows.read(int(kept[number])))
    return Split(train, tuple(rows.read(int(number)) for number in chosen))


def open_rows(config: Config, source: str, key: str, note: Note) -> SftRows:
    """The rows of a source: example:sft-STAGE, or a file, folder or hub id. Raises UserError."""
    if source in EXAMPLE_STAGES:
        stage, second_looks = EXAMPLE_STAGES[source]

        def make(index: int) -> SftRow:
            example = sft_examples(stage, SFT_SEED, index, second_looks, SILENT)
            return SftRow(example.problem, (Turn("assistant", example.spans),))

        return SftRows(EXAMPLE_ROWS, source, make)
    if not source:
        raise UserError(
            f"{key}: wanted a file of rows with a completion, or one of {', '.join(EXAMPLE_STAGES)}; nothing came. "
            "Set it."
        )
    if config.data.image_root and not os.path.isdir(os.path.expanduser(config.data.image_root)):
        raise UserError(f"data.image_root: {config.data.image_root} is not a folder")
    rows = list(_rows(config, source, note))
    if not rows:
        raise UserError(
            f"{source}: no row has a `completion` or an assistant's turn that can be learned; see bad_rows.jsonl in "
            "the run directory."
        )
    hash = hash_of(map(_content, rows))
    return SftRows(len(rows), hash, rows.__getitem__)


def _content(row: SftRow) -> tuple[object, ...]:
    """What is learned of a row, with its pictures; of one that is a file, its name: it is read when it is due."""
    pictures = [
        hashlib.sha256(one).hexdigest() if isinstance(one, bytes) else Path(one).name for one in row.problem.images
    ]
    return row.problem.id, row.problem.question, row.turns, row.system, pictures


def _rows(config: Config, source: str, note: Note) -> Iterator[SftRow]:
    """The rows of all files that can be used. An id that was there before is told apart by where it stands."""
    known: set[str] = set()
    for part in _json_or_parts(source):
        if all(isinstance(row, BadRow) for row in part.rows):  # nothing has columns that could be matched
            for row in part.rows:
                if isinstance(row, BadRow):
                    note(row)
            continue
        found = _source(config, part)
        for number, row in enumerate(part.rows):
            if isinstance(row, BadRow):
                note(row)
                continue
            try:
                one = read_sft_row(row, found, number)
            except BadField as error:
                note(BadRow(f"{part.name} row {number}", error.kind, error.why))
                continue
            if one.problem.id in known:
                own = f"{one.problem.id} ({part.name} row {number})"
                one = dataclasses.replace(one, problem=dataclasses.replace(one.problem, id=own))
            known.add(one.problem.id)
            yield one


def _source(config: Config, part: Part) -> Source:
    folder = Path(config.data.image_root).expanduser() if config.data.image_root else part.folder
    format = detect_format(part.columns, config.sft.format, part.name)
    columns = columns_of(part.columns, format, part.name)
    root = os.path.realpath(folder) if folder is not None else None
    return Source(part.name, format, columns, root, config.sft.learned_turns)


def _json_or_parts(source: str) -> Iterator[Part]:
    """As `read_problems` reads them, and .json files that hold one list of rows, as LLaMA-Factory's data sets do."""
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        yield _json_part(path)
    else:
        yield from parts_of(source)


def _json_part(path: Path) -> Part:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(found, list):
        raise UserError(
            f"{path}: wanted a list of rows, came {type(found).__name__}; JSON lines have the ending .jsonl"
        )
    columns: dict[str, None] = {}
    rows: list[dict[str, Any] | BadRow] = []
    for number, row in enumerate(found):
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
            rows.append(row)
        else:
            rows.append(
                BadRow(f"{path.name} row {number}", "bad_json", f"wanted an object, found {type(row).__name__}")
            )
    return Part(path.name, list(columns), rows, path.parent)
