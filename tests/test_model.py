"""The port against transformers (golden files always, live where torch is), and what no sum of parts may break.

Tolerances are parts of the size of what is compared. In float32 ours and torch's lie 1e-5 to 4e-5 apart here, and
ours is the nearer one to a float64 run of the original.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_cases import (
    CASES,
    NUM_GREEDY,
    VARIANTS,
    checksum,
    make_config,
    make_prompt,
    make_rows,
    make_weight,
    never_drawn,
    noise,
    sums,
)
from safetensors.numpy import save_file

from rethinker_jax.config import MeshConfig, SamplingConfig
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.precision import cast_params
from rethinker_jax.models.qwen25vl import Model, Params, define_model, init_params, param_dims, param_shapes
from rethinker_jax.models.qwen_config import parse_config, read_config
from rethinker_jax.models.sharding import make_mesh
from rethinker_jax.models.weight_table import weight_table
from rethinker_jax.models.weights import hf_tensors, load_params
from rethinker_jax.prompts.batch import PromptBatch, TextBatch, pack_prompts
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionBatch, VisionGeometry, pack_images
from rethinker_jax.sampling.prefill import sampling_layout
from rethinker_jax.sampling.sampler import Budgets, Request, Sampler
from rethinker_jax.types import ImagePatches

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A variant: its config.json, what the golden file says, and our model with the generated weights."""

    raw: dict[str, Any]
    golden: dict[str, np.ndarray]
    model: Model
    params: Params

    @property
    def geometry(self) -> VisionGeometry:
        vision = self.model.config.vision
        return VisionGeometry(vision.patch_size, vision.merge_size, vision.window_size)


def load(raw: dict[str, Any], directory: Path) -> tuple[Model, Params]:
    """The model of `raw`, its weights written as a checkpoint and read back."""
    (directory / "config.json").write_text(json.dumps(raw))
    config = read_config(directory)
    tensors = {name: make_weight(name, entry.hf_shape) for entry in weight_table(config) for name in entry.names}
    save_file(tensors, directory / "model.safetensors")
    config, params = load_params(directory, config, jnp.float32)
    return define_model(config), params


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    loaded = {}
    for variant in VARIANTS:
        with np.load(GOLDEN / f"{variant}.npz") as file:
            golden = dict(file)
        raw = json.loads(str(golden["config"]))
        loaded[variant] = Loaded(raw, golden, *load(raw, tmp_path_factory.mktemp(variant)))
    return loaded


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


def run(loaded: Loaded, batch: PromptBatch) -> np.ndarray:
    """Logits; of batches in the common shape, by what the golden test has compiled."""
    return np.asarray(loss_and_gradients(loaded.model, loaded.params, batch)[0][1])


def for_device(batch: PromptBatch) -> PromptBatch:
    """Without the host's index of merged tokens, whose shapes vary."""
    return batch if batch.vision is None else dataclasses.replace(batch, vision=on_device(batch.vision))


def on_device(vision: VisionBatch) -> VisionBatch:
    return dataclasses.replace(vision, merged_index=())


def pack(loaded: Loaded, case: str, **options: Any) -> PromptBatch:
    """A case's prompts; in one shape for all cases unless `options` say otherwise, to compile once a variant."""
    prompts = [make_prompt(row, loaded.raw) for row in make_rows(case, loaded.raw)]
    options = {"batch_size": 3, "vision_buckets": [(2, 12)]} | options
    return for_device(pack_prompts(prompts, loaded.geometry, **options))


def assert_near(ours: np.ndarray, theirs: np.ndarray, scale: float, what: str) -> None:
    error = float(np.abs(ours - theirs).max(initial=0.0))
    assert error <= TOLERANCE * scale, f"{what}: {error:.2e} apart, {error / scale:.1e} of its size"


# --- the same numbers as transformers ---


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variants: dict[str, Loaded], variant: str, case: str) -> None:
    """Catches anything the port does otherwise: a forgotten bias, window order, m-RoPE sections, GELU's kind, ..."""
    loaded = variants[variant]
    golden = loaded.golden
    rows = make_rows(case, loaded.raw)
    for number, row in enumerate(rows):  # else the generator changed, not the model
        assert row.token_ids.tolist() == golden[f"{case}/{number}/token_ids"].tolist()
        assert [checksum(image.patches) for image in row.images] == golden[f"{case}/{number}/checksum"].tolist()
    (loss, logits), gradients = loss_and_gradients(loaded.model, loaded.params, pack(loaded, case))
    logits = np.asarray(logits)
    for number, row in enumerate(rows):
        theirs = golden[f"{case}/{number}/logits"]
        assert_near(logits[number, : len(row.token_ids)], theirs, float(theirs.std()), f"logits of row {number}")
    assert_near(np.asarray(loss), golden[f"{case}/loss"], 1.0, "loss")
    named = dict(hf_tensors(loaded.model.config, gradients, np.float32))
    assert sorted(named) == golden["names"].tolist()
    for name, theirs in zip(golden["names"], golden[f"{case}/gradient_sums"], strict=True):
        # A signed sum of n independent errors of size e is about e * sqrt(n), as the norm is; three times that at most.
        assert_near(sums(str(name), named[str(name)]), theirs, 3 * float(theirs[0]) + 1e-7, f"gradient of {name}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_decoding_is_that_of_transformers(
    variants: dict[str, Loaded], variant: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches a completion that starts at the wrong m-RoPE position, and caches of another row or of padding."""
    loaded = variants[variant]
    directory = tmp_path_factory.mktemp("tokenizer")
    build_model_directory(directory)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    sampler = Sampler(
        loaded.model, mesh, ChatTokenizer(directory), loaded.geometry, (), np.array(never_drawn(loaded.raw), np.int32)
    )
    prompts = [make_prompt(row, loaded.raw) for case in CASES for row in make_rows(case, loaded.raw)]
    wanted = np.concatenate([loaded.golden[f"{case}/greedy"] for case in CASES])
    params = sampling_layout(loaded.model, loaded.params, mesh, jnp.float32)
    settings = SamplingConfig(temperature=0.0, max_new_tokens=NUM_GREEDY)
    drawn, _ = sampler.generate(
        params, [Request(prompt, 0) for prompt in prompts], settings, Budgets(first=NUM_GREEDY), seed=0, step=0
    )
    assert [one.completion.token_ids.tolist() for one in drawn] == wanted.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_live_against_transformers(variant: str, tmp_path: Path) -> None:
    """Like the golden test, element by element and with the example's config of today."""
    pytest.importorskip("torch", reason="torch is not installed (pip install 'rethinker_jax[parity]')")
    import reference_torch

    build_model_directory(tmp_path)
    raw = make_config(variant, json.loads((tmp_path / "config.json").read_text()))
    theirs = reference_torch.make_model(raw)
    loaded = Loaded(raw, {}, *load(raw, tmp_path))
    for case in CASES:
        rows = make_rows(case, raw)
        answer = reference_torch.answer(theirs, rows, raw)
        (loss, logits), gradients = loss_and_gradients(loaded.model, loaded.params, pack(loaded, case))
        for number, wanted in enumerate(answer.logits):
            assert_near(
                np.asarray(logits)[number, : len(wanted)],
                wanted,
                float(wanted.std()),
                f"{case}: logits of row {number}",
            )
        assert_near(np.asarray(loss), np.array(answer.loss), 1.0, f"{case}: loss")
        for name, ours in hf_tensors(loaded.model.config, gradients, np.float32):
            wanted = answer.gradients.pop(name)
            assert_near(ours, wanted, float(np.abs(wanted).max()) + 1e-7, f"{case}: gradient of {name}")
        assert not answer.gradients


# --- images, rows and padding do not see each other ---


def make_image(name: str, h: int, w: int, loaded: Loaded) -> ImagePatches:
    return ImagePatches(noise(5, name, (h * w, loaded.model.config.vision.patch_dim)), (1, h, w))


def test_images_of_one_row_do_not_see_each_other(variants: dict[str, Loaded]) -> None:
    """Catches full attention that runs over the whole vision row."""
    loaded = variants["tied"]
    first, second, other = (make_image(name, h, 6, loaded) for name, h in [("a", 10), ("b", 6), ("c", 6)])
    before, after = (pack_images([first, image], loaded.geometry, [(1, 16)]) for image in (second, other))
    assert set(before.segment[0].tolist()) == {0, 1, 2}  # both images, and padding windows, share the only row
    tables = [np.asarray(encode(loaded.model, loaded.params, on_device(vision))) for vision in (before, after)]
    mine, theirs = before.merged_index
    np.testing.assert_array_equal(tables[0][mine], tables[1][mine])
    assert np.abs(tables[0][theirs] - tables[1][theirs]).max(axis=1).min() > 1e-3


def test_windows_see_each_other_in_full_layers_only(variants: dict[str, Loaded]) -> None:
    """Catches layers that all are windowed, and windowed ones that look out of their window."""
    loaded = variants["tied"]
    near = make_image("a", 16, 16, loaded)
    changed = near.patches.copy()
    changed[-1] += 1.0  # of the last window
    far = ImagePatches(changed, near.grid)
    windowed = dataclasses.replace(loaded.model.config.vision, full_attention_blocks=())
    models = loaded.model, define_model(dataclasses.replace(loaded.model.config, vision=windowed))
    moved = []
    for model in models:
        visions = [pack_images([image], loaded.geometry) for image in (near, far)]
        a, b = (np.asarray(encode(model, loaded.params, on_device(vision))) for vision in visions)
        moved.append(np.abs(a - b)[visions[0].merged_index[0]].max(axis=1).reshape(8, 8) > 0)
    units = loaded.geometry.window_units
    assert moved[0].all()
    assert moved[1][-units:, -units:].all()
    assert not moved[1][:-units].any() and not moved[1][:, :-units].any()


def test_padding_patches_change_nothing(variants: dict[str, Loaded]) -> None:
    """Catches a softmax over the padding of ragged windows, and of padding windows."""
    loaded = variants["untied"]
    vision = pack_images([make_image("a", 10, 6, loaded), make_image("b", 2, 4, loaded)], loaded.geometry, [(2, 4)])
    assert (vision.valid.any(axis=2) & ~vision.valid.all(axis=2)).any() and not vision.valid.any(axis=2).all()
    filled = np.where(vision.valid[..., None], vision.patches, np.float32(50.0))
    tables = [
        np.asarray(encode(loaded.model, loaded.params, on_device(dataclasses.replace(vision, patches=patches))))
        for patches in (vision.patches, filled)
    ]
    for index in vision.merged_index:
        np.testing.assert_array_equal(tables[0][index], tables[1][index])


def test_padding_tokens_and_other_rows_change_nothing(variants: dict[str, Loaded]) -> None:
    """Catches a causal mask without lengths that is read from behind, and rows that leak into each other."""
    loaded = variants["tied"]
    batch = pack(loaded, "padded_batch")
    text = batch.text
    ids = np.where(text.mask, text.token_ids, 99)  # padding has other tokens,
    ids[0] = 77  # the first row too,
    changed = dataclasses.replace(batch, text=dataclasses.replace(text, token_ids=ids.astype(np.int32)))
    before, after = run(loaded, batch), run(loaded, changed)
    assert np.isfinite(run(loaded, pack(loaded, "one_image"))).all()  # rows of length 0 included
    for row in (1, 2):
        np.testing.assert_array_equal(before[row, : text.lengths[row]], after[row, : text.lengths[row]])
    assert np.abs(before[0] - after[0]).max() > 1e-3


def test_larger_buckets_give_the_same(variants: dict[str, Loaded]) -> None:
    """Catches what leans on a shape: here are more vision rows, windows, tokens and rows than needed."""
    loaded = variants["tied"]
    small = pack(loaded, "two_images", seq_minimum=4, batch_size=1, vision_buckets=[(1, 5)])
    large = pack(loaded, "two_images")
    assert small.vision is not None and large.vision is not None
    assert small.vision.shape == (1, 5) and large.vision.shape == (2, 12)
    length = int(small.text.lengths[0])
    a, b = np.asarray(forward(loaded.model, loaded.params, small))[0, :length], run(loaded, large)[0, :length]
    assert_near(b, a, float(a.std()), "logits")


def test_no_token_sees_a_later_one(variants: dict[str, Loaded]) -> None:
    """Catches a mask off by one, either way: the gradient of state t by embedding s is zero exactly where s > t."""
    loaded = variants["tied"]
    seq, real = 8, 6
    ids, index = np.arange(20, 20 + seq, dtype=np.int32)[None], np.arange(seq, dtype=np.int32)[None]
    # Every token is read from the table, so the table's gradient is the embeddings'.
    text = TextBatch(ids, np.stack([index] * 3), index, np.array([real], np.int32))
    table = loaded.params["text"]["embedding"][ids[0]]

    def states(table: jax.Array, text: TextBatch) -> jax.Array:
        return loaded.model.hidden(loaded.params, text, table)[0].sum(axis=-1)

    seen = np.abs(np.asarray(jax.jit(jax.jacrev(states))(table, text))).max(axis=-1) > 0
    assert seen[:real, :real].tolist() == np.tri(real, dtype=bool).tolist()
    assert not seen[:real, real:].any()


# --- the ways in which the one model function is used ---


def test_scanned_and_unrolled_layers_agree(variants: dict[str, Loaded]) -> None:
    """Catches a sampler that runs other layers, or in another order, than the trainer."""
    loaded = variants["untied"]
    model, config = loaded.model, loaded.model.config
    x = jnp.asarray(noise(6, "x", (2, 5, config.d_model)))
    angles = model.angles(jnp.broadcast_to(jnp.arange(5), (3, 2, 5)))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        return query + cache, key.sum()

    stacked = loaded.params["text"]["layers"]
    caches = jnp.arange(1.0, 1 + config.layers)
    unrolled = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.layers)]
    a, a_caches = model.run_layers(stacked, x, angles, attend, caches)
    b, b_caches = model.run_layers(unrolled, x, angles, attend, list(caches))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a_caches, jnp.stack(b_caches), rtol=1e-5)


def test_rematerialised_gradients_are_the_same(variants: dict[str, Loaded]) -> None:
    """Catches a checkpointed layer that sees other inputs in the backward pass."""
    loaded = variants["tied"]
    batch = pack(loaded, "two_images")
    plain = loss_and_gradients(loaded.model, loaded.params, batch)
    remat = loss_and_gradients(define_model(loaded.model.config, remat=True), loaded.params, batch)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(a).max()))


def test_bfloat16_stays_close(variants: dict[str, Loaded]) -> None:
    """Catches norms, angles or softmax that fell to bfloat16: positions above 256 would then coincide."""
    loaded = variants["untied"]
    batch = pack(loaded, "two_images")
    far = dataclasses.replace(batch.text, positions=batch.text.positions + np.int32(2001))
    batch = dataclasses.replace(batch, text=far)
    wide = run(loaded, batch)
    narrow = forward(loaded.model, cast_params(loaded.params, jnp.bfloat16), batch)
    assert narrow.dtype == jnp.float32  # logits are, always
    length = int(batch.text.lengths[0])
    error = np.abs(wide - np.asarray(narrow))[0, :length]
    # bfloat16 keeps 8 bits: 2^-9 a rounding, a dozen of them in a row; measured 0.02 of the logits' size.
    assert error.mean() < 0.05 * float(wide[0, :length].std())


def test_random_parameters_have_the_promised_form(variants: dict[str, Loaded]) -> None:
    """Catches trees of shapes, dimension words and values that differ, and a start that is not near ln(vocab)."""
    config = variants["untied"].model.config
    params, shapes, dims = init_params(config, 0), param_shapes(config), param_dims(config)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    words = jax.tree.map(lambda leaf: len(leaf.shape), shapes)
    assert jax.tree.map(len, dims, is_leaf=lambda node: isinstance(node, tuple)) == words
    (loss, _), _ = loss_and_gradients(variants["untied"].model, params, pack(variants["untied"], "one_image"))
    assert abs(float(loss) - np.log(config.vocab)) < 1.0


def test_definition_is_hashable_and_free_of_arrays(variants: dict[str, Loaded]) -> None:
    """Catches a definition that recompiles every call, or that keeps weights alive."""
    raw = variants["tied"].raw
    assert hash(define_model(parse_config(raw))) == hash(variants["tied"].model)
    assert define_model(parse_config(raw)) == variants["tied"].model
    assert not [
        leaf for leaf in jax.tree.leaves(dataclasses.astuple(variants["tied"].model)) if isinstance(leaf, jax.Array)
    ]
