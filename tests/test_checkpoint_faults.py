"""Damaged checkpoints: what is noticed, what a run then goes on from, and what is left as it was."""

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.checksums import describe_tree
from rethinker_jax.training.update import TrainState

# When a read fails, orbax leaves the others where they are, and Python finds that out at some later time.
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def nothing_is_left_to_others() -> Generator[None]:
    yield
    gc.collect()


REWARDS = {1: 0.25, 2: 0.75, 3: 0.5}
MANIFEST = {"config": "0123", "commit": "4567", "versions": {"jax": "1"}}


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("fsdp",))


def state_of(step: int, width: int = 32) -> TrainState:
    """Noise, so that nothing of it is compressed away."""
    rng = np.random.default_rng(step)
    place = NamedSharding(mesh(), PartitionSpec())
    made = {
        "kernel": rng.standard_normal((64, width), np.float32),
        "bias": rng.standard_normal(width).astype(jnp.bfloat16),
    }
    params = {name: jax.device_put(array, place) for name, array in made.items()}
    count = jax.device_put(np.int32(step), place)
    return TrainState(params=params, opt_state=(params,), num_updates=count, num_skipped=count * 0, average={})


def saved_of(step: int) -> Saved:
    arrays = {"length": np.arange(step, dtype=np.int32), "advantage": np.linspace(0, step, 100)}
    return Saved(state_of(step), arrays, {"step": step, "before": {"greedy": 0.5, "none": float("nan")}})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with contextlib.closing(CheckpointStore(folder, 3, 1, MANIFEST)) as store:
        for step, reward in REWARDS.items():
            store.save(step, saved_of(step), reward)
    return folder


@pytest.fixture
def copy(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def restored(folder: Path, like: TrainState | None = None, keep: int = 3, step: int | None = None) -> Saved:
    with contextlib.closing(CheckpointStore(folder, keep, 1)) as store:
        return store.restore(state_of(1) if like is None else like, mesh(), step)


def assert_saved(found: Saved, step: int) -> None:
    wanted = saved_of(step)
    assert json.dumps(found.meta) == json.dumps(wanted.meta)
    jax.tree.map(np.testing.assert_array_equal, found.state, wanted.state)
    jax.tree.map(np.testing.assert_array_equal, found.arrays, wanted.arrays)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_file(step: Path, item: str = "state") -> Path:
    """The largest of an item: the arrays themselves."""
    return max((path for path in (step / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: Path) -> None:
    data = path.read_bytes()
    third = len(data) // 3
    path.write_bytes(data[:third] + bytes(third) + data[2 * third :])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [remove, empty, cut, zeros, flip])
def test_any_damaged_file_is_noticed_or_does_not_matter(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    """Every file of the newest checkpoint in turn. Catches weights, replay or counters that come back as something
    else, a traceback, and a checkpoint that is passed over in silence or removed."""
    passed_over = []
    for number, file in enumerate(sorted(path for path in (three / "3").rglob("*") if path.is_file())):
        folder = Path(shutil.copytree(three, tmp_path / str(number)))
        name = str(file.relative_to(three / "3"))
        damage(folder / "3" / name)
        left = contents(folder / "3")
        found = restored(folder)
        said = capsys.readouterr().err
        if (folder / "3").is_dir():
            assert_saved(found, 3)
            assert "going on" not in said, name
        else:
            assert_saved(found, 2)
            assert f"{folder}/3 is damaged" in said and "going on from checkpoint 2" in said, name
            assert contents(folder / "3.damaged") == left, name
            passed_over.append(name)
    # Without these nothing could come back; that they do not matter would mean that they were not damaged here.
    assert {str(data_file(three / "3", item).relative_to(three / "3")) for item in ("state", "meta")} <= {*passed_over}


@pytest.mark.parametrize("part", ["state", "arrays", "meta", "."])
def test_a_missing_part_is_noticed(copy: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    """Catches a run that goes on with an empty replay buffer, or without its counters."""
    for path in (copy / "3" / part).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if part != ".":
        (copy / "3" / part).rmdir()
    assert_saved(restored(copy), 2)
    assert "3 is damaged" in capsys.readouterr().err


def test_a_step_that_was_damaged_can_be_saved_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a save that fails or is left out because a directory stands in its place, and a second damaged one that
    takes the place of the first."""
    for name in ("3.damaged", "3.damaged-2"):
        cut(data_file(copy / "3"))
        left = contents(copy / "3")
        with contextlib.closing(CheckpointStore(copy, 3, 1)) as store:
            assert_saved(store.restore(state_of(1), mesh()), 2)
            assert store.steps == [1, 2]
            store.save(3, saved_of(3), REWARDS[3])
        assert contents(copy / name) == left
        assert name in capsys.readouterr().err
    assert_saved(restored(copy), 3)
    assert capsys.readouterr().err == ""


def test_several_damaged_ones_are_passed_over(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a fall back of one step only."""
    empty(data_file(copy / "3"))
    flip(data_file(copy / "2"))
    assert_saved(restored(copy), 1)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is damaged")[0] for line in said] == [str(copy / "3"), str(copy / "2")]
    assert all("going on from checkpoint 1" in line for line in said) and "not what was written" in said[1]


def test_none_is_left(copy: Path) -> None:
    """Catches a run that begins anew over its past, and one that moves what it cannot use."""
    for step in (1, 2, 3):
        cut(data_file(copy / str(step)))
    before = contents(copy)
    with pytest.raises(UserError, match=r"3 is damaged: .*1 is damaged: .*No complete checkpoint is left\. Nothing"):
        restored(copy)
    assert contents(copy) == before


@pytest.mark.parametrize("damaged", [False, True])
def test_another_config_is_refused_and_not_fallen_back_from(copy: Path, damaged: bool) -> None:
    """Catches a whole checkpoint taken for a damaged one because it does not fit; damaged weights change nothing."""
    if damaged:
        cut(data_file(copy / "3"))
    before = contents(copy)
    with pytest.raises(
        UserError, match=r"fit this config: opt_state\.0\.bias is bfloat16 \[32\] there and .* \[16\] here"
    ):
        restored(copy, state_of(1, width=16))
    like = state_of(1)
    like = TrainState(
        params={"kernel": like.params["kernel"]}, opt_state=(), num_updates=like.num_updates,
        num_skipped=like.num_skipped, average={},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"opt_state\.0\.bias is bfloat16 \[32\] there and absent here"):
        restored(copy, like)
    assert contents(copy) == before


def test_readers_name_a_damaged_checkpoint_and_move_nothing(copy: Path) -> None:
    """Catches an export of other weights than were asked for, and one that moves what a run may be writing."""
    cut(data_file(copy / "3"))
    before = contents(copy)
    with pytest.raises(UserError, match=r"3 is damaged: .* There are others: 1, 2; name one of them\."):
        restored(copy, keep=0, step=3)
    assert_saved(restored(copy, keep=0, step=1), 1)
    assert contents(copy) == before


@pytest.mark.parametrize("damage", [remove, empty, cut, zeros])
def test_what_checkpoints_are_ranked_by_survives(
    copy: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    """Catches the best checkpoint deleted as an old one because the file with its score is damaged, and a traceback."""
    damage(copy / "2" / "metrics" / "metrics")
    with contextlib.closing(CheckpointStore(copy, 1, 1)) as store:
        store.save(4, saved_of(4), 0.0)
        store.wait()
        assert store.steps == [2, 4]  # 2 is the best
    assert json.loads((copy / "2" / "metrics" / "metrics").read_text()) == {"reward": 0.75, "step": 2}
    assert "2/metrics/metrics was damaged and is written again" in capsys.readouterr().err


def test_a_score_that_is_lost_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that cannot start because of a checkpoint that it does not need."""
    for name in ("metrics/metrics", "meta/metadata"):
        cut(copy / "2" / name)
    with contextlib.closing(CheckpointStore(copy, 1, 1)) as store:
        assert store.steps == [1, 2, 3]
        assert_saved(store.restore(state_of(1), mesh()), 3)
        store.save(4, saved_of(4), 0.0)
        store.wait()
        assert store.steps == [3, 4]  # of those that have one, 3 has the best
    assert "checkpoint 2 is not among the best" in capsys.readouterr().err


def test_being_asked_to_stop_is_not_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a whole checkpoint that is moved aside because a signal came while it was read: the handler raises
    wherever the main thread is, here where orbax opens a file, and orbax may wrap what it meets."""

    def interrupted(*_: Any, **__: Any) -> Any:
        try:
            raise Stopped("asked to stop", 75)
        except Stopped as error:
            raise ValueError("could not read") from error

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", interrupted)
    with pytest.raises(Stopped):
        restored(copy)
    monkeypatch.undo()
    assert (copy / "3").is_dir()
    assert_saved(restored(copy), 3)


def test_what_a_checkpoint_says_of_its_origin(three: Path) -> None:
    """Catches a checkpoint of which nobody can tell what wrote it, and arrays without a checksum."""
    manifest = json.loads((three / "3" / "meta" / "metadata").read_text())["manifest"]
    assert {key: manifest[key] for key in MANIFEST} == MANIFEST
    assert manifest["measured"] == {"reward": 0.5, "step": 3}
    names = {"params.kernel", "params.bias", "opt_state.0.kernel", "opt_state.0.bias", "num_updates", "num_skipped"}
    assert manifest["state"].keys() == names and manifest["arrays"].keys() == {"length", "advantage"}


def test_older_checkpoints_are_still_read(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches runs that cannot go on because their checkpoints were written before there were checksums."""
    path = copy / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["manifest"]
    path.write_text(json.dumps(meta))
    assert_saved(restored(copy), 3)
    cut(data_file(copy / "3"))
    assert_saved(restored(copy), 2)
    assert "3 is damaged" in capsys.readouterr().err


def test_a_checksum_is_the_sum_that_is_written_down() -> None:
    """Σ (2i + 1) · bits modulo 2³². Catches a sum that does not see two numbers change places, or one bit."""
    values = np.array([[1.0, -2.0, 3.5], [0.0, 1e-30, -7.25]], np.float32)
    bits = values.reshape(-1).view(np.uint32).astype(object)
    wanted = sum((2 * place + 1) * one for place, one in enumerate(bits)) % 2**32
    assert describe_tree({"a": jnp.asarray(values)}) == {"a": ["float32", [2, 3], wanted]}
    swapped, flipped = values[::-1].copy(), values.copy()
    flipped.view(np.uint32)[1, 0] ^= 1 << 31  # the sign of a zero: equal numbers, other bits
    for other in (swapped, flipped):
        assert describe_tree({"a": jnp.asarray(other)})["a"][2] != wanted
    # Half precision, bytes, truth values, none and scalars: (1 · 0x3f80 + 3 · 0xc000), 1 + 3·2 + 5·3, 1·1 + 3·0 + 5·1.
    tree = {
        "half": jnp.array([1, -2], jnp.bfloat16),
        "bytes": jnp.array([1, 2, 3], jnp.uint8),
        "truth": jnp.array([True, False, True]),
        "none": jnp.zeros((0, 4)),
        "one": jnp.int32(9),
    }
    found = {name: described[2] for name, described in describe_tree(tree).items()}
    assert found == {"half": 0x3F80 + 3 * 0xC000, "bytes": 22, "truth": 6, "none": 0, "one": 9}


def test_files_that_may_not_be_read(copy: Path) -> None:
    """Catches a checkpoint of another user taken for a damaged one and moved. The superuser reads everything."""
    if os.geteuid() == 0:
        pytest.skip("the superuser may read every file")
    (copy / "3" / "meta" / "metadata").chmod(0)
    with pytest.raises(UserError):
        restored(copy, keep=0, step=3)
