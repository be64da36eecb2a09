"""The update step, compiled for a mesh whose devices are not there."""

import dataclasses
from typing import Any

import numpy as np

from rethinker_jax.planning.layouts import Layout, bytes_per_device, cast_shapes, placed
from rethinker_jax.planning.work import UpdateWork
from rethinker_jax.training.optimizer import make_optimizer
from rethinker_jax.training.update import AverageRule, Updater, UpdateRule, batch_shardings

NUM_UPDATES = 100  # of the schedule: a number that shapes nothing


@dataclasses.dataclass(frozen=True)
class UpdateState:
    """Updater and shapes of everything that the step is given, and bytes of a device by what they hold."""

    updater: Updater
    state: Any
    reference: Any
    bytes: dict[str, int]


def update_state(layout: Layout) -> UpdateState:
    config = layout.config
    consistency = config.reward.consistency
    average = None
    if consistency.weight and consistency.model == "ema":
        average = AverageRule(consistency.ema_decay, consistency.ema_every)
    # The updater copies the reference from real arrays; here it is made of shapes, below.
    loss = dataclasses.replace(config.loss, reference="none")
    rule = UpdateRule(
        layout.model, make_optimizer(config.optimizer, NUM_UPDATES), loss, layout.dtype, config.model.freeze, average,
        config.optimizer.offload,
    )  # fmt: skip
    updater = Updater(rule, layout.params, layout.mesh)
    state = updater.shapes(layout.params)
    base = {part: leaves for part, leaves in layout.params.items() if part != "lora"}
    reference = cast_shapes(base, layout.dtype) if config.loss.reference == "start" else {}
    held = {
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
        "average": bytes_per_device(state.average),
        "reference": bytes_per_device(reference),
    }
    return UpdateState(updater, state, reference, held)


def lower_update(layout: Layout, made: UpdateState, work: UpdateWork) -> Any:
    """The step, traced and lowered: `.compile()` asks the compiler."""
    batch = placed(work.batch, batch_shardings(work.batch, layout.mesh))
    reference = {} if layout.config.loss.kl == "reward" else made.reference
    return made.updater.compiled_step.lower(made.state, batch, reference, np.float32(0))


def batch_bytes(layout: Layout, work: UpdateWork) -> int:
    return bytes_per_device(placed(work.batch, batch_shardings(work.batch, layout.mesh)))


__all__ = ["UpdateState", "batch_bytes", "lower_update", "update_state"]
