"""The figures of the algorithm study, by matplotlib: curves with bands, a histogram, and scores with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from algorithm_tables import LABELS
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

COLOURS: Mapping[str, str] = {  # of Okabe and Ito, told apart by colour-blind readers
    "grpo": "#000000",
    "grpo_double_rate": "#888888",
    "filter": "#56b4e9",
    "dynamic": "#009e73",
    "ssr": "#d55e00",
    "ssr_bootstrap": "#e69f00",
    "ssr_deque": "#cc79a7",
    "ssr_rethink": "#0072b2",
    "ssr_rethink_decay": "#66a61e",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "rethinker_jax",  # the same numbers give the same file
}
TITLES: Mapping[str, str] = {
    "shipped": "shipped family",
    "stage_two": "stage two, from SSR's model",
    "steep": "steep: nine prompts in ten beyond reach",
    "slow": "slow: steep at 2e-5",
    "faint": "faint: half the contrast, from the clean parent",
    "noise": "noise: a fifth of the answers wrong",
}


def draw(output: Path, results: Mapping[str, Any]) -> None:
    """Write algorithm-*.svg into `output`, those whose runs are there."""
    regimes = results["regimes"]
    curves = {
        "zero-advantage": (("shipped", "steep"), "zero_advantage_share", "groups without an advantage"),
        "effective": (("shipped", "steep"), "effective_share", "rows of the batch with an advantage"),
        "validation": (("shipped", "steep", "slow", "faint"), "validation_reward", "validation reward"),
        "rethinking": (("shipped", "stage_two", "faint"), "rethink_ratio", "unforced second looks"),
    }
    with mpl.rc_context(STYLE):
        for name, (shown, metric, label) in curves.items():
            _save(output / f"algorithm-{name}.svg", _curves(regimes, shown, metric, label))
        _save(output / "algorithm-second-looks.svg", _second_looks(regimes, ("shipped", "stage_two", "faint")))
        _save(output / "algorithm-advantages.svg", _histograms(regimes, ("shipped", "steep")))
        _save(output / "algorithm-scores.svg", _scores(regimes))


def _save(path: Path, figure: Figure) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panels(names: Sequence[str], height: float = 3.3) -> tuple[Figure, list[Axes]]:
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(4.2 * len(names), height), squeeze=False, layout="constrained"
    )
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_title(TITLES[name], fontsize=9)
    return figure, list(panels[0])


def _curves(regimes: Mapping[str, Any], names: Sequence[str], metric: str, label: str) -> Figure:
    names = [name for name in names if name in regimes]
    figure, panels = _panels(names)
    for axes, name in zip(panels, names, strict=True):
        for arm, found in regimes[name]["arms"].items():
            if found["curves"][metric]["step"]:
                _line(axes, found["curves"][metric], COLOURS[arm], LABELS[arm])
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylabel(label)
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _line(axes: Axes, curve: Mapping[str, Sequence[float]], colour: str, label: str, style: str = "-") -> None:
    """Means and their band; everything drawn is a share, so a band ends at 0 and 1."""
    low = [max(0.0, mean - half) for mean, half in zip(curve["mean"], curve["half"], strict=True)]
    high = [min(1.0, mean + half) for mean, half in zip(curve["mean"], curve["half"], strict=True)]
    axes.plot(curve["step"], curve["mean"], style, color=colour, linewidth=1.4, label=label)
    axes.fill_between(curve["step"], low, high, color=colour, alpha=0.12, linewidth=0)


def _second_looks(regimes: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """First and final accuracy of forced completions: a second look helps where the solid line is above the dashed."""
    names = [name for name in names if name in regimes]
    figure, panels = _panels(names)
    for axes, name in zip(panels, names, strict=True):
        curves = regimes[name]["arms"]["ssr_rethink"]["curves"]
        if curves["forced_first_accuracy"]["step"]:
            _line(axes, curves["forced_first_accuracy"], "#888888", "first response", "--")
            _line(axes, curves["forced_final_accuracy"], COLOURS["ssr_rethink"], "after the forced second look")
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylabel("accuracy of forced completions")
    panels[-1].legend(fontsize=8)
    return figure


def _histograms(regimes: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Advantages among the rows that were trained on, as in Fig. 6 of the paper."""
    names = [name for name in names if name in regimes]
    arms = ("grpo", "filter", "ssr", "ssr_bootstrap")
    figure, panels = pyplot.subplots(
        len(names),
        len(arms),
        figsize=(11, 2.2 * len(names)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, name in zip(panels, names, strict=True):
        for axes, arm in zip(row, arms, strict=True):
            shares = regimes[name]["arms"][arm]["advantages"]
            axes.bar([int(eighths) / 8 for eighths in shares], list(shares.values()), width=0.11, color=COLOURS[arm])
            axes.set_title(f"{TITLES[name].partition(':')[0]}: {LABELS[arm]}", fontsize=8)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.supxlabel("advantage of a trained row", fontsize=9)
    return figure


def _scores(regimes: Mapping[str, Any]) -> Figure:
    """pass@1 after training of every arm, with its 95% interval; dashed: the clean parent, untrained."""
    figure, panels = _panels(list(regimes), height=3.2)
    for axes, entry in zip(panels, regimes.values(), strict=True):
        arms = list(entry["arms"])
        for place, arm in enumerate(reversed(arms)):
            score = entry["arms"][arm]["after"]["pass@1"]
            axes.errorbar(
                score["mean"], place, xerr=score["half"], fmt="o", color=COLOURS[arm], capsize=3, markersize=5
            )
            axes.plot(score["values"], [place] * len(score["values"]), "|", color=COLOURS[arm], alpha=0.5)
        axes.set_yticks(range(len(arms)), [LABELS[arm] for arm in reversed(arms)], fontsize=7)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("pass@1")
        if "parent" in entry:
            axes.axvline(entry["parent"]["pass@1"], linestyle="--", color="#888888", linewidth=1)
    return figure
