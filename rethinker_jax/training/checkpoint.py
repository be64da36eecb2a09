"""Checkpoints by orbax: everything a run needs to go on, written at once or not at all, and checked when it is read."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax import peers
from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.output_files import write_whole
from rethinker_jax.processes import first_says
from rethinker_jax.training.checksums import describe_arrays, describe_tree, expected_of, hash_of_json
from rethinker_jax.training.update import TrainState

# orbax raises what goes wrong, and also logs it with a traceback from each of its threads.
logging.getLogger("absl").setLevel(logging.CRITICAL)
FILLER = {"_": np.zeros(1, np.int8)}  # orbax refuses an item without arrays
LATE = ("Event loop is closed", "error while reading array index")  # what those say that nobody waits for
MANIFEST = "manifest"  # the key of the JSON under which stands what the store adds


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: the state of the optimizer, host arrays (the replay buffer), and JSON (counters)."""

    state: TrainState
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


class Damaged(Exception):
    """A checkpoint whose files do not give back what was saved; the text says why."""


class CheckpointStore:
    """The checkpoints of one run directory: the newest `keep`, and the best `keep_best` of those that were measured.

    Writing is asynchronous; `close` waits for it. `keep` 0 opens them for reading alone and touches nothing: a run may
    be writing there. `manifest` is what each of them says of its origin.
    """

    def __init__(self, directory: Path, keep: int, keep_best: int = 0, manifest: Mapping[str, Any] | None = None):
        _pass_over_late_errors()
        self.directory = directory
        self._manifest = dict(manifest or {})
        self._writes = keep > 0
        newest = ocp.checkpoint_managers.LatestN(keep)
        best = ocp.checkpoint_managers.BestN(get_metric_fn=_rank, n=keep_best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(create=False)
        if self._writes:
            if jax.process_index() == 0:
                _mend_rewards(directory)
            multihost_utils.sync_global_devices(f"rewards: {directory}")
            # What a killed run left half written is cleared away.
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([newest, best]),
                best_fn=_rank,  # without it, orbax does not write down what was measured
                create=True,
                cleanup_tmp_directories=True,
            )
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Of all that are there, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, saved: Saved, reward: float | None = None) -> None:
        """Begin to write a checkpoint; `reward` is what was measured of it, and it is ranked by.

        Raises UserError where there is no room; orbax would say so a step too late.
        """
        self._manager.wait_until_finished()
        needed = sum(map(_own_bytes, jax.tree.leaves((saved.state, saved.arrays))))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"{self.directory}: the disk is full: a checkpoint takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB "
                "are free. The last checkpoint is kept: free some space and run the same command again."
            )
        metrics = None if reward is None else {"reward": reward, "step": step}
        state = _as_dict(saved.state)
        manifest = self._manifest | {
            "measured": metrics,
            "state": describe_tree(state),
            "arrays": describe_arrays(saved.arrays),
            "meta": hash_of_json(saved.meta),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            arrays=ocp.args.StandardSave(saved.arrays | FILLER),
            meta=ocp.args.JsonSave(saved.meta | {MANIFEST: manifest | {"manifest": hash_of_json(manifest)}}),
        )
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, like: TrainState, mesh: Mesh, step: int | None = None) -> Saved:
        """Read the newest checkpoint that is whole, or that of `step`, into the shapes and places of `like`.

        Damaged ones behind it are said on stderr and moved aside, where this store writes. Raises UserError if it does
        not fit `like`, if that of `step` is damaged, and if all are; then nothing is moved.
        """
        wanted = first_says(self.steps[::-1]) if step is None else [step]
        damaged: dict[int, str] = {}
        for one in wanted:
            try:
                saved = self._read(one, like, mesh)
            except Damaged as error:
                if peers.watched():
                    self._end_job(one, str(error))
                damaged[one] = str(error)
            else:
                self._leave_behind(damaged, one)
                return saved
        others = ", ".join(str(one) for one in self.steps if one not in damaged)
        raise UserError(
            "; ".join(f"{self.directory / str(one)} is damaged: {why}" for one, why in damaged.items())
            + (f". There are others: {others}; name one of them." if others else ". No complete checkpoint is left. ")
            + ("" if others else "Nothing was changed: put the files back, or name another run.dir to begin anew.")
        )

    def _end_job(self, step: int, why: str) -> NoReturn:
        """What one process of several found alone: the others wait for it to go on reading, so there is no other way
        back than to start again, from the checkpoint before. Raises Stopped, and UserError where nothing is moved."""
        path = self.directory / str(step)
        if not self._writes:
            raise UserError(f"{path} is damaged: {why}. Name another checkpoint.")
        aside = _free_name(self.directory / f"{step}.damaged")
        with contextlib.suppress(OSError):  # another process may have found it too
            os.replace(path, aside)
        raise Stopped(
            f"{path} is damaged ({why}), moved to {aside.name}; started again, the run goes on without it", 75
        )

    def _read(self, step: int, like: TrainState, mesh: Mesh) -> Saved:
        """Raises Damaged, and UserError for a whole checkpoint of other shapes."""
        with _reading("its JSON"):
            found: Any = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            meta = dict(found.meta)
            manifest = meta.pop(MANIFEST, {})
            described = dict(manifest)
            whole = not manifest or described.pop("manifest") == hash_of_json(described)
        if not whole or (manifest and manifest["meta"] != hash_of_json(meta)):
            raise Damaged("its JSON is not what was written")
        if manifest:
            self._check_fits(step, manifest["state"], expected_of(_as_dict(like)))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_target(mesh), _as_dict(like))),
            arrays=ocp.args.StandardRestore(),
        )
        with _reading("its arrays"):
            read: Any = self._manager.restore(step, args=args)
            state = TrainState(**read.state)
            arrays = {name: np.asarray(value) for name, value in read.arrays.items() if name not in FILLER}
        if manifest:  # what older versions wrote has none
            now = {"state": describe_tree(_as_dict(state)), "arrays": describe_arrays(arrays)}
            wrong = [
                f"{part}.{name}"
                for part, these in now.items()
                for name in these.keys() | manifest[part].keys()
                if these.get(name) != manifest[part].get(name)
            ]
            if wrong:
                raise Damaged(f"{len(wrong)} arrays are not what was written, such as {min(wrong)}")
        return Saved(state, arrays, meta)

    def _check_fits(self, step: int, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        were = {name: described[:2] for name, described in there.items()}
        if were != wanted:
            name = min(name for name in were.keys() | wanted.keys() if were.get(name) != wanted.get(name))
            raise UserError(
                f"{self.directory}/{step}: the checkpoint does not fit this config: {name} is "
                f"{_words(were.get(name))} there and {_words(wanted.get(name))} here. Go on with the config with "
                "which it was written, or name another run.dir."
            )

    def _leave_behind(self, damaged: Mapping[int, str], step: int) -> None:
        """Say which checkpoints were passed over, and make room for their steps without losing a file of them."""
        if not damaged:
            return
        for number, why in damaged.items():
            if jax.process_index() == 0:
                path = self.directory / str(number)
                moved = ""
                if self._writes:
                    aside = _free_name(self.directory / f"{number}.damaged")
                    os.replace(path, aside)
                    moved = f", moved to {aside.name}"
                print(f"{path} is damaged ({why}){moved}; going on from checkpoint {step}", file=sys.stderr)
        multihost_utils.sync_global_devices(f"damaged: {self.directory}")
        self._manager.reload()

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


@contextlib.contextmanager
def _reading(what: str) -> Generator[None]:
    """Turns what goes wrong inside into Damaged, but for a lack of memory and for being asked to stop."""
    try:
        yield
    except (Stopped, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax and tensorstore raise many types, the bare one too
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, Stopped):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        said = " ".join(str(error).partition("See full TensorStore details")[0].split()) or type(error).__name__
        raise Damaged(f"{what} cannot be read: {said:.200}") from error


@functools.cache
def _pass_over_late_errors() -> None:
    """When a read or write fails, orbax leaves the others; Python would print a traceback for each that ends later."""
    before = sys.unraisablehook

    def hook(what: Any) -> None:
        if not any(words in str(what.exc_value) for words in LATE):
            before(what)

    sys.unraisablehook = hook


def _target(mesh: Mesh) -> Callable[[jax.Array | jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """Of a leaf, its shape and place; whole on every device where it has none on a mesh."""
    whole = NamedSharding(mesh, PartitionSpec())

    def target(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return target


def _mend_rewards(directory: Path) -> None:
    """Write again what a checkpoint is ranked by, from its JSON, where the small file of it is gone or damaged.

    orbax reads these files of all checkpoints at once and gives up at the first one that it cannot read.
    """
    for step in directory.glob("[0-9]*"):
        if not step.name.isdecimal():
            continue
        path = step / "metrics" / "metrics"
        measured = _reward_in(step / "meta" / "metadata", MANIFEST, "measured")
        there = _reward_in(path)
        if there is not None or (measured is None and not path.is_file()):
            continue
        if measured is None:
            os.replace(path, _free_name(path.with_name("metrics.damaged")))
            print(f"{path} is damaged: checkpoint {step.name} is not among the best", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(measured))
            print(f"{path} was damaged and is written again from the checkpoint's JSON", file=sys.stderr)


def _reward_in(path: Path, *keys: str) -> dict[str, float] | None:
    """What `_rank` reads, under `keys` of a JSON file; None where it is not there."""
    try:
        value = json.loads(path.read_bytes())
        for key in keys:
            value = value[key]
        return {"reward": float(value["reward"]), "step": int(value["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _free_name(path: Path) -> Path:
    """`path`, or the same with the first number that makes it new."""
    names = (path.with_name(f"{path.name}-{number}") for number in range(2, 1 << 30))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _rank(metrics: Any) -> Any:
    """What orbax sorts checkpoints by, the best one last: of equal rewards the earlier step."""
    return metrics["reward"], -metrics["step"]


def _words(described: Any) -> str:
    return "absent" if described is None else f"{described[0]} {described[1]}"


def _own_bytes(leaf: jax.Array | np.ndarray) -> int:
    """Bytes of what this process writes of an array."""
    if isinstance(leaf, jax.Array):
        return sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
    return leaf.nbytes


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
