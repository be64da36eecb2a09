"""Numbers of a run: sums divided once, and the files they are written to."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np

from rethinker_jax.errors import UserError


class Metrics:
    """Means as (sum, count) by name, so that parts of different sizes join exactly; divided once, at the end.

    A sum may be a device array: it is read only by `means`, so adding does not wait for the device.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[SupportsFloat, SupportsFloat]]] = {}

    def add(self, name: str, total: SupportsFloat, count: SupportsFloat = 1) -> None:
        """Adds `count` values that sum to `total`."""
        self._parts.setdefault(name, []).append((total, count))

    def add_all(self, sums: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> None:
        """Adds name → (sum, count), as an update step returns them."""
        for name, (total, count) in sums.items():
            self.add(name, total, count)

    def add_values(self, name: str, values: np.ndarray) -> None:
        """Adds every element of an array, of any shape; an empty one adds nothing but the name."""
        self.add(name, float(np.sum(values, dtype=np.float64)), values.size)

    def means(self) -> dict[str, float]:
        """Name → mean, in the order in which names came; NaN where nothing was counted."""
        means = {}
        for name, parts in self._parts.items():
            count = math.fsum(float(count) for _, count in parts)
            means[name] = _sum([float(total) for total, _ in parts]) / count if count else math.nan
        return means


def _sum(values: list[float]) -> float:
    """Exact where all are finite; fsum would raise on inf - inf, where the answer is NaN."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


class MetricsLog:
    """`metrics.jsonl`, one line per step, and the same numbers as TensorBoard events in `tensorboard/`.

    A run that resumes at `first_step` loses the lines of that step and later ones, which it will write again; so does a
    last line that was torn when the run was killed. With `writes` False nothing is touched: another process writes.
    """

    def __init__(self, run_dir: Path, first_step: int = 0, *, writes: bool = True):
        self.path = run_dir / "metrics.jsonl"
        self._writes = writes
        if not writes:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _keep_before(self.path, first_step)
        from tensorboardX import SummaryWriter  # here, because it imports torch where that is installed

        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step or None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line and waits until it is on the disk. Numbers that are not finite are written as null."""
        if not self._writes:
            return
        values = {name: plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step), **values}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a torn last one. null is None."""
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            # Only a line without its newline can be torn; the piece after the last newline is otherwise empty.
            if number == len(lines):
                break
            raise UserError(f"{path} line {number}: wanted a JSON object; mend or remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path} line {number}: wanted a JSON object with a whole number `step`; mend or remove it")
        rows.append(row)
    return rows


def _keep_before(path: Path, first_step: int) -> None:
    """Rewrites the file with the lines of earlier steps only, whole or not at all."""
    kept = [row for row in read_metrics(path) if row["step"] < first_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def plain(value: Any) -> Any:
    """A value as JSON has it; arrays of one element are numbers, NaN and infinities None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
