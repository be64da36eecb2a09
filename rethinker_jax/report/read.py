"""Reads a run directory, finished or in progress, into plain dataclasses.

A file that is not there yet is an empty answer. A line that cannot be read (the last one of a run in progress is often
half written) is left out and counted, and the count is shown on the page.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rethinker_jax.errors import UserError

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")
_PAD_RUN = re.compile(r"(?:<\|(?:image|video)_pad\|>){2,}")
_IMAGE_FILE = re.compile(r"[0-9a-f]{64}\.(?:png|jpe?g|webp|gif|bmp)")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{1,200000}={0,2}")
MAX_LEARNED_ROWS, MAX_LEARNED_IMAGES = 8, 6


@dataclasses.dataclass(frozen=True)
class Metrics:
    """`steps` ascend; `series[name]` has one value a step, None where the run wrote no finite number."""

    steps: tuple[int, ...] = ()
    series: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    num_unreadable: int = 0


@dataclasses.dataclass(frozen=True)
class Segment:
    """`kind` is first, trigger or second_look."""

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion with its verdict; None where the run did not say."""

    sample: int
    segments: tuple[Segment, ...]
    verdict: str
    first_verdict: str
    reward: float | None
    extracted: str | None
    rule: str
    advantage: float | None
    num_tokens: int | None
    finish_reason: str
    forced: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """The samples of one problem. `images` are names of files in the image folder, checked to be nothing else."""

    id: str
    question: str
    answer: str
    choices: tuple[str, ...]
    type: str
    source: str
    prompt_text: str
    images: tuple[str, ...]
    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True)
class RolloutFile:
    """A file of groups. `name` is its stem; `step` is None for the evaluations before and after."""

    name: str
    label: str
    step: int | None
    path: Path


@dataclasses.dataclass(frozen=True)
class LearnedSpan:
    text: str
    learned: bool


@dataclasses.dataclass(frozen=True)
class LearnedRow:
    """A row of fine-tuning as its tokens have it. `images` are base64 of small WebPs, checked to be nothing else."""

    id: str
    prompt_text: str
    images: tuple[str, ...]
    spans: tuple[LearnedSpan, ...]
    num_tokens: int | None
    num_learned: int | None
    is_cut: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """`learned` are sample rows of a fine-tuning run, which other runs have none of."""

    name: str
    config_text: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Metrics
    evaluations: tuple[RolloutFile, ...]
    rollouts: tuple[RolloutFile, ...]
    image_dir: Path
    learned: tuple[LearnedRow, ...] = ()

    @property
    def is_sft(self) -> bool:
        """Fine-tuning, by its sample rows or by metrics without a reward."""
        return bool(self.learned or (self.metrics.steps and "reward" not in self.metrics.series))

    @property
    def num_steps(self) -> int | None:
        """Steps the run was asked for; of one that counts epochs, once it is finished."""
        section = as_mapping(self.config.get("sft" if self.is_sft else "run"))
        counts_epochs = self.is_sft and as_int(section.get("num_epochs"))
        return as_int((self.summary if counts_epochs else section).get("num_steps"))

    @property
    def model(self) -> str:
        return as_text(as_mapping(self.config.get("model")).get("path"))


def read_run(run_dir: Path) -> Run:
    """Everything of a run but its rollouts, which `iterate_groups` reads one by one. UserError if it is no run."""
    known = ("config.yaml", "metrics.jsonl", "summary.json")
    if not any((run_dir / name).is_file() for name in known):
        raise UserError(f"wanted a run directory, one that holds {', '.join(known)}; {run_dir} has none of them")
    config_path, summary_path = run_dir / "config.yaml", run_dir / "summary.json"
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    steps = [(path, _STEP_FILE.fullmatch(path.name)) for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))]
    rollouts = [RolloutFile(p.stem, f"Step {int(m[1])}", int(m[1]), p) for p, m in steps if m is not None]
    evaluations = [
        RolloutFile(name, label, None, run_dir / "evaluations" / f"{name}.jsonl")
        for name, label in (("before", "Before training"), ("after", "After training"))
    ]
    return Run(
        name=as_text(run_dir.resolve().name),
        config_text=config_text,
        config=_parse_config(config_text),
        summary=_read_summary(summary_path),
        metrics=_read_metrics(run_dir / "metrics.jsonl"),
        evaluations=tuple(file for file in evaluations if file.path.is_file()),
        rollouts=tuple(sorted(rollouts, key=lambda file: file.step or 0)),
        image_dir=run_dir / "rollouts" / "images",
        learned=_read_learned(run_dir / "samples.jsonl"),
    )


def iterate_groups(path: Path) -> Iterator[Group | None]:
    """The groups of a rollout file in file order, None in the place of a line that cannot be read."""
    for row in _json_lines(path):
        yield _group(row) if row is not None else None


def count_lines(path: Path) -> int:
    """Lines with something in them, without parsing."""
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def fold_pads(text: str) -> str:
    """`text` with runs of image placeholders written as one and a count: a picture is hundreds of them."""
    times = "\N{MULTIPLICATION SIGN}"
    return _PAD_RUN.sub(lambda run: f"{run[0][: run[0].index('>') + 1]}{times}{run[0].count('<|')}", text)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def as_number(value: Any) -> float | None:
    """A finite number, else None: a NaN drawn as 0 would be a lie."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_int(value: Any) -> int | None:
    number = as_number(value)
    return None if number is None else int(number)


def as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Objects of a JSON-lines file; None for a line that holds none. A missing file has no lines."""
    if not path.is_file():
        return
    # Bytes split at \n alone; text would also split at U+2028, which may stand raw inside a JSON string.
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield _parse_object(line)


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _parse_config(text: str) -> Mapping[str, Any]:
    try:
        return as_mapping(yaml.safe_load(text))
    except yaml.YAMLError:
        return {}


def _read_summary(path: Path) -> Mapping[str, Any]:
    return (_parse_object(path.read_bytes()) or {}) if path.is_file() else {}


def _read_metrics(path: Path) -> Metrics:
    by_step: dict[int, dict[str, Any]] = {}
    num_unreadable = 0
    for row in _json_lines(path):
        step = as_int(row.get("step")) if row is not None else None
        if row is None or step is None:
            num_unreadable += 1
        else:
            by_step[step] = row  # a resumed run writes some steps again: the last word counts
    steps = tuple(sorted(by_step))
    names = dict.fromkeys(name for step in steps for name in by_step[step] if name != "step")
    series = {name: tuple(as_number(by_step[step].get(name)) for step in steps) for name in names}
    drawn = {name: values for name, values in series.items() if any(value is not None for value in values)}
    return Metrics(steps, drawn, num_unreadable)


def _read_learned(path: Path) -> tuple[LearnedRow, ...]:
    rows = itertools.islice((row for row in _json_lines(path) if row is not None), MAX_LEARNED_ROWS)
    return tuple(
        LearnedRow(
            id=as_text(row.get("id")),
            prompt_text=fold_pads(as_text(row.get("prompt_text"))),
            images=tuple(
                image
                for image in map(as_text, as_list(row.get("images"))[:MAX_LEARNED_IMAGES])
                if _BASE64.fullmatch(image)
            ),
            spans=tuple(
                LearnedSpan(as_text(span.get("text")), span.get("learned") is True)
                for span in map(as_mapping, as_list(row.get("spans")))
            ),
            num_tokens=as_int(row.get("num_tokens")),
            num_learned=as_int(row.get("num_learned")),
            is_cut=row.get("is_cut") is True,
        )
        for row in rows
    )


def _group(row: Mapping[str, Any]) -> Group:
    problem = as_mapping(row.get("problem"))
    return Group(
        id=as_text(problem.get("id")),
        question=as_text(problem.get("question")),
        answer=as_text(problem.get("answer")),
        choices=tuple(as_text(choice) for choice in as_list(problem.get("choices"))),
        type=as_text(problem.get("type")),
        source=as_text(problem.get("source")),
        prompt_text=fold_pads(as_text(row.get("prompt_text"))),
        # A name that is not a hash could lead out of the image folder.
        images=tuple(name for name in map(as_text, as_list(row.get("images"))) if _IMAGE_FILE.fullmatch(name)),
        samples=tuple(_sample(as_mapping(sample), place) for place, sample in enumerate(as_list(row.get("samples")))),
    )


def _sample(row: Mapping[str, Any], place: int) -> Sample:
    sample = as_int(row.get("sample"))
    segments = [as_mapping(segment) for segment in as_list(row.get("segments"))]
    verdict = as_text(row.get("verdict"))
    extracted = row.get("extracted")
    return Sample(
        sample=place if sample is None else sample,
        segments=tuple(Segment(as_text(segment.get("kind")), as_text(segment.get("text"))) for segment in segments),
        verdict=verdict,
        first_verdict=as_text(row.get("first_verdict")) or verdict,
        reward=as_number(row.get("reward")),
        extracted=None if extracted is None else as_text(extracted),
        rule=as_text(row.get("rule")),
        advantage=as_number(row.get("advantage")),
        num_tokens=as_int(row.get("num_tokens")),
        finish_reason=as_text(row.get("finish_reason")),
        forced=row.get("forced") is True,
    )
