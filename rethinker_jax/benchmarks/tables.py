"""Result files as tables for people and papers: Markdown, LaTeX, CSV, with published numbers beside one's own.

Names, ids and answers are untrusted text: each format escapes them, so that none can break a row, run a LaTeX command
or become a formula of a spreadsheet.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rethinker_jax.benchmarks.compare import Comparison
from rethinker_jax.benchmarks.published import PublishedNumber, benchmark_key

MAX_CELL = 200  # characters
MAX_FLIPS = 100
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

    Only published numbers of benchmarks that are among the results are shown. A name that has a benchmark twice (two
    protocols) gets a row for each.
    """
    benchmarks = list(dict.fromkeys(result["benchmark"] for _, result in results))
    rows: list[tuple[str, str, str, dict[str, str]]] = []
    for name, result in results:
        protocol = _protocol(result["protocol"])
        cells = next((row[3] for row in rows if row[0] == name and row[2] == protocol), None)
        if cells is None or result["benchmark"] in cells:
            cells = {}
            rows.append((name, "this evaluation", protocol, cells))
        cells[result["benchmark"]] = accuracy_cell(result["accuracy"])
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


def _protocol(protocol: Mapping[str, Any]) -> str:
    """The plain values of a protocol in a line."""
    plain = {key: value for key, value in sorted(protocol.items()) if isinstance(value, str | int | float | bool)}
    return ", ".join(f"{key}={value}" for key, value in plain.items())


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
