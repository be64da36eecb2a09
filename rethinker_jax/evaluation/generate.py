"""Items in, records out: n samples an item by the training sampler, judged and written while others are drawn."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rethinker_jax import rethink
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.config import Config
from rethinker_jax.evaluate import EVALUATION_STEP
from rethinker_jax.evaluation.asks import Ask
from rethinker_jax.evaluation.listener import Listener
from rethinker_jax.evaluation.shared import SharedJudging
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.rewards.grounding import answer_as_seen
from rethinker_jax.rewards.inputs import image_sizes
from rethinker_jax.run_data import agreed, build_prompts
from rethinker_jax.sampling.sampler import Budgets, Drawn, Request
from rethinker_jax.system import System
from rethinker_jax.types import Problem, Prompt

NO_TRIGGER = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How items are drawn: `num_items` of them in one call of the sampler, `num_slots` completions at once."""

    config: Config
    n: int
    seed: int
    force_rethink: bool
    num_items: int
    num_slots: int

    def run(
        self, system: System, params: Params, asks: Sequence[Ask], judging: SharedJudging, listener: Listener
    ) -> None:
        """Draws everything; `params` are in the sampling layout."""
        for start in range(0, len(asks), self.num_items):
            batch = asks[start : start + self.num_items]
            made, bad = build_prompts(system, [ask.problem for ask in batch])
            bad = agreed(bad)
            for place, (kind, why) in bad.items():
                listener.left_out(batch[place], kind, why)
            good = [place for place in range(len(batch)) if place not in bad]
            if good:
                prompts, items = [made[place] for place in good], [batch[place].item for place in good]
                self._draw(system, params, prompts, items, judging, listener)
                listener.records(judging.ready(wait=True))

    def _draw(
        self,
        system: System,
        params: Params,
        prompts: Sequence[Prompt],
        items: Sequence[Item],
        judging: SharedJudging,
        listener: Listener,
    ) -> None:
        triggers = [system.tokenizer.encode(text) for text in self.config.rethink.triggers]
        pairs = [(place, sample) for place in range(len(prompts)) for sample in range(self.n)]
        requests = [Request(prompts[place], sample) for place, sample in pairs]
        requests = [
            dataclasses.replace(request, trigger_ids=self._trigger(request.prompt.problem, request.sample, triggers))
            for request in requests
        ]

        def finished(ended: Sequence[tuple[int, Drawn]]) -> None:
            found = [(pairs[row], drawn) for row, drawn in ended]
            judging.submit_drawn([self._record(items[place], prompts[place], n, drawn) for (place, n), drawn in found])
            listener.records(judging.ready())

        settings = dataclasses.replace(self.config.sampling, num_slots=self.num_slots)
        system.sampler.generate(
            params, requests, settings, self._budgets(triggers), seed=self.seed, step=EVALUATION_STEP,
            second_temperature=self.config.rethink.temperature, num_prompts=self.num_items,
            num_requests=self.num_items * self.n, on_finished=finished,
        )  # fmt: skip

    def _budgets(self, triggers: Sequence[np.ndarray]) -> Budgets:
        first = self.config.sampling.max_new_tokens
        if not self.force_rethink:
            return Budgets(first)
        return Budgets(first, self.config.rethink.max_new_tokens, first, max(map(len, triggers)))

    def _trigger(self, problem: Problem, sample: int, triggers: Sequence[np.ndarray]) -> np.ndarray:
        """Every sample gets a trigger, which one by the config's odds and the sample's name."""
        if not self.force_rethink:
            return NO_TRIGGER
        rng = rethink.coin(self.seed, EVALUATION_STEP, problem.stable_hash, sample)
        always = dataclasses.replace(self.config.rethink, fraction=1.0)
        number = rethink.choose_at_random(always, rng)
        assert number is not None, "a fraction of 1 leaves nobody out"
        return triggers[number]

    def _record(self, item: Item, prompt: Prompt, sample: int, drawn: Drawn) -> Record:
        """The sample as it was drawn; its verdicts are still to come."""
        first = drawn.first or drawn.completion
        forced = drawn.completion if drawn.first is not None else None
        problem = item.problem
        return Record(
            id=problem.id,
            sample=sample,
            question=problem.question,
            answer=answer_as_seen(problem, image_sizes(prompt), self.config.reward),
            choices=problem.choices,
            type=problem.type,
            categories=item.categories,
            cluster=item.cluster,
            scored=item.scored,
            completion=first.text,
            finish_reason=first.finish_reason,
            num_tokens=len(first),
            verdict="no_answer",
            extracted=None,
            rule="",
            lenient="no_answer",
            alternatives=item.alternatives,
            forced=forced.text if forced is not None else "",
            forced_num_tokens=len(forced) if forced is not None else 0,
        )
