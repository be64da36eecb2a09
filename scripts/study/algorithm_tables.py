"""The tables of a study in Markdown, put between the markers of a page whose other text is written by hand."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LABELS: Mapping[str, str] = {
    "parent": "clean parent, untrained",
    "grpo": "GRPO",
    "grpo_double_rate": "GRPO, twice the rate",
    "filter": "GRPO-Filter",
    "dynamic": "dynamic resampling",
    "ssr": "SSR (Algorithm 1)",
    "ssr_bootstrap": "SSR, bootstrap form",
    "ssr_deque": "SSR, deque form",
    "ssr_rethink": "SSR + Forced Rethinking",
    "ssr_rethink_decay": "SSR + Forced Rethinking, q decays",
}
COLUMNS = ("greedy", "pass@1", "pass@8", "rethink_ratio")


def write(page: Path, results: Mapping[str, Any]) -> None:
    """Replace what stands between `<!-- REGIME -->` and `<!-- end -->`, for each regime and for `provenance`."""
    text = page.read_text(encoding="utf-8")
    tables = {regime: "\n".join(table(entry)) for regime, entry in results["regimes"].items()}
    tables["provenance"] = "\n".join(f"- {name}: `{value}`" for name, value in results["provenance"].items())
    for name, made in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
        if count != 1:
            raise SystemExit(f"{page}: wanted one <!-- {name} --> with its <!-- end -->, found {count}")
    page.write_text(text, encoding="utf-8")


def table(entry: Mapping[str, Any]) -> Iterator[str]:
    """A row an arm: scores after training in %, and in brackets how much they differ from the first arm's, by seed."""
    first, arms = entry["compared_with"], entry["arms"]
    names = (f"{entry['seeds']} seeds", "greedy", "pass@1", "pass@8", "unforced rethinking")
    yield f"| {' | '.join(names)} | zero-advantage groups, late | rows with an advantage, late |"
    yield "|---|---|---|---|---|---|---|"
    start = arms[first]["before"]
    yield f"| before | {' | '.join(_percent(start[column]['mean']) for column in COLUMNS)} | | |"
    if "parent" in entry:
        yield f"| {LABELS['parent']} | {' | '.join(_percent(entry['parent'][column]) for column in COLUMNS)} | | |"
    for arm, found in arms.items():
        differences = found["difference"] if arm != first else {}
        cells = [_cell(found["after"][column], differences.get(column)) for column in COLUMNS]
        late = [_percent(found["late"][name]["mean"]) for name in ("zero_advantage_share", "effective_share")]
        yield f"| {LABELS[arm]} | {' | '.join([*cells, *late])} |"


def _cell(score: Mapping[str, float], difference: Mapping[str, float] | None) -> str:
    cell = f"{_percent(score['mean'])} ± {100 * score['half']:.1f}"
    if difference is None:
        return cell
    text = f"{100 * difference['mean']:+.1f} ± {100 * difference['half']:.1f}"
    beyond = abs(difference["mean"]) > difference["half"]
    return f"{cell} ({f'**{text}**' if beyond else text})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
