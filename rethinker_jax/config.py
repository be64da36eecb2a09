"""Typed configuration: what every key means, its default, and nothing else. Reading YAML is at the end of the file.

A config is refused or understood: unknown, doubled and mistyped keys are errors with the nearest name suggested, all
reported at once. Field names here are the contract of `section.key=value` overrides.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What the run is called, how long it is, and what it leaves behind."""

    dir: str = ""  # "" = runs/<config name>
    seed: NonNegative = 0
    num_steps: NonNegative = 100  # rollout batches; each makes one or more optimizer steps
    save_every: Positive = 20  # steps between checkpoints; the last step is always saved
    keep_checkpoints: Positive = 2
    rollouts_every: Positive = 10  # steps between rollout files; the first and last step are always written
    compilation_cache: str = "~/.cache/rethinker_jax/xla"  # "" = none
    max_bad_rows: NonNegative = 100  # unreadable rows survived before the run stops


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: str = "example"  # a Hugging Face directory; "example" = the built-in warm start
    init: Literal["checkpoint", "random"] = "checkpoint"  # random = the directory's config.json, weights from run.seed
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # computation; auto = the checkpoint's
    remat: Literal["none", "full"] = "none"  # recompute decoder layers in the backward pass
    freeze: tuple[Literal["vision", "merger", "decoder"], ...] = ()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str = "example:train"  # parquet, JSON lines, a hub id, or example:SPLIT
    test: str = "example:test"  # evaluated before and after, never trained on
    image_root: str = ""  # "" = the folder of the rows file
    prompt_template: str = "default"  # a name of prompts/template.py, or none
    max_prompt_tokens: Positive = 2048  # longer prompts leave the data, counted; never cut inside an image
    min_pixels: NonNegative = 0  # 0 = the model directory's preprocessor_config.json
    max_pixels: NonNegative = 0
    shuffle: bool = True


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    temperature: NonNegativeFloat = 1.0  # 0 = greedy
    top_k: NonNegative = 0  # 0 = off
    top_p: Fraction = 1.0
    min_p: Fraction = 0.0
    max_new_tokens: Positive = 2048
    num_slots: NonNegative = 0  # completions decoded at once; 0 = one per request
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = ()
    steps_per_call: Positive = 64  # decode steps between two looks of the host


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: Positive = 16
    samples_per_prompt: Positive = 8


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    reward: Literal["accuracy", "accuracy_and_format", "vl_rethinker_code"] = "accuracy"  # of verify/rewards.py
    num_workers: Positive = 1
    deadline_s: PositiveFloat = 2.0  # wall clock per item, the backstop
    cpu_limit_s: PositiveFloat = 1.0  # CPU time per item, what decides
    memory_mb: Positive = 1024


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """VL-Rethinker §2.1; its printed formula divides by the std, its code does not (`group_mean`)."""

    estimator: Literal["group_mean", "group_std", "rloo"] = "group_mean"
    epsilon: PositiveFloat = 1e-6  # |advantage| at or below this is zero


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Selective Sample Replay, VL-Rethinker §3.2 and Algorithm 1."""

    mode: Literal["ssr", "filter", "none"] = "ssr"  # filter = drop zero-advantage rows; none = plain GRPO
    alpha: NonNegativeFloat = 1.0  # P(j) ∝ |A_j|^alpha
    capacity: Positive = 4096  # rows; the oldest leave first
    clear_every: Positive = 16  # optimizer steps between clearings ("episode" of the paper)


@dataclasses.dataclass(frozen=True)
class RethinkConfig:
    """Forced Rethinking, VL-Rethinker §3.3.

    `rule: random` picks samples before they are drawn and feeds the trigger inside the decode loop. `rule: paper` picks
    after the verdicts of the group and continues in a second pass.
    """

    rule: Literal["off", "random", "paper"] = "off"
    fraction: Fraction = 0.65  # share q of the eligible completions
    until_step: NonNegative = 0  # 0 = never stops
    triggers: tuple[str, ...] = (
        "\n\nWait",
        "\n\nWait, does it seem right?",
        "\n\nWait, let's double check",
        "\n\nWait, there might be a mistake",
    )
    odds: tuple[NonNegativeFloat, ...] = (0.2, 0.3, 0.25, 0.25)  # of the triggers; rule paper: the last two share
    temperature: NonNegativeFloat = 0.9  # of the second look
    max_new_tokens: Positive = 1024  # of the second look; longer ones are not kept
    max_first_tokens: Positive = 1024  # longer first responses are not eligible
    max_kept_per_problem: Positive = 2
    easy_group: Fraction = 0.7  # rule paper: wrong answers in groups above this score are left alone
    truncate: Fraction = 0.0  # rule paper: probability of cutting the first response (released code: 0.5)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    clip_low: NonNegativeFloat = 0.2
    clip_high: NonNegativeFloat = 0.35
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    nll_coefficient: NonNegativeFloat = 0.05  # on trigger and second look of kept forced completions
    entropy_coefficient: float = 0.0
    old_log_probs: Literal["auto", "sampler", "trainer"] = "auto"  # auto = sampler in float32, trainer in bfloat16


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: PositiveFloat = 1e-6
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: Fraction = 0.5  # of the learning rate, at the end of a cosine
    warmup_steps: NonNegative = 10  # optimizer steps
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How rows become optimizer steps."""

    batch_size: Positive = 64  # rows per optimizer step
    micro_batch_size: NonNegative = 0  # rows per forward and backward; 0 = batch_size
    max_skipped_updates: NonNegative = 10  # non-finite gradients survived before the run stops


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    num_problems: NonNegative = 256  # greedy; 0 = no evaluation
    num_sampled_problems: NonNegative = 128  # n samples each at temperature 1
    samples_per_problem: Positive = 8
    batch_size: Positive = 64  # problems per rollout batch


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (`main sft`). Rows: problems with a `completion`: text or [{text, loss}]."""

    data: str = ""  # parquet or JSON lines with a completion column, or example:sft-STAGE
    num_steps: Positive = 1000
    batch_size: Positive = 64
    max_completion_tokens: Positive = 64


@dataclasses.dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    replay: ReplayConfig = ReplayConfig()
    rethink: RethinkConfig = RethinkConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sft: SftConfig = SftConfig()
