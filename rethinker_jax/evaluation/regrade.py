"""Generations that are there: judged again, or joined from shards. Needs no model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rethinker_jax.config import VerifierConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.judging import Judging, judge_identity
from rethinker_jax.evaluation.pages import write_page
from rethinker_jax.evaluation.results import (
    Generations,
    generations_of,
    paths_of,
    read_generations,
    result_of,
    write_generations,
    write_result,
)
from rethinker_jax.output_files import RECORDED, Row, alone, check_writable, differences, with_earlier
from rethinker_jax.verify.pool import VerifierPool

BATCH = 1024  # records that are in the verifier's queue at once


def regrade(file: Path, output: Path | None, config: VerifierConfig) -> Path:
    """Judge every record again and write result and generations to `output`, or in place. Returns the result's path.

    `file` is the generations or the result before them. Raises UserError.
    """
    generations = generations_of(file)
    found = read_generations(generations)
    if found.asked["shard"][1] != 1:
        raise UserError(f"{generations} is one shard of several. Join them by --merge; that is judged as it was.")
    paths = paths_of(output or result_of(generations))
    check_writable(paths.result, "--output")
    records = []
    shown = RunProgress(len(found.records), title="regrade", unit="record")
    with alone(paths.generations), VerifierPool(config) as pool, shown:
        judging = Judging(pool, found.asked["protocol"]["extraction"])
        for start in range(0, len(found.records), BATCH):
            judging.submit(found.records[start : start + BATCH])
            records += judging.ready(wait=True)
            shown.update(len(records), {"accuracy": sum(record.correct for record in records) / len(records)})
        judged = dataclasses.replace(found, records=tuple(records), judge=judge_identity(config))
        write_generations(paths.generations, judged)
        write_result(paths.result, judged, pool)
    write_page(paths.result)
    return paths.result


def merge(files: Sequence[Path], output: Path, config: VerifierConfig) -> Path:
    """Join the shards of one evaluation into what one process would have written. Raises UserError."""
    shards = [read_generations(path) for path in files]
    joined = _join(files, shards)
    paths = paths_of(output)
    check_writable(paths.result, "--output")
    with alone(paths.generations), VerifierPool(config) as pool:
        write_generations(paths.generations, joined)
        write_result(paths.result, joined, pool)
    write_page(paths.result)
    return paths.result


def _join(files: Sequence[Path], shards: Sequence[Generations]) -> Generations:
    first = shards[0]
    for path, other in zip(files[1:], shards[1:], strict=True):
        _check_same(files[0], path, _request(first) | {"judge": first.judge}, _request(other) | {"judge": other.judge})
    count = first.asked["shard"][1]
    numbers = sorted(one.asked["shard"][0] for one in shards)
    if any(one.asked["shard"][1] != count for one in shards) or numbers != list(range(count)):
        came = ", ".join("{}/{}".format(*one.asked["shard"]) for one in shards)
        raise UserError(f"--merge: wanted the shards 0 to {count - 1} of {count}, each once, came {came}.")
    records = tuple(record for one in shards for record in one.records)
    left_out = tuple({found for one in shards for found in one.left_out})
    asked = with_earlier(first.asked, *(one.asked for one in shards)) | {"shard": [0, 1]}
    return Generations(records, asked, left_out, first.judge)


def _request(found: Generations) -> Row:
    return {key: value for key, value in found.asked.items() if key not in ("shard", "earlier", *RECORDED)}


def _check_same(first: Path, other: Path, wanted: Row, came: Row) -> None:
    changed = [f"{key} is {one!r:.80} and {two!r:.80}" for key, one, two in differences(wanted, came)]
    if changed:
        raise UserError(f"--merge: {first} and {other} are of different evaluations: {'; '.join(changed)}.")
