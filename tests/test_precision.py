"""The bfloat16 policy of `models/precision.py`, seen in what is traced and in single roundings."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from reference_cases import make_prompt, make_rows, noise
from reference_ours import for_device, forward, geometry_of, load, loss_and_gradients

from rethinker_jax.errors import UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.attention import attend
from rethinker_jax.models.layers import RMSNorm
from rethinker_jax.models.precision import cast_params, resolve_dtype
from rethinker_jax.models.qwen25vl import Model, Params
from rethinker_jax.models.rope import rotate, text_angles
from rethinker_jax.prompts.batch import PromptBatch, pack_prompts
from rethinker_jax.sampling.caches import attend_caches

Loaded = tuple[Model, Params, PromptBatch]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The example's model with generated weights, and two images between text, far from the first positions."""
    directory = tmp_path_factory.mktemp("example")
    build_model_directory(directory)
    raw = json.loads((directory / "config.json").read_text())
    model, params = load(raw, directory)
    batch = pack_prompts([make_prompt(row, raw) for row in make_rows("two_images", raw)], geometry_of(model.config))
    batch.text.positions[:] += 2001
    return model, params, for_device(batch)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of scans, branches and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def traced(loaded: Loaded) -> list[Any]:
    """The forward pass in bfloat16."""
    model, params, batch = loaded
    cast = cast_params(params, jnp.bfloat16)
    return [*equations(jax.make_jaxpr(lambda: forward(model, cast, batch))().jaxpr)]


# They come from softmax, norms and rotary angles; SiLU and GELU have primitives of their own.
IN_FLOAT32 = {"exp", "reduce_max", "rsqrt", "cos", "sin"}


def test_norms_softmax_angles_and_logits_are_traced_in_float32(loaded: Loaded) -> None:
    """Catches any of them that follows its input's bfloat16."""
    found = set()
    for equation in traced(loaded):
        if equation.primitive.name in IN_FLOAT32:
            found.add(equation.primitive.name)
            assert {v.aval.dtype for v in [*equation.invars, *equation.outvars]} == {jnp.dtype(jnp.float32)}, equation
    assert found == IN_FLOAT32
    model, params, batch = loaded
    assert jax.eval_shape(lambda: forward(model, cast_params(params, jnp.bfloat16), batch)).dtype == jnp.float32


def test_weights_and_activations_are_bfloat16(loaded: Loaded) -> None:
    """Catches a float32 value that spreads through a matrix product: then the policy saves nothing.

    Products with a float32 result are those of attention scores and of the logits; their operands are bfloat16.
    """
    model, _, batch = loaded
    products = [equation for equation in traced(loaded) if equation.primitive.name == "dot_general"]
    assert all(operand.aval.dtype == jnp.bfloat16 for equation in products for operand in equation.invars)
    wide = [equation.outvars[0].aval.shape for equation in products if equation.outvars[0].aval.dtype == jnp.float32]
    seq = batch.text.token_ids.shape[1]
    config = model.config
    assert (1, seq, config.vocab) in wide
    assert (1, config.kv_heads, config.group * seq, seq) in wide
    assert len(wide) == 4  # logits, and the scores of text, windows and whole images


def test_scores_are_not_rounded_before_the_softmax() -> None:
    """Two scores of 40 that differ by 1/16: in bfloat16 (steps of 1/4 there) they would be equal."""
    query = jnp.full((1, 1, 1, 16), 4.0, jnp.bfloat16)
    keys = np.full((1, 2, 1, 16), 2.5, np.float32)
    keys[0, 1, 0, 0] += 1 / 16  # x 4 x 16 ** -0.5 = 1/16
    values = jnp.asarray(np.eye(2, 16)[None, :, None], jnp.bfloat16)
    context = attend(query, jnp.asarray(keys, jnp.bfloat16), values, jnp.ones((1, 1, 2), bool))
    wanted = jax.nn.softmax(jnp.array([40.0, 40.0625])).astype(jnp.bfloat16)
    np.testing.assert_array_equal(context[0, 0, 0, :2].astype(jnp.float32), wanted.astype(jnp.float32))
    assert wanted[0] != wanted[1]


def test_decoding_keeps_scores_and_sums_in_float32() -> None:
    """Catches a decode step that rounds what the trainer does not: log-probs would drift apart."""
    query = jnp.ones((2, 1, 2, 8), jnp.bfloat16)
    cache = jnp.ones((2, 1, 8, 4), jnp.bfloat16), jnp.ones((2, 1, 4, 8), jnp.bfloat16), jnp.ones((2, 1, 4), bool)
    traced = [*equations(jax.make_jaxpr(attend_caches)(query, cache, cache).jaxpr)]
    for equation in traced:
        if equation.primitive.name in ("exp", "reduce_max", "reduce_sum", "div", "dot_general"):
            assert equation.outvars[0].aval.dtype == jnp.float32, equation
    assert sum(equation.primitive.name == "dot_general" for equation in traced) == 4
    assert {"exp", "reduce_sum"} <= {equation.primitive.name for equation in traced}


def test_a_norm_rounds_once() -> None:
    """Bit for bit the float32 norm, rounded: the original rounds before the scale too. And the scale is not rounded."""
    norm = RMSNorm(64, "d_model", 1e-6, nnx.Rngs(0))
    scale = jnp.asarray(1 + 0.4 * noise(1, "scale", (64,)))
    norm.scale[...] = scale
    narrow = jnp.asarray(noise(1, "x", (5, 64))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        norm(narrow).astype(jnp.float32), norm(narrow.astype(jnp.float32)).astype(jnp.bfloat16).astype(jnp.float32)
    )
    cast = cast_params({"norm": {"scale": scale}, "up": {"kernel": scale}}, jnp.bfloat16)
    assert (cast["norm"]["scale"].dtype, cast["up"]["kernel"].dtype) == (jnp.float32, jnp.bfloat16)


def test_a_rotation_rounds_once_at_far_positions() -> None:
    """Positions 120001 and 120002 are one number in bfloat16; here they differ as in float64."""
    positions = jnp.broadcast_to(jnp.array([[120001, 120002]]), (3, 1, 2))
    angles = text_angles(positions, 8, 1e6, (1, 1, 2))
    assert angles.dtype == jnp.float32
    x = jnp.asarray(noise(2, "x", (1, 2, 1, 8))).astype(jnp.bfloat16)
    turned = rotate(x, angles)
    assert turned.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)[0, :, 0]
    angle = np.array([120001.0, 120002.0])[:, None] * 1e6 ** (-np.arange(4) / 4)
    low, high = wide[:, :4], wide[:, 4:]
    wanted = np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], axis=1
    )
    # 2^-9 of the size is one rounding to bfloat16; float32 angles of 120000 are 0.004 off in steps of 1/128.
    np.testing.assert_allclose(np.asarray(turned, np.float64)[0, :, 0], wanted, rtol=2**-8, atol=0.01)


def test_gradients_of_trained_parameters_are_float32(loaded: Loaded) -> None:
    """Catches a cast that lies outside of the differentiated function."""
    model, params, batch = loaded
    gradients = jax.eval_shape(
        jax.grad(lambda params: loss_and_gradients(model, cast_params(params, jnp.bfloat16), batch)[0][0]), params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_bfloat16_stays_close(loaded: Loaded) -> None:
    """Catches what the traces do not show: positions above 256 would coincide if angles were rounded anywhere."""
    model, params, batch = loaded
    wide = np.asarray(forward(model, params, batch))
    narrow = np.asarray(forward(model, cast_params(params, jnp.bfloat16), batch))
    length = int(batch.text.lengths[0])
    error = np.abs(wide - narrow)[0, :length]
    # bfloat16 keeps 8 bits: 2^-9 a rounding, a dozen of them in a row; measured 0.02 of the logits' size.
    assert error.mean() < 0.05 * float(wide[0, :length].std())


def test_the_dtype_is_the_asked_one_or_the_checkpoints() -> None:
    assert resolve_dtype("auto", "bfloat16") == resolve_dtype("bfloat16", "float32") == jnp.bfloat16
    with pytest.raises(UserError, match=r"model\.dtype.*float16"):
        resolve_dtype("auto", "float16")
