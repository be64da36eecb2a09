"""Typed configuration: what every key means, its default, and nothing else. Reading YAML is at the end of the file.

A config is refused or understood: unknown, doubled and mistyped keys are errors with the nearest name suggested, all
reported at once. Field names here are the contract of `section.key=value` overrides.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from rethinker_jax.config_curation import DistillConfig, SelectConfig
from rethinker_jax.config_health import HealthConfig
from rethinker_jax.config_numbers import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from rethinker_jax.config_rewards import RewardConfig

Estimator = Literal[
    "group_mean",
    "group_std",
    "rloo",
    "remax",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "pass_at_k",
    "best_of_n",
    "g2rpo",
]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What the run is called, how long it is, and what it leaves behind."""

    dir: str = ""  # "" = runs/<config name>
    seed: NonNegative = 0
    num_steps: NonNegative = 100  # rollout batches; each makes one or more optimizer steps
    save_every: Positive = 20  # steps between checkpoints; the last step is always saved
    keep_checkpoints: Positive = 2  # the newest ones
    keep_best: NonNegative = 1  # beside them, by mean reward on data.validation, where there is validation
    rollouts_every: Positive = 10  # steps between rollout files; the first and last step are always written
    compilation_cache: str = "~/.cache/rethinker_jax/xla"  # "" = none
    max_bad_rows: NonNegative = 100  # unreadable rows survived before the run stops
    peak_tflops: NonNegativeFloat = 0.0  # of one device, for metrics of utilisation; 0 = by its kind, if it is known


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, Hu et al. 2021: a kernel W becomes W + (alpha / rank) A B, and only A and B are trained."""

    rank: NonNegative = 0  # 0 = off; else adapters in the parts that model.freeze does not name
    alpha: PositiveFloat = 32.0
    targets: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] = ()  # () = all of these


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: str = "example"  # a Hugging Face directory; "example" = the built-in warm start
    init: Literal["checkpoint", "random"] = "checkpoint"  # random = the directory's config.json, weights from run.seed
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # computation; auto = the checkpoint's
    attention: Literal["auto", "plain", "cudnn", "splash"] = "auto"  # splash: TPUs; cudnn: NVIDIA GPUs, 16 bits
    remat: Literal["none", "dots", "full"] = "none"  # what layers recompute in the backward: dots = all but products
    freeze: tuple[Literal["vision", "merger", "decoder"], ...] = ()
    lora: LoraConfig = LoraConfig()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    context: int = 1  # cuts the tokens of an update's rows: for prompts too long for a device
    tensor: int = 1
    search: bool = False  # finds sizes that fit the devices, as --mesh auto; those above are not read

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes, in the order of a mesh."""
        return {"data": self.data, "fsdp": self.fsdp, "context": self.context, "tensor": self.tensor}

    def with_sizes(self, sizes: Mapping[str, int]) -> "MeshConfig":
        """With these sizes of the axes that they name."""
        found = {**self.sizes, **sizes}
        return MeshConfig(found["data"], found["fsdp"], found["context"], found["tensor"], self.search)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str = "example:train"  # parquet, JSON lines, a hub id, or example:SPLIT
    test: str = "example:test"  # evaluated before and after, never trained on
    validation: str = ""  # measured every evaluation.validate_every steps, never trained on; "" = none
    image_root: str = ""  # "" = the folder of the rows file
    prompt_template: str = "default"  # a name of prompts/template.py, or none
    max_prompt_tokens: Positive = 2048  # longer prompts leave the data, counted; never cut inside an image
    min_pixels: NonNegative = 0  # 0 = the model directory's preprocessor_config.json
    max_pixels: NonNegative = 0
    shuffle: bool = True
    curriculum: Literal["none", "easy_first"] = "none"  # easy_first: every epoch in stages, shuffled inside of them
    curriculum_column: str = "pass_rate"  # a number in every row, larger = easier; `select` writes pass_rate
    curriculum_stages: Positive = 3


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
    prefill_tokens: Positive = 16384  # prompt tokens that run through the layers of a shard at once
    cache_gib: NonNegativeFloat = 0.0  # caches may take on each device; 0 = most of what is free


@dataclasses.dataclass(frozen=True)
class BucketsConfig:
    """Shapes that are compiled: a batch takes the smallest that holds it, and is padded to it.

    Where a list is empty, or nothing in it is large enough, sizes are rounded up to four steps a doubling.
    """

    prompt_tokens: tuple[Positive, ...] = ()  # of the longest prompt of a rollout batch
    row_tokens: tuple[Positive, ...] = ()  # length of the update's packed rows; longer sequences are cut
    rows: tuple[Positive, ...] = ()  # packed rows of a shard; where none is enough, 16 steps a doubling
    prefix_tokens: tuple[Positive, ...] = ()  # keys before a packed row: of shared prompts and cut sequences
    targets: tuple[Positive, ...] = ()  # completion tokens of a shard
    # (rows, windows a row) of the vision tower; rows that data x fsdp does not divide are passed over.
    vision: tuple[tuple[Positive, Positive], ...] = ()


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: Positive = 16
    samples_per_prompt: Positive = 8


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    num_workers: Positive = 1
    deadline_s: PositiveFloat = 2.0  # wall clock per item, the backstop; up to five of them where it waits for a core
    cpu_limit_s: PositiveFloat = 1.0  # CPU time per item, what decides
    memory_mb: Positive = 1024


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """VL-Rethinker §2.1; its printed formula divides by the std, its code does not (`group_mean`)."""

    estimator: Estimator = "group_mean"  # remax draws one greedy response more a prompt
    k: Positive = 4  # of pass_at_k: the best of how many samples counts
    epsilon: PositiveFloat = 1e-6  # |advantage| at or below this is zero


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Selective Sample Replay, VL-Rethinker §3.2 and Algorithm 1; modes and forms are told apart in `replay.py`."""

    mode: Literal["ssr", "filter", "dynamic", "none"] = "ssr"  # filter drops zero-advantage rows, dynamic draws others
    form: Literal["top_up", "bootstrap", "deque"] = "top_up"  # of ssr: top_up is Algorithm 1
    alpha: NonNegativeFloat = 1.0  # P(j) ∝ |A_j|^alpha
    capacity: Positive = 4096  # rows; the oldest leave first
    clear_every: Positive = 16  # optimizer steps between clearings ("episode" of the paper), of top_up alone
    max_age: NonNegative = 0  # optimizer steps since its rollout above which a row leaves the buffer; 0 = no limit
    max_resamples: NonNegative = 4  # of dynamic: rollout batches more, until prompts_per_step groups have an advantage
    replacement: bool = False  # may a row come again from the buffer before all have come
    importance: Fraction = 0.0  # a row drawn from n rows weighs (1 / (n·P(j)))^importance; 1 = as if drawn uniformly


@dataclasses.dataclass(frozen=True)
class RethinkConfig:
    """Forced Rethinking, VL-Rethinker §3.3; what paper and released code have for each key: docs/rethinking.md.

    `rule: random` picks samples before they are drawn and feeds the trigger inside the decode loop. `rule: paper` picks
    after the verdicts of the group and continues in a second pass; keys marked so are read by that rule alone.
    """

    rule: Literal["off", "random", "paper"] = "off"
    fraction: Fraction = 0.65  # share q of the eligible completions
    until_step: NonNegative = 0  # from this step on the share is final_fraction; 0 = it never changes
    schedule: Literal["step", "linear", "cosine"] = "step"  # from fraction to final_fraction; step = all at once
    final_fraction: Fraction = 0.0  # itself a share of the eligible completions
    group_rule: Literal["spare_easy", "wrong_in_hard", "any"] = "spare_easy"  # rule paper: who is eligible
    easy_group: Fraction = 0.7  # rule paper: a group is easy above this share of right first responses
    max_first_tokens: Positive = 1024  # longer first responses are not eligible
    triggers: tuple[str, ...] = (
        "\n\nWait",
        "\n\nWait, does it seem right?",
        "\n\nWait, let's double check",
        "\n\nWait, there might be a mistake",
    )
    odds: tuple[NonNegativeFloat, ...] = (0.2, 0.3, 0.25, 0.25)  # of the triggers
    trigger_by_verdict: bool = True  # rule paper: the last two odds go to the last but one if right, the last if wrong
    temperature: NonNegativeFloat = 0.9  # of the second look
    max_new_tokens: Positive = 1024  # of the second look; longer ones are not kept
    truncate: Fraction = 0.0  # rule paper: probability of cutting the first response (released code: 0.5)
    truncate_at: Literal["released", "last_answer", "paragraph", "sentence"] = "released"  # rule paper: where
    keep: Literal["correct", "all"] = "correct"  # which second looks are trained on
    min_second_tokens: NonNegative = 0  # shorter second looks are not kept (released code: 31)
    max_waits: NonNegative = 0  # second looks with more, their trigger included, are not kept; 0 = no limit
    answer_again: bool = False  # is a second look without an answer of its own not kept
    max_kept_per_problem: Positive = 2  # the first ones, by sample number
    kept_as: Literal["replacement", "addition"] = "replacement"  # of the first response; addition = one row more
    baseline: Literal["first", "final"] = "first"  # rewards that an advantage compares with: before or after keeping
    policy_on: Literal["second", "first_and_second"] = "second"  # of a kept row; the trigger never
    nll_on: Literal["none", "second", "trigger_and_second", "all"] = "trigger_and_second"  # tokens of nll_rows
    nll_rows: Literal["correct_forced", "positive_forced", "positive_waits"] = "correct_forced"  # positive = A > 0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What an update minimises; equations and papers stand at the functions of `training/losses.py`.

    `reference: start` keeps the weights with which the run began, in the dtype of computation and spread as the trained
    ones are: 2 bytes a parameter over all devices in bfloat16, and one forward pass more in every update.
    """

    policy: Literal["clipped", "gspo", "cispo", "sapo"] = "clipped"
    clip_low: NonNegativeFloat = 0.2
    clip_high: NonNegativeFloat = 0.35
    dual_clip: NonNegativeFloat = 0.0  # clipped, negative advantages: bound of the ratio, above 1; 0 = off
    sapo_tau_positive: PositiveFloat = 1.0  # steepness of the soft gate, by the sign of the advantage
    sapo_tau_negative: PositiveFloat = 1.05
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"  # constant = Dr. GRPO
    constant_length: NonNegative = 0  # aggregation constant: tokens; 0 = all the room a completion has
    nll_coefficient: NonNegativeFloat = 0.05  # on trigger and second look of kept forced completions
    entropy_coefficient: float = 0.0
    old_log_probs: Literal["auto", "sampler", "trainer"] = "auto"  # auto = sampler in float32, trainer in bfloat16
    importance_cap: NonNegativeFloat = 0.0  # of the weights trainer / sampler, with old_log_probs trainer; 0 = off
    reference: Literal["none", "start"] = "none"  # start = the model at the start of the run
    kl: Literal["none", "loss", "reward"] = "none"  # where the KL to the reference goes; none = only measured
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_coefficient: NonNegativeFloat = 0.001  # controller adaptive: the first one
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: PositiveFloat = 0.1  # controller adaptive: nats a token
    kl_horizon: Positive = 10000  # controller adaptive: rows


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; what `moments` costs and what `offload` does is told at the functions of `training/optimizer.py`."""

    learning_rate: PositiveFloat = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: Fraction = 0.5  # of the learning rate, at the end of a cosine or a line
    warmup_steps: NonNegative = 10  # optimizer steps; not read where warmup_fraction is above 0
    warmup_fraction: Fraction = 0.0  # of all optimizer steps, in place of warmup_steps; 0 = off
    rates: Mapping[Literal["vision", "merger", "decoder", "adapters"], PositiveFloat] = dataclasses.field(
        default_factory=dict
    )  # multipliers above 0 of the learning rate of parts; model.freeze leaves a part as it is
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0  # of the gradients of all parts together
    moments: Literal["float32", "mu_bfloat16", "bfloat16"] = "float32"  # as kept; bfloat16 not with b2 above 0.99
    offload: bool = False  # moments lie in host memory between steps


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How rows become optimizer steps."""

    batch_size: Positive = 64  # rows per optimizer step
    cut: Literal["group", "sample"] = "group"  # sample = the rows of a rollout are shuffled, as in the released code
    micro_batch_tokens: NonNegative = 0  # prompt and completion tokens of a shard per forward and backward; 0 = all
    max_skipped_updates: NonNegative = 10  # not finite ones; more are what health.not_finite says


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    num_problems: NonNegative = 256  # greedy; 0 = no evaluation
    num_sampled_problems: NonNegative = 128  # n samples each at temperature 1
    samples_per_problem: Positive = 8
    batch_size: Positive = 64  # problems per rollout batch
    validate_every: NonNegative = 0  # steps; before the first and after the last too; 0 = no validation
    num_validation_problems: NonNegative = 256  # first rows of data.validation, greedy; 0 = all


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (`main sft`); what rows may look like stands in docs/sft.md."""

    data: str = ""  # parquet, JSON lines, a JSON list, a hub id, or example:sft-STAGE
    format: Literal["auto", "question", "conversation", "alpaca"] = "auto"  # of the rows; auto = by their columns
    num_steps: Positive = 1000  # optimizer steps
    num_epochs: NonNegative = 0  # passes over the rows, in place of num_steps; the last batch may be short; 0 = off
    batch_size: Positive = 64  # rows per optimizer step
    max_completion_tokens: Positive = 64  # behind the first question: end tokens and later turns count too
    overlong: Literal["cut", "drop"] = "cut"  # rows with longer completions: learned without their end, or left out
    learned_turns: Literal["all", "last"] = "all"  # of an assistant in a conversation
    validation: str = ""  # rows to measure on, as in data
    validation_fraction: Fraction = 0.0  # share of data held out to measure on, in place of validation
    validation_rows: NonNegative = 256  # at most so many of them are measured; 0 = all
    validate_every: Positive = 100  # steps; before the first step and after the last in any case
    evaluate: bool = False  # answer data.test before and after, as train does; wants sampling and evaluation set


@dataclasses.dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    buckets: BucketsConfig = BucketsConfig()
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    advantage: AdvantageConfig = AdvantageConfig()
    replay: ReplayConfig = ReplayConfig()
    rethink: RethinkConfig = RethinkConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
    sft: SftConfig = SftConfig()
    select: SelectConfig = dataclasses.field(default_factory=SelectConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
