"""Checkpoints by orbax: everything a run needs to go on, written at once or not at all."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rethinker_jax.errors import UserError
from rethinker_jax.training.update import TrainState

# orbax raises what goes wrong, and also logs it with a traceback from each of its threads.
logging.getLogger("absl").setLevel(logging.CRITICAL)
FILLER = {"_": np.zeros(1, np.int8)}  # orbax refuses an item without arrays


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: the state of the optimizer, host arrays (the replay buffer), and JSON (counters)."""

    state: TrainState
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run directory: the newest `keep`, and the best `keep_best` of those that were measured.

    Writing is asynchronous; `close` waits for it. `keep` 0 opens them for reading alone and touches nothing: a run may
    be writing there.
    """

    def __init__(self, directory: Path, keep: int, keep_best: int = 0):
        newest = ocp.checkpoint_managers.LatestN(keep)
        best = ocp.checkpoint_managers.BestN(get_metric_fn=_rank, n=keep_best, keep_checkpoints_without_metrics=False)
        options = (
            # What a killed run left half written is cleared away.
            ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([newest, best]),
                best_fn=_rank,  # without it, orbax does not write down what was measured
                create=True,
                cleanup_tmp_directories=True,
            )
            if keep
            else ocp.CheckpointManagerOptions(create=False)
        )
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
        self.directory = directory

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
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_dict(saved.state)),
            arrays=ocp.args.StandardSave(saved.arrays | FILLER),
            meta=ocp.args.JsonSave(saved.meta),
        )
        metrics = None if reward is None else {"reward": reward, "step": step}
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, like: TrainState, mesh: Mesh, step: int | None = None) -> Saved:
        """Read the newest checkpoint, or that of `step`, into the shapes and places of `like`.

        Raises UserError if it does not fit.
        """
        step = self._manager.latest_step() if step is None else step
        whole = NamedSharding(mesh, PartitionSpec())

        def target(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else whole
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(target, _as_dict(like))),
            arrays=ocp.args.StandardRestore(),
            meta=ocp.args.JsonRestore(),
        )
        try:
            found: Any = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{self.directory}/{step}: the checkpoint does not fit this config or is damaged ({error}). "
                "Remove it to go on from the one before, or name another run.dir."
            ) from error
        return Saved(
            TrainState(**found.state),
            {name: np.asarray(value) for name, value in found.arrays.items() if name not in FILLER},
            found.meta,
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _rank(metrics: Any) -> Any:
    """What orbax sorts checkpoints by, the best one last: of equal rewards the earlier step."""
    return metrics["reward"], -metrics["step"]


def _own_bytes(leaf: jax.Array | np.ndarray) -> int:
    """Bytes of what this process writes of an array."""
    if isinstance(leaf, jax.Array):
        return sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
    return leaf.nbytes


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
