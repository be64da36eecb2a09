"""Line charts as inline SVG, and the numbers the page's script reads out. Colours come from the style sheet."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from rethinker_jax.health import PREFIX
from rethinker_jax.report.read import Metrics

MAX_POINTS = 500  # more steps than this are averaged in neighbouring buckets before they are drawn


@dataclasses.dataclass(frozen=True)
class ChartSpec:
    """What a chart shows: `series` are (metric, label); `unit` is share, number or seconds.

    `sparse` metrics are measured at some steps only: lines go from one to the next, and are not smoothed.
    """

    id: str
    title: str
    note: str
    series: tuple[tuple[str, str], ...]
    unit: str = "number"
    log: bool = False
    sparse: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """The drawing area in the SVG's own units, and the values its edges stand for (log10 of them where `log`)."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool

    def x(self, step: int | float) -> float:
        return self.left + (step - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        height = math.log10(value) if self.log else value
        return self.bottom - (height - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawn chart. `readout` is plain data for the script: the frame, and values by series and place."""

    spec: ChartSpec
    svg: Markup
    labels: tuple[str, ...]
    readout: dict


HERO = ChartSpec(
    "learning",
    "Reward and accuracy",
    "Mean over the rollouts of each step, on training problems.",
    (("reward", "Reward"), ("accuracy", "Accuracy")),
    "share",
)
SFT_HERO = ChartSpec(
    "learning",
    "Loss",
    "Mean negative log-likelihood of the learned tokens, in nats: of each batch, and of the validation rows.",
    (("nll", "Training"), ("validation_nll", "Validation")),
)
SPECS = (
    ChartSpec(
        "validation",
        "Validation",
        "Greedy responses to held-out rows, after the update of a step; at the left edge before the first one.",
        (("validation_reward", "Reward"), ("validation_accuracy", "Accuracy")),
        "share",
        sparse=True,
    ),
    ChartSpec(
        "signal",
        "Signal in the batch",
        "As groups become all right or all wrong, replay keeps the rows useful.",
        (
            ("effective_share", "Effective rows"),
            ("zero_advantage_share", "Zero-advantage groups"),
            ("replay_share", "Replayed rows"),
        ),
        "share",
    ),
    ChartSpec(
        "rethinking",
        "Rethinking",
        "Completions with a second look: by the model's own choice, and forced.",
        (("rethink_ratio", "Of its own accord"), ("forced_share", "Forced")),
        "share",
    ),
    ChartSpec(
        "second_look",
        "What a forced second look does",
        "Accuracy of forced completions before and after it; verdicts it turned.",
        (
            ("forced_first_accuracy", "First answer"),
            ("forced_final_accuracy", "Final answer"),
            ("wrong_to_right", "Wrong → right"),
            ("right_to_wrong", "Right → wrong"),
        ),
        "share",
    ),
    ChartSpec(
        "token_accuracy",
        "Token accuracy",
        "Validation: share of the learned tokens that are the likeliest next token.",
        (("validation_token_accuracy", "Validation"),),
        "share",
    ),
    ChartSpec("length", "Completion length", "Mean tokens a completion.", (("completion_length", "Tokens"),)),
    ChartSpec("entropy", "Entropy", "Of the policy's next token, in nats, mean.", (("entropy", "Entropy"),)),
    ChartSpec("gradient", "Gradient norm", "Before clipping.", (("gradient_norm", "Norm"),)),
    ChartSpec(
        "gap",
        "Sampler and trainer",
        "Gap between their log-probabilities.",
        (("sampler_trainer_gap", "Gap"),),
        log=True,
    ),
    ChartSpec("speed", "Speed", "Sampled tokens per second.", (("tokens_per_second", "Tokens / s"),)),
    ChartSpec(
        "phases",
        "Where the time goes",
        "Seconds of a step in which the run waits for each.",
        (
            ("seconds_device_steps", "Optimizer steps"),
            ("seconds_sampling", "Sampling"),
            ("seconds_prompts", "Prompts"),
            ("seconds_waiting_for_verdicts", "Verdicts"),
        ),
        "seconds",
    ),
)


def rest_of(metrics: Metrics, hero: ChartSpec = HERO) -> list[ChartSpec]:
    """One small chart for every metric that neither `hero` nor another named chart shows, phase times last."""
    named = {name for spec in (hero, *SPECS) for name, _ in spec.series}
    rest = (n for n in metrics.series if n not in named and not n.startswith(PREFIX))  # alarms stand in the header
    names = sorted(rest, key=lambda n: (n.startswith("seconds_"), n))
    return [
        ChartSpec(f"rest-{place}", name, "", ((name, name),), "seconds" if name.startswith("seconds_") else "number")
        for place, name in enumerate(names)
    ]


def thin(metrics: Metrics, limit: int = MAX_POINTS) -> Metrics:
    """At most `limit` points: the means of equal buckets of neighbouring steps, each at its last step."""
    count = len(metrics.steps)
    if count <= limit:
        return metrics
    edges = [round(i * count / limit) for i in range(limit + 1)]
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    series = {name: tuple(_mean(values[span]) for span in spans) for name, values in metrics.series.items()}
    return dataclasses.replace(metrics, steps=tuple(metrics.steps[span][-1] for span in spans), series=series)


def smooth(values: Sequence[float | None], sigma: float) -> list[float | None]:
    """Gaussian mean around each place, over the values that are there; None stays None."""
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)]
    result: list[float | None] = []
    for place, value in enumerate(values):
        total = mass = 0.0
        for offset in range(-reach, reach + 1):
            near = values[place + offset] if 0 <= place + offset < len(values) else None
            if near is not None:
                total += weights[offset + reach] * near
                mass += weights[offset + reach]
        result.append(None if value is None else total / mass)
    return result


def draw(
    spec: ChartSpec, metrics: Metrics, width: int, height: int, before: Mapping[str, float] | None = None
) -> Chart | None:
    """None if the run has none of the chart's metrics. Colour index = place of the series in the spec.

    `before`: metric → its value before the first step, drawn one step to the left of it.
    """
    present = [(i, n, label) for i, (n, label) in enumerate(spec.series) if n in metrics.series]
    if not present:
        return None
    values = {name: metrics.series[name] for _, name, _ in present}
    first = {name: before[name] for name in values if name in before} if before else {}
    seen = [v for line in (*values.values(), first.values()) for v in line if v is not None]
    log = spec.log and all(v > 0 for v in seen)
    steps = (metrics.steps[0] - 1, *metrics.steps) if first else metrics.steps
    frame = _frame(spec, steps, seen, log, width, height)
    parts = [_axes(spec, frame)]
    sigma = max(1.0, len(metrics.steps) / 30)
    for index, name, _ in reversed(present):
        line = (first.get(name), *values[name]) if first else values[name]
        drawn = _smooth_line(line, sigma, log) if len(metrics.steps) >= 8 and not spec.sparse else line
        points = [(frame.x(s), frame.y(v)) for s, v in zip(steps, line, strict=True) if v is not None]
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        parts.append(f'<path class="dots s{index}" d="{dots}"/>')
        parts.append(f'<path class="line s{index}" d="{_path(steps, drawn, frame)}"/>')
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(spec.title)}">'
    svg = f'{opening}{"".join(parts)}<g class="cursor"></g></svg>'
    readout = {
        "frame": [frame.left, frame.right, frame.top, frame.bottom],
        "x": [frame.x_low, frame.x_high],
        "y": [frame.y_low, frame.y_high],
        "log": log,
        "unit": spec.unit,
        "series": [
            {"color": index, "values": [None if v is None else float(f"{v:.5g}") for v in values[name]]}
            for index, name, _ in present
        ],
    }
    return Chart(spec, Markup(svg), tuple(label for _, _, label in present), readout)


def _smooth_line(line: Sequence[float | None], sigma: float, log: bool) -> list[float | None]:
    if not log:
        return smooth(line, sigma)
    powers = smooth([None if v is None else math.log10(v) for v in line], sigma)
    return [None if v is None else 10.0**v for v in powers]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def _frame(spec: ChartSpec, steps: Sequence[int], seen: list[float], log: bool, width: int, height: int) -> Frame:
    low, high = min(seen), max(seen)
    if log:
        low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        low, high = (low, high) if high > low else (low - 1, high + 1)
    elif spec.unit == "share":
        full = spec is HERO or high > 0.6  # small shares would lie flat on the floor of a full scale
        low, high = min(0.0, low), max(1.0, high) if full else max(0.02, 1.15 * high)
    elif low >= 0 and low < 0.7 * high:
        low, high = 0.0, high * 1.05
    else:
        margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    x_low, x_high = (steps[0], steps[-1]) if steps[-1] > steps[0] else (steps[0] - 1, steps[0] + 1)
    edges = (float(x_low), float(x_high), float(low), float(high))
    return Frame(width, height, 42, width - 8, 8, height - 24, *edges, log)


def _path(steps: Sequence[int], line: Sequence[float | None], frame: Frame) -> str:
    """One stroke through the values there are. Gaps are bridged: steps without forced completions are common."""
    points = [(s, v) for s, v in zip(steps, line, strict=True) if v is not None]
    return "".join(f"{'L' if i else 'M'}{frame.x(s):.1f} {frame.y(v):.1f}" for i, (s, v) in enumerate(points))


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def format_value(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.0%}"
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k" if abs(value) < 1e6 else f"{value / 1e6:.3g}M"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _axes(spec: ChartSpec, frame: Frame) -> str:
    parts = []
    small = frame.height < 140
    if frame.log:
        powers = range(math.ceil(frame.y_low), math.floor(frame.y_high) + 1)
        every = max(1, math.ceil(len(powers) / 5))
        levels = [(10.0**p, f"1e{p}") for p in powers if p % every == 0]
    else:
        levels = [(v, format_value(v, spec.unit)) for v in ticks(frame.y_low, frame.y_high, 2 if small else 4)]
    for value, label in levels:
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.right}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    steps = [s for s in ticks(frame.x_low, frame.x_high, frame.width // 85) if s == round(s) and s >= 0]
    for step in steps:
        anchor = "end" if frame.x(step) > frame.right - 8 else "middle"
        at = f'x="{frame.x(step):.1f}" y="{frame.bottom + 15}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {at}>{int(step)}</text>')
    parts.append(f'<text class="axis" x="{frame.left - 6}" y="{frame.bottom + 15}" text-anchor="end">step</text>')
    return "".join(parts)
