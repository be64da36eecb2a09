"""Result files as tables for people and papers: Markdown, LaTeX, CSV, with published numbers beside one's own.

Names, ids and answers are untrusted text: each format escapes them, so that none can break a row, run a LaTeX command
or become a formula of a spreadsheet.
"""

import csv
import dataclasses
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rethinker_jax.benchmarks.compare import Comparison
from rethinker_jax.benchmarks.published import PublishedNumber, benchmark_key

MAX_CELL = 200  # characters
MAX_FLIPS = 100
# Published under one name, and each part a benchmark of its own here: a column where a row has all parts.
MEANS = {"mmmu_pro": ("mmmu_pro_standard10", "mmmu_pro_vision")}
# Of a protocol, in the tables.
SHOWN = ("name", "samples", "temperature", "top_p", "top_k", "max_new_tokens", "prompt_template", "max_pixels")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "–": "--", "±": r"$\pm$", "−": "$-$",
}  # fmt: skip
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts as they are, not escaped; every row is as long as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def results_table(results: Sequence[tuple[str, Mapping[str, Any]]], published: Sequence[PublishedNumber] = ()) -> Table:
    """One row a name with its accuracies in percent and their intervals, then the published rows; a column a benchmark.

    Only published numbers of benchmarks that are among the results are shown. Two protocols of a name are two rows; two
    seeds of one protocol are one cell, with mean and standard deviation over the seeds.
    """
    found = _cells(results)
    benchmarks = list(dict.fromkeys(name for cells in found.values() for name in cells))
    rows = [(name, "this evaluation", how, cells) for (name, how, *_), cells in found.items()]
    by_key = {benchmark_key(benchmark): benchmark for benchmark in benchmarks}
    printed: dict[tuple[str, str, str], dict[str, str]] = {}
    for number in published:
        benchmark = by_key.get(benchmark_key(number.benchmark))
        if benchmark is not None:
            row = printed.setdefault((number.model, number.source, number.protocol), {})
            row[benchmark] = f"{number.value:.1f}"
    rows += [(*key, cells) for key, cells in printed.items()]
    return Table(
        ("model", *benchmarks, "source", "protocol"),
        tuple((name, *(cells.get(b, "–") for b in benchmarks), source, how) for name, source, how, cells in rows),
    )


def _cells(results: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[tuple[str, ...], dict[str, str]]:
    """(name, protocol in words, all that two seeds must share) → benchmark → cell."""
    rows: dict[tuple[str, ...], dict[str, list[Mapping[str, Any]]]] = {}
    for name, result in results:
        same = json.dumps([result["protocol"], result["num_samples"]], sort_keys=True)
        key = name, _protocol(result), same
        seeds = [_seed(one) for one in rows.get(key, {}).get(result["benchmark"], ())]
        if None in (*seeds, _seed(result)) or _seed(result) in seeds:
            key = (*key, str(len(rows))) if seeds else key
        rows.setdefault(key, {}).setdefault(result["benchmark"], []).append(result)
    return {key: _with_means({name: _cell(found) for name, found in row.items()}, row) for key, row in rows.items()}


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    """One result: its accuracy with its interval; several seeds: mean ± sample standard deviation."""
    if len(found) == 1:
        return accuracy_cell(found[0]["accuracy"])
    values = [100 * one["accuracy"]["value"] for one in found]
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)"


def _with_means(cells: dict[str, str], row: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The cells and, of a row that has all parts of it, each mean that papers print under one name."""
    for name, parts in MEANS.items():
        if all(part in row for part in parts):
            values = [statistics.fmean(100 * one["accuracy"]["value"] for one in row[part]) for part in parts]
            cells[name] = f"{statistics.fmean(values):.1f} (mean of {len(parts)})"
    return cells


def _seed(result: Mapping[str, Any]) -> Any:
    made_by = result.get("made_by")
    return made_by.get("seed") if isinstance(made_by, Mapping) else None


def categories_table(results: Sequence[tuple[str, Mapping[str, Any]]], dimension: str) -> Table:
    """One row a value of `dimension`, one column a result; items in brackets behind the value."""
    found = [(name, result.get("per_category", {}).get(dimension, {})) for name, result in results]
    values = sorted({value for _, categories in found for value in categories})
    rows = []
    for value in values:
        sizes = sorted({categories[value]["num_problems"] for _, categories in found if value in categories})
        cells = [accuracy_cell(c[value]["accuracy"]) if value in c else "–" for _, c in found]
        rows.append((value, "/".join(map(str, sizes)), *cells))
    return Table((dimension, "items", *(name for name, _ in found)), tuple(rows))


def comparisons_table(comparisons: Sequence[Comparison]) -> Table:
    """One row a pair: the difference in points with its interval, who is better on how many items, the p-value."""
    header = ("a", "b", "items", "b − a", "a better", "b better", "p", "solved by a only", "by b only", "unpaired")
    rows = []
    for one in comparisons:
        gap = one.difference
        unpaired = len(one.only_in_a) + len(one.only_in_b) + len(one.changed)
        counts = (one.a_better, one.b_better)
        sets = (len(one.solvable.only_a), len(one.solvable.only_b))
        rows.append(
            (
                one.a,
                one.b,
                str(one.num_paired),
                f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})",
                *map(str, counts),
                f"{one.p_value:.3g}",
                *map(str, sets),
                str(unpaired),
            )
        )
    return Table(header, tuple(rows))


def flips_table(comparison: Comparison, limit: int = MAX_FLIPS) -> Table:
    """The items on which two evaluations differ most."""
    header = ("id", "gold", f"right, {comparison.a}", f"right, {comparison.b}", comparison.a, comparison.b)
    rows = tuple(
        (
            flip.id,
            flip.gold,
            f"{flip.accuracy_a:.2f}",
            f"{flip.accuracy_b:.2f}",
            "–" if flip.answer_a is None else flip.answer_a,
            "–" if flip.answer_b is None else flip.answer_b,
        )
        for flip in comparison.flips[:limit]
    )
    return Table(header, rows)


def accuracy_cell(accuracy: Mapping[str, float]) -> str:
    """In percent, with its interval."""
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def _protocol(result: Mapping[str, Any]) -> str:
    """What of a protocol moves numbers most, in a line; all of it stands in the result."""
    found = {**result["protocol"], "samples": result["num_samples"]}
    return ", ".join(f"{key}={found[key]}" for key in SHOWN if found.get(key) is not None)


def to_markdown(table: Table) -> str:
    lines = [table.header, tuple("---" for _ in table.header), *table.rows]
    return "".join(
        "| " + " | ".join(cell if number == 1 else escape_markdown(cell) for cell in line) + " |\n"
        for number, line in enumerate(lines)
    )


def to_latex(table: Table) -> str:
    """A `tabular` with booktabs rules."""
    lines = [" & ".join(map(escape_latex, line)) + r" \\" for line in (table.header, *table.rows)]
    columns = "l" * len(table.header)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*top, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([escape_csv(cell) for cell in line] for line in (table.header, *table.rows))
    return file.getvalue()


def escape_markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", _one_line(text))


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def escape_csv(text: str) -> str:
    """A cell that a spreadsheet would run as a formula gets an apostrophe before it; numbers are left alone."""
    text = _one_line(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _NUMBER.fullmatch(text) else text


def _one_line(text: str) -> str:
    """Without line breaks, control characters and halves of characters, and not longer than a cell may be."""
    text = text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
    return "".join(c if c.isprintable() else " " for c in text).strip()
