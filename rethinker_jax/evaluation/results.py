"""The files of an evaluation: FILE.json with the numbers, FILE.generations.jsonl with what they are made of.

Beside the generations, in FILE.generations.jsonl.asked.json, stands what they were made by and who judged them.
Nothing in these files depends on the time of day, or on the order or number of the batches.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.benchmarks.majority import verified_same
from rethinker_jax.benchmarks.numbers import evaluation_numbers, numbers_text, plain
from rethinker_jax.benchmarks.record_files import SUFFIX, beside, generations_path, read_records, write_records
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.errors import UserError
from rethinker_jax.output_files import Row, asked_path, write_whole
from rethinker_jax.verify.pool import VerifierPool

NEEDED = ("benchmark", "protocol", "headline", "macro_over", "n", "shard", "num_items")  # of what was asked
TOP = ("benchmark", "protocol", "headline", "macro_over", "n", "shard")  # at the top of a result, or without meaning


@dataclasses.dataclass(frozen=True)
class Paths:
    """Where an evaluation's files lie; `generations` are those of one shard where there are several."""

    result: Path
    generations: Path


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A row or an item that was not drawn; `id` is "" where the row could not even be read."""

    id: str
    where: str
    kind: str
    why: str


@dataclasses.dataclass(frozen=True)
class Generations:
    """A finished file of generations: its records, what they were made by, and what was left out."""

    records: tuple[Record, ...]
    asked: Row
    left_out: tuple[LeftOut, ...]
    judge: Row


def paths_of(output: Path, shard: tuple[int, int] = (0, 1)) -> Paths:
    """The files that belong to `--output FILE`; links are written through. Raises UserError for a name of theirs."""
    if output.name.endswith((SUFFIX, ".html", ".asked.json")):
        raise UserError(f"--output {output}: that name is of a file beside a result. Name the result: out.json")
    output = output.resolve()
    part = "" if shard[1] == 1 else f".shard-{shard[0]}-of-{shard[1]}"
    return Paths(output, beside(output, part + SUFFIX))


def generations_of(path: Path) -> Path:
    """The generations that are named, or that are behind the result that is named."""
    return path if path.name.endswith(SUFFIX) else generations_path(path)


def result_of(generations: Path) -> Path:
    """FILE.generations.jsonl → FILE.json, or FILE where the result is called that."""
    bare = generations.with_name(generations.name.removesuffix(SUFFIX))
    named = bare.with_name(bare.name + ".json")
    return bare if bare.is_file() and not named.exists() else named


def num_of_shard(num_items: int, shard: Sequence[int]) -> int:
    """How many of the items are those of shard (number, count)."""
    return len(range(shard[0], num_items, shard[1]))


def read_generations(path: Path) -> Generations:
    """A finished file of generations. Raises UserError where it is not finished or nobody says what made it."""
    records = read_records(path)
    asked = _read_asked(path)
    left_out = tuple(LeftOut(**row) for row in asked.pop("left_out"))
    judge = asked.pop("judge")
    _check_complete(path, records, asked, left_out)
    return Generations(tuple(records), asked, left_out, judge)


def write_generations(path: Path, found: Generations) -> None:
    """Both files; records by id and sample, what was left out by its place."""
    write_records(path, sorted(found.records, key=lambda record: (record.id, record.sample)))
    left_out = [dataclasses.asdict(one) for one in sorted(found.left_out, key=dataclasses.astuple)]
    write_whole(asked_path(path), _json(found.asked | {"left_out": left_out, "judge": found.judge}))


def write_result(path: Path, found: Generations, pool: VerifierPool) -> Row:
    """The numbers of finished generations; answers are grouped for the majority by the verifier."""
    asked = found.asked
    numbers = evaluation_numbers(
        found.records, benchmark=asked["benchmark"], protocol=asked["protocol"], headline=asked["headline"],
        macro_over=asked["macro_over"], same=verified_same(pool),
    )  # fmt: skip
    made_by = {key: value for key, value in asked.items() if key not in TOP}
    left_out = [dataclasses.asdict(one) for one in sorted(found.left_out, key=dataclasses.astuple)]
    result = {**numbers, "num_left_out": len(left_out), "left_out": left_out, "made_by": made_by, "judge": found.judge}
    write_whole(path, numbers_text(plain(result)))
    return result


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _read_asked(generations: Path) -> Row:
    path = asked_path(generations)
    if not path.is_file():
        raise UserError(
            f"{generations}: wanted {path.name} beside it, which says by what the generations were made and without "
            "which their numbers cannot be trusted. Copy both files, or evaluate again."
        )
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: wanted JSON ({error}). Restore the file, or evaluate again.") from error
    missing = [key for key in NEEDED if not isinstance(asked, dict) or key not in asked]
    if missing:
        raise UserError(f"{path}: wanted what `evaluate` writes; it has no {', '.join(missing)}. Evaluate again.")
    if "left_out" not in asked or "judge" not in asked:
        raise UserError(f"{generations}: the evaluation has not ended. Run its command again; it goes on.")
    return asked


def _check_complete(path: Path, records: Iterable[Record], asked: Row, left_out: Sequence[LeftOut]) -> None:
    """Raises UserError where samples of an item, or whole items, are missing or too many."""
    samples_of: dict[str, list[int]] = {}
    for record in records:
        samples_of.setdefault(record.id, []).append(record.sample)
    for name, samples in samples_of.items():
        if sorted(samples) != list(range(asked["n"])):
            raise UserError(
                f"{path}: item {name!r} has the samples {sorted(samples)}, wanted {asked['n']} from 0 on. Run the "
                "evaluation's command again; it goes on."
            )
    wanted = num_of_shard(asked["num_items"], asked["shard"]) - sum(bool(one.id) for one in left_out)
    if len(samples_of) != wanted:
        raise UserError(f"{path}: {len(samples_of)} items, wanted {wanted}. Run the evaluation's command again.")
