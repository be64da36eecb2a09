"""Figures of the study beside this file: accuracy, response lengths and keywords, stage by stage."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Json = Mapping[str, Any]

INK, FAINT = "#222222", "#8a8a8a"
BLUE, ORANGE, GREEN, PURPLE = "#0b66b0", "#d1600a", "#2a8a4a", "#7a52a8"  # told apart by the colour-blind too
KEYWORD_COLOURS = {"wait": BLUE, "double check": ORANGE, "seem right": GREEN, "mistake": PURPLE}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "study",  # the same figure is the same file
}
KINDS = ("sft", "medium", "hard")
LABELS = {"sft": "SFT", "medium": "med.", "hard": "hard"}


def draw_figures(results: Json, folder: Path) -> None:
    """pipeline-accuracy.svg, pipeline-lengths.svg and pipeline-keywords.svg."""
    with plt.rc_context(STYLE):
        for name, figure in (
            ("accuracy", _accuracy(results["stages"])),
            ("lengths", _lengths(results["stages"])),
            ("keywords", _keywords(results["stages"])),
        ):
            figure.savefig(folder / f"pipeline-{name}.svg", metadata={"Date": None})
            plt.close(figure)


def path_of(stages: Json, suffix: str = "") -> list[str]:
    """Base and the nine stages; of an arm, those of its own where it has them."""
    names = [f"{kind}{number}" for number in (1, 2, 3) for kind in KINDS]
    return ["base", *(name + suffix if name + suffix in stages else name for name in names)]


def _accuracy(stages: Json) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.6), sharey=True, layout="constrained")
    titles = {"pass@1": "pass@1", "greedy": "Greedy accuracy"}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        _line(axes, stages, path_of(stages, "_continue"), metric, ORANGE, "SFT goes on", 4, "--")
        _line(axes, stages, path_of(stages), metric, BLUE, "SFT restarts", 0, "-")
        _stage_axis(axes)
        axes.set_title(title)
        axes.set_ylim(0.2, 1.01)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(panels[1])
    return figure


def _lengths(stages: Json) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained")
    for axes, unit in zip(panels, ("words", "tokens"), strict=True):
        path = path_of(stages)
        _line(axes, stages, path, f"{unit} incorrect", ORANGE, "incorrect ones", 0, "-")
        _line(axes, stages, path, unit, BLUE, "all responses", 0, "-")
        _stage_axis(axes)
        axes.set_title(f"Mean length in {unit}")
        axes.set_ylim(bottom=0)
    _legend(panels[1])
    return figure


def _keywords(stages: Json) -> Figure:
    figure, axes = plt.subplots(figsize=(9.2, 3.4), layout="constrained")
    path = path_of(stages)
    below = [0.0] * len(path)
    for word, colour in KEYWORD_COLOURS.items():
        heights = [stages[name][f"keyword {word}"]["mean"] for name in path]
        axes.bar(range(len(path)), heights, 0.62, below, color=colour, label=f"“{word}”")
        below = [low + height for low, height in zip(below, heights, strict=True)]
    halves = [_known(stages[name]["keywords"]["half"]) for name in path]
    axes.errorbar(range(len(path)), below, halves, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    _stage_axis(axes)
    axes.set_title("Words of a second look in a hundred responses")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def _line(
    axes: Axes, stages: Json, path: Sequence[str], metric: str, colour: str, label: str, first: int, style: str
) -> None:
    """Means with their 95% intervals, from the place `first` on; the one before it is where it branched off."""
    places = list(range(max(first - 1, 0), len(path)))
    found = [stages[path[place]][metric] for place in places]
    means = [_known(one["mean"]) for one in found]
    shift = 0.08 if first else 0.0  # so that two intervals can be read beside each other
    shown = [place + shift for place in places]
    axes.plot(shown, means, style, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.errorbar(
        shown, means, [_known(one["half"]) for one in found], fmt="none", ecolor=colour, elinewidth=1, capsize=2
    )


def _known(value: float | None) -> float:
    """NaN, of which nothing is drawn, for null: of one seed no interval is known."""
    return math.nan if value is None else value


def _legend(axes: Axes) -> None:
    """Above the panel, to the right of its title, where no data can be."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=4, handlelength=1.6, columnspacing=1.2)


def _stage_axis(axes: Axes) -> None:
    """Base and three times three stages, an iteration's above its number: fine-tuning, medium and hard questions."""
    axes.set_xticks(range(10), ["base", *[LABELS[kind] for _ in range(3) for kind in KINDS]], fontsize=8)
    for number in (1, 2, 3):
        start = 3 * number - 2.5
        if number % 2:
            axes.axvspan(start, start + 3, color="#f4f4f4", zorder=0, linewidth=0)
        axes.annotate(
            f"iteration {number}", (start + 1.5, 0), (0, -19), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", ha="center", va="top", color=FAINT, fontsize=8, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(-0.5, 9.5)
