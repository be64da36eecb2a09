"""What a config asks of the devices at its largest: the shapes of an optimizer step and of a rollout batch.

Every prompt is as long as the config allows, with one image of as many pixels as fit, and every completion as long. The
arrays are laid out by the functions that a run uses, but of patches of one number, which are widened to shapes alone.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from rethinker_jax.config import Config
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import Parts
from rethinker_jax.prompts.batch import PromptBatch, pack_prompts
from rethinker_jax.prompts.positions import mrope_positions
from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry, bucket, num_windows
from rethinker_jax.rollout import budgets_of
from rethinker_jax.sampling.sampler import Budgets
from rethinker_jax.training.batch import Packed, pack_micro_batches
from rethinker_jax.training.layout import TrainBatch, TrainRow
from rethinker_jax.training.update import stack_batches
from rethinker_jax.types import ImagePatches, Problem, Prompt

TEMPLATE_TOKENS = 8  # kept free of image tokens at least: the turn's marks and a word
TRIGGER_TOKENS = 16  # of a trigger, whose tokenizer is not at hand


@dataclasses.dataclass(frozen=True)
class Longest:
    """The longest prompt and completion. grid: patches (height, width) of its one image, (0, 0) = none."""

    prompt_tokens: int
    grid: tuple[int, int]
    budgets: Budgets

    @property
    def completion_tokens(self) -> int:
        return self.budgets.total


def longest_of(config: Config, qwen: QwenConfig, max_pixels: int) -> Longest:
    """Of what `data`, `sampling`, `rethink` and `buckets` allow. `max_pixels`: of the model's images."""
    data, buckets = config.data, config.buckets
    prompt = min(data.max_prompt_tokens, max(buckets.prompt_tokens, default=data.max_prompt_tokens))
    merge, patch = qwen.vision.merge_size, qwen.vision.patch_size
    pixels = data.max_pixels or max_pixels
    units = min(pixels // (merge * patch) ** 2, prompt - TEMPLATE_TOKENS)
    height, width = _squarest(units, geometry_of(qwen), max((size for _, size in buckets.vision), default=0))
    triggers = [np.zeros(TRIGGER_TOKENS, np.int32)]
    return Longest(prompt, (height * merge, width * merge), budgets_of(config, triggers))


def _squarest(units: int, geometry: VisionGeometry, most_windows: int) -> tuple[int, int]:
    """Sides in merged tokens of a picture of nearly `units`, no more than twice as wide as high; (0, 0) = no room."""
    best = (0, 0)
    for height in range(1, math.isqrt(max(units, 0)) + 1):
        width = min(units // height, 2 * height)
        grid = (1, height * geometry.merge_size, width * geometry.merge_size)
        fits = not most_windows or num_windows(grid, geometry) <= most_windows
        if fits and height * width >= best[0] * best[1]:
            best = (height, width)
    return best


def geometry_of(qwen: QwenConfig) -> VisionGeometry:
    return VisionGeometry(qwen.vision.patch_size, qwen.vision.merge_size, qwen.vision.window_size)


def make_prompt(qwen: QwenConfig, longest: Longest, name: str) -> Prompt:
    """A picture and words; its patches are one number wide."""
    height, width = longest.grid
    merge = qwen.vision.merge_size
    tokens = height * width // merge**2
    ids = np.zeros(longest.prompt_tokens, np.int32)
    index = np.full(len(ids), -1, np.int32)
    grids = []
    images: tuple[ImagePatches, ...] = ()
    if tokens:
        ids[0], ids[1 : 1 + tokens], ids[1 + tokens] = qwen.vision_start_token, qwen.image_token, qwen.vision_end_token
        index[1 : 1 + tokens] = np.arange(tokens)
        grids = [(1, height, width)]
        images = (ImagePatches(np.zeros((height * width, 1), np.float32), (1, height, width)),)
    positions, following = mrope_positions(ids, qwen.image_token, grids, merge)
    return Prompt(Problem(name, "", ""), ids, positions, index, following, images)


@dataclasses.dataclass(frozen=True)
class UpdateWork:
    """One optimizer step: its stacked micro-batches, as shapes, and how they were packed."""

    batch: TrainBatch
    packed: Packed


def update_work(config: Config, qwen: QwenConfig, longest: Longest, parts: Parts) -> UpdateWork:
    """The optimizer step of `training.batch_size` rows, in whole groups, cut into `parts`."""
    length, samples = longest.completion_tokens, config.rollout.samples_per_prompt
    learned, zeros = np.ones(length, bool), np.zeros(length)
    size = config.training.batch_size
    rows = []
    for number in range(-(-size // samples)):
        prompt = make_prompt(qwen, longest, str(number))
        row = TrainRow(prompt, zeros.astype(np.int32), learned, ~learned, zeros.astype(np.float32), 1.0)
        rows += [row] * min(samples, size - number * samples)
    packed = pack_micro_batches(
        rows, geometry_of(qwen), length, _most_rows(config), config.training.micro_batch_tokens, config.buckets, parts
    )
    batch = shapes_of(stack_batches(packed.batches))
    if batch.vision is not None:
        batch = dataclasses.replace(batch, vision=_widen(batch.vision, qwen))
    if config.loss.importance_cap:
        batch = dataclasses.replace(batch, sampler_log_probs=batch.old_log_probs)
    return UpdateWork(batch, packed)


def _most_rows(config: Config) -> int:
    adds = config.rethink.rule != "off" and config.rethink.kept_as == "addition"
    return config.training.batch_size * (2 if adds else 1)


def prompt_work(config: Config, qwen: QwenConfig, longest: Longest, rows: int, shards: int) -> PromptBatch:
    """A wave of `rows` prompts, as shapes."""
    prompts = [make_prompt(qwen, longest, str(number)) for number in range(rows)]
    packed = pack_prompts(
        prompts, geometry_of(qwen), batch_size=-(-rows // shards) * shards, seq_buckets=(longest.prompt_tokens,),
        seq_minimum=longest.prompt_tokens, vision_buckets=config.buckets.vision,
        vision_minimum=(bucket(max(1, rows // 2), 4), 4), row_multiple=shards,
    )  # fmt: skip
    batch = shapes_of(dataclasses.replace(packed, vision=_without_index(packed.vision)))
    return dataclasses.replace(batch, vision=None if batch.vision is None else _widen(batch.vision, qwen))


def _without_index(vision: VisionBatch | None) -> VisionBatch | None:
    return None if vision is None else dataclasses.replace(vision, merged_index=())


def _widen(vision: VisionBatch, qwen: QwenConfig) -> VisionBatch:
    shape = (*vision.patches.shape[:-1], qwen.vision.patch_dim)
    return dataclasses.replace(vision, patches=jax.ShapeDtypeStruct(shape, np.float32))


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
