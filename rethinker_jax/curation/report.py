"""What `select` says of a selection: FILE.report.json, and a table for people."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rethinker_jax.curation.chain import Flow, Step, describe, options_of
from rethinker_jax.curation.difficulty import SourceDifficulty
from rethinker_jax.curation.records import Group
from rethinker_jax.types import VerdictName

Json = dict[str, Any]
FAILED: tuple[VerdictName, ...] = ("bad_gold", "timeout", "crash")


def report_path(output: Path) -> Path:
    return output.with_name(output.name + ".report.json")


@dataclasses.dataclass(frozen=True)
class Difficulties:
    """The sources from easy to hard, or why there are no labels."""

    sources: tuple[SourceDifficulty, ...] = ()
    why_none: str = ""


def samples_json(groups: Sequence[Group], num_judged_here: int) -> Json:
    """What came in: verdicts, and by source the problems, the samples, and how many of both are right."""
    verdicts = collections.Counter(sample.verdict for group in groups for sample in group.samples)
    of_source: dict[str, list[Group]] = {}
    for group in groups:
        of_source.setdefault(group.source, []).append(group)
    return {
        "num_samples": sum(group.num_samples for group in groups),
        "judged_here": num_judged_here,
        "verdicts": {name: verdicts[name] for name in get_args(VerdictName)},
        "per_source": {source: _source_json(found) for source, found in sorted(of_source.items())},
    }


def _source_json(groups: Sequence[Group]) -> Json:
    samples = sum(group.num_samples for group in groups)
    return {
        "problems": len(groups),
        "samples": samples,
        "pass_rate": sum(group.num_correct for group in groups) / samples if samples else None,
        "any_right": sum(group.num_correct > 0 for group in groups) / len(groups) if samples else None,
    }


def steps_json(steps: Sequence[Step]) -> list[Json]:
    return [
        {
            "filter": step.filter.name,
            "options": options_of(step.filter),
            **_flow_json(step.flow),
            "counts": dict(step.counts),
            "per_source": {source: _flow_json(flow) for source, flow in step.per_source.items()},
        }
        for step in steps
    ]


def _flow_json(flow: Flow) -> Json:
    return {**dataclasses.asdict(flow), "pass_rate": flow.pass_rate}


def difficulty_json(found: Difficulties) -> Json:
    return {"why_none": found.why_none, "sources": [dataclasses.asdict(one) for one in found.sources]}


def print_report(said: Mapping[str, Any], steps: Sequence[Step], output: Path, console: Console | None = None) -> None:
    """The table of the filters, then what a person should know before the file is used."""
    console = console or Console()
    if steps:
        console.print(_table(steps))

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    samples = said["samples"]
    if samples is not None:
        failed = {name: samples["verdicts"][name] for name in FAILED if samples["verdicts"][name]}
        if failed:
            counts = ", ".join(f"{count} {name}" for name, count in failed.items())
            tell(f"counted as not correct, though the verifier could not say: {counts}")
        if said["num_without_samples"]:
            tell(f"rows without samples, left out: {said['num_without_samples']}")
    if said["num_bad_rows"]:
        counts = ", ".join(f"{count} {kind}" for kind, count in said["bad_rows"].items())
        tell(f"rows that cannot be used, left out: {counts}")
    if said["image_root"]:
        tell(f"its images are paths: read it with data.image_root={said['image_root']}")
    tell(f"{'replaced' if said['replaced'] else 'wrote'} {said['num_written']} rows: {output}")
    tell(f"report: {report_path(output)}")


def _table(steps: Sequence[Step]) -> Table:
    table = Table(title="selection")
    for heading in ("filter", "problems in", "out", "samples in", "out", "passed"):
        table.add_column(heading, justify="left" if heading == "filter" else "right")
    for step in steps:
        flow = step.flow
        counts = "".join(f"\n  {name} {count}" for name, count in step.counts.items() if count)
        share = "-" if flow.pass_rate is None else f"{100 * flow.pass_rate:.1f}%"
        numbers = (flow.problems_in, flow.problems_out, flow.samples_in, flow.samples_out)
        table.add_row(Text(describe(step.filter) + counts), *(f"{number:,}" for number in numbers), share)
    return table
