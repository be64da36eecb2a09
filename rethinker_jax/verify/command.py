"""`main verify`: lines `{id, response, answer, choices?, type?}` in, `{id, verdict, reward, extracted, rule, ms}` out.

The whole input is checked before anything is judged, so that a malformed line costs nothing; then it streams, a few
batches in memory at a time, in the order of the input. The output file appears complete or not at all: until then
verdicts are in `OUTPUT.<digest>.partial`, and a command that finds this file goes on from there. The digest is of the
input and of the settings that decide.

With the rows that were sampled, the lines are those of `sample`: their answers come from the rows, and the verdict's
keys are added to each line, so that what was sampled stays beside what was said of it.
"""

import collections
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, get_args

from rich.console import Console

from rethinker_jax import __version__
from rethinker_jax.config import VerifierConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.json_lines import object_of, with_keys
from rethinker_jax.stopping import listening
from rethinker_jax.types import Verdict, VerdictName
from rethinker_jax.verify.pool import JudgeItem, PendingVerdicts, VerifierPool

BATCH = 64  # lines that are written together
BATCH_CHARS = 1_000_000  # of responses and of lines that are kept; a batch of long ones is smaller
BATCHES_IN_FLIGHT = 32
MAX_NAMED_LINES = 20
SHOW_EVERY_S = 0.5
DIGEST_CHARS = 16

Row = dict[str, Any]
Tally = collections.Counter[str]  # verdict name: lines
Golds = Mapping[str, JudgeItem]  # problem id: what a response to it is judged by


@dataclasses.dataclass(frozen=True, slots=True)
class _Target:
    """What a verdict is written to: a line's id, and the line itself where it is kept."""

    id: str | int
    line: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class _Input:
    item: JudgeItem
    target: _Target


def verify_file(input: Path, output: Path | None, config: VerifierConfig, golds: Golds | None = None) -> int:
    """Judges every line and returns how many there are; `output` None writes to stdout.

    With `golds` the lines are those of `sample`.

    Raises UserError for an input that cannot be read or has malformed lines, all of them counted and the first named,
    and Stopped, with the verdicts so far kept, where the output is a file and the process is asked to stop.
    """
    try:
        source = input.open("rb")
    except OSError as error:
        raise UserError(
            f"--input: wanted a readable file of JSON lines, got {str(input)!r} ({error.strerror})."
        ) from error
    with source:
        lines = source if source.seekable() else _spooled(source)
        num_lines, digest = _check(lines, str(input), golds)
        lines.seek(0)
        if output is None:
            shared = sys.stdout.isatty()  # the lines are progress enough
            console = Console(stderr=True, quiet=shared, force_terminal=False if shared else None)
            progress = RunProgress(num_lines, title="verify", console=console, unit="line")
            _judge_rows(_inputs(lines, golds), Tally(), sys.stdout.write, contextlib.nullcontext, progress, config)
            sys.stdout.flush()
        else:
            if output.exists() and (not output.is_file() or output.samefile(input)):
                raise UserError(f"--output: wanted a file, and not the input, got {str(output)!r}.")
            path = partial_path(output, digest, config)
            _judge_to_file(_inputs(lines, golds), num_lines, output, path, config)
    return num_lines


def partial_path(output: Path, digest: str, config: VerifierConfig) -> Path:
    """Where the verdicts on the input with this SHA-256 are until all are there; another file for what may differ."""
    decides = repr((digest, __version__, config.cpu_limit_s, config.memory_mb))
    return output.with_name(f"{output.name}.{hashlib.sha256(decides.encode()).hexdigest()[:DIGEST_CHARS]}.partial")


def _spooled(source: IO[bytes]) -> IO[bytes]:
    """A pipe's bytes in a temporary file: the input is read twice."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (goes with the last reference)
    for block in iter(lambda: source.read(1 << 20), b""):
        spool.write(block)
    spool.seek(0)
    return spool


def _check(lines: IO[bytes], name: str, golds: Golds | None) -> tuple[int, str]:
    """The number of lines that hold something, and a digest of them all and of the golds."""
    digest, num_lines = hashlib.sha256(), 0
    if golds is not None:
        digest.update(repr(sorted(golds.items(), key=lambda gold: gold[0])).encode("utf-8", "surrogatepass"))
    named: list[str] = []
    num_problems = 0
    for number, line in enumerate(lines, 1):
        digest.update(line)
        if not line.strip():
            continue
        num_lines += 1
        problem = line_problem(line, golds)
        if problem:
            num_problems += 1
            if len(named) < MAX_NAMED_LINES:
                named.append(f"line {number}: {problem}")
    if num_problems:
        more = f"; and {num_problems - len(named)} more" if num_problems > len(named) else ""
        raise UserError(
            f"{name}: {num_problems} malformed line(s), nothing was judged. Wanted one JSON object per line with "
            f"{_WANTED if golds is None else _WANTED_SAMPLE}. {'; '.join(named)}{more}."
        )
    return num_lines, digest.hexdigest()


_WANTED = "id, response (text) and answer (text), optionally choices (list of texts) and type (text)"
_WANTED_SAMPLE = "id (of a row of --data) and completion (text), as `sample` writes them"


def line_problem(line: bytes, golds: Golds | None = None) -> str:
    """What is wrong with one input line, or ""."""
    try:
        # Keys are added to a sample's line in UTF-8.
        row = object_of(line if golds is None else line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not JSON ({type(error).__name__})"
    except ValueError as error:
        return str(error)
    wanted = ("id", "response", "answer") if golds is None else ("id", "completion")
    missing = [key for key in wanted if key not in row]
    if missing:
        return f"missing {', '.join(missing)}"
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        return "id is neither text nor an integer"
    if golds is not None:
        if not isinstance(row["completion"], str):
            return "completion is not text"
        return "" if _name(row) in golds else f"no usable row has the id {row['id']!r:.80}"
    if not isinstance(row["response"], str):
        return "response is not text"
    if isinstance(row["answer"], bool) or not isinstance(row["answer"], str | int | float):
        return "answer is neither text nor a number"
    if isinstance(row["answer"], float) and not math.isfinite(row["answer"]):
        return f"answer is {row['answer']}, which is no number to compare with"  # Python's JSON reads NaN and 1e999
    choices = row.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        return "choices is not a list of texts"
    if not isinstance(row.get("type") or "auto", str):
        return "type is not text"
    return ""


def _judge_to_file(rows: Iterator[_Input], num_lines: int, output: Path, path: Path, config: VerifierConfig) -> None:
    """Judges the rows whose verdicts are not in `path` yet, and makes that file the output."""
    with _open_partial(path, output) as partial:
        tally = _read_kept(partial, path, rows)
        kept = tally.total()
        progress = RunProgress(num_lines, kept, title="verify", unit="line")
        if kept:
            progress.note(f"{kept} of {num_lines} lines are in {path}; going on from there")
        try:
            with listening() as stop:

                def write(text: str) -> None:
                    partial.write(text.encode("utf-8"))
                    partial.flush()

                _judge_rows(rows, tally, write, stop.held, progress, config)
        except Stopped as stopped:
            raise Stopped(
                f"stopped after {tally.total()} of {num_lines} lines; they are in {path}, and the same command "
                f"goes on from there",
                stopped.exit_code,
            ) from stopped
        os.fsync(partial.fileno())
        os.replace(path, output)


@contextlib.contextmanager
def _open_partial(path: Path, output: Path) -> Generator[IO[bytes]]:
    """The file of the verdicts so far, made or found, for this process alone; it goes where nothing came into it."""
    for other in output.parent.glob(f"{glob.escape(output.name)}.{'[0-9a-f]' * DIGEST_CHARS}.partial"):
        if other != path:
            raise UserError(
                f"--output: {other} holds the beginning of this output for another input, other values of "
                f"verifier.cpu_limit_s and verifier.memory_mb, or another version of this program. Finish it with what "
                f"it was begun with, or delete it to begin again."
            )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("r+b" if path.exists() else "w+b")
    except OSError as error:
        raise UserError(f"--output: cannot write {str(path)!r} ({error.strerror}).") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, so a killed one leaves none
        except BlockingIOError as error:
            raise UserError(f"--output: another process is writing {path}. Wait for it, or end it.") from error
        try:
            yield file
        except BaseException:
            if not path.stat().st_size:
                path.unlink()
            raise


def _read_kept(partial: IO[bytes], path: Path, rows: Iterator[_Input]) -> Tally:
    """Counts the verdicts that are there, takes their rows off `rows`, and cuts off a last line that is torn."""
    tally, end = Tally(), 0
    for number, line in enumerate(partial, 1):
        if not line.endswith(b"\n"):
            break
        row = next(rows, None)
        try:
            kept = json.loads(line)
            fits = row is not None and kept["id"] == row.target.id and kept["verdict"] in get_args(VerdictName)
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise UserError(
                f"--output: line {number} of {path} is not the verdict on line {number} of the input. Somebody "
                f"else wrote into this file; delete it to begin again."
            )
        tally[kept["verdict"]] += 1
        end += len(line)
    partial.truncate(end)
    partial.seek(end)
    return tally


def _judge_rows(
    rows: Iterator[_Input],
    tally: Tally,
    write: Callable[[str], object],
    whole: Callable[[], contextlib.AbstractContextManager[object]],
    progress: RunProgress,
    config: VerifierConfig,
) -> None:
    """Judges and writes; no stop comes inside `whole`, so that what is counted is what is written."""
    waiting: collections.deque[tuple[list[_Target], PendingVerdicts]] = collections.deque()
    shown = 0.0

    def finish(batch: list[_Target], pending: PendingVerdicts) -> None:
        nonlocal shown
        verdicts = pending.result()
        if not shown and len(batch) == BATCH:  # the pace counts from here: starting the workers took its time
            shown = time.monotonic()
            progress.update(tally.total(), {})
        text = "".join(map(_line, batch, verdicts))
        with whole():
            write(text)
            tally.update(verdict.verdict for verdict in verdicts)
        if shown and time.monotonic() - shown >= SHOW_EVERY_S:
            shown = time.monotonic()
            failed = {name: float(tally[name]) for name in ("timeout", "crash", "bad_gold") if tally[name]}
            progress.update(tally.total(), {"accuracy": tally["correct"] / tally.total(), **failed})

    with progress, VerifierPool(config) as pool:
        for batch in _batches(rows):
            waiting.append(([row.target for row in batch], pool.submit([row.item for row in batch])))
            if len(waiting) >= BATCHES_IN_FLIGHT:
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
        counts = ", ".join(f"{tally[name]} {name}" for name in get_args(VerdictName) if tally[name])
        progress.note(f"{tally.total()} lines: {counts}" if tally else "no lines")


def _inputs(lines: IO[bytes], golds: Golds | None) -> Iterator[_Input]:
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        if golds is None:
            yield _Input(_item(row), _Target(row["id"]))
        else:
            item = dataclasses.replace(golds[_name(row)], response=row["completion"])
            yield _Input(item, _Target(row["id"], line))


def _name(row: Row) -> str:
    """The problem's id, as rows are named."""
    return str(row["id"]).strip()


def _batches(rows: Iterator[_Input]) -> Iterator[list[_Input]]:
    batch: list[_Input] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += len(row.item.response) + len(row.target.line)
        if len(batch) == BATCH or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _item(row: Row) -> JudgeItem:
    return JudgeItem(row["response"], str(row["answer"]), tuple(row.get("choices") or ()), row.get("type") or "auto")


def _line(target: _Target, verdict: Verdict) -> str:
    """One line of output. The verdict is in ASCII: answers may hold halves of characters, which no file could."""
    record = _record(target.id, verdict)
    if target.line:
        del record["id"]
        return with_keys(target.line, record).decode("utf-8")
    return json.dumps(record) + "\n"


def _record(identity: str | int, verdict: Verdict) -> Row:
    return {
        "id": identity,
        "verdict": verdict.verdict,
        "reward": verdict.reward,
        "extracted": verdict.extracted,
        "rule": verdict.rule,
        "ms": round(verdict.ms, 3),
    }
