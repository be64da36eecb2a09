"""Tables of the study beside this file, written into a page between markers."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

Json = Mapping[str, Any]


def write_tables(results: Json, path: Path) -> None:
    """The tables between the page's markers; the page's prose is written by hand."""
    text = path.read_text()
    for name, lines in (
        ("run", run_lines(results)),
        ("stages", stage_lines(results)),
        ("comparisons", comparison_lines(results)),
        ("difficulty", difficulty_lines(results)),
        ("traces", trace_lines(results)),
    ):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"{path}: wanted the markers {begin} and {end}")
        text = "\n".join((head + begin, *lines, end)) + tail
    path.write_text(text)


def run_lines(results: Json) -> list[str]:
    run, once = results["provenance"], results["iterations_cpu_s"]["mean"]
    return [
        f"`{run['command']}` at {run['commit']}: {results['seeds']} seeds, {run['cpu_minutes']:.0f} CPU minutes "
        f"in all; the three iterations of one seed took {once / 60:.1f}."
    ]


def stage_lines(results: Json) -> list[str]:
    lines = table_head(
        "stage", "greedy", "pass@1", "pass@8", "of medium", "of hard", "words", "of incorrect", "tokens",
        "keywords", "at once",
    )  # fmt: skip
    for name, found in results["stages"].items():
        cells = [shown(found[key], 100) for key in ("greedy", "pass@1", "pass@8", "pass@1 medium", "pass@1 hard")]
        cells += [shown(found[key], 1) for key in ("words", "words incorrect", "tokens", "keywords")]
        lines.append(row(name, *cells, shown(found["at once"], 100)))
    return lines


def comparison_lines(results: Json) -> list[str]:
    """A difference's interval is over seeds, of which each is paired with itself."""
    lines = table_head("first − second", "greedy", "pass@1", "of medium", "of hard", "tokens", "seeds won, tied, lost")
    for found in results["comparisons"]:
        signs = [(value > 0) - (value < 0) for value in found["pass@1"]["values"]]
        counts = ", ".join(str(signs.count(sign)) for sign in (1, 0, -1))
        cells = [shown(found[key], 100, sign=True) for key in ("greedy", "pass@1", "pass@1 medium", "pass@1 hard")]
        lines.append(row(found["what"], *cells, shown(found["tokens"], 1, sign=True), counts))
    return lines


def difficulty_lines(results: Json) -> list[str]:
    """The mean error rate of each source by the model that drew, and the classes that the seeds found."""
    lines = table_head("source", "base", "after iteration 1", "after iteration 2")
    rounds = list(zip(*results["difficulty"], strict=True))
    for source in sorted(rounds[0][0], key=lambda one: rounds[0][0][one]["error_rate"]):
        cells = []
        for found in rounds:
            labels = [seed.get(source, {}).get("label", "none") for seed in found]
            rates = [seed[source]["error_rate"] for seed in found if source in seed]
            classes = ", ".join(f"{label}" for label in dict.fromkeys(labels))
            cells.append(f"{100 * fmean(rates):.1f}% {classes}")
        lines.append(row(source, *cells))
    return lines


def trace_lines(results: Json) -> list[str]:
    lines = table_head("traces of iteration", "traces", "with a second look", "that answer at once")
    for number, found in enumerate(zip(*results["traces"], strict=True), 1):
        cells = [f"{fmean([one[key] for one in found]):.0f}" for key in ("traces", "second_looks", "at_once")]
        lines.append(row(str(number), *cells))
    told = ", ".join(f"{count} {why}" for why, count in results["cut"].items())
    return [*lines, "", f"Truncation of {sum(results['cut'].values())} distilled traces: {told}."]


def table_head(*names: str) -> list[str]:
    return [row(*names), row("---", *["--:"] * (len(names) - 1))]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def shown(found: Json, scale: float, sign: bool = False) -> str:
    if found["mean"] is None:
        return "none"
    half = "" if found["half"] is None else f" ± {scale * found['half']:.1f}"
    return f"{scale * found['mean']:{'+' if sign else ''}.1f}{half}"
