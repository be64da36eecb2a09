"""Every implementation of attention against the definition, and the definition against numpy.

The splash kernel runs in interpret mode here, and cuDNN's arguments through the XLA implementation that takes the same
ones; the kernels themselves are compiled for TPUs where libtpu can be imported, and run on a GPU where there is one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rethinker_jax.config import Config, ModelConfig
from rethinker_jax.errors import UserError
from rethinker_jax.models.attention import Mask, attend
from rethinker_jax.models.attention_kernels import PLAIN, Attention, attend_cudnn, choose_name
from rethinker_jax.sampling.caches import attend_caches
from rethinker_jax.system import EXAMPLE_MODEL, load_system

REPOSITORY = Path(__file__).parent.parent
SPLASH = Attention("splash", interpret=True)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]

# name: ([*rows, seq], heads, kv_heads, head_dim, mask). Rows of length 0, padding in the middle of segments, sequences
# that fill no tile, one tile, or several, heads that fill no lane.
LENGTHS = np.array([33, 7, 0], np.int32)
RAGGED = np.array([[5, 8, 0, 1], [8, 8, 8, 3]], np.int32)
SEGMENTS = np.repeat(np.array([[1, 1, 1, 2, 2, 0], [3, 1, 0, 0, 2, 2]], np.int32), 8, axis=1)
SEGMENTS[:, [6, 7, 20]] = 0
CASES = {
    "causal": ((3, 33), 4, 2, 16, Mask(causal=True, lengths=LENGTHS)),
    "causal, several tiles": ((2, 257), 2, 1, 8, Mask(causal=True, lengths=np.array([257, 130], np.int32))),
    "windows": ((2, 4, 8), 2, 2, 40, Mask(lengths=RAGGED)),
    "images": ((2, 48), 2, 2, 40, Mask(segments=SEGMENTS)),
    "packed": ((2, 48), 6, 3, 8, Mask(causal=True, segments=SEGMENTS)),
    "packed, padded": ((2, 48), 2, 2, 8, Mask(segments=SEGMENTS, lengths=np.array([48, 30], np.int32))),
    "full": ((2, 5), 2, 1, 8, Mask()),
}


def draw(case: str, dtype: type = jnp.float32) -> tuple[jax.Array, ...]:
    """Query, key, value, and weights with which the context is summed."""
    rows, heads, kv_heads, head_dim, _ = CASES[case]
    rng = np.random.default_rng(3)
    sizes = heads, kv_heads, kv_heads, heads
    return tuple(jnp.asarray(rng.normal(size=(*rows, n, head_dim)), dtype) for n in sizes)


def values(attention: Attend, mask: Mask, arrays: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
    """Context and gradients, float32."""

    def total(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
        context = attention(query, key, value, mask)
        return jnp.sum(context * arrays[3], dtype=jnp.float32), context

    (_, context), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays[:3], mask)
    found = dict(zip(("context", "query", "key", "value"), (context, *gradients), strict=True))
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def through_xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
    """What cuDNN is asked for, computed by XLA."""
    context = attend_cudnn(query, key, value, mask, implementation="xla")
    return jnp.where(mask.real(query.shape[-3])[..., None, None], context, 0)


def errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in wanted}


# --- the definition ---


def test_the_definition_is_softmax_of_scaled_scores() -> None:
    """In float64 numpy, a head at a time. Catches heads that read another kv head, a lost scale, a transposed mask."""
    query, key, value, _ = draw("packed")
    mask = np.random.default_rng(4).random((2, 48, 48)) < 0.3
    found = np.asarray(attend(query, key, value, jnp.asarray(mask)))
    for head in range(6):
        q, k, v = (np.asarray(x, np.float64) for x in (query[:, :, head], key[:, :, head // 2], value[:, :, head // 2]))
        scores = np.where(mask, np.einsum("bsh,bth->bst", q, k) / np.sqrt(8), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(found[:, :, head], np.einsum("bst,bth->bsh", weights, v), atol=1e-6)


@pytest.mark.parametrize(
    "mask, wanted",
    [
        (Mask(), ["1111"]),
        (Mask(lengths=np.array(3)), ["1110"]),
        (Mask(causal=True, lengths=np.array(3)), ["1000", "1100", "1110", "1110"]),
        (Mask(segments=np.array([2, 0, 2, 1])), ["1010", "0000", "1010", "0001"]),
        (Mask(causal=True, segments=np.array([2, 0, 2, 1])), ["1000", "0000", "1010", "0001"]),
        (Mask(segments=np.array([1, 1, 2, 2]), lengths=np.array(3)), ["1100", "1100", "0010", "0010"]),
    ],
)
def test_masks_written_out(mask: Mask, wanted: list[str]) -> None:
    """Catches a part of a mask that is dropped where another is given, and padding that is seen."""
    found = np.asarray(jax.jit(lambda mask: mask.dense(4))(mask))
    assert ["".join(map(str, row)) for row in found.astype(int)] == wanted


def test_the_decode_loop_computes_the_same() -> None:
    """Catches a second definition that drifts: one softmax over two caches, half of each unseen."""
    rng = np.random.default_rng(5)
    shape = {"query": (3, 2, 2, 8), "keys": (3, 2, 8, 12), "values": (3, 2, 12, 8)}
    x = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in shape.items()}
    seen = jnp.asarray(rng.random((3, 12)) < 0.5).at[:, 7].set(True)
    caches = [
        (x["keys"][..., part], x["values"][:, :, part], seen[:, None, part]) for part in (slice(0, 7), slice(7, None))
    ]
    found = attend_caches(x["query"], *caches)
    keys, values = x["keys"].transpose(0, 3, 1, 2), x["values"].swapaxes(1, 2)
    wanted = attend(x["query"].reshape(3, 1, 4, 8), keys, values, seen[:, None, :])
    np.testing.assert_allclose(found.reshape(3, 1, 4, 8), wanted, atol=1e-6)


# --- each implementation equals it ---


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", [through_xla, SPLASH], ids=["cudnn's arguments", "splash"])
def test_implementations_agree(attention: Attend, case: str) -> None:
    """Forward and gradients, float32. Catches segments that leak, padding that is seen, a scale that is lost or taken
    twice, query heads that read another kv head, tiles at the end that count."""
    mask, arrays = CASES[case][-1], draw(case)
    wanted, found = values(PLAIN, mask, arrays), values(attention, mask, arrays)
    assert {name: error for name, error in errors(found, wanted).items() if not error < 1e-5} == {}


def assert_bfloat16_is_near(attention: Attend, case: str) -> None:
    """Root mean square error below 2^-8, the coarsest rounding of bfloat16; plain has 2.3e-3 at most."""
    mask, narrow = CASES[case][-1], draw(case, jnp.bfloat16)
    wanted = values(PLAIN, mask, tuple(x.astype(jnp.float32) for x in narrow))
    found = values(attention, mask, narrow)
    for name, array in wanted.items():
        assert np.sqrt(np.mean((found[name] - array) ** 2) / np.mean(array**2)) < 2**-8, name


@pytest.mark.parametrize("case", ["causal", "images"])
@pytest.mark.parametrize("attention", [PLAIN, through_xla, SPLASH], ids=["plain", "cudnn's arguments", "splash"])
def test_bfloat16_rounds_operands_only(attention: Attend, case: str) -> None:
    """Catches scores and a softmax in bfloat16: gradients would be 5.7e-3 to 8e-3 off; measured are 3.2e-3 at most."""
    assert_bfloat16_is_near(attention, case)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
@pytest.mark.parametrize("case", ["causal", "causal, several tiles", "windows", "images"])
def test_cudnn_on_a_gpu(case: str) -> None:
    """Catches lengths and biases that the kernel takes otherwise than XLA does."""
    assert_bfloat16_is_near(Attention("cudnn"), case)


@pytest.mark.parametrize("attention", [PLAIN, through_xla, SPLASH], ids=["plain", "cudnn's arguments", "splash"])
@pytest.mark.parametrize("case", ["causal", "windows", "images", "packed"])
def test_padding_gets_nothing_and_gives_nothing(attention: Attend, case: str) -> None:
    """Catches NaN out of rows that see nothing, gradients into padding, and huge padding that shines through."""
    (rows, *_, mask), arrays = CASES[case], draw(case)
    real = np.asarray(mask.real(rows[-1]))
    huge = tuple(jnp.where(real[..., None, None], x, 1e4) for x in arrays)
    for found in (values(attention, mask, arrays), values(attention, mask, huge)):
        for array in found.values():
            assert np.isfinite(array).all()
            assert not array[~real].any() and array[real].any()


# --- several devices, and TPUs ---


def report(mode: str, **environment: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "tests/attention_devices.py", mode, str(EXAMPLE_MODEL)],
        cwd=REPOSITORY,
        env=clean | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_a_mesh() -> dict[str, Any]:
    return report("mesh", JAX_NUM_CPU_DEVICES="8")


def test_splash_on_a_mesh(on_a_mesh: dict[str, Any]) -> None:
    """Forward and gradients on eight devices against plain on one; of the kernel, alone and behind a prefix, and of the
    whole model. Catches query heads that meet the kv heads of another shard, gradients of copied kv heads that are not
    summed, prefixes that lie with other rows, and call sites that give the kernel another mask."""
    assert {name: found for name, found in on_a_mesh["kernel"].items() if not max(found) < 1e-5} == {}
    assert on_a_mesh["model"] < 1e-4


def test_cudnn_on_a_mesh(on_a_mesh: dict[str, Any]) -> None:
    """The same for what cuDNN's kernel is given; left alone, jax refuses queries that lie otherwise than their keys."""
    assert on_a_mesh["model by cudnn"] < 1e-4


def test_random_weights_are_the_same_in_pieces(on_a_mesh: dict[str, Any]) -> None:
    """Catches draws that hang on the number of devices, and weights that lie whole on each at first."""
    assert on_a_mesh["init"] < 1e-6 and on_a_mesh["in their places"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install libtpu)")
def test_splash_compiles_for_tpus() -> None:
    """Catches tiles that do not fit a TPU's memory, head sizes that the compiler refuses, and a model in which the
    kernel is not reached. Forward, gradient of queries, gradient of keys and values: three kernels, and three more for
    the keys of a prefix; with rematerialisation the forward one twice, in the text decoder and in the full layers of
    the vision tower."""
    found = report(
        "tpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1.0",
        TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0",
    )  # fmt: skip
    assert set(found) == {"v5e:2x2", "v5p:2x2x1", "v6e:2x2"}
    for counts in found.values():
        assert counts == {"chosen": "splash", "text": 3, "behind": 6, "vision": 3, "model": 8}


# --- which one it is ---

BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    "asked, platform, dtype, head_dims, wanted",
    [
        ("auto", "cpu", F32, (128, 80), "plain"),
        ("auto", "cpu", BF16, (128, 80), "plain"),
        ("auto", "gpu", BF16, (128, 80), "cudnn"),
        ("auto", "gpu", F32, (128, 80), "plain"),
        ("auto", "gpu", BF16, (128, 20), "plain"),
        ("auto", "tpu", BF16, (128, 80), "splash"),
        ("auto", "tpu", F32, (24, 24), "splash"),
        ("plain", "tpu", BF16, (128, 80), "plain"),
        ("plain", "gpu", BF16, (128, 80), "plain"),
    ],
)
def test_what_is_chosen(asked: str, platform: str, dtype: type, head_dims: tuple[int, ...], wanted: str) -> None:
    """Catches `auto` that dies where a kernel cannot compute the model, and one that overrules what is asked for."""
    assert choose_name(asked, platform, dtype, head_dims) == wanted


@pytest.mark.parametrize(
    "asked, platform, dtype, head_dims, wanted",
    [
        ("cudnn", "cpu", BF16, (128, 80), "the devices are cpu"),
        ("cudnn", "gpu", F32, (128, 80), "float32"),
        ("cudnn", "gpu", BF16, (128, 20), "heads of 20"),
        ("cudnn", "gpu", BF16, (256, 80), "heads of 256"),
        ("splash", "gpu", BF16, (128, 80), "the devices are gpu"),
        ("flash", "tpu", BF16, (128, 80), "wanted auto"),
    ],
)
def test_what_is_refused(asked: str, platform: str, dtype: type, head_dims: tuple[int, ...], wanted: str) -> None:
    """Catches a kernel that is silently replaced, or fails later without saying why."""
    with pytest.raises(UserError, match=r"model\.attention.*" + wanted):
        choose_name(asked, platform, dtype, head_dims)


def test_the_choice_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a key that nobody reads, and a choice that nobody is told."""
    system = load_system(Config())
    assert system.model.attention == PLAIN
    assert capsys.readouterr().err.count("attention: plain\n") == 1
    with pytest.raises(UserError, match="splash, but it is a kernel for TPUs"):
        load_system(Config(model=ModelConfig(attention="splash")))
