"""Counted operations, against products written out by hand for a small model."""

import dataclasses

import jax.numpy as jnp
import pytest

from rethinker_jax.devices import peak_flops
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.flops import (
    decoder_flops,
    image_work,
    merger_flops,
    update_flops,
    vision_flops,
)
from rethinker_jax.models.qwen_config import QwenConfig, read_config
from rethinker_jax.training.packing import Group


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> QwenConfig:
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    small = read_config(directory)
    vision = dataclasses.replace(
        small.vision, depth=3, d_model=8, heads=2, d_ff=16, out_dim=12, in_channels=1, patch_size=2, merge_size=2,
        temporal_patch_size=1, window_size=8, full_attention_blocks=(2,),
    )  # fmt: skip
    return dataclasses.replace(
        small, vocab=100, d_model=12, d_ff=20, layers=2, heads=4, kv_heads=2, head_dim=3, vision=vision
    )


def test_the_decoder_by_hand(config: QwenConfig) -> None:
    """Catches keys counted with all heads, one product of the MLP forgotten, and logits of every token."""
    # A layer of a token: query and output 12x12, key and value 12x6, three MLP products 12x20.
    layer = 2 * (2 * 12 * 12 + 2 * 12 * 6 + 3 * 12 * 20)
    assert decoder_flops(config, 1, 0, 0) == 2 * layer
    # A pair: a product of 3 with the key and one with the value, for 4 heads, in 2 layers.
    assert decoder_flops(config, 0, 1, 0) == 2 * 4 * (2 * 3 + 2 * 3)
    assert decoder_flops(config, 0, 0, 1) == 2 * 12 * 100
    assert decoder_flops(config, 5, 7, 3) == 5 * 2 * layer + 7 * 96 + 3 * 2400


def test_the_vision_tower_by_hand(config: QwenConfig) -> None:
    """6 x 4 patches in windows of 4 x 4: one of 16, one of 8. Catches windows that attend to the whole image, and
    ragged windows taken for whole ones."""
    work = image_work(config, [(1, 6, 4)])
    assert (work.patches, work.frame_pairs, work.window_pairs) == (24, 24**2, 16**2 + 8**2)
    assert image_work(config, [(1, 6, 4), (2, 4, 4)]).window_pairs == 16**2 + 8**2 + 2 * 16**2
    layer = 4 * 8 * 8 + 3 * 8 * 16  # query, key, value, output; three MLP products
    pairs = 24**2 + 2 * (16**2 + 8**2)  # one full layer, two of windows
    assert vision_flops(config, work) == 2 * 24 * (4 * 8 + 3 * layer) + 2 * 2 * pairs * 8
    assert merger_flops(config, work) == 2 * 6 * (32 * 32 + 32 * 12)


def test_what_is_frozen_costs_less(config: QwenConfig) -> None:
    """Catches a frozen tower that is counted with a backward pass, and a decoder whose gradient must go through."""
    grids = [(1, 4, 4)]
    work = image_work(config, grids)
    text, vision, merger = decoder_flops(config, 9, 30, 4), vision_flops(config, work), merger_flops(config, work)

    def found(*freeze: str, adapters: bool = False) -> int:
        return update_flops(config, 9, 30, 4, grids, freeze, adapters)

    assert found() == 3 * (text + vision + merger)
    assert found("vision") == 3 * text + vision + 3 * merger
    assert found("vision", "merger") == 3 * text + vision + merger
    assert found("merger") == 3 * text + 3 * vision + 2 * merger
    assert found("decoder") == 2 * text + 3 * vision + 3 * merger
    assert found(adapters=True) == 2 * (text + vision + merger)


def test_pairs_are_counted_as_they_are_run() -> None:
    """A prompt of 3 with completions of 1 and 2: 2 prompt tokens are run once, its last one with each completion.
    Catches a prompt that is counted for every completion, and completions that see each other."""
    # Prompt: 1 + 2. Completion of 1: 2 + 1. Completion of 2: (2 + 1) + (2 + 2).
    assert Group((0, 1), 3, (1, 2)).num_pairs == 3 + 3 + 7
    assert Group((0,), 3, (2,)).num_pairs == 1 + 2 + 3 + 4


def test_the_peak_is_of_the_device_or_as_asked() -> None:
    """Catches a v5e taken for a v5p, float32 measured against the peak of bfloat16, and a CPU with a made-up peak."""
    assert peak_flops("TPU v5 lite", 0, jnp.bfloat16) == 197e12
    assert peak_flops("TPU v5", 0, jnp.bfloat16) == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3", 0, jnp.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", 0, jnp.bfloat16) == 756e12
    assert peak_flops("NVIDIA H200", 0, jnp.float32) is None and peak_flops("cpu", 0, jnp.bfloat16) is None
    assert peak_flops("cpu", 0.1, jnp.float32) == 1e11
