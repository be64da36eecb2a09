"""`main select`: samples and their verdicts → the rows that are worth learning from, or the traces.

The input is read once, a line at a time; of its arrays only means and lengths are kept. Output and report appear whole
or not at all.
"""

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from rethinker_jax.config import Config
from rethinker_jax.config_curation import SelectConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.curation import chain, report
from rethinker_jax.curation.difficulty import source_difficulties
from rethinker_jax.curation.filters import Difficulty, Filter
from rethinker_jax.curation.judging import judge_as_openvlthinker, judge_lines
from rethinker_jax.curation.records import Group
from rethinker_jax.curation.report import Difficulties
from rethinker_jax.curation.samples import read_lines
from rethinker_jax.curation.sources import Rows, Source, open_source, read_rows
from rethinker_jax.curation.written import NewRow, write_rows
from rethinker_jax.errors import UserError
from rethinker_jax.output_files import alone, check_writable, versions, write_whole

MAX_RATINGS_BYTES = 1 << 20
MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class SelectOptions:
    """`select`: samples of the rows of `data`. `input` None selects by the rows alone."""

    input: Path | None
    data: str
    output: Path
    mode: Literal["rows", "traces"]


def select(options: SelectOptions, config: Config) -> None:
    """Write what the filters leave of the input, and the report beside it. Raises UserError."""
    filters = _filters(options, config.select)
    source = open_source(options.data)
    output = options.output.resolve()  # a link is written through
    _check_output(output, options, source)
    ratings = read_ratings(Path(config.select.ratings)) if config.select.ratings else None
    with alone(output):
        columns = chain.columns_of(filters)
        rows = read_rows(source, config.data.image_root, columns, config.run.max_bad_rows)
        keep_texts = options.mode == "traces" or chain.reads_texts(filters)
        groups, num_judged_here = _groups(options, rows, config, keep_texts)
        difficulties = _difficulties(groups, ratings)
        label_of = {one.source: one.label for one in difficulties.sources}
        groups = [dataclasses.replace(group, difficulty=label_of.get(group.source, "")) for group in groups]
        if not label_of and any(isinstance(one, Difficulty) for one in filters):
            raise UserError(f"no source has a difficulty to select by: {difficulties.why_none}")
        if chain.wants_openvlthinker(filters):
            groups = judge_as_openvlthinker(groups, [row.gold for row in rows.rows], config.verifier)
        kept, steps = chain.run_chain(groups, filters, config.run.seed)
        if not kept:
            last = next(chain.describe(step.filter) for step in steps if not step.flow.problems_out)
            raise UserError(f"the filters left nothing; the last problem went at {last!r}. Nothing was written.")
        written = _traces(kept, rows) if options.mode == "traces" else _rows(kept, rows, options.input is not None)
        replaced = output.exists()
        said = {
            "input": None if options.input is None else str(options.input),
            "data": options.data,
            "output": str(output),
            "mode": options.mode,
            "seed": config.run.seed,
            "num_rows": len(rows.rows),
            "num_bad_rows": len(rows.bad_rows),
            "bad_rows": dict(collections.Counter(bad.kind for bad in rows.bad_rows)),
            "num_without_samples": len(rows.rows) - len(groups),
            "samples": None if options.input is None else report.samples_json(groups, num_judged_here),
            "difficulty": report.difficulty_json(difficulties),
            "filters": report.steps_json(steps),
            "num_written": len(written),
            "image_root": _image_root(rows, output),
            "replaced": replaced,
            **versions(("rethinker_jax",)),
        }
        # First: rows without it, as after a kill, would be taken for somebody else's.
        write_whole(report.report_path(output), json.dumps(said, indent=2, allow_nan=False) + "\n")
        write_rows(source, written, output)
    report.print_report(said, steps, output)


def _filters(options: SelectOptions, config: SelectConfig) -> tuple[Filter, ...]:
    """The filters of the config, that of `select.difficulty` first. Raises UserError where they lack what they need."""
    filters = chain.read_filters(config.filters)
    if config.difficulty:
        filters = (Difficulty((config.difficulty,)), *filters)
    if options.mode == "traces" and not config.filters:
        raise UserError("select: traces want select.filters, such as [correct, {pick: shortest}]; every sample came")
    if options.input is not None:
        return filters
    if options.mode == "traces" or config.ratings:
        raise UserError("select: wanted --input FILE, the samples; only rows can be selected without, by their columns")
    unfit = [one.name for one in filters if one.of_samples]
    if unfit or not filters:
        raise UserError(
            f"select: wanted --input FILE, the samples{', for the filter ' if unfit else ''}{' and '.join(unfit)}; "
            "column and per_source work without"
        )
    return filters


def _check_output(output: Path, options: SelectOptions, source: Source) -> None:
    """Raises UserError where the output would be lost on its readers, or would replace what `select` did not write."""
    if output.suffix != source.suffix:
        raise UserError(
            f"--output {options.output}: rows are written in the form in which they were read; wanted a name that "
            f"ends in {source.suffix}"
        )
    check_writable(output, "--output")
    read = [*source.files, *([] if options.input is None else [options.input])]
    if output.exists() and any(path.exists() and output.samefile(path) for path in read):
        raise UserError(f"--output {options.output} is a file that is read; name another")
    if Path(options.data).expanduser().is_dir() and output.parent == source.files[0].parent.resolve():
        raise UserError(f"--output {options.output} would lie in the folder that is read; name another place")
    if output.exists() and not report.report_path(output).is_file():
        raise UserError(
            f"--output {options.output} is there and was not written by `select` (there is no "
            f"{report.report_path(output).name} beside it). Remove it, or name another."
        )


def _groups(options: SelectOptions, rows: Rows, config: Config, keep_texts: bool) -> tuple[list[Group], int]:
    """The problems that have samples, in the order of the rows, and how many samples were judged here.

    Where there is no input, all problems without samples.
    """
    if options.input is None:
        return [Group(place, row.id, row.source, columns=row.columns) for place, row in enumerate(rows.rows)], 0
    row_of = {row.id.strip(): place for place, row in enumerate(rows.rows)}
    golds = [row.gold for row in rows.rows]
    with _opened(options.input) as lines:
        found = read_lines(lines, str(options.input), row_of, options.data)
        judged = judge_lines(found, golds, config.verifier, keep_texts)
    if not judged.samples:
        raise UserError(f"--input {options.input}: wanted lines of samples, came none")
    groups = []
    for place, samples in sorted(judged.samples.items()):
        row = rows.rows[place]
        num_correct = sum(sample.correct for sample in samples)
        groups.append(Group(place, row.id, row.source, tuple(samples), len(samples), num_correct, columns=row.columns))
    return groups, judged.num_judged_here


@contextlib.contextmanager
def _opened(path: Path) -> Generator[Iterator[bytes]]:
    """The lines of the input, with progress by megabytes where it is a file of some size."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"--input {path}: wanted a file of JSON lines ({error.strerror})") from error
    size = path.stat().st_size // MEGABYTE
    with file:
        if not size:
            yield file
            return
        with RunProgress(size, title="select", unit="MB") as shown:
            yield _counted(file, shown)


def _counted(file: IO[bytes], shown: RunProgress) -> Iterator[bytes]:
    num_read = told = 0
    for line in file:
        yield line
        num_read += len(line)
        if num_read // MEGABYTE > told:
            told = num_read // MEGABYTE
            shown.update(told, {})


def _difficulties(groups: Sequence[Group], ratings: Mapping[str, float] | None) -> Difficulties:
    """Of the sources, by the error rate over all samples. Raises UserError where ratings were given for nothing."""
    rates: dict[str, list[float]] = {}
    for group in groups:
        if group.pass_rate is not None:
            rates.setdefault(group.source, []).append(1 - group.pass_rate)
    if not rates:
        return Difficulties(why_none="there are no samples")
    try:
        means = {source: math.fsum(found) / len(found) for source, found in rates.items()}
        return Difficulties(source_difficulties(means, ratings))
    except ValueError as error:
        if ratings is not None:
            raise UserError(f"select.ratings: {error}") from error
        return Difficulties(why_none=str(error))


def read_ratings(path: Path) -> dict[str, float]:
    """Source → how hard it is, from 0 to 10, of a JSON or YAML file. Raises UserError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RATINGS_BYTES + 1)
        if len(text) > MAX_RATINGS_BYTES:
            raise UserError(f"select.ratings: {path} has more than {MAX_RATINGS_BYTES} bytes; wanted a rating a source")
        found = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"select.ratings: {path} cannot be read: {error}") from error
    wanted = 'wanted {"source": rating from 0 to 10, ...}'
    if not isinstance(found, dict) or not found:
        raise UserError(f"select.ratings: {path}: {wanted}, came {found!r:.80}")
    for source, rating in found.items():
        is_number = isinstance(rating, int | float) and not isinstance(rating, bool)
        if not isinstance(source, str) or not is_number or not 0 <= rating <= 10:
            raise UserError(f"select.ratings: {path}: {wanted}, came {source!r:.80}: {rating!r:.80}")
    return {source: float(rating) for source, rating in found.items()}


def _rows(groups: Sequence[Group], rows: Rows, sampled: bool) -> list[NewRow]:
    """The problems that are left; what was measured of them is added where there are samples."""
    return [NewRow(rows.rows[group.row], _measured(group) if sampled else {}) for group in groups]


def _traces(groups: Sequence[Group], rows: Rows) -> list[NewRow]:
    """A row for every sample that is left. Ids become PROBLEM:SAMPLE where a problem keeps several: none may recur."""
    several = bool(rows.id_column) and any(len(group.samples) > 1 for group in groups)
    return [
        NewRow(
            rows.rows[group.row],
            ({rows.id_column: f"{group.id}:{sample.number}"} if several else {})
            | {"completion": sample.completion}
            | _measured(group),
        )
        for group in groups
        for sample in group.samples
    ]


def _measured(group: Group) -> dict[str, Any]:
    return {
        "pass_rate": group.pass_rate,
        "num_samples": group.num_samples,
        "difficulty": group.difficulty or None,
    }


def _image_root(rows: Rows, output: Path) -> str:
    """Where image paths start, "" where readers of the output find them by themselves."""
    root = rows.path_root
    return "" if root is None or root == output.parent else str(root)
