"""The safetensors files of one directory: which tensor lies where, and reading no more of it than is asked for.

The safetensors library checks the headers. The bytes are read with pread, because its own slices either read the whole
tensor or leave the pages of the mapped file in the process's memory.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Generator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rethinker_jax.errors import UserError
from rethinker_jax.models.weight_table import canonical_name

INDEX = "model.safetensors.index.json"
FLOAT_TYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: `name` as in the file, `offset` of its first byte."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


@dataclasses.dataclass(frozen=True)
class SafetensorsDirectory:
    """The opened files of `directory`; `where` goes by canonical names."""

    directory: Path
    where: Mapping[str, StoredTensor]
    descriptors: Mapping[Path, int]

    def read(self, name: str, rows: range, columns: range | None = None) -> np.ndarray:
        """Rows of the first axis, whole, or `columns` of them where the tensor is seen as a matrix.

        Returns [rows, columns] of the stored dtype. Raises UserError if the file has become shorter.
        """
        stored = self.where[name]
        width = math.prod(stored.shape[1:])
        columns = range(width) if columns is None else columns
        block = np.empty((len(rows), len(columns)), stored.dtype)
        raw = block.view(np.uint8).reshape(-1)
        begin = stored.offset + (rows.start * width + columns.start) * stored.dtype.itemsize
        if len(columns) == width:
            self._fill(stored, raw, begin)
            return block
        piece, step = len(columns) * stored.dtype.itemsize, width * stored.dtype.itemsize
        for row in range(len(rows)):
            self._fill(stored, raw[row * piece : (row + 1) * piece], begin + row * step)
        return block

    def _fill(self, stored: StoredTensor, raw: np.ndarray, offset: int) -> None:
        done = 0
        while done < raw.size:  # one call reads at most 2 GiB
            count = os.preadv(self.descriptors[stored.path], [raw[done:].data], offset + done)
            if not count:
                raise UserError(f"{stored.path}: became shorter while tensor {stored.name} was read. Copy it again.")
            done += count


@contextlib.contextmanager
def open_safetensors(directory: Path) -> Generator[SafetensorsDirectory, None, None]:
    """Open the files that the index names, or every *.safetensors where there is no index.

    Raises UserError for no file, a damaged one, a name twice, a type that is no float, an index that does not fit.
    """
    index = directory / INDEX
    listed = _read_index(index) if index.is_file() else None
    files = sorted(
        directory.glob("*.safetensors") if listed is None else {directory / file for file in listed.values()}
    )
    if not files:
        raise UserError(f"{directory}: wanted *.safetensors, found none. Name the directory with the weights.")
    where: dict[str, StoredTensor] = {}
    for path in files:
        for stored in _stored_tensors(path):
            name = canonical_name(stored.name)
            if name in where:
                raise UserError(
                    f"{path}: tensor {stored.name} is there twice; the other is {where[name].name} in "
                    f"{where[name].path.name}."
                )
            where[name] = stored
    if listed is not None:
        _check_index(index, listed, where)
    with contextlib.ExitStack() as stack:
        descriptors = {path: stack.enter_context(path.open("rb")).fileno() for path in files}
        yield SafetensorsDirectory(directory, where, descriptors)


def _stored_tensors(path: Path) -> list[StoredTensor]:
    try:
        with safe_open(path, framework="np") as file, path.open("rb") as raw:
            # The library has made sure that the tensors follow each other without a gap to the file's end.
            offset = 8 + int.from_bytes(raw.read(8), "little")
            found = []
            for name in file.offset_keys():
                lazy = file.get_slice(name)
                if lazy.get_dtype() not in FLOAT_TYPES:
                    raise UserError(
                        f"{path}: tensor {name}: wanted one of {', '.join(FLOAT_TYPES)}, came {lazy.get_dtype()}. "
                        "Quantised checkpoints cannot be trained: take the original one."
                    )
                dtype = FLOAT_TYPES[lazy.get_dtype()]
                found.append(StoredTensor(path, name, tuple(lazy.get_shape()), dtype, offset))
                offset += math.prod(found[-1].shape) * dtype.itemsize
            return found
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}). The file is cut or damaged: copy it again."
        ) from error


def _read_index(index: Path) -> dict[str, str]:
    """Name in the file → file name, of files that are there."""
    try:
        listed = dict(json.loads(index.read_text())["weight_map"].items())
        outside = sorted({file for file in listed.values() if Path(file).name != file})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index}: wanted JSON with a weight_map of names to files, came something else ({error!r}). "
            "The file is cut or damaged: copy it again."
        ) from error
    if outside:
        raise UserError(
            f"{index}: wanted names of files in {index.parent}, came {outside[0]!r}. Nothing outside it is read: "
            "put the shards beside the index and name them alone."
        )
    whole = "model.safetensors"
    if (index.parent / whole).exists() and whole not in listed.values():
        raise UserError(
            f"{index.parent}: holds {whole} and {INDEX}, which does not name it: two checkpoints, and readers differ "
            "in the one they take. Remove one."
        )
    lost = sorted({file for file in listed.values() if not (index.parent / file).is_file()})
    if lost:
        raise UserError(
            f"{index}: it names {', '.join(lost)}, which {index.parent} does not hold. Copy the missing shards."
        )
    return listed


def _check_index(index: Path, listed: Mapping[str, str], where: Mapping[str, StoredTensor]) -> None:
    held = {stored.name: stored.path.name for stored in where.values()}
    for name in sorted(held.keys() | listed.keys()):
        if held.get(name) != listed.get(name):
            raise UserError(
                f"{index}: tensor {name}: by the index in {listed.get(name, 'no file')}, found in "
                f"{held.get(name, 'none of the files')}. The index belongs to other shards: copy all of them again."
            )
