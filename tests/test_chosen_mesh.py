"""The mesh of a command: found, told with the bytes of a device, and held against the model's sizes."""

import json
from pathlib import Path

import pytest
import yaml
from commands import run_job
from published import SIZES, published_config

from rethinker_jax.chosen_mesh import mesh_line
from rethinker_jax.config import MeshConfig
from rethinker_jax.device_bytes import Held, weights_of
from rethinker_jax.errors import UserError
from rethinker_jax.mesh_checks import check_heads, warning_of
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.models.qwen_config import parse_config
from rethinker_jax.models.sharding import AXES, TRAINING_RULES

SCRIPT = str(Path(__file__).parent / "found_mesh.py")
COUNTERS = 8  # bytes of the optimizer's two counters, which are no moments
GIB = 2**30


def test_the_axes_are_those_of_the_mesh() -> None:
    """Catches an axis that `--mesh` takes and no mesh has, or in another order."""
    assert tuple(MeshConfig().sizes) == AXES
    assert (
        mesh_words(MeshConfig(2, 1, 1, 4)) == "data=2,fsdp=1,tensor=4" and mesh_words(MeshConfig(search=True)) == "auto"
    )


def test_what_is_said_lies_on_the_device(tmp_path: Path) -> None:
    """The example on eight simulated devices. Catches a sampler's copy without the head that CPUs untie or without
    repeated kv heads, weights counted whole, and sizes of one device that are not the fullest's."""
    codes, [printed] = run_job(tmp_path, "bytes", [[SCRIPT, "bytes"]], 8)
    assert codes == [0], printed
    *said, last = printed.strip().splitlines()
    found = json.loads(last)
    for one in found.values():
        weights, optimizer, copy = one["held"]
        assert one["real"] == [weights, optimizer + COUNTERS, copy], one
    assert found["cut"]["mesh"] == "fsdp=2,context=2,tensor=2"
    lines = [line for line in said if line.startswith("mesh: ")]
    assert len(lines) == 3 and lines[1].startswith("mesh: fsdp=2,context=2,tensor=2 on 8 × cpu; a device holds ")
    [why] = [line for line in said if line.startswith("--mesh auto: ")]
    assert why.startswith(f"--mesh auto: {found['auto']['mesh']}, the quickest of ") and found["auto"]["mesh"] != "auto"


def test_a_run_on_a_mesh_that_was_found(tmp_path: Path) -> None:
    """Fine-tuning on four simulated devices. Catches a run whose config.yaml does not say what it ran on, and one that
    cannot go on with --mesh auto on two."""
    (tmp_path / "small.yaml").write_text("base: package:example\nrun: {dir: run}\n")
    words = ["-m", "rethinker_jax.main", "sft", "small.yaml", "--mesh", "auto", "sft.data=example:sft-clean"]
    words += ["sft.batch_size=2", "sft.validation_rows=2"]
    for devices, steps in ((4, 1), (2, 2)):
        codes, [printed] = run_job(tmp_path, "run", [[*words, f"sft.num_steps={steps}"]], devices)
        assert codes == [0], printed
        kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["mesh"]
        mesh = MeshConfig(**kept)
        sizes = list(mesh.sizes.values())
        assert not mesh.search and sizes[0] * sizes[1] * sizes[2] * sizes[3] == devices
        assert f"--mesh auto: {mesh_words(mesh)}, " in printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_steps"] == 2


def test_two_processes_choose_alike(tmp_path: Path) -> None:
    """One has devices of 120 GiB, one of 90. Catches a choice by one's own memory: two programs that wait for
    each other for ever."""
    codes, printed = run_job(tmp_path, "agree", [[SCRIPT, "agree"]] * 2, 2)
    assert codes == [0, 0], printed
    first, second = (json.loads(one.strip().splitlines()[-1]) for one in printed)
    assert first["alone"] != second["alone"], "the test wants memories by which they differ"
    assert first["both"] == second["both"] == second["alone"]


@pytest.mark.parametrize(
    "mesh, name, said",
    [
        (MeshConfig(1, 8), "3B", ""),
        (MeshConfig(1, 1, 1, 4), "3B", ""),  # 2 kv heads: repeated on purpose
        (MeshConfig(1, 7), "3B", "down.kernel is not cut over fsdp, as 7 does not divide its d_model of 2,048, nor"),
        (MeshConfig(1, 7), "3B", "No mesh of 7 devices cuts it; one of 6 or 8 devices would."),
        (MeshConfig(1, 6), "3B", "--mesh data=3,fsdp=2 would cut all of it."),
        (MeshConfig(1, 1, 1, 8), "7B", "text.layers.attention.output is not cut over tensor, as 8 does not"),
        (MeshConfig(1, 256, 4), "7B", "is not cut further over context, as 4 does not divide"),
    ],
)  # fmt: skip
def test_what_stays_whole_is_named(mesh: MeshConfig, name: str, said: str) -> None:
    """Catches a mesh of seven that holds 3B whole seven times without a word, and words where nothing is lost."""
    warning = warning_of(parse_config(published_config(name)), mesh)
    assert said in warning and (warning == "") == (said == "")


def test_heads_that_no_device_would_have() -> None:
    """7B has 28 heads over 4 kv heads: context 8 is refused, 4 taken, and so is 2 with tensor=2. Catches an error deep
    in the compiler, and a rule that looks at heads alone: 3B's 16 heads are cut by 8."""
    qwen = parse_config(published_config("7B"))
    with pytest.raises(UserError, match=r"28 heads.*context may be 1, 2, 4, 7, 14 or 28; 8 devices could be --mesh .*"):
        check_heads(qwen, MeshConfig(1, 1, 8))
    check_heads(qwen, MeshConfig(1, 2, 4))
    check_heads(qwen, MeshConfig(1, 1, 2, 2))
    check_heads(qwen, MeshConfig(1, 1, 1, 8))  # without context heads may stay whole
    check_heads(parse_config(published_config("3B")), MeshConfig(1, 1, 8))


@pytest.mark.parametrize("size", SIZES)
def test_no_axis_is_wanted_twice_but_once(size: str) -> None:
    """Of two dimensions that want one axis the first takes it. That happens in one weight, which its first dimension
    cuts. Catches a new weight that the rules would leave whole in silence."""
    qwen = parse_config(published_config(size))
    twice = set()
    for path, weight in weights_of(qwen).items():
        wanted = [axis for dim in weight.dims for axis in TRAINING_RULES.get(dim, ())]
        if len(wanted) != len(set(wanted)):
            twice.add("/".join(path))
    assert twice == {"vision/merger/down/kernel"}


def test_the_line() -> None:
    """Catches units that differ within a line, and parts of no bytes that are named."""
    held = Held(3 * GIB, 3 * GIB, 0, 6 * GIB, 0, 0, 0, GIB)
    assert mesh_line(MeshConfig(2, 4), held, "TPU v5", 8) == (
        "mesh: data=2,fsdp=4 on 8 × TPU v5; a device holds 3.0 GiB of weights, 6.0 of optimizer, "
        "1.0 of the sampler's copy"
    )
    alone = Held(2**20, 2**20, 0, 0, 2**21, 0, 0, 0)
    assert mesh_line(MeshConfig(1, 1), alone, "cpu", 1) == (
        "mesh: 1 × cpu; it holds 1.0 MiB of weights; the host holds 2.0 MiB of optimizer for it"
    )
