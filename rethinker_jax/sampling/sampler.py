"""Requests in, completions out: the host's side of the decode loop."""

import dataclasses
from collections.abc import Callable, Sequence

from rethinker_jax.config import SamplingConfig
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.sampling.call import Call, Setup
from rethinker_jax.sampling.completions import Drawn
from rethinker_jax.sampling.requests import Asked, Budgets, Counters, Kept, Request

__all__ = ["Budgets", "Counters", "Drawn", "Kept", "Request", "Sampler"]


@dataclasses.dataclass(frozen=True)
class Sampler(Setup):
    """A loaded model that draws."""

    def generate(
        self,
        params: Params,
        requests: Sequence[Request],
        settings: SamplingConfig,
        budgets: Budgets,
        *,
        seed: int,
        step: int,
        second_temperature: float = 1.0,
        num_prompts: int | None = None,
        num_requests: int | None = None,
        kept: Kept | None = None,
        on_finished: Callable[[Sequence[tuple[int, Drawn]]], None] | None = None,
    ) -> tuple[list[Drawn], Counters]:
        """Draw one completion a request, in the order of `requests`. `params` are in the sampling layout.

        Each prompt object is prefilled once. `num_prompts` and `num_requests` pad their numbers, so that few shapes are
        compiled. `on_finished` is given the completions that ended since the last look, each with the number of its
        request, while the device draws the others; a look that finds none gives an empty list. Raises ValueError for a
        request that cannot be drawn, such as one whose prompt ends in an image (its last token is fed again, as text),
        UserError where one request does not fit.
        """
        if not requests:
            return [], Counters(0, 0, 0, 0, 1.0, 1.0)
        for request in requests:
            request.check(budgets)
        asked = Asked(tuple(requests), settings, budgets, (seed, step), second_temperature)
        call = Call(self, params, asked, kept, num_prompts, num_requests)
        drawn: dict[int, Drawn] = {}
        call.go_on()
        while len(drawn) < len(requests):
            ended = [number for number in call.look() if number not in drawn]
            copies = call.copy(ended)  # before the loop goes on, because it takes the arrays over
            if len(drawn) + len(ended) < len(requests):
                call.go_on()
            new = call.read(copies)
            drawn |= new
            if on_finished is not None:
                on_finished(new)
        call.hand_over()
        return [drawn[number] for number in range(len(requests))], call.counters()
