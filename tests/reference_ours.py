"""What our model says about rows of `reference_cases.py`: logits, loss, gradients, greedy tokens."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference_cases import make_weight
from safetensors.numpy import save_file

from rethinker_jax.config import BucketsConfig, MeshConfig, SamplingConfig
from rethinker_jax.models.qwen25vl import Model, Params, define_model
from rethinker_jax.models.qwen_config import QwenConfig, read_config
from rethinker_jax.models.sharding import make_mesh
from rethinker_jax.models.weight_table import weight_table
from rethinker_jax.models.weights import load_params
from rethinker_jax.prompts.batch import PromptBatch
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry
from rethinker_jax.sampling.prefill import sampling_layout
from rethinker_jax.sampling.sampler import Budgets, Request, Sampler
from rethinker_jax.types import Prompt


def load(raw: dict[str, Any], directory: Path) -> tuple[Model, Params]:
    """The model of `raw`, its weights written as a checkpoint and read back."""
    (directory / "config.json").write_text(json.dumps(raw))
    config = read_config(directory)
    tensors = {name: make_weight(name, entry.hf_shape) for entry in weight_table(config) for name in entry.names}
    save_file(tensors, directory / "model.safetensors")
    config, params = load_params(directory, config, jnp.float32)
    return define_model(config), params


def geometry_of(config: QwenConfig) -> VisionGeometry:
    return VisionGeometry(config.vision.patch_size, config.vision.merge_size, config.vision.window_size)


def on_device(vision: VisionBatch) -> VisionBatch:
    """Without the host's index of merged tokens, whose shapes vary."""
    return dataclasses.replace(vision, merged_index=())


def for_device(batch: PromptBatch) -> PromptBatch:
    return batch if batch.vision is None else dataclasses.replace(batch, vision=on_device(batch.vision))


@functools.partial(jax.jit, static_argnums=0)
def encode(model: Model, params: Params, vision: VisionBatch) -> jax.Array:
    return model.encode_images(params, vision)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Model, params: Params, batch: PromptBatch) -> jax.Array:
    table = None if batch.vision is None else model.encode_images(params, batch.vision)
    return model.logits(params, model.hidden(params, batch.text, table))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def loss_and_gradients(model: Model, params: Params, batch: PromptBatch) -> tuple[jax.Array, jax.Array]:
    """((loss, logits), gradients); the loss is the mean over every real token behind a row's first."""
    logits = forward(model, params, batch)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    nll = -jnp.take_along_axis(log_probs, batch.text.token_ids[:, 1:, None], axis=-1)[..., 0]
    real = jnp.arange(1, batch.text.token_ids.shape[1]) < batch.text.lengths[:, None]
    return jnp.sum(nll * real) / jnp.sum(real), logits


def greedy(
    model: Model, params: Params, prompts: Sequence[Prompt], directory: Path, never: Sequence[int], num_tokens: int
) -> list[list[int]]:
    """Tokens of the sampler at temperature 0; `directory` holds the example's tokenizer."""
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    tokenizer, geometry = ChatTokenizer(directory), geometry_of(model.config)
    sampler = Sampler(model, mesh, tokenizer, geometry, (), np.array(never, np.int32), BucketsConfig())
    settings = SamplingConfig(temperature=0.0, max_new_tokens=num_tokens)
    requests = [Request(prompt, 0) for prompt in prompts]
    laid_out = sampling_layout(model, params, mesh, jnp.float32)
    drawn, _ = sampler.generate(laid_out, requests, settings, Budgets(first=num_tokens), seed=0, step=0)
    return [one.completion.token_ids.tolist() for one in drawn]
