"""The optimizer by itself: rates of parts, clipping, moments in other dtypes and in host memory, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax.config import OptimizerConfig
from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.offload import host_shardings, leaf_by_leaf
from rethinker_jax.training.optimizer import learning_rate_schedule, make_optimizer
from rethinker_jax.training.update import TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")
PLAIN = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_steps=0, clip_norm=1e9)
ALL_MOMENTS = ("float32", "mu_bfloat16", "bfloat16")


def make_params():
    """One leaf of each part, as the model's tree names them."""
    return {
        "vision": {"blocks": {"w": jnp.array([2.0, -1.0])}, "merger": {"w": jnp.array([4.0])}},
        "text": {"layers": {"w": jnp.array([[1.0, -3.0]])}},
        "lora": {"text": {"a": jnp.array([0.5])}},
    }


def parts_of(tree):
    return {
        "vision": np.asarray(tree["vision"]["blocks"]["w"]),
        "merger": np.asarray(tree["vision"]["merger"]["w"]),
        "decoder": np.asarray(tree["text"]["layers"]["w"]),
        "adapters": np.asarray(tree["lora"]["text"]["a"]),
    }


def gradients(step):
    """Positive ones of many sizes, other ones at every step; NaN at step NaN."""
    return jax.tree.map(lambda leaf: jnp.abs(jnp.sin(leaf * (step + 1.0))) + 0.01, make_params())


def whole():
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), "fsdp"), PartitionSpec())


def state_places(optimizer, params, offload):
    return optax.tree.map_params(
        optimizer,
        lambda _: host_shardings(whole()) if offload else whole(),
        jax.eval_shape(optimizer.init, params),
        transform_non_params=lambda _: whole(),
    )


def run(config, num_steps=3, finite=(True,) * 9):
    """(parameters, state, updates of the last step) after some jitted steps; gradients are NaN where not `finite`."""
    optimizer = make_optimizer(config, 10)
    params = jax.device_put(make_params(), whole())
    places = state_places(optimizer, params, config.offload)
    state = jax.jit(optimizer.init, out_shardings=places)(params)

    def step(params, state, grads, finite):
        updates, state = optimizer.update(grads, state, params, finite=finite)
        return optax.apply_updates(params, updates), state, updates

    jitted = jax.jit(step, donate_argnums=1, out_shardings=(whole(), places, whole()))
    updates = None
    for number in range(num_steps):
        grads = gradients(number if finite[number] else np.nan)
        # Where one argument has no place, jax 0.10 gives donated host memory to results of the device, and crashes.
        params, state, updates = jitted(params, state, *jax.device_put((grads, finite[number]), whole()))
    return params, state, updates


def moments(state):
    return {name: jax.tree.leaves(optax.tree.get(state, name)) for name in ("mu", "nu")}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# --- rates and clipping --------------------------------------------------------------------------------------------


def test_a_part_has_its_own_rate_and_weight_decay_with_it():
    """Adam's first update is the gradient's sign, so a parameter p moves by -0.5 · multiplier · (±1 + 0.1 p). Catches
    gradients that are multiplied (Adam would not feel it), decay that is left unscaled, a merger taken for vision, and
    adapters taken for the decoder."""
    rates = {"vision": 0.1, "merger": 3.0, "adapters": 10.0}
    optimizer = make_optimizer(dataclasses.replace(PLAIN, rates=rates, weight_decay=0.1), 10)
    params = make_params()
    grads = jax.tree.map(lambda leaf: -7.0 * leaf, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    wanted = {
        "vision": [-0.5 * 0.1 * (-1 + 0.2), -0.5 * 0.1 * (1 - 0.1)],
        "merger": [-0.5 * 3 * (-1 + 0.4)],
        "decoder": [[-0.5 * (-1 + 0.1), -0.5 * (1 - 0.3)]],
        "adapters": [-0.5 * 10 * (-1 + 0.05)],
    }
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for part, update in parts_of(updates).items():
        np.testing.assert_allclose(update, wanted[part], rtol=1e-5, err_msg=part)


def test_the_norm_is_that_of_all_parts_together():
    """Gradients 3 and 4 have norm 5 and become 0.6 and 0.8, whatever the rates; mu is a tenth of that. Clipped part by
    part they would both become 1, and behind the rates 0.55 and 0.07."""
    config = dataclasses.replace(PLAIN, clip_norm=1.0, rates={"vision": 10.0, "decoder": 0.1})
    optimizer = make_optimizer(config, 10)
    params = {"vision": {"blocks": {"w": jnp.zeros(1)}}, "text": {"w": jnp.zeros(1)}}
    grads = {"vision": {"blocks": {"w": jnp.full(1, 3.0)}}, "text": {"w": jnp.full(1, 4.0)}}
    mu = optax.tree.get(optimizer.update(grads, optimizer.init(params), params)[1], "mu")
    np.testing.assert_allclose([mu["vision"]["blocks"]["w"][0], mu["text"]["w"][0]], [0.06, 0.08], rtol=1e-6)


def test_it_is_the_adamw_of_optax():
    """Three steps agree with optax's own AdamW behind its own clipping, state tree included: a checkpoint of either is
    one of the other. Catches decay before Adam, a rate that is one step late, a state that grows with the rates."""
    config = dataclasses.replace(PLAIN, learning_rate=0.1, warmup_steps=2, weight_decay=0.1, clip_norm=0.5, b2=0.99)
    rate = learning_rate_schedule(config, 10)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=0.1))
    params = make_params()
    state = theirs.init(params)
    for number in range(3):
        updates, state = theirs.update(gradients(number), state, params)
        params = optax.apply_updates(params, updates)
    found, found_state, _ = run(config)
    for ours, wanted in zip(jax.tree.leaves((found, found_state)), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    for changed in ({"rates": {"vision": 0.1}}, {"moments": "bfloat16"}, {"offload": True}, {"schedule": "linear"}):
        other = make_optimizer(dataclasses.replace(config, **changed), 10)
        assert jax.tree.structure(jax.eval_shape(other.init, params)) == jax.tree.structure(state)


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(offload):
    """Catches NaN that reaches a moment or a parameter, and a step that counts for bias correction and schedule."""
    config = dataclasses.replace(PLAIN, schedule="linear", offload=offload, weight_decay=0.1)
    params, state, _ = run(config, 2)
    same_params, same_state, updates = run(config, 3, (True, True, False))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert_same((params, state), (same_params, same_state))


# --- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kept", ALL_MOMENTS)
def test_moments_are_kept_as_told_and_computed_in_float32(kept, offload):
    """The second step, worked out in float64 from the moments that lie in the state after the first. Catches the other
    dtype, and products that are rounded to bfloat16: b1 would be 0.8984 there and b2 1.0, which is 1e-3 and more."""
    config = dataclasses.replace(PLAIN, moments=kept, b2=0.999, offload=offload)
    _, state, first = run(config, 1)
    _, _, second = run(config, 2)
    dtypes = {name: {str(leaf.dtype) for leaf in leaves} for name, leaves in moments(state).items()}
    mu_dtype, nu_dtype = ("float32", "bfloat16")[kept != "float32"], ("float32", "bfloat16")[kept == "bfloat16"]
    assert dtypes == {"mu": {mu_dtype}, "nu": {nu_dtype}}
    for update, mu, nu, grad in zip(
        jax.tree.leaves(second), *moments(state).values(), jax.tree.leaves(gradients(1)), strict=True
    ):
        mu, nu, grad = (np.asarray(leaf, np.float64) for leaf in (mu, nu, grad))
        mean = (0.9 * mu + 0.1 * grad) / (1 - 0.9**2)
        square = (0.999 * nu + 0.001 * grad**2) / (1 - 0.999**2)
        np.testing.assert_allclose(update, -0.5 * mean / (np.sqrt(square) + 1e-8), rtol=1e-4)
    for update in jax.tree.leaves(first):  # no moment was rounded yet: the sign of the gradient
        np.testing.assert_allclose(update, -0.5, rtol=1e-4)


@pytest.mark.parametrize("kept", ["mu_bfloat16", "bfloat16"])
def test_rounding_costs_what_it_may_and_no_more(kept):
    """Of positive gradients, a moment after t steps has been rounded t - 1 times by at most u = 2^-8 when it is used,
    so mu is off by a factor of at most (1 + u)^(t-1) and the root of nu by (1 - u)^-((t-1)/2): 1.8 % at t = 4. No
    difference at all would be moments that are float32 in disguise."""
    u, steps = 2.0**-8, 4
    bound = (1 + u) ** (steps - 1) * (1 - u) ** (-(steps - 1) / 2) - 1
    exact, rounded = (run(dataclasses.replace(PLAIN, moments=name), steps)[2] for name in ("float32", kept))
    # Gradients depend on the step alone, so the updates of the fourth step are of the same four gradients.
    off = [np.abs(b / a - 1).max() for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True)]
    assert 1e-5 < max(off) <= bound


def test_with_slow_decay_the_second_moment_falls_only_in_float32():
    """One gradient of 1, then 300 of 0, b2 = 0.999: nu falls from 0.001 by 0.999^300 = 0.74. In bfloat16 each fall by
    0.1 % is rounded away and nu stays: what mu_bfloat16 is there for."""

    def last_nu(kept):
        optimizer = make_optimizer(dataclasses.replace(PLAIN, moments=kept, b2=0.999), 10)
        params = {"text": {"w": jnp.zeros(1)}}

        def step(state, grad):
            return optimizer.update({"text": {"w": grad}}, state, params)[1], None

        grads = jnp.zeros((301, 1)).at[0].set(1.0)
        state, _ = jax.jit(lambda: jax.lax.scan(step, optimizer.init(params), grads))()
        return float(optax.tree.get(state, "nu")["text"]["w"][0])

    np.testing.assert_allclose(last_nu("mu_bfloat16"), 0.001 * 0.999**300, rtol=1e-3)
    np.testing.assert_allclose(last_nu("bfloat16"), 0.001, rtol=2.0**-8)


# --- host memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ALL_MOMENTS)
def test_moments_on_the_host_change_no_more_than_rounding(kept):
    """Five steps, the third not finite, with and without. Fused otherwise, a float32 may differ in its last bit, and
    then a bfloat16 in its own, by 2^-7. Catches a moment of the wrong leaf, a skipped step that still moves what is on
    the host, and a state that stays on the device."""
    config = dataclasses.replace(PLAIN, moments=kept, clip_norm=1.0, weight_decay=0.1, rates={"merger": 2.0})
    finite = (True, True, False, True, True)
    here = run(config, 5, finite)
    there = run(dataclasses.replace(config, offload=True), 5, finite)
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.float32(one), np.float32(other), rtol=1e-5 if kept == "float32" else 2.0**-7, atol=1e-7
        )
    for state, kind in ((here[1], "device"), (there[1], "pinned_host")):
        for leaf in jax.tree.leaves(moments(state)):
            assert leaf.sharding.memory_kind == kind


@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_gives_the_moments_back(tmp_path, offload):
    """Through orbax into the shapes of a fresh state: catches moments that come back as float32 or on the device."""
    config = dataclasses.replace(PLAIN, moments="bfloat16", offload=offload)
    params, opt_state, _ = run(config, 2)
    optimizer = make_optimizer(config, 10)
    zero = jax.device_put(np.zeros((), np.int32), whole())
    state = TrainState(params=params, opt_state=opt_state, num_updates=zero, num_skipped=zero, average={})
    store = CheckpointStore(tmp_path, 1)
    store.save(1, Saved(state, {}, {}))
    store.wait()
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        state_places(optimizer, params, offload),
    )
    found = store.restore(dataclasses.replace(state, opt_state=like), whole().mesh).state
    store.close()
    assert_same(found.opt_state, opt_state)
    for leaf, old in zip(jax.tree.leaves(found.opt_state), jax.tree.leaves(opt_state), strict=True):
        assert leaf.sharding.memory_kind == old.sharding.memory_kind


def test_a_leaf_is_fetched_when_the_one_before_it_is_back():
    """What the fetch of each leaf waits for, followed through the traced program. Without this order the compiler holds
    all leaves on the device at once, and no result would show it."""
    parked = [jax.device_put(np.full(3, number, np.float32), host_shardings(whole())) for number in range(3)]

    def step(leaves, parked, after):
        return leaf_by_leaf(lambda leaf, old: (leaf + old, old * leaf), leaves, parked, after)

    jaxpr = jax.make_jaxpr(step)([np.ones(3, np.float32)] * 3, parked, np.float32(0)).jaxpr
    needs = {var: {place} for place, var in enumerate(jaxpr.invars)}
    fetched = []
    for equation in jaxpr.eqns:
        found = set().union(*(needs.get(var, set()) for var in equation.invars if not hasattr(var, "val")))
        needs |= dict.fromkeys(equation.outvars, found)
        if equation.primitive.name == "device_put" and equation.outvars[0].aval.memory_space == jax.memory.Space.Device:
            fetched.append(found)
    # Inputs: 0-2 leaves, 3-5 what is parked, 6 what the first waits for.
    assert fetched == [{3, 6}, {3, 6, 0, 4}, {3, 6, 0, 4, 1, 5}]


def test_host_shardings_keep_their_cuts():
    here = {"w": NamedSharding(whole().mesh, PartitionSpec(None, "fsdp")), "b": whole()}
    there = host_shardings(here)
    assert {name: (one.spec, one.memory_kind) for name, one in there.items()} == {
        "w": (PartitionSpec(None, "fsdp"), "pinned_host"),
        "b": (PartitionSpec(), "pinned_host"),
    }


# --- the learning rate ---------------------------------------------------------------------------------------------


def test_linear_schedule_and_warmup_fraction():
    """Rates of the 1st, 2nd, ... of 10 updates. Catches a line that is as long as all updates and begins at the end of
    the warm-up (it would end above its final fraction), and a fraction beside which warmup_steps still counts."""
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2, final_fraction=0.2)
    rate = learning_rate_schedule(config, 10)
    # Two steps up, then 0.8 down in eight steps.
    wanted = [0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]
    np.testing.assert_allclose([rate(step) for step in range(11)], wanted, rtol=1e-5)

    without = learning_rate_schedule(dataclasses.replace(config, warmup_steps=0), 8)
    np.testing.assert_allclose([without(0), without(7)], [0.9, 0.2], rtol=1e-5)

    fraction = learning_rate_schedule(dataclasses.replace(config, warmup_steps=7, warmup_fraction=0.2), 10)
    np.testing.assert_allclose([fraction(step) for step in range(11)], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("fraction", "num_updates", "peak"),
    [
        (0.1, 45, 5),  # 4.5 is rounded up
        (0.07, 100, 7),  # 7.000000000000001 is not
        (1.0, 4, 4),
    ],
)
def test_the_peak_is_at_the_end_of_the_warmup_fraction(fraction, num_updates, peak):
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=fraction, final_fraction=0.0)
    rate = learning_rate_schedule(config, num_updates)
    rates = np.array([rate(step) for step in range(num_updates)], np.float32)
    np.testing.assert_allclose(rates[peak - 1], 1.0, rtol=1e-6)
    assert all(rate < 0.9999 for place, rate in enumerate(rates) if place != peak - 1)


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer.rates.visoin=0.1", "'adapters', came 'visoin'; did you mean vision?"),
        ("optimizer.rates={vision: 0}", "optimizer.rates.vision: wanted greater than 0, came 0"),
        ("optimizer.rates={lora: 2}", "came 'lora'"),
        ("optimizer.rates=0.1", "optimizer.rates: wanted names with values"),
        ("optimizer.moments=bf16", "'float32', 'mu_bfloat16' or 'bfloat16', came 'bf16'"),
        ("optimizer.schedule=lin", "'cosine', 'linear' or 'constant', came 'lin'; did you mean linear?"),
        ("optimizer.offload=1", "optimizer.offload: wanted true or false, came 1"),
        ("optimizer.warmup_fraction=1.5", "optimizer.warmup_fraction: wanted less than or equal to 1, came 1.5"),
    ],
)
def test_wrong_keys_are_refused_with_one_message(override, part):
    with pytest.raises(UserError) as error:
        load_defaults([override])
    assert str(error.value).startswith("1 problem") and part in str(error.value)


def test_rates_can_be_set_one_by_one():
    config = load_defaults(["optimizer.rates.vision=0.1", "optimizer.rates.merger=2"])
    assert dict(config.optimizer.rates) == {"vision": 0.1, "merger": 2.0}
