"""The example's problems as parquet files, and its fine-tuning examples."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rethinker_jax.errors import UserError
from rethinker_jax.example import render, solutions, tasks
from rethinker_jax.example.solutions import Span
from rethinker_jax.types import Problem

Stage = Literal["clean", "noisy"]

SPLIT_SIZES = {"train": 4096, "validation": 512, "test": 512}
SPLIT_SEEDS = {"train": 1, "validation": 2, "test": 3}
# Of other members of the family, as "long-train".
SPLIT_SIZES |= {f"{member}-{split}": size for member in tasks.MEMBERS for split, size in SPLIT_SIZES.items()}
SFT_SIZES = {"clean": 16384, "noisy": 6144}
SFT_SEED = 11
CAPTION_SHARE = 0.4  # of the clean stage, kinds with a picture: without captions the tiny model does not learn to see

_PROBLEM_FIELDS = [
    ("id", pa.string()),
    ("question", pa.string()),
    ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ("answer", pa.string()),
    ("choices", pa.list_(pa.string())),
    ("type", pa.string()),
    ("source", pa.string()),
]
PROBLEM_SCHEMA = pa.schema(_PROBLEM_FIELDS)
SFT_SCHEMA = pa.schema(
    [*_PROBLEM_FIELDS, ("completion", pa.list_(pa.struct([("text", pa.string()), ("loss", pa.bool_())])))]
)


@dataclasses.dataclass(frozen=True)
class SftExample:
    """A problem and the completion to learn. Tokenise the spans one by one; add the end token, with loss, yourself."""

    problem: Problem
    spans: tuple[Span, ...]


def sft_examples(stage: str, seed: int, index: int, second_look_share: float = 0.2, silent: float = 0.0) -> SftExample:
    """The index-th fine-tuning example of a stage, from the training part; a pure function of its arguments.

    clean: captions (`CAPTION_SHARE`; never for text problems), else clean solutions, of which `second_look_share` are
    second looks, a share `silent` of these without loss up to the trigger.
    noisy: `solutions.noisy`, which has its own share of second looks.
    """
    if stage not in SFT_SIZES:
        raise UserError(f"the example's fine-tuning stages are {', '.join(SFT_SIZES)}, not {stage!r}")
    task = tasks.make_task(seed, index)
    rng = np.random.default_rng([seed, index, 1])  # not the pictures' stream
    if stage == "noisy":
        return SftExample(task.problem, tuple(solutions.noisy(task, rng)))
    if task.caption and rng.random() < CAPTION_SHARE:
        problem, spans = solutions.captioned(task)
        return SftExample(problem, tuple(spans))
    if rng.random() < second_look_share:
        return SftExample(task.problem, tuple(solutions.second_look(task, rng, silent)))
    return SftExample(task.problem, tuple(solutions.clean(task)))


def problem_row(problem: Problem) -> dict[str, object]:
    """A problem as a row of `PROBLEM_SCHEMA`; `path` names a picture that lives in the row itself."""
    return {
        "id": problem.id,
        "question": problem.question,
        "images": [{"bytes": image, "path": f"{problem.id}-{place}.png"} for place, image in enumerate(problem.images)],
        "answer": problem.answer,
        "choices": list(problem.choices),
        "type": problem.type,
        "source": problem.source,
    }


def _write(path: pathlib.Path, rows: list[dict[str, object]], schema: pa.Schema) -> None:
    """Written beside its place and renamed into it, so that a file of that name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # PNG bytes do not shrink further.
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), unfinished, compression="none", row_group_size=512)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_split(path: str | os.PathLike[str], split: str, count: int | None = None) -> None:
    """Writes a split's problems (all of `SPLIT_SIZES`, or the first `count`) to a parquet file.

    Raises UserError for an unknown split.
    """
    if split not in SPLIT_SIZES:
        raise UserError(f"the example has the splits {', '.join(SPLIT_SIZES)}, not {split!r}")
    member, _, part = split.rpartition("-")
    count = SPLIT_SIZES[split] if count is None else count
    made = tasks.make_tasks(SPLIT_SEEDS[part], count, part, tasks.MEMBERS.get(member, tasks.SHIPPED))
    _write(pathlib.Path(path), [problem_row(task.problem) for task in made], PROBLEM_SCHEMA)


def write_sft_split(
    path: str | os.PathLike[str], stage: Stage, count: int, seed: int, second_look_share: float = 0.2
) -> None:
    """Writes `count` fine-tuning examples to a parquet file: a problem's columns and `completion`, its spans."""
    rows = []
    for index in range(count):
        example = sft_examples(stage, seed, index, second_look_share)
        spans = [{"text": text, "loss": has_loss} for text, has_loss in example.spans]
        rows.append(problem_row(example.problem) | {"completion": spans})
    _write(pathlib.Path(path), rows, SFT_SCHEMA)


@functools.cache
def content_version() -> str:
    """Hash of the modules that decide what the files hold: a changed generator writes files of another name."""
    digest = hashlib.sha256()
    for source in (render.__file__, solutions.__file__, tasks.__file__, __file__):
        digest.update(pathlib.Path(source).read_bytes())
    return digest.hexdigest()[:10]


def example_path(name: str, cache_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Path of the parquet file called "example:train", ":long-test" (`SPLIT_SIZES`), ":sft-clean" or ":sft-noisy".

    Made in the cache directory when it is not there yet. Raises UserError for any other name.
    """
    prefix, _, split = name.partition(":")
    known = [f"example:{known_split}" for known_split in SPLIT_SIZES] + [f"example:sft-{stage}" for stage in SFT_SIZES]
    if name not in known:
        raise UserError(f"wanted one of {', '.join(known)}, got {name!r}")
    path = pathlib.Path(cache_dir).expanduser() / f"{prefix}-{split}-{content_version()}.parquet"
    if path.exists():
        return path
    if split in SPLIT_SIZES:
        write_split(path, split)
    else:
        stage: Stage = "clean" if split == "sft-clean" else "noisy"
        write_sft_split(path, stage, SFT_SIZES[stage], SFT_SEED)
    return path
