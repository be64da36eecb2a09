"""What may change when a run goes on: the devices, its length, and what it leaves behind. Nothing that it computes."""

import contextlib
import copy
import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import TIMEOUT_S, start, stop_at

from rethinker_jax.config import Config
from rethinker_jax.config_file import load_config, save_config
from rethinker_jax.config_health import HealthConfig
from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.run_directory import EVALUATED, FREE_KEYS, UNUSED, Kind, RunDirectory

SMALL = """
base: package:example
run: {num_steps: 4, save_every: 1, rollouts_every: 1, keep_checkpoints: 4}
data: {train: train.parquet}
sampling: {max_new_tokens: 24}
rollout: {prompts_per_step: 8, samples_per_prompt: 2}
training: {batch_size: 16}
replay: {capacity: 16}
rethink: {fraction: 0.75}
evaluation: {num_problems: 0, num_sampled_problems: 0}
"""
LEARN = "rethinker_jax.loop:learn"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with rows and small.yaml; processes started meanwhile compile quickly."""
    folder = tmp_path_factory.mktemp("elastic")
    write_split(folder / "train.parquet", "train", 24)
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield folder


def go_on(run: Path, devices: int, stop: bool) -> None:
    """One step on so many simulated devices, or all that are left."""
    log = run.with_suffix(".log")
    words = ("train", "small.yaml", "--mesh", f"run.dir={run.name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
        if stop:
            assert stop_at(LEARN, 1, signal.SIGTERM, *words, log=log) == 75, log.read_text()
        else:
            assert start(*words, log=log).wait(TIMEOUT_S) == 0, log.read_text()


@pytest.fixture(scope="module")
def one(place: Path) -> Path:
    """Four steps on one device."""
    go_on(place / "one", 1, stop=False)
    return place / "one"


def params_of(run: Path, step: int) -> list[np.ndarray]:
    """Read onto this process's one device, whatever devices wrote them: orbax wants a target for that."""
    first: Any = restored(run.with_name("one"), 1, None)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), first.state)
    found = restored(run, step, target)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found.state["params"])]


def restored(run: Path, step: int, target: Any) -> Any:
    with contextlib.closing(ocp.CheckpointManager(run / "checkpoints")) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))


def distance(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(ours, theirs, strict=True))))


def rollouts_of(run: Path, step: int) -> list[Row]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def problems_of(run: Path) -> list[list[str]]:
    return [[row["problem"]["id"] for row in rollouts_of(run, step)] for step in range(4)]


def texts_of(run: Path, step: int) -> list[str]:
    return [part["text"] for row in rollouts_of(run, step) for one in row["samples"] for part in one["segments"]]


def assert_same_to_rounding(run: Path, one: Path) -> None:
    """The same rows in the same order, the same responses, and weights that differ by rounding.

    Devices add the same float32 numbers in another order. Of a gradient that is the sum of n terms the relative error
    is about √n · 2⁻²⁴, some 1e-6 here; Adam divides by the gradient's size, so that elements with next to none move by
    what is rounding. Measured: 6e-5 of the way that the weights went, losses and gradients to 2e-6. The bounds are 2e-3
    and 1e-3; an update that was lost, made twice or averaged over the wrong number of devices is beyond 0.1.
    """
    assert problems_of(run) == problems_of(one)
    rows, others = ([json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, one))
    assert [row["step"] for row in rows] == [0, 1, 2, 3] == [row["step"] for row in others]
    for step in range(4):
        assert texts_of(run, step) == texts_of(one, step), step
        for name in ("reward", "replay_share", "replay_size", "effective_share"):
            assert rows[step][name] == others[step][name], (step, name)
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(rows[step][name], others[step][name], rtol=1e-3, atol=1e-5)
    way = distance(params_of(one, 4), params_of(one, 1))
    assert way > 0
    assert distance(params_of(run, 4), params_of(one, 4)) < 2e-3 * way


def test_eight_devices_then_four_then_one(one: Path) -> None:
    """Catches a checkpoint that is tied to its mesh, rows that are met twice or left out, and moments or a replay
    buffer that come back in another order."""
    run = one.with_name("fewer")
    for devices, stop in ((8, True), (4, True), (1, False)):
        go_on(run, devices, stop)
    said = run.with_suffix(".log").read_text()
    assert "is damaged" not in said and "Traceback" not in said
    assert_same_to_rounding(run, one)


def test_one_device_then_eight(one: Path) -> None:
    """Catches a state that lies whole on one device where it should be cut over eight."""
    run = Path(shutil.copytree(one, one.with_name("more")))
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    (run / "summary.json").unlink()
    go_on(run, 8, stop=False)
    assert json.loads((run / "summary.json").read_text())["device"].startswith("8 ")
    assert_same_to_rounding(run, one)


@pytest.mark.parametrize(
    "words",
    [
        ["training.batch_size=8"],
        ["rollout.prompts_per_step=4", "training.batch_size=8"],
        ["rollout.samples_per_prompt=4"],
        ["training.micro_batch_tokens=512"],
        ["replay.capacity=8"],
    ],
)
def test_another_layout_of_batches_is_refused(
    one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Catches a run that goes on with a replay buffer and a data order that were made for other batches."""
    monkeypatch.chdir(one.parent)
    kept = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    assert main(["train", "small.yaml", "run.dir=one", "run.num_steps=5", *words]) == 2
    said = capsys.readouterr().err
    key, _, value = words[0].partition("=")
    assert "holds a run with another config" in said and f"{key} was" in said and f"is {value}" in said
    assert "num_steps" not in said
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == kept


def with_value(thing: Any, name: str, value: Any) -> Any:
    """A copy of a frozen dataclass that holds something else, be it of a type that it does not allow."""
    changed = copy.copy(thing)
    object.__setattr__(changed, name, value)
    return changed


def other_than(value: Any) -> Any:
    """Something else of the same kind; nobody checks it here."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, value[0]) if value else (1,)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        field = dataclasses.fields(value)[0].name
        return with_value(value, field, other_than(vars(value)[field]))
    return {**value, "new": 1} if isinstance(value, dict) else 1


KEYS = [
    (section.name, field.name)
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(vars(Config())[section.name])
]


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_every_key_that_is_read_is_refused_when_it_changes(tmp_path: Path, kind: Kind) -> None:
    """Every key of the config in turn. Catches one that slips through a comparison, as a nested one may, and one that
    is compared although this kind of run does not read it."""
    config = load_config(None, [])
    run = RunDirectory(tmp_path, kind)
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    assert run.changes(config) == []
    unread = UNUSED[kind] - (EVALUATED if kind == "sft" and config.sft.evaluate else frozenset())
    hashes = {run.manifest(config)["config"]}
    for section, key in KEYS:
        values = vars(config)[section]
        changed = with_value(config, section, with_value(values, key, other_than(vars(values)[key])))
        name = f"{section}.{key}"
        said = run.changes(changed)
        if name in FREE_KEYS or section in unread:
            assert said == [], name
            assert run.manifest(changed)["config"] in hashes, name
        else:
            assert len(said) == 1 and said[0].startswith(f"{name} was "), name
            hashes.add(run.manifest(changed)["config"])
    refused = sum(section not in unread and f"{section}.{key}" not in FREE_KEYS for section, key in KEYS)
    assert len(hashes) == 1 + refused  # each changes the hash that checkpoints carry, and each to another


def test_which_keys_are_free() -> None:
    """Catches a key that was freed by the way: what may change is a promise."""
    assert FREE_KEYS - {f"health.{field.name}" for field in dataclasses.fields(HealthConfig)} == {
        *("run.num_steps", "sft.num_steps", "sft.num_epochs"),  # how long
        *("run.dir", "run.save_every", "run.keep_checkpoints", "run.keep_best", "run.rollouts_every"),  # what is left
        *("run.max_bad_rows", "training.max_skipped_updates", "verifier.deadline_s"),  # what is survived
        *("mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor", "mesh.search"),  # by whom
        *("verifier.num_workers", "run.compilation_cache"),
    }
    known = {f"{section}.{key}" for section, key in KEYS}
    assert known >= FREE_KEYS
