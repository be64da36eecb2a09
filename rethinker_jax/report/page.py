"""Assembles the page: one HTML file with its style, script, charts, rollouts and images inside, and nothing outside.

What the model wrote is untrusted. It enters as JSON in a data block, which the script turns into text nodes, never into
markup; the page's policy forbids any script but ours, by hash, and any connection.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from rethinker_jax.health import PREFIX, alarm_words, alarms_in, left_out_words
from rethinker_jax.report.charts import HERO, SFT_HERO, SPECS, Chart, draw, rest_of, thin
from rethinker_jax.report.read import Group, Run, as_int, as_mapping, as_number, as_text
from rethinker_jax.report.subset import Subset, choose_rollouts, script_json
from rethinker_jax.terminal import CONTROL

MAX_PAGE_BYTES = 15_000_000
MAX_TEXT = 100_000  # characters of config.yaml and summary.json shown
MAX_REST_CHARTS = 60


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One line of the table: two shares in [0, 1], None where the run has not got there.

    `better` says whether more is better (+1), worse (-1) or neither (0).
    """

    label: str
    note: str
    before: float | None
    after: float | None
    better: int

    @property
    def change(self) -> str:
        """In points of 100, with its sign."""
        if self.before is None or self.after is None:
            return ""
        points = round(100 * (self.after - self.before), 1)
        return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "±0"

    @property
    def tone(self) -> str:
        if self.before is None or self.after is None or self.before == self.after or not self.better:
            return "same"
        return "good" if (self.after > self.before) == (self.better > 0) else "bad"


def render_page(run: Run, max_bytes: int = MAX_PAGE_BYTES) -> bytes:
    """The page as UTF-8, at most `max_bytes` long: rollouts fill what the rest of the page leaves free."""
    charts = _draw_charts(run)
    without = _render(run, charts, Subset([], {}, len(run.rollouts)))
    # The sentences and the set headers grow by less than this once there are rollouts.
    subset = choose_rollouts(run, max_bytes - len(without) - 20_000)
    return _render(run, charts, subset)


def group_payload(group: Group) -> dict[str, Any]:
    """A group as the script reads it: the fields of `Group`, images by sha256 alone."""
    fields = dataclasses.asdict(group)
    return fields | {"images": [name.partition(".")[0] for name in group.images]}


@dataclasses.dataclass(frozen=True)
class _Charts:
    hero: Chart | None
    named: list[Chart]
    rest: list[Chart]
    num_left_out: int
    steps: tuple[int, ...]
    thinned: bool


def _draw_charts(run: Run) -> _Charts:
    metrics = thin(run.metrics)
    hero = SFT_HERO if run.is_sft else HERO
    rest = rest_of(metrics, hero)
    before = _numbers(as_mapping(run.summary.get("validation")).get("before"))
    measured = {f"validation_{name}": value for name, value in before.items()}
    named = [draw(spec, metrics, 360, 190, measured) for spec in SPECS]
    drawn = [draw(spec, metrics, 250, 120) for spec in rest[:MAX_REST_CHARTS]]
    return _Charts(
        hero=draw(hero, metrics, 700, 335),
        named=[chart for chart in named if chart is not None],
        rest=[chart for chart in drawn if chart is not None],
        num_left_out=max(0, len(rest) - MAX_REST_CHARTS),
        steps=metrics.steps,
        thinned=len(metrics.steps) < len(run.metrics.steps),
    )


def _numbers(value: Any) -> dict[str, float]:
    """Of a mapping, what is a finite number."""
    numbers = {name: as_number(one) for name, one in as_mapping(value).items()}
    return {name: one for name, one in numbers.items() if one is not None}


def fill_template(name: str, payload: Mapping[str, Any], **fields: Any) -> bytes:
    """A page of this package with its style, script and data inside, as UTF-8."""
    files = resources.files("rethinker_jax.report")
    names = ("style.css", name, "rollouts.html", "app.js", "rollouts.js")
    style, page, rollouts, *scripts = (files.joinpath(one).read_text("utf-8") for one in names)
    script = "\n".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({name: page, "rollouts.html": rollouts}), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible,
    )  # fmt: skip
    environment.filters["spelled"] = spell_controls
    html = environment.get_template(name).render(
        **fields, style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}",
        data=Markup(script_json(payload)),
    )  # fmt: skip
    return html.encode("utf-8", errors="backslashreplace")


def cut(text: str) -> str:
    """As much of a text as a page shows."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\n… ({len(text) - MAX_TEXT:,} more characters)"


def spell_controls(text: str) -> str:
    """As much of a text as a page shows, control characters written out."""
    return _visible(cut(text))


def _visible(value: Any) -> Any:
    """What a template prints: text with its control characters written out, but not what is markup already."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return CONTROL.sub(lambda found: f"[U+{ord(found[0]):04X}]", value)


def _render(run: Run, charts: _Charts, subset: Subset) -> bytes:
    drawn = [chart for chart in (charts.hero, *charts.named, *charts.rest) if chart is not None]
    return fill_template(
        "page.html",
        _payload(charts, subset, drawn),
        run=run,
        status=_status(run),
        facts=_facts(run),
        held_out=_held_out(run.summary),
        training=_training(run.summary),
        charts=charts,
        subset=subset,
        sources=sorted({group.source for chosen in subset.files for group in chosen.groups if group.source}),
        config_text=cut(run.config_text),
        summary_text=cut(json.dumps(run.summary, indent=2, ensure_ascii=False)) if run.summary else "",
    )


def _payload(charts: _Charts, subset: Subset, drawn: list[Chart]) -> dict[str, Any]:
    return {
        "steps": charts.steps,
        "charts": {chart.spec.id: chart.readout for chart in drawn},
        "sets": [
            {
                "name": chosen.file.name,
                "label": chosen.file.label,
                "step": chosen.file.step,
                "num_groups": chosen.num_groups,
                "groups": [group_payload(group) for group in chosen.groups],
            }
            for chosen in subset.files
        ],
        "images": {key: dataclasses.asdict(image) for key, image in subset.images.items()},
    }


def _status(run: Run) -> dict[str, str]:
    done, wanted = len(run.metrics.steps), run.num_steps
    steps = f"{done:,} steps" if wanted is None or done >= wanted else f"{done:,} of {wanted:,} steps"
    if "after" in run.summary or (wanted is not None and done >= wanted and "wall_s" in run.summary):
        return {"tone": "done", "word": "finished", "steps": steps}
    return {"tone": "live", "word": "in progress", "steps": steps}


def _facts(run: Run) -> list[tuple[str, str]]:
    """Short (name, value) pairs for the header; what the run did not say is left out."""
    summary = run.summary
    versions = as_mapping(summary.get("versions"))
    validation = as_mapping(summary.get("validation_nll"))
    losses = [as_number(value) for value in (summary.get("nll"), validation.get("before"), validation.get("after"))]
    accuracy = as_mapping(summary.get("validation_token_accuracy"))
    shares = [as_number(accuracy.get(when)) for when in ("before", "after")]
    wall, cpu = as_number(summary.get("wall_s")), as_number(summary.get("cpu_s"))
    seed = as_int(summary.get("seed", as_mapping(run.config.get("run")).get("seed")))
    facts = [
        ("model", run.model),
        ("seed", "" if seed is None else str(seed)),
        ("loss", "" if losses[0] is None else f"{losses[0]:.3f}"),
        ("validation loss", "" if losses[1] is None or losses[2] is None else f"{losses[1]:.3f} → {losses[2]:.3f}"),
        ("validation reward", _validation_reward(summary)),
        ("token accuracy", "" if shares[0] is None or shares[1] is None else f"{shares[0]:.1%} → {shares[1]:.1%}"),
        ("device", as_text(summary.get("device"))),
        ("wall time", "" if wall is None else duration(wall)),
        ("CPU time", "" if cpu is None else duration(cpu)),
        ("commit", as_text(summary.get("commit"))[:12]),
        ("alarms", alarm_words(alarms_in(_metric_rows(run)))),
        ("rows left out", left_out_words(_counts(summary.get("rows_left_out")))),
        ("versions", ", ".join(f"{name} {as_text(version)}" for name, version in sorted(versions.items()))),
    ]
    return [(name, value) for name, value in facts if value]


def _metric_rows(run: Run) -> list[dict[str, Any]]:
    """What `alarms_in` reads, a row a step."""
    series = {name: values for name, values in run.metrics.series.items() if name.startswith(PREFIX)}
    return [
        {"step": step} | {name: values[place] for name, values in series.items()}
        for place, step in enumerate(run.metrics.steps)
    ]


def _counts(value: Any) -> dict[str, int]:
    counts = {as_text(name): as_int(one) for name, one in as_mapping(value).items()}
    return {name: one for name, one in counts.items() if one is not None}


def _validation_reward(summary: Mapping[str, Any]) -> str:
    """`0.310 → 0.520, best 0.540 at checkpoint 30`; empty where nothing was measured after a step."""
    found = as_mapping(summary.get("validation"))
    before, last, best = (as_number(as_mapping(found.get(when)).get("reward")) for when in ("before", "last", "best"))
    step = as_int(found.get("best_step"))
    if before is None or last is None or best is None or step is None:
        return ""
    return f"{before:.3f} → {last:.3f}, best {best:.3f} at checkpoint {step}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 12 s`, `5 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _held_out(summary: Mapping[str, Any]) -> list[ResultRow]:
    before, after = as_mapping(summary.get("before")), as_mapping(summary.get("after"))
    rows = (
        ("greedy", "Greedy", "one answer each, temperature 0", 1),
        ("pass@1", "pass@1", "mean over samples", 1),
        ("pass@8", "pass@8", "any of eight right", 1),
        ("rethink_ratio", "Rethinks", "of its own accord", 0),
    )
    pairs = [(label, note, as_number(before.get(key)), as_number(after.get(key)), b) for key, label, note, b in rows]
    return [ResultRow(*row) for row in pairs if row[2] is not None or row[3] is not None]


def _training(summary: Mapping[str, Any]) -> list[ResultRow]:
    rows = (
        ("zero_advantage_share", "Zero-advantage groups", "all right or all wrong", 0),
        ("effective_share", "Effective rows", "advantage not zero, after replay", 1),
    )
    spans = [(as_mapping(summary.get(key)), label, note, better) for key, label, note, better in rows]
    pairs = [(label, note, as_number(s.get("first")), as_number(s.get("last")), b) for s, label, note, b in spans]
    return [ResultRow(*row) for row in pairs if row[2] is not None or row[3] is not None]
