"""Rules of the config that span several keys; the types and bounds of single keys stand in `config.py`."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rethinker_jax.config import Config, LossConfig, MeshConfig, ReplayConfig, RethinkConfig
from rethinker_jax.config_keys import nearest
from rethinker_jax.config_rewards import REWARD_TERMS, RewardConfig

MOST_B2_IN_BFLOAT16 = 0.99
MODES_THAT_READ = {  # of the keys of `replay` that not every mode reads
    "form": ("ssr",),
    "max_age": ("ssr", "dynamic"),
    "replacement": ("ssr",),
    "importance": ("ssr",),
    "max_resamples": ("dynamic",),
}
USER_TERM = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


def check(config: Config) -> list[str]:
    """What is wrong between the keys of a well-typed config, one sentence each; empty when nothing is."""
    return [
        *_check_finite(config),
        *check_mesh(config.mesh),
        *_check_sampling(config),
        *_check_validation(config),
        *_check_batches(config),
        *_check_replay(config.replay),
        *_check_reward(config.reward),
        *_check_rethink(config),
        *_check_learning(config),
        *_check_optimizer(config),
        *_check_loss(config.loss),
        *_check_kl(config.loss),
    ]


def check_mesh(mesh: MeshConfig) -> list[str]:
    """Axis sizes are positive, except that at most one may be -1. Whether they fit the devices is known only later."""
    sizes = mesh.sizes
    problems = [
        f"mesh.{axis} is {size}; wanted a positive number, or -1 for the devices that are left"
        for axis, size in sizes.items()
        if size == 0 or size < -1
    ]
    filled = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
    if len(filled) > 1:
        problems.append(f"{' and '.join(filled)} are both -1; only one axis can take the devices that are left")
    return problems


def _check_finite(config: Config) -> list[str]:
    return [
        f"{key} is {value}; wanted a finite number"
        for key, value in _leaves(dataclasses.asdict(config))
        if isinstance(value, float) and not math.isfinite(value)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_sampling(config: Config) -> list[str]:
    problems = []
    if config.sampling.top_p <= 0:
        problems.append("sampling.top_p is 0, which leaves no token to draw; wanted 0 < top_p <= 1 (1 = off)")
    if "" in config.sampling.stop_strings:
        problems.append("sampling.stop_strings holds an empty string, which would stop every completion at once")
    low, high = config.data.min_pixels, config.data.max_pixels
    if low and high and low > high:
        problems.append(f"data.min_pixels {low} is above data.max_pixels {high}")
    return problems


def _check_validation(config: Config) -> list[str]:
    """Rows and their interval are said together: one alone would measure nothing."""
    source, every = config.data.validation, config.evaluation.validate_every
    if source and not every:
        return [
            f"data.validation is {source} and evaluation.validate_every 0, by which nothing is measured; set the steps "
            "between two validations, such as evaluation.validate_every=10"
        ]
    if every and not source:
        return [
            f"evaluation.validate_every is {every} and data.validation is empty; name held-out rows with "
            "data.validation=ROWS, or leave it at 0"
        ]
    return []


def _check_batches(config: Config) -> list[str]:
    batch = config.training.batch_size
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    problems = []
    estimator, k = config.advantage.estimator, config.advantage.k
    if samples < 2 and estimator not in ("remax", "reinforce_plus_plus"):
        problems.append(
            f"rollout.samples_per_prompt is {samples}; an advantage compares a group's samples, so it needs 2 or more"
        )
    if estimator == "pass_at_k" and k >= max(samples, 2):
        problems.append(
            f"advantage.k {k} is not below rollout.samples_per_prompt {samples}; pass_at_k compares the best of k "
            "samples with the best of k others"
        )
    if (prompts * samples) % batch:
        problems.append(
            f"rollout.prompts_per_step {prompts} x rollout.samples_per_prompt {samples} = {prompts * samples} rows "
            f"cannot be cut into batches of training.batch_size {batch}"
        )
    if config.replay.mode == "ssr" and batch % samples:
        problems.append(
            f"training.batch_size {batch} is not a multiple of rollout.samples_per_prompt {samples}, "
            "which replay.mode ssr needs"
        )
    return problems


def _check_replay(replay: ReplayConfig) -> list[str]:
    """What is said of the buffer is used: an unused limit or weight would look as if it were in force."""
    said = dataclasses.asdict(replay)
    unread = [
        f"replay.{key} is {said[key]} with replay.mode {replay.mode}; only {' and '.join(modes)} reads it"
        for key, modes in MODES_THAT_READ.items()
        if replay.mode not in modes and said[key] != dataclasses.asdict(ReplayConfig())[key]
    ]
    if unread or replay.mode != "ssr":
        return unread
    if replay.form == "bootstrap":
        return [
            f"replay.{key} is {said[key]} with replay.form bootstrap, which draws from no buffer; leave it out"
            for key in ("max_age", "replacement")
            if said[key]
        ]
    if replay.importance and not replay.replacement:
        return [
            f"replay.importance is {replay.importance} with replay.replacement false; draws that leave a row out once "
            "it has come do not have the probabilities that the weights divide by, so it wants replay.replacement=true"
        ]
    return []


def _check_reward(reward: RewardConfig) -> list[str]:
    tables = {"reward.terms": reward.terms} | {
        f"reward.by_type.{name}": terms for name, terms in reward.by_type.items()
    }
    problems = [
        f"{name} is empty; wanted at least one term, such as accuracy" for name, terms in tables.items() if not terms
    ]
    used = {term for terms in tables.values() for term in terms}
    known = f" (there: {', '.join(REWARD_TERMS)})"
    for name, terms in tables.items():
        problems += [
            f"{name}.{term}: no such term{nearest(term, REWARD_TERMS) or known}; "
            "a function of your own is named path.py:function"
            for term in terms
            if term not in REWARD_TERMS and not USER_TERM.fullmatch(term)
        ]
    problems += [
        f"reward.kwargs.{name}: no such function among the terms{nearest(name, used)}"
        for name in reward.kwargs
        if name not in used or name in REWARD_TERMS
    ]
    length, overlong, judge = reward.length, reward.soft_overlong, reward.judge
    problems += [
        f"reward.length.{name} is {value}; a wrong answer must not earn more than 0"
        for name, value in (("wrong_short", length.wrong_short), ("wrong_long", length.wrong_long))
        if value > 0
    ]
    if 0 < overlong.max_tokens < overlong.buffer_tokens:
        problems.append(
            f"reward.soft_overlong.buffer_tokens {overlong.buffer_tokens} is above max_tokens {overlong.max_tokens}"
        )
    if "judge" in used:
        if not judge.url.startswith(("http://", "https://")):
            problems.append(f"reward.judge.url is {judge.url!r}; the term judge wants one such as http://host:8000/v1")
        if not judge.model:
            problems.append("reward.judge.model is empty; the term judge wants the model's name on the server")
        if "{response}" not in judge.prompt:
            problems.append("reward.judge.prompt lacks {response}, so that the judge would not see what it judges")
    return problems


def _check_rethink(config: Config) -> list[str]:
    rethink = config.rethink
    problems = []
    if len(rethink.odds) != len(rethink.triggers):
        problems.append(
            f"rethink.odds has {len(rethink.odds)} entries and rethink.triggers {len(rethink.triggers)}; "
            "wanted one per trigger"
        )
    if rethink.rule == "off":
        return problems
    if not rethink.triggers or not all(rethink.triggers):
        problems.append(f"rethink.rule is {rethink.rule} and rethink.triggers is empty or holds an empty string")
    if sum(rethink.odds) <= 0:
        problems.append(f"rethink.odds {list(rethink.odds)} sum to 0, so no trigger could be drawn")
    if rethink.fraction == 0 and rethink.final_fraction == 0:
        problems.append(f"rethink.rule is {rethink.rule} with rethink.fraction 0; write rethink.rule=off to mean that")
    if rethink.min_second_tokens > rethink.max_new_tokens:
        problems.append(
            f"rethink.min_second_tokens {rethink.min_second_tokens} is above rethink.max_new_tokens "
            f"{rethink.max_new_tokens}, so no second look would be kept"
        )
    if rethink.nll_rows == "positive_waits" and rethink.nll_on not in ("all", "none"):
        problems.append(
            f"rethink.nll_rows is positive_waits with rethink.nll_on {rethink.nll_on}, by which no token of an "
            "unforced row is supervised; wanted rethink.nll_on=all"
        )
    return problems + _unread_of_rethink(config)


def _unread_of_rethink(config: Config) -> list[str]:
    """What is said of Forced Rethinking is used: a key without effect would look as if it were in force."""
    rethink, estimator = config.rethink, config.advantage.estimator
    unread = [
        (
            rethink.rule == "random",
            ("group_rule", "easy_group", "trigger_by_verdict", "truncate", "truncate_at"),
            "rethink.rule random, which knows no verdict and cuts nothing; only paper reads it",
        ),
        (
            rethink.until_step == 0,
            ("schedule", "final_fraction"),
            "rethink.until_step 0, by which the share never changes",
        ),
        (rethink.group_rule == "any", ("easy_group",), "rethink.group_rule any, which asks for no score"),
        (rethink.truncate == 0, ("truncate_at",), "rethink.truncate 0, by which nothing is cut"),
        (
            estimator in ("remax", "reinforce_plus_plus"),
            ("baseline",),
            f"advantage.estimator {estimator}, which compares with no sibling",
        ),
        (rethink.nll_on == "none", ("nll_rows",), "rethink.nll_on none, by which no token is supervised"),
    ]
    said, default = dataclasses.asdict(rethink), dataclasses.asdict(RethinkConfig())
    found: dict[str, str] = {}
    for applies, keys, why in unread:
        for key in keys:
            if applies and said[key] != default[key]:
                found.setdefault(key, f"rethink.{key} is {said[key]} with {why}")
    return list(found.values())


def _check_learning(config: Config) -> list[str]:
    parts = set(config.model.freeze)
    problems = ["model.freeze names every part; nothing would be trained"] * (len(parts) == 3)
    problems += [
        f"optimizer.{name} is 1, where the average never moves and its bias correction divides by 0; wanted below 1"
        for name, value in (("b1", config.optimizer.b1), ("b2", config.optimizer.b2))
        if value >= 1
    ]
    return problems


def _check_optimizer(config: Config) -> list[str]:
    optimizer, lora = config.optimizer, config.model.lora
    problems = []
    if optimizer.moments == "bfloat16" and optimizer.b2 > MOST_B2_IN_BFLOAT16:
        problems.append(
            f"optimizer.moments is bfloat16 with optimizer.b2 {optimizer.b2}, in which the second moment could never "
            f"fall; wanted b2 of at most {MOST_B2_IN_BFLOAT16}, or moments mu_bfloat16"
        )
    for part in optimizer.rates:
        if (part == "adapters") != bool(lora.rank):
            why = f"model.lora.rank is {lora.rank}: {'adapters alone are' if lora.rank else 'no adapters are'} trained"
            problems.append(f"optimizer.rates has {part}, but {why}")
        elif part in config.model.freeze:
            problems.append(f"optimizer.rates has {part}, which model.freeze leaves as it is")
    return problems


def _check_loss(loss: LossConfig) -> list[str]:
    problems = []
    if loss.clip_low > 1 or (loss.clip_low == 1 and loss.policy != "cispo"):
        problems.append(f"loss.clip_low is {loss.clip_low}; the lower bound 1 - clip_low must stay above 0")
    if loss.dual_clip and loss.policy != "clipped":
        problems.append(f"loss.dual_clip is {loss.dual_clip} with loss.policy {loss.policy}; only clipped has it")
    elif 0 < loss.dual_clip <= 1:
        problems.append(f"loss.dual_clip is {loss.dual_clip}; wanted a ratio above 1, or 0 for none")
    if loss.constant_length and loss.aggregation != "constant":
        problems.append(
            f"loss.constant_length is {loss.constant_length} with loss.aggregation {loss.aggregation}; "
            "only the aggregation constant divides by it"
        )
    if loss.importance_cap and loss.old_log_probs != "trainer":
        problems.append(
            f"loss.importance_cap is {loss.importance_cap} with loss.old_log_probs {loss.old_log_probs}; it weighs the "
            "trainer's old log-probs against the sampler's, so it wants loss.old_log_probs=trainer"
        )
    elif 0 < loss.importance_cap < 1:
        problems.append(
            f"loss.importance_cap is {loss.importance_cap}, which would cut down tokens on which sampler and trainer "
            "agree; wanted 1 or more, or 0 for none"
        )
    return problems


def _check_kl(loss: LossConfig) -> list[str]:
    """What is said of the KL is used: an unused part would look as if the policy were held near the reference."""
    if loss.kl == "none":
        if loss.kl_controller == "adaptive":
            return ["loss.kl_controller is adaptive and loss.kl is none; wanted loss.kl=loss or loss.kl=reward"]
        return []
    if loss.reference == "none":
        return [f"loss.kl is {loss.kl} and loss.reference is none; wanted loss.reference=start to measure it to"]
    if loss.kl_coefficient == 0:
        return [f"loss.kl is {loss.kl} with loss.kl_coefficient 0; write loss.kl=none to measure the KL alone"]
    return []
