"""`main verify`: lines `{id, response, answer, choices?, type?}` in, `{id, verdict, reward, extracted, rule, ms}` out.

The whole input is checked before anything is judged, so that a malformed line costs nothing; then it streams, a few
batches in memory at a time, in the order of the input. The output file appears complete or not at all.
"""

import collections
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.types import Verdict
from rethinker_jax.verify.pool import JudgeItem, PendingVerdicts, VerifierPool

BATCH = 512
BATCHES_IN_FLIGHT = 4
MAX_NAMED_LINES = 20


def verify_file(input: Path, output: Path | None, config: VerifierConfig) -> int:
    """Judges every line and returns how many there were; `output` None writes to stdout.

    Raises UserError for an input that cannot be read or has malformed lines, all of them counted and the first named.
    """
    try:
        source = input.open("rb")
    except OSError as error:
        raise UserError(
            f"--input: wanted a readable file of JSON lines, got {str(input)!r} ({error.strerror})."
        ) from error
    with source:
        lines = source if source.seekable() else _spooled(source)
        _check(lines, str(input))
        lines.seek(0)
        if output is None:
            return _judge_lines(lines, sys.stdout, config)
        return _judge_to_file(lines, output, config)


def _spooled(source: IO[bytes]) -> IO[bytes]:
    """A pipe's bytes in a temporary file: the input is read twice."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (goes with the last reference)
    for block in iter(lambda: source.read(1 << 20), b""):
        spool.write(block)
    spool.seek(0)
    return spool


def _check(lines: IO[bytes], name: str) -> None:
    problems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            problem = line_problem(line)
            if problem:
                problems.append((number, problem))
    if problems:
        shown = "; ".join(f"line {number}: {problem}" for number, problem in problems[:MAX_NAMED_LINES])
        more = f"; and {len(problems) - MAX_NAMED_LINES} more" if len(problems) > MAX_NAMED_LINES else ""
        raise UserError(
            f"{name}: {len(problems)} malformed line(s), nothing was judged. Wanted one JSON object per line with id, "
            f"response (text) and answer (text), optionally choices (list of texts) and type (text). {shown}{more}."
        )


def line_problem(line: bytes) -> str:
    """What is wrong with one input line, or ""."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({type(error).__name__})"
    if not isinstance(row, dict):
        return f"a JSON object is wanted, not {type(row).__name__}"
    missing = [key for key in ("id", "response", "answer") if key not in row]
    if missing:
        return f"missing {', '.join(missing)}"
    if not isinstance(row["id"], str | int):
        return "id is neither text nor an integer"
    if not isinstance(row["response"], str):
        return "response is not text"
    if isinstance(row["answer"], bool) or not isinstance(row["answer"], str | int | float):
        return "answer is neither text nor a number"
    choices = row.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        return "choices is not a list of texts"
    if not isinstance(row.get("type") or "auto", str):
        return "type is not text"
    return ""


def _judge_to_file(lines: IO[bytes], output: Path, config: VerifierConfig) -> int:
    try:
        descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise UserError(f"--output: cannot write in {str(output.parent)!r} ({error.strerror}).") from error
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            count = _judge_lines(lines, handle, config)
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return count


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _judge_lines(lines: IO[bytes], sink: io.TextIOBase | TextIO, config: VerifierConfig) -> int:
    count = 0
    waiting: collections.deque[tuple[list[str | int], PendingVerdicts]] = collections.deque()
    with VerifierPool(config) as pool:
        for rows in _batches(lines):
            waiting.append(([row["id"] for row in rows], pool.submit([_item(row) for row in rows])))
            if len(waiting) >= BATCHES_IN_FLIGHT:
                count += _write(sink, *waiting.popleft())
        while waiting:
            count += _write(sink, *waiting.popleft())
    sink.flush()
    return count


def _batches(lines: IO[bytes]) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for line in lines:
        if line.strip():
            batch.append(json.loads(line))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _item(row: dict[str, Any]) -> JudgeItem:
    return JudgeItem(row["response"], str(row["answer"]), tuple(row.get("choices") or ()), row.get("type") or "auto")


def _write(sink: io.TextIOBase | TextIO, ids: list[str | int], pending: PendingVerdicts) -> int:
    for identity, verdict in zip(ids, pending.result(), strict=True):
        sink.write(json.dumps(_record(identity, verdict), ensure_ascii=False) + "\n")
    return len(ids)


def _record(identity: str | int, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": identity,
        "verdict": verdict.verdict,
        "reward": verdict.reward,
        "extracted": verdict.extracted,
        "rule": verdict.rule,
        "ms": round(verdict.ms, 3),
    }
