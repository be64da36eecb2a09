"""prompt → rollout → verify: n samples of every prompt, judged, with second looks where Forced Rethinking asks."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from rethinker_jax import peers, rethink
from rethinker_jax.config import Config, RethinkConfig
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.phases import during
from rethinker_jax.processes import exchange, is_mine
from rethinker_jax.rewards.scorer import Pending, Response, Scorer
from rethinker_jax.sampling.sampler import Budgets, Counters, Drawn, Kept, Request
from rethinker_jax.system import System
from rethinker_jax.types import FIRST, TRIGGER, Prompt, Rollout, Verdict


@dataclasses.dataclass(frozen=True)
class Group:
    """The rollouts of one prompt, a row to learn from each; `problem` is the number of its dataset row.

    `rethinking`: by what second looks were forced on them and kept, and are learned from. Where these are added
    (`kept_as`), a sample whose second look is kept has two rollouts: its first response alone and, right behind it, the
    kept one.
    """

    problem: int
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rethinking: RethinkConfig = rethink.DEFAULTS

    @property
    def rewards(self) -> np.ndarray:
        return np.array([rollout.reward for rollout in self.rollouts], np.float32)

    @property
    def first_rewards(self) -> np.ndarray:
        return np.array([rollout.first_verdict.reward for rollout in self.samples], np.float32)

    def is_added(self, rollout: Rollout) -> bool:
        """Is one of the rollouts a second row of its sample."""
        return rollout.kept and self.rethinking.kept_as == "addition"

    @property
    def added(self) -> np.ndarray:
        """bool [rollouts]: `is_added` of each."""
        return np.array([self.is_added(rollout) for rollout in self.rollouts], bool)

    @property
    def samples(self) -> tuple[Rollout, ...]:
        """One rollout a sample: its first response where the kept second look was added."""
        return tuple(one for one, added in zip(self.rollouts, self.added, strict=True) if not added)

    @property
    def drawn(self) -> tuple[Rollout, ...]:
        """One rollout a sample: the one that was added, which holds the first response, where there is one."""
        continued = [*self.added[1:], False]
        return tuple(one for one, more in zip(self.rollouts, continued, strict=True) if not more)

    @property
    def not_kept(self) -> list[rethink.NotKept | None]:
        """Of every second look why it was not kept, None where it was."""
        found: list[rethink.NotKept | None] = []
        num_kept = 0
        for one in self.rollouts:
            if one.forced is not None and one.forced_verdict is not None:
                why = rethink.why_not_kept(self.rethinking, one.forced, one.forced_verdict, num_kept)
                num_kept += why is None
                found.append(why)
        return found

    def masks(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """(policy gradient, supervised) masks of what is trained on of one of the rollouts, advantages being there."""
        correct, advantage = rollout.verdict.correct, rollout.advantage
        return rethink.loss_masks(rollout.completion, self.rethinking, correct=correct, advantage=advantage)


@dataclasses.dataclass(frozen=True)
class SecondPass:
    """What second looks cost that were chosen after the verdicts; `seconds` includes waiting for theirs."""

    counters: Counters
    seconds: float


@dataclasses.dataclass(frozen=True)
class Rolled:
    """A rollout batch."""

    groups: list[Group]
    counters: Counters
    second_pass: SecondPass | None = None


def budgets_of(config: Config, triggers: Sequence[np.ndarray]) -> Budgets:
    """How long completions of this config may be; the same at every step, so that one loop is compiled."""
    first = config.sampling.max_new_tokens
    if config.rethink.rule == "off":
        return Budgets(first)
    width = max(len(trigger) for trigger in triggers)
    max_first = min(first, config.rethink.max_first_tokens)
    return Budgets(first, config.rethink.max_new_tokens, max_first, width)


def roll_out(
    system: System,
    params: Params,
    prompts: Sequence[tuple[int, Prompt]],
    config: Config,
    scorer: Scorer,
    step: int,
    *,
    forced: bool,
) -> Rolled:
    """Draw and judge `rollout.samples_per_prompt` samples of every (row number, prompt).

    `params` are in the sampling layout. `forced` switches Forced Rethinking on, by the config's rule.
    """
    n, seed = config.rollout.samples_per_prompt, config.run.seed
    if forced:
        config = dataclasses.replace(config, rethink=rethink.at_step(config.rethink, step))
    triggers = [system.tokenizer.encode(trigger) for trigger in config.rethink.triggers]
    budgets = budgets_of(config, triggers)
    requests = [Request(prompt, sample) for _, prompt in prompts for sample in range(n)]
    if forced and config.rethink.rule == "random":
        requests = [_with_trigger(request, triggers, config, step) for request in requests]
    judging = Judging(requests, scorer)
    by_verdict = forced and config.rethink.rule == "paper"
    kept = Kept(config.rethink.max_first_tokens) if by_verdict else None
    with during("rollout"):  # ends with the last token; only caches that are kept may still be moved by the device
        _, counters = system.sampler.generate(
            params, requests, config.sampling, budgets, seed=seed, step=step,
            second_temperature=config.rethink.temperature, num_prompts=config.rollout.prompts_per_step,
            on_finished=judging.submit, kept=kept,
        )  # fmt: skip
    rollouts = judging.result()
    second = None
    if kept is not None:
        began_at = time.monotonic()
        rollouts, counters_of_second = _second_pass(system, params, rollouts, triggers, config, scorer, step, kept)
        if counters_of_second is not None:
            second = SecondPass(counters_of_second, time.monotonic() - began_at)
    groups = []
    for place, (row, prompt) in enumerate(prompts):
        kept_of = keep(rollouts[place * n : (place + 1) * n], config)
        groups.append(Group(row, prompt, as_rows(kept_of, config.rethink), config.rethink))
    return Rolled(groups, counters, second)


class Judging:
    """Rollouts in the making: completions are submitted to the scorer as they end, while others are being drawn.

    Of several processes each judges its share of the requests, and `result` brings the verdicts together.
    """

    def __init__(self, requests: Sequence[Request], scorer: Scorer):
        self._requests = requests
        self._scorer = scorer
        self._drawn: dict[int, Drawn] = {}
        self._parts: list[tuple[Sequence[tuple[int, Drawn]], Pending]] = []

    def submit(self, ended: Sequence[tuple[int, Drawn]]) -> None:
        """Asks for the verdicts of the first responses and, behind them, of what second looks were forced on."""
        self._drawn |= dict(ended)
        mine = [(row, drawn) for row, drawn in ended if is_mine(row)]
        if not mine:
            return
        firsts = [(self._requests[row].prompt, drawn.first or drawn.completion) for row, drawn in mine]
        forced = [(self._requests[row].prompt, drawn.completion) for row, drawn in mine if drawn.first is not None]
        self._parts.append((mine, self._scorer.submit(firsts + forced)))

    @during("verify")
    def result(self) -> list[Rollout]:
        """Waits for the verdicts; one rollout a request, in their order."""
        firsts: dict[int, Verdict] = {}
        seconds: dict[int, Verdict] = {}
        for mine, pending in self._parts:
            verdicts = pending.result()
            firsts |= {row: verdict for (row, _), verdict in zip(mine, verdicts, strict=False)}
            forced = [row for row, drawn in mine if drawn.first is not None]
            seconds |= dict(zip(forced, verdicts[len(mine) :], strict=True))
        firsts, seconds = all_verdicts(firsts), all_verdicts(seconds)
        rollouts = []
        for row, request in enumerate(self._requests):
            drawn = self._drawn[row]
            rollout = Rollout(request.prompt, request.sample, drawn.first or drawn.completion, firsts[row])
            if drawn.first is not None:
                rollout = dataclasses.replace(rollout, forced=drawn.completion, forced_verdict=seconds[row])
            rollouts.append(rollout)
        return rollouts


def all_verdicts(mine: Mapping[int, Verdict]) -> dict[int, Verdict]:
    """The verdicts of all processes, by what they are of."""
    if peers.count() == 1:
        return dict(mine)
    found: dict[int, Verdict] = {}
    for said in exchange([[number, dataclasses.asdict(verdict)] for number, verdict in mine.items()]):
        found |= {number: Verdict(**fields) for number, fields in said}
    return found


@during("verify")
def judge_all(responses: Sequence[Response], scorer: Scorer) -> list[Verdict]:
    """The verdicts of responses that all processes have; each judges its share."""
    mine = {place: response for place, response in enumerate(responses) if is_mine(place)}
    found = all_verdicts(dict(zip(mine, scorer.submit(list(mine.values())).result(), strict=True)))
    return [found[place] for place in range(len(responses))]


def keep(rollouts: Sequence[Rollout], config: Config) -> tuple[Rollout, ...]:
    """Mark the forced completions of one group that are trained on."""
    marked: list[Rollout] = []
    num_kept = 0
    for rollout in rollouts:
        if rollout.forced is not None and rollout.forced_verdict is not None:
            kept = rethink.is_kept(config.rethink, rollout.forced, rollout.forced_verdict, num_kept)
            num_kept += kept
            rollout = dataclasses.replace(rollout, kept=kept)
        marked.append(rollout)
    return tuple(marked)


def as_rows(rollouts: Sequence[Rollout], config: RethinkConfig) -> tuple[Rollout, ...]:
    """One rollout a row to learn from: a kept second look takes its first response's place or comes behind it."""
    if config.kept_as == "replacement":
        return tuple(rollouts)
    rows: list[Rollout] = []
    for rollout in rollouts:
        if rollout.kept:
            rows.append(dataclasses.replace(rollout, forced=None, forced_verdict=None, kept=False))
        rows.append(rollout)
    return tuple(rows)


def _with_trigger(request: Request, triggers: Sequence[np.ndarray], config: Config, step: int) -> Request:
    rng = rethink.coin(config.run.seed, step, request.prompt.problem.stable_hash, request.sample)
    number = rethink.choose_at_random(config.rethink, rng)
    return request if number is None else dataclasses.replace(request, trigger_ids=triggers[number])


def _second_pass(
    system: System,
    params: Params,
    rollouts: list[Rollout],
    triggers: Sequence[np.ndarray],
    config: Config,
    scorer: Scorer,
    step: int,
    kept: Kept,
) -> tuple[list[Rollout], Counters | None]:
    """Rule `paper`: choose after the verdicts of the group, then go on from first response and trigger.

    The caches of the first responses are `kept` where there was room; else each is read again in one chunk.
    """
    n = config.rollout.samples_per_prompt
    places: list[int] = []
    requests: list[Request] = []
    for place, rollout in enumerate(rollouts):
        group = rollouts[place // n * n : place // n * n + n]
        score = float(np.mean([one.first_verdict.correct for one in group]))
        rng = rethink.coin(config.run.seed, step, rollout.prompt.problem.stable_hash, rollout.sample)
        number = rethink.choose_by_verdict(config.rethink, rollout.first, rollout.first_verdict, score, rng)
        if number is None:
            continue
        prefix = rollout.first.token_ids[:-1]  # without its end token
        if rng.random() < config.rethink.truncate:
            cut = rethink.cut_first_response(rollout.first.text, config.rethink.truncate_at)
            prefix = system.tokenizer.encode(cut)[: len(prefix)]
        ids = np.concatenate([prefix, triggers[number]]).astype(np.int32)
        segments = np.repeat(np.array([FIRST, TRIGGER], np.int32), [len(prefix), len(triggers[number])])
        places.append(place)
        requests.append(
            Request(rollout.prompt, rollout.sample, prefix_ids=ids, prefix_segments=segments, resume=rollout.first)
        )
    if not requests:
        return rollouts, None
    first, second = min(config.sampling.max_new_tokens, config.rethink.max_first_tokens), config.rethink.max_new_tokens
    # Every prefix ends in a trigger, so nothing is drawn of a first response.
    budgets = Budgets(second, second, prefix_width=first + max(map(len, triggers)))
    with during("rollout"):
        drawn, counters = system.sampler.generate(
            params, requests, config.sampling, budgets, seed=config.run.seed, step=step,
            second_temperature=config.rethink.temperature, num_prompts=config.rollout.prompts_per_step,
            num_requests=len(rollouts), kept=kept,
        )  # fmt: skip
    kept.drop()
    prompts = [rollouts[place].prompt for place in places]
    verdicts = judge_all([(prompt, one.completion) for prompt, one in zip(prompts, drawn, strict=True)], scorer)
    rollouts = list(rollouts)
    for place, one, verdict in zip(places, drawn, verdicts, strict=True):
        rollouts[place] = dataclasses.replace(rollouts[place], forced=one.completion, forced_verdict=verdict)
    return rollouts, counters
