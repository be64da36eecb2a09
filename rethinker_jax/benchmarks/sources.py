"""Where a benchmark's rows come from: a folder, a file or the hub → tables of rows, as they were published."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.dataset import HUB_ID, BadRow

TABLE_SUFFIXES = (".parquet", ".jsonl", ".json")
# JSON files that lie beside data but hold none.
NO_TABLES = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
MAX_JSON_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one file or hub split, read as they are asked for; a BadRow stands for a row that could not be read.

    `config` is the dataset's configuration ("" where there is none), `folder` where relative paths start.
    """

    name: str
    config: str
    folder: Path | None
    rows: Iterator[dict[str, Any] | BadRow]


def read_tables(data: str | None, hub: str, configs: Sequence[str], split: str, name: str) -> Iterator[Table]:
    """The tables of a benchmark, in the order of configs and file names.

    data   a folder (parquet files are looked for first, at any depth of three, whatever else lies there), a file, a hub
           id "owner/name[:split]", or None for the published place `hub`.
    Raises UserError for a source that does not exist or holds no table of this split.
    """
    path = Path(data).expanduser() if data else None
    if path is not None and path.is_dir():
        for file, config in _files_of_split(path, configs, split):
            yield _file_table(file, config, path)
    elif path is not None and path.is_file():
        own = path.resolve().parent.name
        yield _file_table(path, configs[0] if len(configs) == 1 else own if own in configs else "", path.parent)
    elif data and not (HUB_ID.fullmatch(data) and path is not None and path.suffix not in TABLE_SUFFIXES):
        raise UserError(
            f"there is no {data} for the benchmark {name}: wanted a folder or a .parquet, .jsonl or .json file with "
            f"its rows, or a hub id owner/name[:split]"
        )
    elif data or hub:
        hub_id, _, own_split = (data or hub).partition(":")
        for config in configs:
            yield _hub_table(hub_id, config, own_split or split or "train")
    else:
        raise UserError(f"the benchmark {name} has no published place to load from: name its rows by --data")


def _files_of_split(folder: Path, configs: Sequence[str], split: str) -> list[tuple[Path, str]]:
    """(file, config) of the folder's tables that belong to the configs and the split. Raises UserError."""
    for suffix in TABLE_SUFFIXES:
        found = [path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth + suffix)]
        files = sorted({path for path in found if path.name not in NO_TABLES and path.is_file()})
        if files:
            break
    else:
        raise UserError(f"there is no {', '.join(TABLE_SUFFIXES)} file in the folder {folder}, nor in folders in it")
    chosen = [(file, config) for config in configs for file in files if config and _is_of_config(file, config)]
    if not chosen:
        # Files of a config lie in a folder of its name; where no folder has one, the rows are of one config.
        folders = {file.parent for file in files}
        if len(folders) > 1 and any(configs):
            names = ", ".join(sorted(each.name for each in folders))
            raise UserError(f"{folder} holds tables in {names}: wanted {' or '.join(configs)}; name the file or folder")
        chosen = [(file, configs[0] if len(configs) == 1 else "") for file in files]
    named = [(file, config) for file, config in chosen if _is_of_split(file, split)]
    if named or not split:
        return named or chosen
    if len(chosen) > 1:
        listed = ", ".join(file.name for file, _ in chosen[:8])
        raise UserError(f"no file in {folder} is named after the split {split!r}; it has {listed}: name one file")
    return chosen


def _is_of_config(file: Path, config: str) -> bool:
    return config in (file.parent.name, file.stem)


def _is_of_split(file: Path, split: str) -> bool:
    """`test-00000-of-00002` and `test` are of the split test; `testmini-0` and `testmini_text_only` are not."""
    return file.stem == split or file.stem.startswith(f"{split}-")


def _file_table(path: Path, config: str, folder: Path) -> Table:
    if path.suffix == ".parquet":
        return Table(path.name, config, folder, _parquet_rows(path))
    if path.suffix in TABLE_SUFFIXES:
        return Table(path.name, config, folder, _json_rows(path))
    raise UserError(f"{path}: wanted a {', '.join(TABLE_SUFFIXES)} file, or a folder of them")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any] | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {error}") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any] | BadRow]:
    """JSON lines, one list of objects, or one object of objects by id (which becomes `id` where a row has none).

    What a file is, is seen by its content: CURE's rows are one list in a file called .jsonl.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than {MAX_JSON_BYTES}: convert it to parquet")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    whole = _whole_json(text)
    if isinstance(whole, list):
        for number, row in enumerate(whole):
            yield row if isinstance(row, dict) else _no_object(f"{path.name} row {number}", row)
    elif isinstance(whole, dict):
        for key, row in whole.items():
            yield {"id": key} | row if isinstance(row, dict) else _no_object(f"{path.name} key {key[:80]}", row)
    else:
        yield from _json_lines(path.name, text)


def _whole_json(text: str) -> Any:
    """The list in `text`, or its object where all values are objects; None where it is something else."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        return found if found and all(isinstance(value, dict) for value in found.values()) else None
    return found


def _json_lines(name: str, text: str) -> Iterator[dict[str, Any] | BadRow]:
    """Blank lines are skipped but counted, so that row numbers are line numbers from 0."""
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        where = f"{name} row {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRow(where, "bad_json", f"{error}")
            continue
        yield row if isinstance(row, dict) else _no_object(where, row)


def _no_object(where: str, row: Any) -> BadRow:
    return BadRow(where, "bad_json", f"wanted an object, found {type(row).__name__}")


def _hub_table(hub: str, config: str, split: str) -> Table:
    """A split on the Hugging Face hub, through its local cache. Raises UserError when it cannot be had."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(f"{hub} is a hub id, which needs the package datasets: pip install datasets") from error
    try:
        table = datasets.load_dataset(hub, config or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        which = f"{hub}{f', config {config!r}' if config else ''}, split {split!r}"
        raise UserError(
            f"cannot load {which} from the Hugging Face hub ({type(error).__name__}: {error}). Check name and "
            f"connection, or download its files and name their folder by --data"
        ) from error
    label = "-".join(part for part in (hub.replace("/", "-"), config, split) if part)
    return Table(label, config, None, _hub_rows(table))


def _hub_rows(table: Any) -> Iterator[dict[str, Any] | BadRow]:
    """Rows of a `datasets.Dataset`. As arrow, images come as the {bytes, path} they are stored as, not decoded."""
    for batch in table.with_format("arrow").iter(batch_size=256):
        yield from batch.to_pylist()
