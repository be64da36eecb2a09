"""Keys of the section `health`: signs that a run goes wrong, and what is done about each."""

import dataclasses
from typing import Literal

from rethinker_jax.config_numbers import Fraction, NonNegativeFloat, Positive, PositiveFloat

Policy = Literal["ignore", "warn", "stop"]


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """Signs that a run goes wrong, and what is done: ignore, warn, or stop before another checkpoint is written."""

    not_finite: Policy = "stop"  # loss or gradient; stop once more than training.max_skipped_updates were left out
    entropy: Policy = "warn"  # collapse: at or below entropy_floor for entropy_steps steps running
    entropy_floor: NonNegativeFloat = 0.01  # nats a token
    entropy_steps: Positive = 10
    truncation: Policy = "warn"  # lengths explode: share of first responses out of budget at or above truncation_share
    truncation_share: Fraction = 0.5
    truncation_steps: Positive = 10
    verifier: Policy = "stop"  # share of verdicts that timed out or crashed at or above verifier_share
    verifier_share: Fraction = 0.5
    verifier_steps: Positive = 2
    judge: Policy = "stop"  # share of responses for which the judge model gave no value at or above judge_share
    judge_share: Fraction = 0.5
    judge_steps: Positive = 2
    zero_advantage: Policy = "warn"  # no group has an advantage for zero_advantage_steps steps running
    zero_advantage_steps: Positive = 20
    kl: Policy = "warn"  # to the reference of loss.reference: at or above kl_ceiling
    kl_ceiling: PositiveFloat = 1.0  # nats a token
    kl_steps: Positive = 5
