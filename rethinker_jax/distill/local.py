"""Replies of a local checkpoint, by the sampler that trains: the same asks as a server gets."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from rethinker_jax import peers
from rethinker_jax.chosen_mesh import on_mesh
from rethinker_jax.config import Config
from rethinker_jax.console import RunProgress
from rethinker_jax.devices import start_jax
from rethinker_jax.distill.asks import Ask, Failures, Role, section_of
from rethinker_jax.distill.replies import Reply, ReplyFile
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.build import BadPrompt
from rethinker_jax.sample import PACE, model_identity, prompts_at_once
from rethinker_jax.sampling.sampler import Budgets, Drawn, Request
from rethinker_jax.system import System, load_system
from rethinker_jax.types import Completion, Problem, Prompt


class Local:
    """Asks the checkpoint of a role; it is loaded for `ask_all` and freed after it."""

    def __init__(self, role: Role, config: Config):
        """Raises UserError in a job of several processes."""
        start_jax(config)
        if peers.count() > 1:
            raise UserError(
                f"{section_of(role)}: distill draws from a model of its own in one process, and this job has "
                f"{peers.count()}. Start it in one, or serve the model and name {section_of(role)}.url."
            )
        self._role = role
        self._config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, path=role.model),
            data=dataclasses.replace(config.data, prompt_template="none"),
            sampling=dataclasses.replace(
                config.sampling, temperature=role.temperature, top_p=role.top_p, max_new_tokens=role.max_tokens
            ),
        )

    def ask_all(self, asks: Sequence[Ask], replies: ReplyFile, shown: RunProgress, first: int) -> Failures:
        """Draws all and keeps each as it ends; returns how many could not be asked, by reason.

        `first` is how many replies were there before, of the progress that is shown. Raises UserError.
        """
        if not asks:
            return collections.Counter()
        system = load_system(on_mesh(self._config, "sample"))
        try:
            return self._draw(system, asks, replies, shown, first)
        finally:
            system.drop_params()

    def _draw(
        self, system: System, asks: Sequence[Ask], replies: ReplyFile, shown: RunProgress, first: int
    ) -> Failures:
        failures: Failures = collections.Counter()
        params = system.sampling_params(system.params)
        by_prompt = _by_prompt(asks)
        most = max(map(len, by_prompt))
        num_slots = self._config.sampling.num_slots or self._config.rollout.prompts_per_step * most
        settings = dataclasses.replace(self._config.sampling, num_slots=num_slots)
        size = min(prompts_at_once(num_slots, most), len(by_prompt))
        num_done = first
        for start in range(0, len(by_prompt), size):
            drawn_asks: list[Ask] = []
            requests: list[Request] = []
            for group in by_prompt[start : start + size]:
                try:
                    prompt = _prompt(system, group[0])
                except BadPrompt as error:
                    failures[error.kind] += len(group)
                    num_done += len(group)
                    shown.note(f"left out ({error.kind}): {group[0].label}: {error}")
                    continue
                drawn_asks += group
                requests += [Request(prompt, ask.sample) for ask in group]

            def keep(
                ended: Sequence[tuple[int, Drawn]], asked: Sequence[Ask] = drawn_asks, done: int = num_done
            ) -> None:
                nonlocal num_done
                for number, drawn in ended:
                    ask = asked[number]
                    replies.add(ask.key, _reply(drawn.completion), {"of": ask.label, "sample": ask.sample})
                    num_done += 1
                shown.update(num_done, {})

            system.sampler.generate(
                params, requests, settings, Budgets(settings.max_new_tokens), seed=self._role.seed, step=0,
                num_prompts=size, on_finished=keep,
            )  # fmt: skip
        return failures


def local_identity(role: Role, config: Config) -> dict[str, Any]:
    """What the replies of a checkpoint depend on, besides the question. Raises UserError where there is none."""
    sampling = {key: value for key, value in dataclasses.asdict(config.sampling).items() if key not in PACE}
    return {
        **model_identity(role.model),
        "init": config.model.init,
        "dtype": config.model.dtype,
        "pixels": [config.data.min_pixels, config.data.max_pixels],
        "seed": role.seed,
        "sampling": sampling
        | {"temperature": role.temperature, "top_p": role.top_p, "max_new_tokens": role.max_tokens},
    }


def _by_prompt(asks: Sequence[Ask]) -> list[list[Ask]]:
    """The asks of each prompt together, in the order in which prompts first come."""
    groups: dict[tuple[str, str], list[Ask]] = {}
    for ask in asks:
        groups.setdefault((ask.name, ask.text), []).append(ask)
    return list(groups.values())


def _prompt(system: System, ask: Ask) -> Prompt:
    images = () if ask.image is None else (ask.image,)
    return system.builder.build(Problem(ask.name, ask.text, "", images))


def _reply(completion: Completion) -> Reply:
    truncated = completion.truncated_log_probs
    assert truncated is not None, "the sampler records them"
    drawn = {
        "completion_ids": completion.token_ids.tolist(),
        "log_probs": [float(value) for value in completion.log_probs],
        "truncated_log_probs": [float(value) for value in truncated],
    }
    return Reply(completion.text, finish_reason=completion.finish_reason, drawn=drawn)
