"""An evaluation as one HTML page: its numbers, and its generations in the browser of rollouts."""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.benchmarks.groups import ItemSamples, group_records
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.report.page import MAX_PAGE_BYTES, cut, fill_template, group_payload
from rethinker_jax.report.read import Group, Sample, Segment, as_mapping, as_number, as_text
from rethinker_jax.report.subset import MAX_MISSES, InlineImage, inline_image, json_size
from rethinker_jax.types import SEGMENT_NAMES

Images = Mapping[str, Sequence[bytes | str]]  # item → its image files, as bytes or paths
MAX_CATEGORIES = 60


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table of numbers, as it is shown."""

    label: str
    note: str
    value: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Shown:
    """The groups on the page and their images by hash; `sentence` says what is not there."""

    files: tuple[str, ...]
    groups: tuple[Group, ...]
    images: Mapping[str, InlineImage]
    sentence: str


def render_evaluation(
    name: str,
    result: Mapping[str, Any],
    records: Iterable[Record],
    images: Images,
    max_bytes: int = MAX_PAGE_BYTES,
) -> bytes:
    """The page as UTF-8, at most `max_bytes` long; items that have no images in `images` are shown without."""
    items = group_records(records)
    triggers = as_mapping(as_mapping(result.get("protocol")).get("force_rethink")).get("triggers") or ()
    groups = [(_group(item, triggers), images.get(item.id, ())) for item in items]
    without = _render(name, result, Shown((name,), (), {}, ""))
    shown = _choose(name, groups, max_bytes - len(without) - 20_000)
    return _render(name, result, shown)


def _choose(name: str, groups: Sequence[tuple[Group, Sequence[bytes | str]]], left: int) -> Shown:
    """The first groups, by id, that fit into `left` bytes of JSON."""
    chosen: list[Group] = []
    found: dict[str, InlineImage] = {}
    misses = 0
    with tempfile.TemporaryDirectory() as scratch:
        for group, files in groups:
            fresh: dict[str, InlineImage] = {}
            keys: list[str] = []
            for file in files:
                key, path = _on_disk(file, Path(scratch))
                keys.append(key)
                image = None if path is None or key in found or key in fresh else inline_image(path)
                if image is not None:
                    fresh[key] = image
            group = dataclasses.replace(group, images=tuple(keys))
            cost = json_size(dataclasses.asdict(group)) + sum(len(image.uri) + 160 for image in fresh.values())
            if cost <= left:
                left -= cost
                found |= fresh
                chosen.append(group)
            elif (misses := misses + 1) == MAX_MISSES:
                break
    which = "all" if len(chosen) == len(groups) else f"the first, until the page was full: {len(chosen):,} of"
    sentence = f"This page holds the generations of {which} {len(groups):,} items."
    return Shown((name,), tuple(chosen), found, sentence)


def _on_disk(file: bytes | str, scratch: Path) -> tuple[str, Path | None]:
    """(key, path) of an image; bytes are put into `scratch`. The path is None where the file is gone."""
    if isinstance(file, str):
        path = Path(file)
        return (hashlib.sha256(path.read_bytes()).hexdigest(), path) if path.is_file() else ("", None)
    key = hashlib.sha256(file).hexdigest()
    path = scratch / key
    path.write_bytes(file)
    return key, path


def _group(item: ItemSamples, triggers: Sequence[str]) -> Group:
    first = item.first
    return Group(
        id=first.id,
        question=first.question,
        answer=first.answer,
        choices=first.choices,
        type=first.type,
        source=", ".join(first.categories[name] for name in sorted(first.categories)[:1]),
        prompt_text="",
        images=(),
        samples=tuple(_sample(record, triggers) for record in item.records),
    )


def _sample(record: Record, triggers: Sequence[str]) -> Sample:
    forced = record.forced_verdict is not None
    verdict = record.forced_verdict or record.verdict
    return Sample(
        sample=record.sample,
        segments=_segments(record, triggers),
        verdict=verdict,
        first_verdict=record.verdict,
        reward=None,
        extracted=record.forced_extracted if forced else record.extracted,
        rule="" if forced else record.rule,
        advantage=None,
        num_tokens=record.forced_num_tokens if forced else record.num_tokens,
        finish_reason=record.finish_reason,
        forced=forced,
    )


def _segments(record: Record, triggers: Sequence[str]) -> tuple[Segment, ...]:
    """First response, trigger and second look; the seams are found in the text, which is kept in one piece."""
    first, trigger, second = SEGMENT_NAMES
    if record.forced_verdict is None:
        return (Segment(first, record.completion),)
    if not record.forced.startswith(record.completion):
        return (Segment(second, record.forced),)
    rest = record.forced.removeprefix(record.completion)
    said = max((text for text in triggers if rest.startswith(text)), key=len, default="")
    parts = ((first, record.completion), (trigger, said), (second, rest.removeprefix(said)))
    return tuple(Segment(kind, text) for kind, text in parts if text)


def _render(name: str, result: Mapping[str, Any], shown: Shown) -> bytes:
    payload = {
        "steps": [],
        "charts": {},
        "sets": [
            {
                "name": "evaluation",
                "label": as_text(result.get("benchmark")),
                "step": None,
                "num_groups": len(shown.groups),
                "groups": [group_payload(group) for group in shown.groups],
            }
        ],
        "images": {key: dataclasses.asdict(image) for key, image in shown.images.items()},
    }
    return fill_template(
        "evaluation.html",
        payload,
        title=f"{as_text(result.get('benchmark'))} · {name}",
        headline=_percent(as_mapping(result.get("accuracy")).get("value")),
        counts=f"{result.get('num_problems')} problems, {result.get('num_samples')} samples each",
        facts=_facts(result),
        tables=[_main_table(result), *_category_tables(result)],
        subset=shown,
        sources=sorted({group.source for group in shown.groups if group.source}),
        result_text=cut(json.dumps(result, indent=2, ensure_ascii=False)),
    )


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Short (name, value) pairs for the header."""
    made_by, judge = as_mapping(result.get("made_by")), as_mapping(result.get("judge"))
    facts = [
        ("model", as_text(made_by.get("model"))),
        ("weights", as_text(made_by.get("weights"))[:12]),
        ("protocol", as_text(as_mapping(result.get("protocol")).get("name"))),
        ("seed", as_text(made_by.get("seed"))),
        ("left out", as_text(result.get("num_left_out"))),
        ("judge", f"{as_text(judge.get('name'))} {as_text(judge.get('rules'))[:12]}"),
        ("commit", as_text(made_by.get("commit"))[:12]),
    ]
    return [(name, value) for name, value in facts if value.strip()]


def _main_table(result: Mapping[str, Any]) -> Table:
    rows = [
        _row("Accuracy", "by the training rule", result.get("accuracy")),
        _row("Lenient", "any stated answer counts", result.get("lenient_accuracy")),
    ]
    intervals = as_mapping(result.get("pass@k_intervals"))
    rows += [_row(f"pass@{k}", "", interval) for k, interval in intervals.items()]
    majority = as_mapping(result.get("maj@k_intervals"))
    rows += [_row(f"maj@{k}", "the most frequent answer", majority[k]) for k in list(majority)[-1:]]
    second = as_mapping(result.get("second_look"))
    labels = (("before", "Before the second look"), ("after", "After it"), ("oracle", "Right at either"))
    rows += [_row(label, "forced at test time", second[key]) for key, label in labels if key in second]
    shares = (("no_answer_share", "No answer"), ("truncated_share", "Cut at the limit"))
    rows += [Row(label, "of completions", _percent(result.get(key))) for key, label in shares]
    return Table("Numbers", tuple(rows))


def _category_tables(result: Mapping[str, Any]) -> list[Table]:
    return [
        Table(
            as_text(dimension),
            tuple(
                _row(as_text(value), f"{as_mapping(found).get('num_problems')} problems", as_mapping(found)["accuracy"])
                for value, found in list(as_mapping(values).items())[:MAX_CATEGORIES]
            ),
        )
        for dimension, values in as_mapping(result.get("per_category")).items()
    ]


def _row(label: str, note: str, interval: Any) -> Row:
    found = as_mapping(interval)
    low, high = _percent(found.get("low")), _percent(found.get("high"))
    return Row(label, note, _percent(found.get("value")), f"{low} to {high}")


def _percent(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{100 * number:.1f}%"
