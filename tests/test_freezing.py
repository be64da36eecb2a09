"""Frozen parts: how many parameters are trained, that the others never move, and that they cost nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from published import COUNTS, published_config
from test_update import LOSS, OPTIMIZER, Tiny, leaves, make_rows, png

from rethinker_jax.config import Config, DataConfig, ModelConfig
from rethinker_jax.config_file import load_defaults
from rethinker_jax.console import parameter_line
from rethinker_jax.errors import UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.lora import adapter_layout
from rethinker_jax.models.parts import count_parameters, join_params, split_params
from rethinker_jax.models.qwen25vl import param_shapes
from rethinker_jax.models.qwen_config import parse_config, read_config
from rethinker_jax.system import load_system, make_updater
from rethinker_jax.training.update import update_step
from rethinker_jax.types import Problem

pytestmark = pytest.mark.usefixtures("quick_compilation")

# The example's shape: width 96, 4 heads and 2 kv heads of 24, 256 in the MLP, 3 layers, 448 rows of a tied embedding;
# vision 48 wide, 2 heads, 128 in the MLP, 2 blocks, patches of 3·2·14·14 = 1176 values.
# A layer has query, key and value, output, MLP, norms.
LAYER = (96 * 96 + 96) + 2 * (96 * 48 + 48) + 96 * 96 + 3 * 96 * 256 + 2 * 96
DECODER = 448 * 96 + 3 * LAYER + 96
BLOCK = 4 * (48 * 48 + 48) + 2 * (48 * 128 + 128) + (128 * 48 + 48) + 2 * 48
VISION = 1176 * 48 + 2 * BLOCK
MERGER = 48 + (192 * 192 + 192) + (192 * 96 + 96)
TOTAL = 516_944


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    return directory


def make_tiny(directory, dtype="float32", **model) -> Tiny:
    """A random model and its updater, with keys of the config's section `model`."""
    config = Config(
        model=ModelConfig(path=str(directory), init="random", dtype=dtype, **model),
        data=DataConfig(prompt_template="none"),
        optimizer=OPTIMIZER,  # with weight decay, which moves without a gradient
        loss=LOSS,
    )
    system = load_system(config)
    images = ((png(84, 84, 1),), (), (png(84, 56, 2), png(28, 28, 3)))
    prompts = [system.builder.build(Problem(str(len(some)), "<image>" * len(some) + "?", "1", some)) for some in images]
    return Tiny(config, system, make_updater(config, system, 100, LOSS), prompts)


@pytest.mark.parametrize(
    "freeze, trained",
    [
        ((), TOTAL),
        (("vision",), MERGER + DECODER),
        (("merger",), VISION + DECODER),
        (("decoder",), VISION + MERGER),
        (("vision", "merger"), DECODER),
        (("vision", "decoder"), MERGER),
    ],
)
def test_the_tiny_model_is_counted_by_hand(directory, freeze, trained):
    """Catches the merger counted as vision, under which it lies, a tied head counted twice, layers counted once."""
    assert VISION + MERGER + DECODER == TOTAL
    found = count_parameters(param_shapes(read_config(directory)), freeze)
    wanted = {"vision": VISION, "merger": MERGER, "decoder": DECODER, "adapters": 0, "total": TOTAL}
    assert found == wanted | {"trained": trained}


def test_the_published_sizes_are_counted_from_shapes_alone():
    """7B: 8.29 B, of which Qwen2.5-7B has 7,615,616,512. Catches a head that is tied by mistake, and arrays made."""
    config = parse_config(published_config("7B"))
    found = count_parameters(param_shapes(config), ("vision", "merger"))
    block = 4 * (1280**2 + 1280) + 2 * (1280 * 3420 + 3420) + (3420 * 1280 + 1280) + 2 * 1280
    assert found["vision"] == 32 * block + 1176 * 1280 == 631_975_680
    assert found["merger"] == 1280 + (5120**2 + 5120) + (5120 * 3584 + 3584) == 44_574_464
    assert found["decoder"] == found["trained"] == 7_615_616_512
    assert found["total"] == COUNTS["7B"][0] == 8_292_166_656

    # Rank 8 on all of the decoder's projections, (inputs + outputs) · 8 each: query, key, value, output, MLP.
    rank = 8 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    _, shapes = adapter_layout(config, 8, (), ("vision", "merger"))
    found = count_parameters(param_shapes(config) | {"lora": shapes}, ("vision", "merger"))
    assert found["adapters"] == found["trained"] == rank == 20_185_088
    assert found["total"] == 8_292_166_656 + rank


def test_the_line_that_a_run_begins_with():
    counts = {"vision": 1_000, "merger": 20, "decoder": 3_000_000, "adapters": 0, "total": 3_001_020, "trained": 20}
    assert parameter_line(counts) == (
        "parameters: vision 1,000 + merger 20 + decoder 3,000,000 = 3,001,020, trained 20 (0.0%)"
    )


@pytest.mark.parametrize("freeze", [("vision", "decoder"), ("decoder",), ("vision", "merger")])
def test_frozen_parts_stay_and_have_no_optimizer_state(directory, freeze):
    """Two updates with weight decay. Catches a part that takes another's name (the merger lies under `vision`), moments
    that cost memory for what is never trained, and gradients that stop at the frozen decoder before the merger."""
    tiny = make_tiny(directory, freeze=freeze)
    before = leaves(tiny.system.params)
    batch, state = tiny.pack(tiny.own(make_rows(tiny))), tiny.state()
    for _ in range(2):
        state, metrics = tiny.updater.step(state, [batch])
        assert metrics["gradient_norm"] > 0 and metrics["skipped_update"] == 0
    trained, frozen = split_params(state.params, freeze)
    assert set(leaves(trained)) | set(leaves(frozen)) == set(before)
    still = {name for name, value in leaves(state.params).items() if np.array_equal(value, before[name])}
    assert still == set(leaves(frozen))
    sizes = {"vision": VISION, "merger": MERGER, "decoder": DECODER}
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert held == 2 * sum(size for part, size in sizes.items() if part not in freeze)


def test_frozen_parts_cost_no_gradient(directory):
    """Operations before XLA optimizes: without vision and merger the step lacks their whole backward pass, twice the
    forward pass less the gradient of the pixels. Catches a gradient norm over frozen parts, which keeps it alive."""

    def flops(lowered) -> float:
        return lowered.cost_analysis()["flops"]

    found = {}
    for freeze in ((), ("vision", "merger")):
        tiny = make_tiny(directory, freeze=freeze)
        batch = tiny.pack(make_rows(tiny))
        stacked = jax.tree.map(lambda leaf: leaf[None], batch)
        step = jax.jit(functools.partial(update_step, tiny.updater.rule))
        found[freeze] = flops(step.lower(jax.eval_shape(tiny.state), stacked))
        encode = jax.jit(tiny.system.model.encode_images).lower(tiny.system.params, batch.vision)
        pixels = 2 * batch.vision.patches.size * 48
    assert found[()] - found["vision", "merger"] > 2 * flops(encode) - pixels


def test_split_and_join_are_inverse(directory):
    shapes = param_shapes(read_config(directory))
    for freeze in ((), ("vision",), ("decoder", "merger")):
        assert join_params(*split_params(shapes, freeze)) == shapes


def test_freezing_everything_is_refused(directory):
    with pytest.raises(UserError, match=r"model\.freeze names every part"):
        load_defaults(["model.freeze=[decoder, vision, merger]"])
    with pytest.raises(UserError, match=r"model\.lora\.targets=\['query'\].*model\.freeze=\['vision', 'decoder'\]"):
        adapter_layout(read_config(directory), 4, ("query",), ("vision", "decoder"))
    config = dataclasses.replace(Config(), model=ModelConfig(freeze=("vision", "merger")))
    assert load_defaults(["model.freeze=[vision, merger]"]) == config
