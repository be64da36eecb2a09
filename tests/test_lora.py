"""Low-rank adapters: what they compute, what they leave alone, and that sampler, export and resume agree."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_freezing import VISION, directory, make_tiny
from test_update import (
    LOSS,
    OPTIMIZER,
    assert_near,
    assert_same,
    first_moment,
    leaves,
    make_rows,
    png,
)

from rethinker_jax.config import Config, LoraConfig, MeshConfig, ModelConfig, RunConfig, SftConfig
from rethinker_jax.console import parameter_line
from rethinker_jax.errors import UserError
from rethinker_jax.export import export
from rethinker_jax.models.lora import adapt_params, adapter_layout, merge_adapters
from rethinker_jax.models.parts import count_parameters, split_params
from rethinker_jax.models.precision import cast_params
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import TRAINING_RULES, make_mesh, param_shardings
from rethinker_jax.sft import fine_tune
from rethinker_jax.system import EXAMPLE_MODEL, load_system, make_updater
from rethinker_jax.training.batch import pack_rows
from rethinker_jax.training.checkpoint import CheckpointStore
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.types import Problem

__all__ = ["directory"]
pytestmark = pytest.mark.usefixtures("quick_compilation")

RANK, ALPHA = 4, 6.0
LORA = LoraConfig(rank=RANK, alpha=ALPHA)
# Inputs + outputs of the seven kernels, times layers: the shape is worked out in test_freezing.py.
DECODER = 3 * RANK * (2 * (96 + 96) + 2 * (96 + 48) + 3 * (96 + 256))
TOWER = 2 * RANK * (4 * (48 + 48) + 3 * (48 + 128))
MERGER = RANK * ((192 + 192) + (192 + 96))
# Kernel + product, written out for every kind of kernel: behind `layers`, and the merger's without.
SUMS = {
    "query": "ldr,lrnh->ldnh", "key": "ldr,lrnh->ldnh", "value": "ldr,lrnh->ldnh", "output": "lnhr,lrd->lnhd",
    "gate": "ldr,lrf->ldf", "up": "ldr,lrf->ldf", "down": "lfr,lrd->lfd",
}  # fmt: skip


def kernel_paths(adapters):
    """(path of a kernel, its equation) of every adapter."""
    found = []
    for path, _ in jax.tree_util.tree_leaves_with_path(adapters):
        keys = tuple(entry.key for entry in path)
        if keys[-1] == "a":
            equation = SUMS[keys[-3] if keys[-2] == "kernel" else keys[-2]]
            found.append((keys[:-1], equation if "merger" not in keys else equation.replace("l", "")))
    return found


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def with_random_b(params, seed=5):
    """The same parameters with every B away from zero, as training makes them."""
    rng = np.random.default_rng(seed)

    def moved(path, leaf):
        return jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32) if path[-1].key == "b" else leaf

    return params | {"lora": jax.tree_util.tree_map_with_path(moved, params["lora"])}


@pytest.fixture(scope="module")
def tiny(directory, quick_compilation):
    """Adapters on every kernel of all three parts, B not zero."""
    tiny = make_tiny(directory, lora=LORA)
    system = dataclasses.replace(tiny.system, params=with_random_b(tiny.system.params))
    config = dataclasses.replace(tiny.config, optimizer=dataclasses.replace(OPTIMIZER, clip_norm=1e9))
    return dataclasses.replace(tiny, config=config, system=system, updater=make_updater(config, system, 100, LOSS))


# --- which parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "freeze, targets, adapters",
    [
        ((), (), DECODER + TOWER + MERGER),
        (("vision", "merger"), (), DECODER),
        (("decoder", "merger"), (), TOWER),
        (("vision", "decoder"), (), MERGER),
        (("vision", "merger"), ("query", "value"), 3 * RANK * ((96 + 96) + (96 + 48))),
        ((), ("output",), 3 * RANK * (96 + 96) + 2 * RANK * (48 + 48)),
    ],
)
def test_adapters_are_counted_by_hand(directory, freeze, targets, adapters):
    """Catches adapters in frozen parts, biases or embeddings that are taken for kernels, and inputs cut from outputs at
    a wrong axis. Parts that are not frozen do not train beside their adapters."""
    lora = dataclasses.replace(LORA, targets=targets)
    config = Config(model=ModelConfig(path=str(directory), init="random", freeze=freeze, lora=lora))
    found = count_parameters(load_system(config).params, freeze)
    assert found["adapters"] == found["trained"] == adapters
    assert (found["vision"], found["total"]) == (VISION, 516_944 + adapters)


def test_adapters_lie_as_their_kernels_do(directory):
    """The rank is never cut, and everything else as in the kernel. Catches adapters that lie whole on every device."""
    dims, shapes = adapter_layout(read_config(directory), RANK, (), ())
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1))
    layers = param_shardings(dims, shapes, mesh, TRAINING_RULES)["text"]["layers"]
    found = {
        name: [list(at(layers, path)[key].spec) for key in ("a", "b")]
        for name, path in {
            "query": ("attention", "query", "kernel"),
            "output": ("attention", "output"),
            "down": ("mlp", "down", "kernel"),
        }.items()
    }
    assert found == {
        "query": [[None, "fsdp", None], [None, None, "tensor", None]],
        "output": [[None, "tensor", None, None], [None, None, "fsdp"]],
        "down": [[None, "tensor", None], [None, None, "fsdp"]],
    }


# --- what they compute ---------------------------------------------------------------------------------------------


def test_the_first_step_is_that_of_the_base_model(directory, tiny):
    """B is zero: equal log-probs and equal sampling weights, bit for bit. Catches a B that is not, and a kernel that
    its adapter replaces. With B away from zero they differ, else nothing was compared."""
    fresh, base = make_tiny(directory, lora=LORA), make_tiny(directory)
    batch = base.pack(make_rows(base))
    wanted = np.asarray(base.updater.log_probs(base.system.params, batch))
    np.testing.assert_array_equal(fresh.updater.log_probs(fresh.system.params, batch), wanted)
    assert np.abs(fresh.updater.log_probs(tiny.system.params, batch) - wanted).max() > 1e-2
    sampling = [one.system.sampling_params(one.system.params) for one in (fresh, base)]
    assert_same(*sampling)


def test_merged_kernels_are_the_sums(tiny):
    """Every adapted kernel by an equation of its own, in float64; all else is the base. Catches a scale of alpha or
    1 / rank alone, axes that are swapped, and a kernel without its product."""
    params, merged = tiny.system.params, leaves(tiny.system.merged_params(tiny.system.params))
    wanted = leaves({key: params[key] for key in ("text", "vision")})
    paths = kernel_paths(params["lora"])
    assert len(paths) == 7 + 7 + 2
    for path, equation in paths:
        a, b = (np.asarray(at(params["lora"], path)[key], np.float64) for key in ("a", "b"))
        name = "".join(f"['{key}']" for key in path)
        wanted[name] = wanted[name] + ALPHA / RANK * np.einsum(equation, a, b)
        assert np.abs(merged[name] - np.asarray(at(params, path))).max() > 1e-2
    assert_near(merged, wanted, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_and_trainer_read_the_same_kernels(directory, dtype):
    """Bit for bit the export's, cast, in bfloat16 too. Catches a cast before the sum, which loses what is small beside
    its kernel: the sampler would draw from another policy than the one that is trained."""
    tiny = make_tiny(directory, lora=LORA, dtype=dtype)
    params = with_random_b(tiny.system.params)
    exported = cast_params(tiny.system.merged_params(params), tiny.system.dtype)
    assert_same(merge_adapters(adapt_params(params, tiny.system.dtype)), exported)
    sampler = tiny.system.sampling_params(params)
    for layer in range(3):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], exported["text"]["layers"])
        assert_same(sampler["text"]["layers"][layer], own)
    assert_same(sampler["vision"], exported["vision"])


def test_gradients_follow_from_those_of_the_merged_kernels(directory, tiny):
    """dA = s · dW · Bᵀ and dB = s · Aᵀ · dW, with dW of the merged model, trained in full: by Adam's first moments, of
    gradients that are not clipped. Catches a scale that the gradient lacks, and a sum of which the backward pass sees
    one part."""
    params, batch = tiny.system.params, tiny.pack(make_rows(tiny))
    merged = dataclasses.replace(tiny.system, params=tiny.system.merged_params(params))
    plain = dataclasses.replace(tiny.config, model=dataclasses.replace(tiny.config.model, lora=LoraConfig()))
    full = dataclasses.replace(tiny, system=merged, updater=make_updater(plain, merged, 100, LOSS))
    (ours, metrics), (theirs, full_metrics) = tiny.step(batch), full.step(batch)
    assert metrics["loss"] == pytest.approx(full_metrics["loss"], rel=1e-5)
    found, of_kernels = first_moment(ours)["lora"], first_moment(theirs)
    for path, equation in kernel_paths(params["lora"]):
        a, b, w = equation.replace("->", ",").split(",")
        adapter, gradient = at(params["lora"], path), np.asarray(at(of_kernels, path), np.float64)
        wanted = {
            "a": ALPHA / RANK * np.einsum(f"{w},{b}->{a}", gradient, np.asarray(adapter["b"], np.float64)),
            "b": ALPHA / RANK * np.einsum(f"{a},{w}->{b}", np.asarray(adapter["a"], np.float64), gradient),
        }
        assert_near({path: at(found, path)}, {path: wanted}, 1e-4)


def test_only_adapters_move(tiny):
    """Two updates with weight decay. Catches a base that decays, a scale that is trained, and moments of the base."""
    before = leaves(tiny.system.params)
    batch, state = tiny.pack(tiny.own(make_rows(tiny))), tiny.state()
    for _ in range(2):
        state, metrics = tiny.updater.step(state, [batch])
        assert metrics["skipped_update"] == 0
    for name, value in leaves(state.params).items():
        assert np.array_equal(value, before[name]) == (not name.endswith(("['a']", "['b']"))), name
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert held == 2 * (DECODER + TOWER + MERGER)
    assert leaves(split_params(state.params, ())[0]).keys() == leaves(optax.tree.get(state.opt_state, "mu")).keys()


# --- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quick_compilation):
    """The directory of a run of two steps on the example's weights."""
    return fine_tune(run_config(tmp_path_factory.mktemp("runs") / "straight", 2), "lora")


def run_config(run_dir: Path, num_steps: int) -> Config:
    return Config(
        run=RunConfig(dir=str(run_dir), compilation_cache=""),
        model=ModelConfig(freeze=("vision", "merger"), lora=LORA),
        optimizer=dataclasses.replace(OPTIMIZER, learning_rate=0.01),
        sft=SftConfig(data="example:sft-clean", num_steps=num_steps, batch_size=4, max_completion_tokens=24),
    )


def test_a_resumed_run_is_the_straight_one(straight, tmp_path, capsys):
    """Bit for bit; and both parts say what they train. Catches adapters or moments that begin anew, and a count of the
    base or of the merged model."""
    for num_steps in (1, 2):
        parted = fine_tune(run_config(tmp_path / "parted", num_steps), "lora")
        counts = json.loads((parted / "summary.json").read_text())["parameters"]
        assert (counts["adapters"], counts["trained"], counts["total"]) == (DECODER, DECODER, 516_944 + DECODER)
        assert parameter_line(counts) in capsys.readouterr().err
    found, wanted = (load_file(run / "model" / "model.safetensors") for run in (parted, straight))
    assert_same(found, wanted)
    base = load_file(EXAMPLE_MODEL / "model.safetensors")
    moved = {name for name in base if not np.array_equal(found[name], base[name])}
    assert moved == {name for name in base if name.startswith("model.layers.") and name.endswith("proj.weight")}


def test_an_export_computes_what_the_adapters_did(straight, tmp_path):
    """The run's newest checkpoint, with adapters, and what `export` wrote, which has none. Catches an export of the
    base alone, adapters under names that no reader knows, and a base that a run changed."""
    export(straight, tmp_path / "model")
    config = run_config(straight, 2)
    system = load_system(config)
    updater = make_updater(config, system, 2, LOSS)
    with contextlib.closing(CheckpointStore(straight / "checkpoints", keep=0)) as store:
        params = store.restore(updater.init(jax.tree.map(jnp.copy, system.params)), system.mesh).state.params
    base, stored = ({key: tree[key] for key in ("text", "vision")} for tree in (system.params, params))
    assert_same(stored, base)

    plain = dataclasses.replace(config, model=ModelConfig(path=str(tmp_path / "model")))
    exported = load_system(plain)
    problem = Problem("one", "<image> How many?", "1", (png(84, 84, 1),))
    ids, mask = np.arange(5, 15, dtype=np.int32), np.ones(10, bool)
    row = TrainRow(system.builder.build(problem), ids, mask, mask, np.zeros(10, np.float32))
    batch = pack_rows([row], system.geometry, 10, 1)
    wanted, before = (np.asarray(updater.log_probs(tree, batch)) for tree in (params, system.params))
    found = make_updater(plain, exported, 2, LOSS).log_probs(exported.params, batch)
    assert np.abs(wanted - before).max() > 1e-2
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_another_alpha_is_another_run(straight):
    """Catches a resume in which adapters weigh otherwise than they were trained to."""
    config = run_config(straight, 3)
    other = dataclasses.replace(config.model, lora=dataclasses.replace(LORA, alpha=7.0))
    with pytest.raises(UserError, match=r"another config: model\.lora.*alpha.*7\.0"):
        fine_tune(dataclasses.replace(config, model=other), "lora")
