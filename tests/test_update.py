"""One optimizer step of a tiny random model: what moves, what must not, and what it reports.

Compiled without most optimizations: compiling is all that these tests cost.
"""

import dataclasses
import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from rethinker_jax.config import BucketsConfig, Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.prompts.batch import pack_prompts
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training import log_probs as log_probs_module
from rethinker_jax.training.batch import pack_micro_batches, pack_rows
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.log_probs import token_log_probs
from rethinker_jax.training.optimizer import learning_rate_schedule
from rethinker_jax.training.update import Updater
from rethinker_jax.types import Problem, Prompt

LOSS = LossConfig(nll_coefficient=0.5, entropy_coefficient=0.01)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0, b1=0.9, weight_decay=0.1)
NUM_ROWS = 4
pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTH = 16


@dataclasses.dataclass
class Tiny:
    """A random model, an updater, and its log-probs; the updater is compiled once for all tests of one shape."""

    config: Config
    system: System
    updater: Updater
    prompts: list[Prompt]

    def state(self):
        """A state of its own: a step takes its arrays away."""
        return self.updater.init(jax.tree.map(jnp.copy, self.system.params))

    def log_probs(self, rows):
        found = np.asarray(self.updater.log_probs(self.system.params, self.pack(rows)))
        return [values[: len(row.completion_ids)] for values, row in zip(found, rows, strict=False)]

    def pack(self, rows):
        return pack_rows(rows, self.system.geometry, LENGTH, NUM_ROWS)

    def own(self, rows):
        """The rows with old log-probs that are the model's own, as if it had drawn them."""
        values = self.log_probs(rows)
        return [dataclasses.replace(row, old_log_probs=old) for row, old in zip(rows, values, strict=True)]

    def step(self, *batches):
        """(state after one step, metrics) from the initial parameters."""
        state, metrics = self.updater.step(self.state(), batches)
        return state, {name: float(value) for name, value in metrics.items()}


def png(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, quick_compilation):
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    config = Config(
        model=ModelConfig(path=str(directory), init="random", dtype="float32"),
        data=DataConfig(prompt_template="none"),
        optimizer=OPTIMIZER,
        loss=LOSS,
    )
    system = load_system(config)
    problems = [
        Problem("one", "<image> How many?", "1", (png(84, 84, 1),)),
        Problem("none", "What is 2 + 3?", "5"),
        Problem("two", "<image> or <image>?", "2", (png(84, 56, 2), png(28, 28, 3))),
    ]
    prompts = [system.builder.build(problem) for problem in problems]
    return Tiny(config, system, make_updater(config, system, 100, LOSS), prompts)


def make_rows(tiny, count=3, seed=0):
    """Rows of unequal lengths on every prompt, advantages of both signs, the last two tokens supervised."""
    rng = np.random.default_rng(seed)
    rows = []
    for place in range(count):
        length = 5 + 3 * place
        nll = np.arange(length) >= length - 2
        rows.append(
            TrainRow(
                prompt=tiny.prompts[place % 3],
                completion_ids=rng.integers(5, 200, length).astype(np.int32),
                loss_mask=np.arange(length) > 0,
                nll_mask=nll,
                old_log_probs=np.zeros(length, np.float32),
                advantage=[1.0, -0.5, 0.75, -1.0][place % 4],
            )
        )
    return rows


def shifted(rows, scale=0.4, seed=1):
    """Old log-probs some way from the model's own, so that some ratios are clipped."""
    rng = np.random.default_rng(seed)
    return [
        dataclasses.replace(row, old_log_probs=row.old_log_probs + rng.normal(0, scale, len(row.completion_ids)))
        for row in rows
    ]


def first_moment(state):
    """Adam's first moment after one step: the clipped gradient, times 1 - b1."""
    return optax.tree.get(state.opt_state, "mu")


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_near(a, b, tolerance):
    """Every leaf to `tolerance` of its own largest value."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        scale = max(float(np.abs(b[name]).max(initial=0)), 1e-12)
        error = float(np.abs(a[name] - b[name]).max(initial=0))
        assert error <= tolerance * scale, f"{name}: {error / scale:.1e} of its size"


def test_log_probs_are_those_of_the_prompt_gone_on(tiny):
    """Prompt and completion as one long prompt, through the sampler's way of packing, read at the place before each
    token. Catches log-probs one place off, completions at wrong m-RoPE positions, and images of another row."""
    rows = make_rows(tiny)
    longer = []
    for row in rows:
        old, count = row.prompt, len(row.completion_ids)
        # After an image the next position is behind its longest side, not behind its number of tokens.
        positions = np.tile(old.positions.max() + 1 + np.arange(count, dtype=np.int32), (3, 1))
        longer.append(
            dataclasses.replace(
                old,
                token_ids=np.append(old.token_ids, row.completion_ids),
                positions=np.append(old.positions, positions, axis=1),
                image_index=np.append(old.image_index, np.full(count, -1, np.int32)),
            )
        )
    batch = pack_prompts(longer, tiny.system.geometry)
    assert batch.vision is not None
    model = tiny.system.model

    @jax.jit
    def logits_of(params, text, vision):
        return model.logits(params, model.hidden(params, text, model.encode_images(params, vision)))

    vision = dataclasses.replace(batch.vision, merged_index=())
    logits = np.asarray(logits_of(tiny.system.params, batch.text, vision), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, found, there in zip(rows, tiny.log_probs(rows), log_probs, strict=True):
        wanted = [there[len(row.prompt) + t - 1, token] for t, token in enumerate(row.completion_ids)]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


# --- what is reported ----------------------------------------------------------------------------------------------


def test_metrics_are_those_of_a_loop_over_rows(tiny):
    """The loss, its parts and the clip shares, by numpy from log-probs alone. Catches masks that are swapped,
    means over padding, and shares of clipped tokens that count the ones clipping does not touch."""
    rows = shifted(tiny.own(make_rows(tiny)))
    log_probs = tiny.log_probs(rows)
    _, metrics = tiny.step(tiny.pack(rows))
    policy, nll, ratios, low, high = [], [], [], [], []
    for row, new in zip(rows, log_probs, strict=True):
        ratio = np.exp(new.astype(np.float64) - row.old_log_probs)
        a = row.advantage
        loss = -np.minimum(ratio * a, np.clip(ratio, 1 - LOSS.clip_low, 1 + LOSS.clip_high) * a)
        policy += loss[row.loss_mask].tolist()
        ratios += ratio[row.loss_mask].tolist()
        low += ((ratio < 0.8) & (a < 0))[row.loss_mask].tolist()
        high += ((ratio > 1.35) & (a > 0))[row.loss_mask].tolist()
        nll += (-new)[row.nll_mask].tolist()
    wanted = {
        "policy_loss": np.mean(policy),
        "nll": np.mean(nll),
        "ratio": np.mean(ratios),
        "clip_low_fraction": np.mean(low),
        "clip_high_fraction": np.mean(high),
        "loss": np.mean(policy) + 0.5 * np.mean(nll) - 0.01 * metrics["entropy"],
        "skipped_update": 0,
    }
    assert np.mean(low) > 0 and np.mean(high) > 0
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert 0 < metrics["entropy"] < np.log(tiny.system.model.config.vocab)


def test_the_gap_to_the_sampler_is_zero_where_it_is_the_same_policy(tiny):
    """Catches a gap of masked tokens (inserted triggers), of replayed rows, whose policy was another, and none."""
    rows = tiny.own(make_rows(tiny))
    _, metrics = tiny.step(tiny.pack(rows))
    assert metrics["sampler_trainer_gap_max"] < 1e-4
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4)

    masked = rows[0].old_log_probs + np.where(rows[0].loss_mask, 0, 3).astype(np.float32)
    older = rows[1].old_log_probs + np.float32(0.5)
    others = [
        dataclasses.replace(rows[0], old_log_probs=masked),
        dataclasses.replace(rows[1], old_log_probs=older, fresh=False),
        rows[2],
    ]
    assert tiny.step(tiny.pack(others))[1]["sampler_trainer_gap_max"] < 1e-4

    far = dataclasses.replace(rows[1], old_log_probs=older)
    _, metrics = tiny.step(tiny.pack([rows[0], far, rows[2]]))
    assert metrics["sampler_trainer_gap_max"] == pytest.approx(0.5, abs=1e-4)
    # 4 + 7 + 10 policy tokens, 7 of them half a nat off
    assert metrics["sampler_trainer_gap"] == pytest.approx(0.5 * 7 / 21, abs=1e-4)


# --- what moves ----------------------------------------------------------------------------------------------------


def test_a_step_moves_praised_tokens_up_and_blamed_ones_down(tiny):
    """Catches a sign, and a gradient that does not arrive."""
    rows = [dataclasses.replace(row, nll_mask=np.zeros_like(row.nll_mask)) for row in tiny.own(make_rows(tiny))]
    state, _ = tiny.step(tiny.pack(rows))
    after = np.asarray(tiny.updater.log_probs(state.params, tiny.pack(rows)))
    for row, new in zip(rows, after, strict=False):
        moved = (new[: len(row.completion_ids)] - row.old_log_probs)[row.loss_mask].mean()
        assert moved * row.advantage > 1e-3


def test_gradients_reach_every_parameter_through_the_images(tiny):
    """Catches image features that are cut off, or never put in place of their tokens."""
    rows = tiny.own(make_rows(tiny))
    state, _ = tiny.step(tiny.pack(rows))
    still = [name for name, moment in leaves(first_moment(state)).items() if not np.abs(moment).max() > 0]
    # A bias on the keys adds the same to every score of a query: softmax does not see it, up to rounding.
    assert [name for name in still if "key" not in name] == []

    other = tiny.system.builder.build(Problem("other", "<image> How many?", "1", (png(84, 84, 9),)))
    assert other.token_ids.tolist() == tiny.prompts[0].token_ids.tolist()
    moved = tiny.log_probs([dataclasses.replace(rows[0], prompt=other)])[0] - rows[0].old_log_probs
    assert np.abs(moved).max() > 1e-3


def test_padding_changes_nothing(tiny):
    """Noise in the place of padding tokens and of the padding row. Catches losses over padding, and attention to it."""
    rows = make_rows(tiny)
    rows.append(dataclasses.replace(rows[2], prompt=rows[0].prompt, advantage=0.5))
    rows = shifted(tiny.own(rows))
    buckets = BucketsConfig(row_tokens=(96,), rows=(4,), targets=(40,))
    batch = pack_rows(rows, tiny.system.geometry, LENGTH, NUM_ROWS + 1, buckets)
    assert 0 < (batch.text.prefix_segments > 0).mean() < 1
    rng = np.random.default_rng(3)
    text = batch.text
    real = text.segments > 0
    there = batch.completion_mask
    used = np.isin(np.arange(batch.target_ids.size).reshape(batch.target_ids.shape), batch.token_index[there])
    assert not real.all() and not used.all()  # else there is no padding
    places = real.size

    there_rows = np.arange(NUM_ROWS + 1) < len(rows)

    def fill(array, mask, low, high):
        return np.where(mask, array, rng.integers(low, high, array.shape)).astype(array.dtype)

    noisy = dataclasses.replace(
        batch,
        text=dataclasses.replace(
            text,
            token_ids=fill(text.token_ids, real, 5, 200),
            positions=fill(text.positions, real[None], 0, 50),
            image_index=np.where(real, text.image_index, 0).astype(np.int32),
            query_segments=fill(text.query_segments, real, 0, 3),
            prefix_index=fill(text.prefix_index, text.prefix_segments > 0, 0, places),
        ),
        target_index=fill(batch.target_index, used, 0, places),
        target_ids=fill(batch.target_ids, used, 5, 200),
        token_index=fill(batch.token_index, there, 0, used.size),
        old_log_probs=fill(batch.old_log_probs, there, -9, 0),
        advantages=fill(batch.advantages, there_rows, 1, 9),
        fresh=np.ones(NUM_ROWS + 1, bool),
    )
    (clean_state, clean), (noisy_state, dirty) = tiny.step(batch), tiny.step(noisy)
    assert clean == pytest.approx(dirty, rel=1e-5, abs=1e-7)
    assert_near(first_moment(noisy_state), first_moment(clean_state), 1e-5)


# --- what must not happen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["old_log_probs", "advantage"])
def test_a_row_that_is_not_finite_skips_the_update(tiny, where):
    """Parameters and optimizer stay bit for bit; the skip is counted; the next update works. Catches one bad row that
    ruins the weights for good, moments that are already NaN when the next update comes, and a silent skip."""
    good = tiny.own(make_rows(tiny))
    spoilt = np.where(np.arange(len(good[1].completion_ids)) == 2, np.nan, good[1].old_log_probs).astype(np.float32)
    bad = {"old_log_probs": spoilt} if where == "old_log_probs" else {"advantage": float("nan")}
    rows = [good[0], dataclasses.replace(good[1], **bad), good[2]]

    before = tiny.state()
    kept = jax.tree.map(np.array, (before.params, before.opt_state))
    state, metrics = tiny.updater.step(before, [tiny.pack(rows)])
    assert float(metrics["skipped_update"]) == 1
    assert (int(state.num_updates), int(state.num_skipped)) == (1, 1)
    assert_same((state.params, state.opt_state), kept)

    state, metrics = tiny.updater.step(state, [tiny.pack(good)])
    assert float(metrics["skipped_update"]) == 0
    assert (int(state.num_updates), int(state.num_skipped)) == (2, 1)
    assert_same(state.params, tiny.step(tiny.pack(good))[0].params)


def test_what_is_not_finite_behind_the_mask_is_not_seen(tiny):
    """0 · NaN is NaN: a trigger's log-probs, which nothing is learned from, must not skip the update."""
    rows = tiny.own(make_rows(tiny))
    hidden = np.where(rows[0].loss_mask, rows[0].old_log_probs, np.nan).astype(np.float32)
    state, metrics = tiny.step(tiny.pack([dataclasses.replace(rows[0], old_log_probs=hidden), *rows[1:]]))
    assert metrics["skipped_update"] == 0
    assert_same(state.params, tiny.step(tiny.pack(rows))[0].params)


def test_the_step_is_compiled_once(tiny, caplog):
    """Catches a state that comes back placed, or typed, otherwise than it went in: every run would compile twice."""
    state = tiny.state()
    compiled = []
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        for seed in range(3):
            caplog.clear()
            state, _ = tiny.updater.step(state, [tiny.pack(make_rows(tiny, 2 + seed % 2, seed))])
            compiled.append(sum("Compiling jit(" in record.getMessage() for record in caplog.records))
        caplog.clear()
        jax.jit(lambda x: x + 1)(1)
        control = sum("Compiling jit(" in record.getMessage() for record in caplog.records)
    assert control > 0  # else nothing was counted
    assert compiled[1:] == [0, 0]


# --- micro-batches and chunks --------------------------------------------------------------------------------------


def test_micro_batches_are_the_whole_batch(tiny):
    """1 x 4 rows against 2 x 2. The second holds one row, shorter and without an image. Catches means inside
    micro-batches, micro-batches of unequal shapes, which cannot be stacked, and counts of one micro-batch."""
    rows = shifted(tiny.own(make_rows(tiny)))
    rows = [rows[0], rows[2], rows[1]]
    whole_state, whole = tiny.step(tiny.pack(rows))
    halves = pack_micro_batches(rows, tiny.system.geometry, LENGTH, NUM_ROWS, 100).batches
    assert len(halves) == 2
    split_state, split = tiny.step(*halves)
    assert split == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert_near(first_moment(split_state), first_moment(whole_state), 1e-4)


def test_micro_batches_have_one_shape(tiny):
    """Images that are wider in one micro-batch than in the other widen both, and still lie where their tokens look for
    them; a micro-batch without images has room for some, and without a row at all there is one batch."""
    rows = make_rows(tiny)
    wide = tiny.system.builder.build(Problem("wide", "<image>?", "2", (png(252, 168, 4),)))
    words = tiny.system.builder.build(Problem("long", "What is 2 + 3? " * 6, "5"))
    none = dataclasses.replace(rows[1], prompt=words)
    mixed = [rows[0], dataclasses.replace(rows[1], prompt=wide), rows[2], none]
    packed = pack_micro_batches(mixed, tiny.system.geometry, LENGTH, 5, 1)
    assert sorted(packed.rows) == [(0, 2), (1,), (3,)]  # a micro-batch has room for the longest row
    chunks = [packed.batches[packed.rows.index(numbers)] for numbers in ((0, 2), (1,), (3,))]
    assert len({str([leaf.shape for leaf in jax.tree.leaves(chunk)]) for chunk in chunks}) == 1
    visions = [chunk.vision for chunk in chunks if chunk.vision is not None]
    # Segments count the images of a vision row from 1; 0 is padding.
    seen = [len({(r, s) for r, row in enumerate(vision.segment) for s in row if s}) for vision in visions]
    assert seen == [3, 1, 0]
    # The first patch of every image token is its own, in row-major order of the picture.
    unit = tiny.system.geometry.unit_patches
    index = chunks[1].text.image_index[chunks[1].text.image_index >= 0]
    patches = visions[1].patches.reshape(-1, unit, visions[1].patches.shape[-1])
    np.testing.assert_array_equal(patches[index, 0], wide.images[0].patches[::unit])
    texts = pack_micro_batches([rows[1], none], tiny.system.geometry, LENGTH, 2, 1).batches
    assert [chunk.vision for chunk in texts] == [None, None]
    [nothing] = pack_micro_batches([], tiny.system.geometry, LENGTH, 2, 1).batches
    assert not nothing.completion_mask.any() and not nothing.text.segments.any()
    with pytest.raises(ValueError, match="at most 2 rows, got 3"):
        pack_rows(rows, tiny.system.geometry, LENGTH, 2)


@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 7])
def test_chunks_of_logits_change_nothing(tiny, monkeypatch, tokens_per_chunk):
    """14 tokens: 14 x 1, 5 x 3 with one of padding, 2 x 7. Values by numpy in float64. Catches padding that stays in,
    chunks in another order, and gradients that the recomputation loses."""
    model, params = tiny.system.model, tiny.system.params
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 7, model.config.d_model)).astype(np.float32))
    targets = jnp.asarray(rng.integers(0, model.config.vocab, (2, 7)).astype(np.int32))

    def run():
        def loss(embedding, hidden):
            text = params["text"] | {"embedding": embedding}
            found = token_log_probs(model, params | {"text": text}, hidden, targets)
            return jnp.sum(found[0] * jnp.arange(14).reshape(2, 7)) + found[1].sum(), found

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params["text"]["embedding"], hidden)

    (_, (log_probs, entropy)), gradients = run()
    logits = np.asarray(model.logits(params, hidden), np.float64)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        log_probs, np.take_along_axis(wanted, np.asarray(targets)[..., None], -1)[..., 0], rtol=1e-5
    )
    np.testing.assert_allclose(entropy, -(np.exp(wanted) * wanted).sum(-1), rtol=1e-5)

    monkeypatch.setattr(log_probs_module, "CHUNK_BYTES", tokens_per_chunk * model.config.vocab * 4)
    (_, chunked), chunked_gradients = run()
    assert_near(chunked, (log_probs, entropy), 1e-6)
    assert_near(chunked_gradients, gradients, 1e-5)


# --- the learning rate ---------------------------------------------------------------------------------------------


def test_learning_rates():
    """Catches a first update at rate 0, which wastes a batch, warm-up counted twice in the cosine, a rate that ends at
    0 instead of its final fraction, and one that stays 0 for good where there is no warm-up."""
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=4)
    rate = learning_rate_schedule(config, 8)
    np.testing.assert_allclose([rate(step) for step in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])
    config = dataclasses.replace(config, schedule="cosine", final_fraction=0.5)
    rate = learning_rate_schedule(config, 8)
    # The sixth update (step 5) is half way from the fourth to the eighth: half way between 1 and 1/2.
    np.testing.assert_allclose([rate(step) for step in (0, 1, 3, 5, 7, 99)], [0.25, 0.5, 1, 0.75, 0.5, 0.5], rtol=1e-6)
    assert learning_rate_schedule(dataclasses.replace(config, schedule="constant", warmup_steps=0), 8)(0) == 1
    # Without warm-up the first of eight cosine steps is behind: 1/2 + 1/4 (1 + cos(π/8)).
    at_once = learning_rate_schedule(dataclasses.replace(config, warmup_steps=0), 8)(0)
    np.testing.assert_allclose(at_once, 0.5 + 0.25 * (1 + np.cos(np.pi / 8)), rtol=1e-6)


def test_the_shapes_for_a_restore_are_those_of_a_new_state(tiny):
    """Catches a restore into other places or types than the step was compiled for, which would compile it anew."""
    state, shapes = tiny.state(), tiny.updater.shapes(tiny.system.params)
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
