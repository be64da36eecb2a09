"""`plan`: names, shapes, the parser of collectives, the bound on speed, the search, the command's errors.

What needs libtpu is at the end and skipped where it is not installed.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sampling_cases
from published import SIZES, published_config

from rethinker_jax.config import Config, MeshConfig, RolloutConfig, SamplingConfig
from rethinker_jax.config_file import load_config, load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen_config import QwenConfig, parse_config
from rethinker_jax.models.sharding import Parts
from rethinker_jax.planning.auto_mesh import best_mesh, choose_mesh
from rethinker_jax.planning.hlo import array_bytes, find_collectives, first_group
from rethinker_jax.planning.layouts import fill_mesh, lay_out
from rethinker_jax.planning.machines import find_machine
from rethinker_jax.planning.named_models import find_model, published_names
from rethinker_jax.planning.roofline import link_bandwidth, link_seconds, make_roofline, mfu
from rethinker_jax.planning.sample import cache_needs, sample_work
from rethinker_jax.planning.search import Speeds, estimates, long_meshes, mesh_shapes
from rethinker_jax.planning.show import served
from rethinker_jax.planning.work import Longest, longest_of, update_work

REPOSITORY = Path(__file__).parent.parent
GIB = 2**30
WITHOUT_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


# --- names ---


@pytest.mark.parametrize(
    "name, wanted, devices",
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p-128", "v5p:4x4x4", 64),  # of v5p the cloud counts cores, two a chip
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-256", "v5e:16x16", 256),
        ("V6E-8", "v6e:2x4", 8),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),  # two devices a chip
        ("h100:8", "h100:1x8", 8),
        ("h200:2x8", "h200:2x8", 16),
    ],
)
def test_names_of_machines(name: str, wanted: str, devices: int) -> None:
    """Catches a v5p slice of twice the chips, and hosts of GPUs counted as GPUs."""
    machine = find_machine(name)
    assert (machine.name, machine.num_devices) == (wanted, devices)


@pytest.mark.parametrize(
    "name, said",
    [
        ("v9:2x2", "there is no v9"),
        ("v5q:2x2x1", "did you mean v5"),
        ("v5p:4x4", "v5p wants 3 sizes, above 0, came 4x4"),
        ("v5p:0x4x4", "above 0"),
        ("v5p-5", "v5p-8, v5p-16"),
        ("v6e-7", "v6e-4, v6e-8"),
        ("h100-8", "sizes as in h100:8"),
        ("nonsense", "wanted one of v5e:4x4"),
    ],
)
def test_names_that_are_none(name: str, said: str) -> None:
    """Catches a name that fails inside the compiler, and a message that does not say which there are."""
    with pytest.raises(UserError) as refused:
        find_machine(name)
    assert said in str(refused.value)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prefix", ["", "Qwen/", "models/"])
def test_published_models_are_known_by_name(size: str, prefix: str) -> None:
    """Catches sizes that differ from the published ones, and a hub's name that is not understood."""
    found = find_model(f"{prefix}Qwen2.5-VL-{size}-Instruct")
    assert found.config == parse_config(published_config(size))


def test_a_directory_needs_no_more_than_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config("3B")))
    assert find_model(str(tmp_path)).config == parse_config(published_config("3B"))
    with pytest.raises(UserError, match="neither"):
        find_model(str(tmp_path / "nowhere"))
    assert len(published_names()) == 4


def test_a_mesh_is_filled_or_refused() -> None:
    assert fill_mesh(MeshConfig(2, -1, 1, 4), 64) == MeshConfig(2, 8, 1, 4)
    with pytest.raises(UserError, match=r"data=3,fsdp=-1: .*64 devices"):
        fill_mesh(MeshConfig(3, -1), 64)


# --- shapes ---


def recipe(*overrides: str) -> Config:
    return load_config(REPOSITORY / "configs" / "vl_rethinker_7b.yaml", list(overrides))


def test_the_longest_that_the_recipe_allows() -> None:
    """2,048 tokens with 1,280 of an image, which as a picture is 32 x 40 merged tokens, 64 x 80 patches. Catches an
    image that does not fit its prompt, and a trigger that is forgotten."""
    config = recipe()
    model = find_model(config.model.path)
    longest = longest_of(config, model.config, model.max_pixels)
    assert (longest.prompt_tokens, longest.grid, longest.completion_tokens) == (2048, (64, 80), 2048)
    forced = recipe("rethink.rule=random", "rethink.max_first_tokens=1024", "rethink.max_new_tokens=1024")
    assert longest_of(forced, model.config, model.max_pixels).completion_tokens == 1024 + 16 + 1024
    # 100 tokens leave 92 for the image: 7 x 13 merged tokens are the most that a picture has.
    short = longest_of(recipe("data.max_prompt_tokens=100"), model.config, model.max_pixels)
    assert short.grid == (14, 26)


def test_an_update_is_packed_as_a_run_packs_it() -> None:
    """64 groups of 2,047 + 8 x 2,048 tokens: 1,179,584; over 8 shards of 32,768 that is 4.5, so 5 micro-batches.
    Catches patches that are not widened and rows that are lost."""
    config = recipe()
    model = find_model(config.model.path)
    work = update_work(config, model.config, longest_of(config, model.config, model.max_pixels), Parts(8, 8))
    assert work.packed.num_tokens >= 64 * (2047 + 8 * 2048)
    assert work.packed.num_targets == 512 * 2048
    assert work.batch.text.token_ids.shape[:2] == (5, 8)
    assert work.batch.vision is not None and work.batch.vision.patches.shape[-2:] == (64, 3 * 2 * 14 * 14)


# --- the text of compiled programs ---

# In the forms of a TPU program: a loop that counts to 4 by two, inside one of 28 turns, and one that counts to nothing.
TPU_TEXT = """\
HloModule jit_step, is_scheduled=true

%inner_body (p.1: (bf16[8,128], u32[])) -> (bf16[8,128], u32[]) {
  %constant.1 = u32[]{:T(128)} constant(2)
  %p.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %gte.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %gte.2 = bf16[8,128]{1,0} get-tuple-element(%p.1), index=0
  %cp-start = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%gte.2), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, metadata={op_name="jit(step)/while/body/dot_general"}
  %cp-done = bf16[8,128]{1,0} collective-permute-done(%cp-start)
  %add.1 = u32[]{:T(128)} add(%gte.1, %constant.1)
  ROOT %tuple.1 = (bf16[8,128]{1,0}, u32[]{:T(128)}) tuple(%cp-done, %add.1)
}

%inner_cond (p.2: (bf16[8,128], u32[])) -> pred[] {
  %constant.2 = u32[]{:T(128)} constant(4)
  %p.2 = (bf16[8,128]{1,0}, u32[]{:T(128)}) parameter(0)
  %gte.3 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%gte.3, %constant.2), direction=LT
}

%outer_body (p.3: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.3 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %gte.4 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %gte.5 = bf16[8,128]{1,0} get-tuple-element(%p.3), index=1
  %constant.3 = s32[]{:T(128)} constant(1)
  %constant.4 = u32[]{:T(128)} constant(0)
  %tuple.2 = (bf16[8,128]{1,0}, u32[]{:T(128)}) tuple(%gte.5, %constant.4)
  %while.1 = (bf16[8,128]{1,0}, u32[]{:T(128)}) while(%tuple.2), condition=%inner_cond, body=%inner_body
  %gte.6 = bf16[8,128]{1,0} get-tuple-element(%while.1), index=0
  %all-reduce.1 = bf16[8,128]{1,0} all-reduce(%gte.6), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%sum, metadata={op_name="jit(step)/transpose(jvp())/while/body/BSNH,NHD->BSD/dot_general"}
  %add.2 = s32[]{:T(128)} add(%gte.4, %constant.3)
  ROOT %tuple.3 = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%add.2, %all-reduce.1)
}

%outer_cond (p.4: (s32[], bf16[8,128])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(28)
  %p.4 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %gte.7 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.7, %constant.5), direction=LT
}

%open_body (p.5: (s32[], s32[])) -> (s32[], s32[]) {
  %p.5 = (s32[], s32[]) parameter(0)
  %gte.8 = s32[] get-tuple-element(%p.5), index=0
  %gte.9 = s32[] get-tuple-element(%p.5), index=1
  %all-reduce.2 = s32[] all-reduce(%gte.8), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum
  ROOT %tuple.4 = (s32[], s32[]) tuple(%all-reduce.2, %gte.9)
}

%open_cond (p.6: (s32[], s32[])) -> pred[] {
  %p.6 = (s32[], s32[]) parameter(0)
  %gte.10 = s32[] get-tuple-element(%p.6), index=0
  %gte.11 = s32[] get-tuple-element(%p.6), index=1
  ROOT %lt.2 = pred[] compare(%gte.10, %gte.11), direction=LT
}

ENTRY %main (a: bf16[8,128], b: s32[]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %constant.6 = s32[] constant(0)
  %tuple.5 = (s32[], bf16[8,128]{1,0}) tuple(%constant.6, %a)
  %while.2 = (s32[], bf16[8,128]{1,0}) while(%tuple.5), condition=%outer_cond, body=%outer_body
  %tuple.6 = (s32[], s32[]) tuple(%constant.6, %b)
  %while.3 = (s32[], s32[]) while(%tuple.6), condition=%open_cond, body=%open_body
  %ag-start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %ag-done = bf16[32,128]{1,0} all-gather-done(%ag-start)
  ROOT %result = bf16[8,128]{1,0} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program() -> None:
    """An array is 8 x 128 x 2 = 2,048 bytes. Shift: 28 x 2 times 2,048. Sum over 2 devices: 28 times 2 x 2,048 / 2.
    Gather among 4: 8,192 x 3/4. The sum of one number, 7 times as told: 2 x 4 x 3/4. Catches a loop that is counted
    once, a step of two taken for one, the -done half counted again, and what goes in taken for what comes out."""
    found = {one.kind: one for one in find_collectives(TPU_TEXT, 8, turns=7) if one.loops != (None,)}
    shift, total, gather = (found[kind] for kind in ("collective-permute", "all-reduce", "all-gather"))
    assert (shift.loops, shift.count, shift.bytes, shift.group) == ((28, 2), 56, 2048, (0, 1, 2, 3))
    assert (total.loops, total.count, total.bytes, total.group) == ((28,), 28, 2048, (0, 4))
    assert (gather.loops, gather.count, gather.bytes, gather.group) == ((), 1, 6144, (0, 1, 2, 3))
    [told] = [one for one in find_collectives(TPU_TEXT, 8, turns=7) if one.loops == (None,)]
    assert (told.count, told.bytes, told.group) == (7, 6, (0, 2, 4, 6))
    assert served(total.name) == "backward BSNH,NHD->BSD/dot_general"


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("source_target_pairs={{0,2},{2,4},{4,0},{1,3}}", (0, 2, 4)),
    ],
)
def test_groups(words: str, wanted: tuple[int, ...]) -> None:
    """Every form in which XLA writes them. Catches rows taken for columns."""
    assert first_group(f"f32[8] all-reduce(%x), channel_id=1, {words}, use_global_device_ids=true", 8) == wanted


def test_bytes_of_shapes() -> None:
    assert array_bytes("(f32[2,3]{1,0}, bf16[4], pred[5], s32[], f8e4m3fn[6])") == [24, 8, 5, 4, 6]


# --- eight simulated devices ---


@pytest.fixture(scope="module")
def on_devices() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "tests/plan_devices.py"]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_known_collectives_are_found(on_devices: dict[str, Any]) -> None:
    """A device holds float32 [16, 8], 512 bytes. In 5 turns each: a sum over 2 (2 x 512 x 1/2); in 5 x 3: a gather of
    4 x 512 (x 3/4). Once: an exchange (512 x 3/4), a shift (512), a scattered sum (128 x 3). Catches loops that are not
    multiplied, and bytes that do not depend on the group."""
    wanted = {
        "all-reduce": (512, 5, 2),
        "all-gather": (1536, 15, 4),
        "all-to-all": (384, 1, 4),
        "collective-permute": (512, 1, 4),
        "reduce-scatter": (384, 1, 4),
    }
    assert {one["kind"]: (one["bytes"], one["count"], len(one["group"])) for one in on_devices["collectives"]} == wanted


def test_both_phases_of_a_small_run(on_devices: dict[str, Any]) -> None:
    """The example's float32 model on fsdp=4, tensor=2. Catches a training state that the sampler is not charged with, a
    phase without its collectives, and a JSON without the keys that scripts read."""
    update, sample, held = (on_devices["phases"][key] for key in ("update", "sample", "held"))
    for phase in (update, sample):
        assert phase["fits"] and 0 < phase["peak_bytes_per_device"] < phase["hbm_bytes_per_device"]
        assert sum(phase["bytes_per_device"].values()) == phase["peak_bytes_per_device"]
        assert 0 < phase["predicted_mfu"] < 1 and phase["predicted_seconds"] > 0
        assert phase["collective_bytes_per_device"] > 0 and phase["flops_per_device"] > 0
    # Two moments as large as the parameters, and counters.
    assert 0 <= held["optimizer"] - 2 * held["parameters"] < 1024
    assert sample["bytes_per_device"]["training state"] == sum(held.values())
    # 16 completions in 8 slots, 2 a shard: two after another, of 64 tokens or as many as a second look makes them.
    assert sample["shape"]["slots"] == 8 and sample["shape"]["requests"] == 16
    assert sample["shape"]["slots that have room"] == 16
    # 8 prompts, each wave of 256 tokens a shard: 4 at once.
    assert (sample["shape"]["prompts a wave"], sample["shape"]["waves"]) == (4, 2)


def test_variants_of_a_run(on_devices: dict[str, Any]) -> None:
    """Each is traced with all that its update is given. Catches a state that is counted where it does not lie, and
    arguments of another structure than the step wants."""
    found = on_devices["variants"]
    parameters = found["reference"]["parameters"]
    assert found["adapters"]["parameters"] > parameters and found["adapters"]["optimizer"] < parameters / 2
    assert found["reference"]["reference"] == parameters == found["average"]["average"]
    assert found["offload"]["optimizer"] < 64  # counters
    assert found["offload"]["rows"] == 32  # 16 samples, and room for a second row of each


# --- the bound on speed ---


def test_links_of_a_slice() -> None:
    """v5p:4x4x4, 100 GB/s a link. A side of 4 is a ring: two links. Two sides: four. In v5e:4x4 nothing closes, and
    only 16 do. Catches a slice without its rings and a link taken for its both ways."""
    cube = find_machine("v5p:4x4x4")
    where = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    assert link_bandwidth(cube, range(4), where) == (200e9, 2)
    assert link_bandwidth(cube, range(16), where) == (400e9, 4)
    flat = find_machine("v5e:4x4")
    assert link_bandwidth(flat, range(4), [(0, y) for y in range(4)]) == (50e9, 3)
    hosts = find_machine("h100:2x8")
    places = [divmod(number, 8) for number in range(16)]
    assert link_bandwidth(hosts, range(8), places) == (450e9, 0)
    assert link_bandwidth(hosts, (0, 8), places) == (50e9, 0)


def test_seconds_of_links() -> None:
    """The gather of TPU_TEXT: 6,144 bytes over two links of 100 GB/s and 2 hops of 1 µs."""
    cube = find_machine("v5p:4x4x4")
    [gather] = [one for one in find_collectives(TPU_TEXT, 64) if one.kind == "all-gather"]
    where = [(0, 0, z) for z in range(4)]
    assert math.isclose(link_seconds(cube, [gather], where), 6144 / 200e9 + 2e-6)


def test_the_longest_of_three_times_holds() -> None:
    """v5p: 459 TFLOP/s and 2,765 GB/s. 918e12 products are 2 s, half of them useful: MFU 1/2, and less where the memory
    takes 4 s. Catches a sum in place of a maximum, and recomputation that counts as useful."""
    chip = find_machine("v5p:2x2x1")
    quick = make_roofline("update", chip, 918e12, 459e12, 2765e9, 0.5)
    assert (quick.seconds, quick.without_overlap, quick.bound) == (2.0, 3.5, "compute")
    slow = make_roofline("update", chip, 918e12, 459e12, 4 * 2765e9, 0.5)
    assert (slow.seconds, slow.bound) == (4.0, "memory")
    assert math.isclose(mfu([quick]), 0.5) and math.isclose(mfu([quick, slow]), 2 / 6)


# --- the search ---


def test_meshes_that_divide_the_model() -> None:
    """7B has 28 heads: tensor 1, 2, 4 of 8 devices, never 8. Catches meshes on which weights lie whole."""
    found = mesh_shapes(8, parse_config(published_config("7B")))
    assert {mesh.tensor for mesh in found} == {1, 2, 4}
    assert all(math.prod(mesh.sizes.values()) == 8 for mesh in found) and len(found) == 4 + 3 + 2


def search_arguments(size: str, *overrides: str) -> tuple[Any, ...]:
    config = recipe(f"model.path=Qwen2.5-VL-{size}-Instruct", *overrides)
    model = find_model(config.model.path)
    return config, model.config, longest_of(config, model.config, model.max_pixels)


def best_arguments(size: str, *overrides: str) -> tuple[Config, QwenConfig, int]:
    config = recipe(f"model.path=Qwen2.5-VL-{size}-Instruct", *overrides)
    model = find_model(config.model.path)
    return config, model.config, model.max_pixels


SPEEDS = Speeds(459e12, 2765e9, 200e9)


def test_estimates_are_near_what_the_compiler_said() -> None:
    """7B on v5p by libtpu 0.0.42 (low effort): fsdp=8 37.75 GiB, fsdp=64 10.22, fsdp=16,tensor=4 11.41, of which state
    11.59, 1.45, 1.46; the last with remat=dots 35.67. Catches a term that is forgotten: most are more than the eighth
    that is allowed."""
    said = {(1, 8, 1, 1): 37.75, (1, 64, 1, 1): 10.22, (1, 16, 1, 4): 11.41}
    for sizes, gib in said.items():
        [found] = estimates(*search_arguments("7B"), math.prod(sizes), SPEEDS, meshes=[MeshConfig(*sizes)])
        assert abs(found.update_bytes / GIB / gib - 1) < 0.125, (sizes, found.update_bytes / GIB)
    arguments = search_arguments("7B", "model.remat=dots")
    [dots] = estimates(*arguments, 64, SPEEDS, meshes=[MeshConfig(1, 16, 1, 4)])
    assert abs(dots.update_bytes / GIB / 35.67 - 1) < 0.125, dots.update_bytes / GIB


def test_the_best_mesh_fits_or_is_refused() -> None:
    """Catches a search that takes the quickest without asking whether it fits: with 95 GiB 7B needs no cut over
    tensor on 64 devices, on 16 devices of 16 GiB it cannot be."""
    mesh = best_mesh(*best_arguments("7B"), 64, 95 * GIB, SPEEDS).mesh
    assert math.prod(mesh.sizes.values()) == 64
    [own] = estimates(*search_arguments("7B"), 64, SPEEDS, meshes=[mesh])
    assert best_mesh(*best_arguments("7B"), 16, 95 * GIB, SPEEDS, slices=8).mesh.data % 8 == 0  # data alone crosses
    assert own.peak_bytes < 95 * GIB
    with pytest.raises(UserError, match="--mesh auto: no mesh of 16 devices"):
        best_mesh(*best_arguments("7B"), 16, 8 * GIB, SPEEDS)


def test_more_is_kept_without_rematerialisation() -> None:
    config, qwen, longest = search_arguments("7B")
    found = estimates(config, qwen, longest, 8, SPEEDS, vary=True, meshes=[MeshConfig(1, 8)])
    peaks = {(one.remat, one.micro_batch_tokens): one.update_bytes for one in found}
    assert peaks["none", 32768] > peaks["dots", 32768] > peaks["full", 32768] > peaks["full", 8192] * 1.1


def test_the_mesh_of_the_devices_that_are_here() -> None:
    """`--mesh auto` on this computer's one CPU, whose memory is enough for the example. Catches devices that no table
    knows."""
    config = load_defaults([])
    model = find_model(config.model.path)
    chosen = choose_mesh(config, model.config, model.max_pixels, "rl")
    assert chosen.mesh == MeshConfig(1, 1) and chosen.why.startswith("the only one that fits, estimated to take")


def test_tokens_are_cut_where_nothing_else_fits() -> None:
    """7B with prompts of 256k tokens: one row alone wants more than the 95 GiB of a device. Catches a search that never
    tries `context`, and one that tries what heads forbid: 28 of them are not cut by 8."""
    long = "data.max_prompt_tokens=262144", "buckets.prompt_tokens=[]", "buckets.vision=[]", "data.max_pixels=1003520"
    chosen = best_mesh(*best_arguments("7B", *long), 16, 95 * GIB, SPEEDS).mesh
    assert chosen.context in (2, 4) and math.prod(chosen.sizes.values()) == 16
    [whole] = estimates(*search_arguments("7B", *long), 16, SPEEDS, meshes=[MeshConfig(1, 16)])
    [cut] = estimates(*search_arguments("7B", *long), 16, SPEEDS, meshes=[chosen])
    assert whole.update_bytes > 95 * GIB > cut.update_bytes
    qwen = parse_config(published_config("7B"))
    assert {mesh.context for mesh in long_meshes(16, qwen)} == {2, 4} and not mesh_shapes(16, qwen, context=8)


def test_less_work_wants_less() -> None:
    """7B on four devices of 16 GiB can be drawn from, but not trained. Catches moments that `sample` would count, and
    an error that says how to shrink what is not there."""
    assert best_mesh(*best_arguments("7B"), 4, 16 * GIB, SPEEDS, "sample").mesh == MeshConfig(1, 1, 1, 4)
    with pytest.raises(UserError, match=r"the least is \d+\.\d GiB with .*optimizer\.offload=true"):
        best_mesh(*best_arguments("7B"), 4, 16 * GIB, SPEEDS, "rl")
    with pytest.raises(UserError, match="Take more devices, lower sampling") as error:
        best_mesh(*best_arguments("7B"), 4, GIB, SPEEDS, "sample")
    assert "optimizer" not in str(error.value)


def test_the_sampler_is_asked_for_what_a_call_asks_for(tmp_path: Path) -> None:
    """Six prompts, four samples each, on a model of two layers. Catches sizes that `sampling/call.py` finds otherwise:
    plans made from them would be of caches that no run has."""
    loaded = sampling_cases.load(tmp_path)
    settings = SamplingConfig(num_slots=5, prefill_tokens=64)
    counters = loaded.generate(ends=(), num_slots=5, prefill_tokens=64)[1]
    [(asked, _, _)] = loaded.system.sampler.plans
    config = Config(rollout=RolloutConfig(6, 4), sampling=settings)
    system = loaded.system
    longest = Longest(max(map(len, loaded.prompts)), (0, 0), sampling_cases.PLAIN)
    needs = cache_needs(config, system.model.config, longest, system.mesh, np.dtype(system.dtype).itemsize)
    assert needs == asked
    layout = lay_out(config, system.model.config, system.mesh)
    work = sample_work(layout, longest, 8 * GIB, 0)
    assert work.num_waves == counters.waves


# --- the command ---


def run_plan(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rethinker_jax.main", "plan", *words], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))},
    )  # fmt: skip


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "plan: wanted --topology NAME"),
        (["--topology", "v5p:4x4"], "v5p wants 3 sizes"),
        (["--topology", "v5p:2x2x1", "--mesh", "auto"], "wanted --suggest"),
        (["--topology", "v5p:2x2x1", "--json", "no/such/plan.json"], "no such directory"),
        (["--topology", "v5p:2x2x1", "model.path=Qwen3-VL"], "Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_what_the_command_refuses(words: list[str], said: str) -> None:
    done = run_plan(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install() -> None:
    done = run_plan("--topology", "v5p:2x2x1")
    assert done.returncode == 2 and 'pip install "libtpu==' in done.stderr


@WITHOUT_LIBTPU
def test_a_plan_for_tpus(tmp_path: Path) -> None:
    """The example's model on four chips of v5e, both phases. Catches a program that the TPU's compiler refuses."""
    output = tmp_path / "plan.json"
    done = run_plan(
        "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--quick", "--json", str(output),
        "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "training.batch_size=8",
        "data.max_prompt_tokens=128", "sampling.max_new_tokens=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["devices"] == 4 and found["fits"]
    for phase in ("update", "sample"):
        assert found[phase]["hbm_bytes_per_device"] == int(15.75 * GIB)
        assert 0 < found[phase]["peak_bytes_per_device"] < GIB
        assert found[phase]["collective_bytes_per_device"] > 0
    assert {line["program"] for line in found["sample"]["collectives"]} == {"new layout", "prefill", "decode"}


def test_defaults_can_be_planned() -> None:
    """Catches a default config that no model belongs to."""
    config = load_defaults([])
    model = find_model(config.model.path)
    assert model.config.vocab > 0 and jax.devices()
    assert dataclasses.asdict(longest_of(config, model.config, model.max_pixels))["prompt_tokens"] == 2048
