"""Keys of loss and advantage that contradict each other, and those that do not."""

import pytest

from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError

# (overrides, part of the message): each would train with less than what was asked for, in silence.
INCONSISTENT = [
    (["loss.kl=loss"], "loss.kl is loss and loss.reference is none"),
    (["loss.kl=reward", "loss.kl_controller=adaptive"], "loss.kl is reward and loss.reference is none"),
    (["loss.kl_controller=adaptive"], "loss.kl_controller is adaptive and loss.kl is none"),
    (["loss.kl_controller=adaptive", "loss.reference=start"], "loss.kl_controller is adaptive and loss.kl is none"),
    (["loss.kl=loss", "loss.reference=start", "loss.kl_coefficient=0"], "loss.kl is loss with loss.kl_coefficient 0"),
    (["loss.dual_clip=0.9"], "loss.dual_clip is 0.9; wanted a ratio above 1"),
    (["loss.dual_clip=1"], "loss.dual_clip is 1.0; wanted a ratio above 1"),
    (["loss.dual_clip=3", "loss.policy=gspo"], "loss.dual_clip is 3.0 with loss.policy gspo"),
    (["loss.constant_length=100"], "loss.constant_length is 100 with loss.aggregation token_mean"),
    (["loss.importance_cap=2"], "loss.importance_cap is 2.0 with loss.old_log_probs auto"),
    (
        ["loss.importance_cap=2", "loss.old_log_probs=sampler"],
        "loss.importance_cap is 2.0 with loss.old_log_probs samp",
    ),
    (["loss.importance_cap=0.5", "loss.old_log_probs=trainer"], "loss.importance_cap is 0.5, which would cut down"),
    (["loss.clip_low=1"], "loss.clip_low is 1.0; the lower bound"),
    (["loss.clip_low=1.5", "loss.policy=cispo"], "loss.clip_low is 1.5; the lower bound"),
    (["advantage.estimator=pass_at_k", "advantage.k=8"], "advantage.k 8 is not below rollout.samples_per_prompt 8"),
    (
        ["rollout.samples_per_prompt=1", "rollout.prompts_per_step=64", "advantage.estimator=group_mean"],
        "rollout.samples_per_prompt is 1",
    ),
]
CONSISTENT = [
    ["loss.kl=loss", "loss.reference=start", "loss.kl_controller=adaptive"],
    ["loss.kl=reward", "loss.reference=start", "loss.kl_estimator=k1"],
    ["loss.reference=start"],  # only measured
    ["loss.dual_clip=3"],
    ["loss.aggregation=constant", "loss.constant_length=100"],
    ["loss.aggregation=constant"],
    ["loss.importance_cap=2", "loss.old_log_probs=trainer"],
    ["loss.policy=cispo", "loss.clip_low=1"],  # no lower bound, as in the paper
    ["advantage.estimator=pass_at_k", "advantage.k=7"],
    ["advantage.k=8"],  # of no estimator that is used
    ["rollout.samples_per_prompt=1", "rollout.prompts_per_step=64", "advantage.estimator=remax"],
    ["rollout.samples_per_prompt=1", "rollout.prompts_per_step=64", "advantage.estimator=reinforce_plus_plus"],
]


@pytest.mark.parametrize(
    ("overrides", "part"), INCONSISTENT, ids=[" ".join(overrides) for overrides, _ in INCONSISTENT]
)
def test_keys_that_contradict_each_other(overrides: list[str], part: str) -> None:
    """One sentence, and only one: a second rule that also fires would send the reader to the wrong key."""
    with pytest.raises(UserError) as error:
        load_defaults(overrides)
    assert part in str(error.value) and str(error.value).count("loss.") + str(error.value).count("rollout.") <= 4
    assert "problems" not in str(error.value)


@pytest.mark.parametrize("overrides", CONSISTENT, ids=" ".join)
def test_keys_that_do_not(overrides: list[str]) -> None:
    """A rule that is too strict would refuse these."""
    load_defaults(overrides)
