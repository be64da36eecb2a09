"""Responses in, verdicts with rewards out: the verifier, terms, functions of your own and the judge as one object."""

import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence

from rethinker_jax.config import Config
from rethinker_jax.config_check import USER_TERM
from rethinker_jax.config_rewards import RewardConfig
from rethinker_jax.rewards.grounding import answer_as_seen
from rethinker_jax.rewards.inputs import TermValue, image_sizes, reward_input, terms_of
from rethinker_jax.rewards.judge_model import JudgeModel, JudgeValue, gather
from rethinker_jax.rewards.terms import JUDGE, TERMS, weigh
from rethinker_jax.rewards.user import UserFunctions, user_row
from rethinker_jax.types import Completion, Prompt, Verdict
from rethinker_jax.verify.judge import JudgeItem
from rethinker_jax.verify.pool import PendingVerdicts, VerifierPool

Response = tuple[Prompt, Completion]
UserValues = list[dict[str, TermValue]]  # a response each: function → value


@dataclasses.dataclass(frozen=True)
class Pending:
    """Verdicts on their way. `result()` waits for all of them, in the order of the responses."""

    responses: tuple[Response, ...]
    settings: RewardConfig
    verdicts: PendingVerdicts
    user_values: concurrent.futures.Future[UserValues] | None
    asked: Mapping[int, JudgeValue]  # place of a response → the judge's value

    def done(self) -> bool:
        waiting = [*self.asked.values(), *([self.user_values] if self.user_values else [])]
        return self.verdicts.done() and all(one.done() for one in waiting)

    def result(self) -> list[Verdict]:
        """Verdicts with reward and parts. Raises UserError where a function of your own or the judge cannot go on."""
        verdicts = self.verdicts.result()
        own = self.user_values.result() if self.user_values else [{} for _ in verdicts]
        judged = dict(zip(self.asked, gather(list(self.asked.values())), strict=True))
        found = []
        for place, ((prompt, completion), verdict) in enumerate(zip(self.responses, verdicts, strict=True)):
            given = reward_input(prompt, completion, verdict, self.settings)
            weights = terms_of(prompt.problem, self.settings)
            values: dict[str, TermValue] = {term: TERMS[term](given) for term in weights if term in TERMS}
            values |= own[place]
            missing: dict[str, str] = {}
            if place in judged:
                value = judged[place]
                if isinstance(value, str):
                    missing[JUDGE] = value
                else:
                    values[JUDGE] = value
            found.append(weigh(verdict, {term: values[term] for term in weights if term in values}, weights, missing))
        return found


class Scorer:
    """A context manager around the verifier's pool, which it does not own. `submit` may be called from any thread.

    Opening it starts the process for functions of your own, and raises UserError where one cannot be used.
    """

    def __init__(self, config: Config, pool: VerifierPool):
        self.pool = pool
        self.settings = with_room(config)
        tables = [self.settings.terms, *self.settings.by_type.values()]
        names = list(dict.fromkeys(term for table in tables for term in table))
        self._own = tuple(name for name in names if USER_TERM.fullmatch(name))
        self._functions: UserFunctions | None = None
        self._judge: JudgeModel | None = None
        self._asks_judge = JUDGE in names
        # One thread: the functions' process takes one call after the other.
        self._caller = concurrent.futures.ThreadPoolExecutor(1, "rewards") if self._own else None

    def __enter__(self) -> "Scorer":
        if self._asks_judge:
            self._judge = JudgeModel(self.settings.judge)
        if self._own:
            try:
                self._functions = UserFunctions(self._own, self.settings.kwargs, self.settings.user_deadline_s)
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the functions' process and the judge's threads; what is pending raises."""
        if self._judge is not None:
            self._judge.close()
        if self._functions is not None:
            self._functions.kill()
        if self._caller is not None:
            self._caller.shutdown(cancel_futures=True)
        if self._functions is not None:
            self._functions.close()

    def submit(self, responses: Sequence[Response]) -> Pending:
        """Begins to judge the responses and returns at once."""
        items = [
            JudgeItem(
                completion.text,
                answer_as_seen(prompt.problem, image_sizes(prompt), self.settings),
                prompt.problem.choices,
                prompt.problem.type,
            )
            for prompt, completion in responses
        ]
        verdicts = self.pool.submit(items)
        asked = {}
        if self._judge is not None:
            asked = {
                place: self._judge.ask(prompt.problem, completion.text)
                for place, (prompt, completion) in enumerate(responses)
                if JUDGE in terms_of(prompt.problem, self.settings)
            }
        user_values = self._caller.submit(self._call, tuple(responses), verdicts) if self._caller is not None else None
        return Pending(tuple(responses), self.settings, verdicts, user_values, asked)

    def _call(self, responses: Sequence[Response], pending: PendingVerdicts) -> UserValues:
        """The values of functions of your own, which see the verdicts. Runs in the caller's thread."""
        assert self._functions is not None, "the scorer was not opened"
        given = [
            reward_input(prompt, completion, verdict, self.settings)
            for (prompt, completion), verdict in zip(responses, pending.result(), strict=True)
        ]
        values: UserValues = [{} for _ in responses]
        for name in self._own:
            places = [place for place, one in enumerate(given) if name in terms_of(one.problem, self.settings)]
            rows = [user_row(given[place]) for place in places]
            for place, value in zip(places, self._functions.values(name, rows), strict=True):
                values[place][name] = value
        return values


def with_room(config: Config) -> RewardConfig:
    """The reward section with `max_tokens` 0 replaced by all the room that a completion has."""
    rethink = config.rethink
    room = config.sampling.max_new_tokens + (rethink.max_new_tokens if rethink.rule != "off" else 0)
    length, overlong = config.reward.length, config.reward.soft_overlong
    return dataclasses.replace(
        config.reward,
        length=dataclasses.replace(length, max_tokens=length.max_tokens or room),
        soft_overlong=dataclasses.replace(
            overlong,
            max_tokens=overlong.max_tokens or room,
            buffer_tokens=min(overlong.buffer_tokens, overlong.max_tokens or room),
        ),
    )
