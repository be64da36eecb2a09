"""Signs that a run goes wrong, found in its metrics: each rings after some bad steps running, and may stop the run.

How long a sign has been bad is not in the checkpoint: a run that goes on reads it off the lines of `metrics.jsonl` that
lie before its checkpoint. So it stops again at the same step, unless the sign's policy was changed.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rethinker_jax.config import Config
from rethinker_jax.config_health import Policy
from rethinker_jax.errors import UserError
from rethinker_jax.metrics import read_metrics

Row = Mapping[str, Any]  # metric → value of a step; None, NaN or missing where nothing was measured
PREFIX = "alarm/"  # of the metric that is 1 in steps in which an alarm rings, and missing in all others


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A step is bad where the sum of `metrics` is at or above `ceiling`, or at or below `floor`; the other is None.

    It rings at the `steps`-th bad step running. `spared` = (metric, limit): it never stops a run at or below the limit.
    """

    name: str
    policy: Policy
    metrics: tuple[str, ...]
    steps: int
    what: str  # of a bad step, a clause with {value}
    advice: str
    ceiling: float | None = None
    floor: float | None = None
    spared: tuple[str, int] | None = None

    def value(self, row: Row) -> float | None:
        found = [one for one in (_finite(row.get(name)) for name in self.metrics) if one is not None]
        return sum(found) if found else None

    def is_bad(self, row: Row) -> bool | None:
        """None where the step did not measure it: it neither goes on nor ends a series of bad steps."""
        value = self.value(row)
        if value is None:
            return None
        return (self.ceiling is not None and value >= self.ceiling) or (self.floor is not None and value <= self.floor)

    def running(self, before: int, row: Row) -> int:
        """Bad steps running, this one included, after `before` of them."""
        bad = self.is_bad(row)
        return before if bad is None else (before + 1) * bad

    def stops(self, running: int, row: Row) -> bool:
        if self.policy != "stop" or running < self.steps or not self.is_bad(row):
            return False
        return self.spared is None or (_finite(row.get(self.spared[0])) or 0.0) > self.spared[1]

    def sentence(self, running: int, row: Row) -> str:
        """`entropy: the policy's entropy is 0.004 nats a token (at or below 0.01), for 10 steps running`."""
        value = self.value(row)
        shown = "-" if value is None else f"{value:.3g}"
        long = f", for {running} steps running" if running > 1 else ""
        return f"{self.name}: {self.what.format(value=shown)}{long}"


def alarms_of(config: Config) -> tuple[Alarm, ...]:
    """Those that the config does not ignore."""
    health, limit = config.health, config.training.max_skipped_updates
    alarms = (
        Alarm(
            "not_finite", health.not_finite, ("skipped_update",), 1,
            "loss or gradient of {value} of the step's updates is not finite; they were left out",
            "lower optimizer.learning_rate, look at the rollouts of the step, or raise training.max_skipped_updates "
            f"(now {limit})",
            ceiling=1e-9, spared=("skipped_updates", limit),
        ),
        Alarm(
            "entropy", health.entropy, ("entropy",), health.entropy_steps,
            f"the policy's entropy is {{value}} nats a token, at or below health.entropy_floor={health.entropy_floor}",
            "lower optimizer.learning_rate, raise loss.clip_high, or give loss.entropy_coefficient a value",
            floor=health.entropy_floor,
        ),
        Alarm(
            "truncation", health.truncation, ("truncated_share",), health.truncation_steps,
            "the share of first responses that ran out of budget is {value}, at or above "
            f"health.truncation_share={health.truncation_share}",
            "raise sampling.max_new_tokens, or give reward.terms a term on length",
            ceiling=health.truncation_share,
        ),
        Alarm(
            "verifier", health.verifier, ("timeout_share", "crash_share"), health.verifier_steps,
            "the share of verdicts that timed out or crashed is {value}, at or above "
            f"health.verifier_share={health.verifier_share}",
            "look at the rollouts, give the verifier a core of its own, or raise verifier.deadline_s (in another run "
            "also verifier.cpu_limit_s and verifier.memory_mb)",
            ceiling=health.verifier_share,
        ),
        Alarm(
            "judge", health.judge, ("judge_failure_share",), health.judge_steps,
            "the share of responses for which the judge gave no value is {value}, at or above "
            f"health.judge_share={health.judge_share}",
            "see that its server answers; reward_missing in the rollouts says why",
            ceiling=health.judge_share,
        ),
        Alarm(
            "zero_advantage", health.zero_advantage, ("zero_advantage_share",), health.zero_advantage_steps,
            "no group of the step has an advantage",
            "give it rows of another difficulty (`select`), or look at the golds and the reward",
            ceiling=1.0,
        ),
        Alarm(
            "kl", health.kl, ("kl",), health.kl_steps,
            f"the KL to the reference is {{value}} nats a token, at or above health.kl_ceiling={health.kl_ceiling}",
            "lower optimizer.learning_rate, or raise loss.kl_coefficient",
            ceiling=health.kl_ceiling,
        ),
    )  # fmt: skip
    return tuple(alarm for alarm in alarms if alarm.policy != "ignore")


class Watch:
    """Looks at each step of a run in turn. `path` is its metrics.jsonl; lines from `first_step` on are not read."""

    def __init__(self, config: Config, path: Path, first_step: int):
        self._alarms = alarms_of(config)
        self._running = dict.fromkeys((alarm.name for alarm in self._alarms), 0)
        self._row: Row = {}
        self._step = first_step - 1
        for row in read_metrics(path) if path.is_file() and first_step else []:
            if row["step"] < first_step:
                self._count(row)

    def look(self, step: int, row: Row) -> tuple[dict[str, float], list[str]]:
        """Metrics of the alarms that ring in this step, and a line to show for each that begins or ends in it."""
        before = self._ringing()
        self._count(row)
        self._step = step
        after = self._ringing()
        said = [
            f"WARNING, step {step}: {alarm.sentence(self._running[alarm.name], row)}; {alarm.advice}"
            for alarm in after
            if alarm not in before
        ]
        said += [f"step {step}: {alarm.name}: over" for alarm in before if alarm not in after]
        return {PREFIX + alarm.name: 1.0 for alarm in after}, said

    @property
    def is_suspect(self) -> bool:
        """Whether the last step was bad by a sign that may yet stop the run: such weights are not worth keeping."""
        return any(alarm.policy == "stop" and self._running[alarm.name] for alarm in self._alarms)

    @property
    def stops(self) -> list[Alarm]:
        """The alarms for which the run must not go on."""
        return [alarm for alarm in self._alarms if alarm.stops(self._running[alarm.name], self._row)]

    def refuse(self, checkpoints: Path, latest: int | None) -> None:
        """Raises UserError where the run must not go on; `latest` is the newest checkpoint in `checkpoints`, if any."""
        for alarm in self.stops:
            kept = "there is no checkpoint yet" if latest is None else f"checkpoint {checkpoints / str(latest)} is kept"
            raise UserError(
                f"step {self._step}: {alarm.sentence(self._running[alarm.name], self._row)}. Nothing of this step was "
                f"saved; {kept}. What to do: {alarm.advice}. The same command goes on from there and stops here again "
                f"while the cause is there; health.{alarm.name}=warn lets it pass. Keys that change what is computed "
                "want another run.dir."
            )

    def _ringing(self) -> list[Alarm]:
        return [alarm for alarm in self._alarms if self._running[alarm.name] >= alarm.steps]

    def _count(self, row: Row) -> None:
        self._running = {alarm.name: alarm.running(self._running[alarm.name], row) for alarm in self._alarms}
        self._row = row


def alarms_in(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Alarm → how many steps it rang in (`steps`), the `first` and the `last`; only those that did."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for name in (name.removeprefix(PREFIX) for name in row if name.startswith(PREFIX) and row[name]):
            before = found.get(name, {"steps": 0, "first": row["step"]})
            found[name] = before | {"steps": before["steps"] + 1, "last": row["step"]}
    return found


def rows_left_out(path: Path) -> dict[str, int]:
    """How many rows a run's bad_rows.jsonl lists, by kind, the most frequent first; each row once."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kind_of = {row["id"]: row["kind"] for row in reversed(rows)}  # of a row that is listed twice, the first kind
    return dict(sorted(Counter(kind_of.values()).items(), key=lambda item: (-item[1], item[0])))


def alarm_words(found: Mapping[str, Mapping[str, int]]) -> str:
    """`entropy in 16 steps (34 to 60), kl in 1 step (3)`, from `alarms_in`; empty without any."""
    return ", ".join(
        f"{name} in {one['steps']} steps ({one['first']} to {one['last']})"
        if one["steps"] > 1
        else f"{name} in 1 step ({one['first']})"
        for name, one in found.items()
    )


def left_out_words(kinds: Mapping[str, int]) -> str:
    """`3: 2 bad_image, 1 too_long`, from `rows_left_out`; empty without any."""
    return f"{sum(kinds.values())}: " + ", ".join(f"{num} {kind}" for kind, num in kinds.items()) if kinds else ""


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
