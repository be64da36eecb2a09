"""Files that commands write: whole or line by line, gone on with after a kill, and by whom they were made."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rethinker_jax.errors import UserError
from rethinker_jax.json_lines import object_of

Row = dict[str, Any]
PACKAGES = ("rethinker_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it there, so that no reader sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_writable(output: Path, option: str) -> None:
    """Raises UserError where `output` could not be written, before time is spent on what would stand there."""
    if output.exists() and not output.is_file():
        raise UserError(f"{option} {output} is not a regular file. Name another, or leave it out for standard output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise UserError(f"{option} {output}: cannot be written ({error.strerror}). Name another place.") from error


def hash_of(rows: Iterable[object]) -> str:
    """Hash of rows in their order, by their repr: tells whether a run goes on with the data with which it began."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode() + b"\n")
    return digest.hexdigest()


def versions(packages: Sequence[str] = PACKAGES) -> Row:
    """Commit and versions, for summaries and manifests. The commit is the code's, where it lies in a git checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"commit": commit, "versions": found | {"python": platform.python_version()}}


def asked_path(output: Path) -> Path:
    """Where it is kept what the lines of `output` were made by."""
    return output.with_name(output.name + ".asked.json")


# Of what was asked: who wrote lines and where things lay then. A file is gone on with whatever these say.
RECORDED = ("commit", "versions", "device", "model", "data", "image_root")


def recorded_of(asked: Row) -> Row:
    return {key: asked[key] for key in RECORDED if key in asked}


def with_earlier(asked: Row, *others: Row) -> Row:
    """`asked` with `earlier`: what is recorded of processes that wrote other lines of the same file, if it differs."""
    found = [one for other in others for one in (*other.get("earlier", []), recorded_of(other))]
    kept = [one for place, one in enumerate(found) if one != recorded_of(asked) and one not in found[:place]]
    return {key: value for key, value in asked.items() if key != "earlier"} | ({"earlier": kept} if kept else {})


def check_asked(output: Path, asked: Row) -> Row:
    """Refuse to go on with a file that another model or other settings began, or of which nobody says what did.

    Returns `asked` with what is recorded of the processes before.
    """
    path = asked_path(output)
    if not output.is_file() or not output.stat().st_size:
        return asked
    if not path.is_file():
        raise UserError(
            f"--output: {output} is there without {path.name}, which says what made it. Put that file back, or name "
            "another output."
        )
    try:
        before = object_of(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path}: wanted JSON ({error}); it says what made the lines of {output.name}. Name another file."
        ) from error
    decides = {key: value for key, value in asked.items() if key not in RECORDED}
    changed = [f"{key} was {old!r:.80}, is {new!r:.80}" for key, old, new in differences(before, decides)]
    if changed:
        raise UserError(
            f"--output {output} holds the lines of another request: {'; '.join(changed)}. Name another file."
        )
    return with_earlier(asked, before)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of what differs among the keys of `now`; of a mapping, the keys inside it."""
    found: list[tuple[str, Any, Any]] = []
    for key, new in now.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [(f"{key}.{inner}", *values) for inner, *values in differences(old, new)]
        elif old != new:
            found.append((key, old, new))
    return found


def finished_lines(output: Path, n: int, command: str) -> dict[str, list[bytes]]:
    """Id → its lines in `output`, one of each of the `n` samples. Problems that lack one are drawn again, and a torn
    last line is left out.

    Raises UserError for a file that was not made by `command`.
    """
    if not output.is_file():
        return {}
    lines_of: dict[str, dict[int, bytes]] = {}
    lines = output.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = object_of(line)
            if row["sample"] >= n:
                raise UserError(f"--output {output} holds more than --n {n} samples a row. Name another file.")
            lines_of.setdefault(row["id"], {})[row["sample"]] = line
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):  # a line without its newline was torn
                raise UserError(
                    f"--output {output} line {number} is not a line of `{command}` ({error}); nothing was changed. "
                    "Name another file."
                ) from error
    return {name: list(lines.values()) for name, lines in lines_of.items() if lines.keys() == set(range(n))}


@contextlib.contextmanager
def begun(output: Path, finished: Mapping[str, Sequence[bytes]], asked: Row) -> Generator[TextIO]:
    """A file to append lines to, which begins with the finished ones; `asked` is kept beside it.

    For who holds `alone(output)` since before `finished` was read, so that nobody has added lines.
    """
    write_whole(asked_path(output), json.dumps(asked, indent=2) + "\n")
    write_whole(output, b"".join(line + b"\n" for lines in finished.values() for line in lines).decode())
    with output.open("a", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def alone(output: Path) -> Generator[None]:
    """Hold a file beside `output`; the lock goes with the process, so a killed one leaves none.

    Raises UserError while another process holds it.
    """
    path = output.with_name(f".{output.name}.lock")
    with _locked(path, output):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, output: Path) -> TextIO:
    """`path`, opened and locked, and still there: its last holder may have removed it before we locked it."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f"--output: another process is writing {output}. Wait for it, or name another file."
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def line_writer(file: io.TextIOBase | TextIO) -> Callable[[Row], None]:
    in_ascii = file.isatty()  # text of a model could steer a terminal

    def write(row: Row) -> None:
        file.write(json.dumps(row, ensure_ascii=in_ascii) + "\n")
        file.flush()

    return write
