"""Compile the update step for a TPU slice that is not there, and print what the compiler says of its memory.

    python scripts/aot_update.py --model DIR [--topology v5p:2x2x1] [--mesh fsdp=4] [--groups 4] [--set key=value ...]

DIR needs no weights: config.json is enough. Needs libtpu (`pip install "libtpu==0.0.42.*"`), and no TPU. A batch has
`--groups` groups of `--samples` completions of `--completion-tokens`; a prompt has one image of `--pixels` a side.
Prints one JSON line, GiB per device: peak (arguments included), arguments, temporaries. It is the compiler's claim.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import numpy as np
from jax.experimental import topologies

from rethinker_jax.config import Config
from rethinker_jax.config_file import load_defaults
from rethinker_jax.mesh_spec import parse_mesh
from rethinker_jax.models.attention_kernels import Attention
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen25vl import define_model, param_dims, param_shapes
from rethinker_jax.models.qwen_config import QwenConfig, read_config
from rethinker_jax.models.sharding import TRAINING_RULES, make_mesh, param_shardings, row_shards
from rethinker_jax.prompts.positions import mrope_positions
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.training.batch import Packed, pack_micro_batches
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.optimizer import make_optimizer
from rethinker_jax.training.update import Updater, UpdateRule, batch_shardings, stack_batches
from rethinker_jax.types import ImagePatches, Problem, Prompt

GIB = 2**30


def make_prompt(qwen: QwenConfig, pixels: int, name: str) -> Prompt:
    """A picture of `pixels` a side and 48 words, all zeros."""
    side = pixels // qwen.vision.patch_size
    patches = np.zeros((side * side, qwen.vision.patch_dim), np.float32)
    tokens = side * side // qwen.vision.merge_size**2
    ids = [qwen.vision_start_token, *[qwen.image_token] * tokens, qwen.vision_end_token, *range(48)]
    token_ids = np.array(ids, np.int32)
    positions, following = mrope_positions(token_ids, qwen.image_token, [(1, side, side)], qwen.vision.merge_size)
    index = np.where(token_ids == qwen.image_token, np.arange(len(ids)) - 1, -1).astype(np.int32)
    image = ImagePatches(patches, (1, side, side))
    return Prompt(Problem(name, "", ""), token_ids, positions, index, following, (image,))


def make_batch(qwen: QwenConfig, config: Config, options: argparse.Namespace, shards: int) -> Packed:
    length = options.completion_tokens
    learned, zeros = np.ones(length, bool), np.zeros(length)
    prompts = [make_prompt(qwen, options.pixels, str(number)) for number in range(options.groups)]
    rows = [
        TrainRow(prompt, zeros.astype(np.int32), learned, ~learned, zeros.astype(np.float32), 1.0)
        for prompt in prompts
        for _ in range(options.samples)
    ]
    vision = qwen.vision
    geometry = VisionGeometry(vision.patch_size, vision.merge_size, vision.window_size)
    micro = config.training.micro_batch_tokens
    return pack_micro_batches(rows, geometry, length, len(rows), micro, config.buckets, shards)


def compile_update(options: argparse.Namespace) -> dict[str, Any]:
    config = load_defaults(options.set)
    qwen = read_config(options.model)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    mesh = make_mesh(parse_mesh(options.mesh), devices)
    model = define_model(qwen, config.model.remat, Attention("splash", mesh))
    shardings = param_shardings(param_dims(qwen), param_shapes(qwen), mesh, TRAINING_RULES)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), param_shapes(qwen), shardings
    )
    rule = UpdateRule(
        model, make_optimizer(config.optimizer, 100), config.loss, resolve_dtype(config.model.dtype, qwen.dtype),
        config.model.freeze, None, config.optimizer.offload,
    )  # fmt: skip
    updater = Updater(rule, params, mesh)
    packed = make_batch(qwen, config, options, row_shards(mesh))
    stacked = stack_batches(packed.batches)
    batch = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        stacked, batch_shardings(stacked, mesh),
    )  # fmt: skip
    began = time.monotonic()
    state = updater.shapes(params)
    compiled = updater.compiled_step.lower(state, batch, {}, np.float32(0)).compile()
    memory: Any = compiled.memory_analysis()
    return {
        "topology": options.topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "tokens_per_shard": packed.num_tokens // row_shards(mesh),
        "row_padding_share": round(1 - packed.num_tokens / packed.num_places, 3),
        "shape": {"text": stacked.text.token_ids.shape, "prefix": stacked.text.prefix_index.shape[-1]},
        "peak_gib": round(memory.peak_memory_in_bytes / GIB, 2),
        "arguments_gib": round(memory.argument_size_in_bytes / GIB, 2),
        "temporaries_gib": round(memory.temp_size_in_bytes / GIB, 2),
        "host_arguments_gib": round(memory.host_argument_size_in_bytes / GIB, 2),
        "compile_s": round(time.monotonic() - began, 1),
        "set": options.set,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--mesh", default="fsdp=-1")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--completion-tokens", type=int, default=512)
    parser.add_argument("--pixels", type=int, default=448)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    print(json.dumps(compile_update(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
