"""What every command needs of a model directory, loaded once: model, weights on the mesh, tokenizer, sampler."""

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rethinker_jax import peers
from rethinker_jax.config import Config, LossConfig
from rethinker_jax.errors import UserError
from rethinker_jax.models.attention_kernels import choose_attention
from rethinker_jax.models.lora import adapt_params, adapter_layout, init_adapters, merge_adapters
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen25vl import Model, Params, define_model, init_params, param_dims, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig, VisionConfig, read_config
from rethinker_jax.models.sharding import TRAINING_RULES, make_mesh, param_shardings, parts_of
from rethinker_jax.models.weights import load_params
from rethinker_jax.processes import is_first
from rethinker_jax.prompts.build import PromptBuilder
from rethinker_jax.prompts.images import ImageSettings
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.sampling.prefill import sampling_layout
from rethinker_jax.sampling.sampler import Sampler
from rethinker_jax.training.batch import Packed, pack_micro_batches
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.optimizer import make_optimizer
from rethinker_jax.training.update import AverageRule, Updater, UpdateRule

EXAMPLE_MODEL = Path(__file__).parent / "example" / "model"


@dataclasses.dataclass(frozen=True)
class System:
    """A loaded model. `params` are float32 in the training layout; `dtype` is that of computation."""

    directory: Path
    mesh: Mesh
    model: Model
    params: Params
    dtype: Any
    tokenizer: ChatTokenizer
    geometry: VisionGeometry
    builder: PromptBuilder
    sampler: Sampler

    def sampling_params(self, params: Params) -> Params:
        """Cast and reshard training parameters for the sampler."""
        return sampling_layout(self.model, params, self.mesh, self.dtype)

    def drop_params(self) -> None:
        """Frees the loaded weights, where a restored state takes their place."""
        for leaf in jax.tree.leaves(self.params):
            leaf.delete()

    def merged_params(self, params: Params) -> Params:
        """Training parameters as the original has them: adapters, if there are any, added to their kernels."""
        if "lora" not in params:
            return params
        shardings = jax.tree.map(lambda leaf: leaf.sharding, {key: params[key] for key in ("text", "vision")})
        merge = jax.jit(lambda params: merge_adapters(adapt_params(params, jnp.float32)), out_shardings=shardings)
        return merge(params)


def model_directory(path: str) -> Path:
    """Where `model.path` points: the package's example, or a directory."""
    directory = EXAMPLE_MODEL if path == "example" else Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"model.path: wanted a Hugging Face model directory or 'example', came {path!r}, which is not a directory."
        )
    return directory


def load_system(config: Config) -> System:
    """Load what `config.model`, `config.mesh` and `config.data` name. Raises UserError for anything unusable."""
    directory = model_directory(config.model.path)
    qwen = read_config(directory)
    tokenizer = ChatTokenizer(directory)
    never = np.array(tokenizer.never_sampled_ids(qwen.vocab), np.int32)
    vision = qwen.vision
    geometry = VisionGeometry(vision.patch_size, vision.merge_size, vision.window_size)
    images = ImageSettings.from_directory(directory, config.data.min_pixels, config.data.max_pixels)
    _check_images(directory, images, vision)
    builder = PromptBuilder(
        tokenizer, images, geometry, config.data.prompt_template, max_prompt_tokens=config.data.max_prompt_tokens,
        cache_size=1024, decode_late=peers.watched(),
    )  # fmt: skip
    dtype = resolve_dtype(config.model.dtype, qwen.dtype)
    mesh = make_mesh(config.mesh)
    attention = choose_attention(config.model.attention, qwen, dtype, mesh)
    if is_first():
        print(f"attention: {attention.name}", file=sys.stderr)
    qwen, params = _weights(config, directory, qwen, mesh)
    if config.model.lora.rank:
        params["lora"] = _adapters(config, qwen, mesh)
    model = define_model(qwen, config.model.remat, attention, mesh)
    sampler = Sampler(model, mesh, tokenizer, geometry, tokenizer.end_token_ids, never, config.buckets)
    return System(directory, mesh, model, params, dtype, tokenizer, geometry, builder, sampler)


def _check_images(directory: Path, images: ImageSettings, vision: VisionConfig) -> None:
    """Raises UserError where the processor would cut patches that the vision tower does not take."""
    sizes = {
        "patch_size": (images.patch_size, vision.patch_size),
        "merge_size": (images.merge_size, vision.merge_size),
        "temporal_patch_size": (images.temporal_patch_size, vision.temporal_patch_size),
    }
    for key, (came, wanted) in sizes.items():
        if came != wanted:
            raise UserError(
                f"{directory / 'preprocessor_config.json'}: {key}: wanted {wanted}, as vision_config of config.json "
                f"has it, came {came}. The two files belong to different models: copy both from one."
            )


def make_updater(config: Config, system: System, num_updates: int, loss: LossConfig) -> Updater:
    """The jitted optimizer step of a config for a loaded system."""
    optimizer = make_optimizer(config.optimizer, num_updates)
    consistency = config.reward.consistency
    average = None
    if consistency.weight and consistency.model == "ema":
        average = AverageRule(consistency.ema_decay, consistency.ema_every)
    rule = UpdateRule(
        system.model, optimizer, loss, system.dtype, config.model.freeze, average, config.optimizer.offload
    )
    return Updater(rule, system.params, system.mesh)


def pack_to_train(
    config: Config, system: System, rows: Sequence[TrainRow], completion_length: int, num_rows: int
) -> Packed:
    """At most `num_rows` rows as micro-batches for this mesh; `completion_length` bounds their completions."""
    return pack_micro_batches(
        rows, system.geometry, completion_length, num_rows, config.training.micro_batch_tokens, config.buckets,
        parts_of(system.mesh),
    )  # fmt: skip


def training_shardings(config: QwenConfig, mesh: Mesh) -> Params:
    return param_shardings(param_dims(config), param_shapes(config), mesh, TRAINING_RULES)


def _weights(config: Config, directory: Path, qwen: QwenConfig, mesh: Mesh) -> tuple[QwenConfig, Params]:
    shardings = training_shardings(qwen, mesh)
    if config.model.init == "random":
        return qwen, init_params(qwen, config.run.seed, shardings)
    untied = dataclasses.replace(qwen, tied=False)
    found, params = load_params(directory, qwen, jnp.float32, training_shardings(untied, mesh))
    if found != qwen:
        warnings.warn(
            f"{directory}: config.json ties the embeddings, but lm_head.weight differs; using it untied.", stacklevel=2
        )
    return found, params


def _adapters(config: Config, qwen: QwenConfig, mesh: Mesh) -> Params:
    lora = config.model.lora
    dims, shapes = adapter_layout(qwen, lora.rank, lora.targets, config.model.freeze)
    shardings = param_shardings(dims, shapes, mesh, TRAINING_RULES)
    return init_adapters(dims, shapes, shardings, lora.alpha / lora.rank, config.run.seed)
