"""A config on a machine that is not there → what it takes and how long it could take: update and sampler."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.errors import UserError
from rethinker_jax.models.parts import count_parameters
from rethinker_jax.models.sharding import make_mesh, parts_of, row_shards
from rethinker_jax.planning import costs, sample
from rethinker_jax.planning.hlo import Collective
from rethinker_jax.planning.layouts import Layout, bytes_per_device, fill_mesh, lay_out
from rethinker_jax.planning.machines import Machine
from rethinker_jax.planning.named_models import NamedModel
from rethinker_jax.planning.programs import Compiled, compile_program
from rethinker_jax.planning.roofline import Roofline, link_seconds, make_roofline
from rethinker_jax.planning.update import batch_bytes, lower_update, update_state
from rethinker_jax.planning.work import Longest, UpdateWork, longest_of, update_work


@dataclasses.dataclass(frozen=True)
class Phase:
    """Update or sampler. parts: bytes of a device by what they hold at the peak; they add up to `peak_bytes`.

    why_not: what does not fit, in words; "" = it fits. collectives: each with its program's name, counts of the whole
    phase. rooflines: of its programs, which run one after the other; none where it does not fit.
    """

    peak_bytes: int
    usable_bytes: int
    parts: dict[str, int]
    flops: float
    collectives: tuple[tuple[str, Collective], ...]
    rooflines: tuple[Roofline, ...]
    why_not: str
    compile_seconds: float
    shape: dict[str, int]

    @property
    def fits(self) -> bool:
        return not self.why_not

    @property
    def collective_bytes(self) -> int:
        return sum(one.total_bytes for _, one in self.collectives)


@dataclasses.dataclass(frozen=True)
class Plan:
    machine: Machine
    mesh: MeshConfig
    model: NamedModel
    parameters: dict[str, int]
    longest: Longest
    update: Phase
    sample: Phase

    @property
    def fits(self) -> bool:
        return self.update.fits and self.sample.fits


def make_plan(config: Config, model: NamedModel, machine: Machine, devices: Sequence[jax.Device]) -> Plan:
    """Compiles everything that a step of the run would run. Raises UserError for what cannot be planned."""
    filled = fill_mesh(config.mesh, len(devices), machine.slices)
    mesh = make_mesh(filled, devices)
    layout = lay_out(config, model.config, mesh)
    longest = longest_of(config, model.config, model.max_pixels)
    made = update_state(layout)
    update = plan_update(layout, longest, machine, made)
    held = sum(made.bytes.values())
    sampler = plan_sample(layout, longest, machine, held)
    parameters = count_parameters(layout.params, config.model.freeze)
    return Plan(machine, filled, model, parameters, longest, update, sampler)


def coordinates_of(layout: Layout, machine: Machine) -> list[tuple[int, ...]]:
    """Of the mesh's devices in their order: where they stand in the slice, behind its number if there are several; or
    (host, GPU)."""
    if machine.is_gpu:
        return [divmod(int(device.id), machine.shape[1]) for device in layout.mesh.devices.flat]
    devices: list[Any] = list(layout.mesh.devices.flat)
    if machine.slices > 1:
        return [(device.slice_index, *device.coords) for device in devices]
    return [tuple(device.coords) for device in devices]


def plan_update(layout: Layout, longest: Longest, machine: Machine, made: Any) -> Phase:
    config, mesh, num_devices = layout.config, layout.mesh, layout.mesh.size
    work = update_work(config, layout.qwen, longest, parts_of(mesh))
    compiled = compile_program("update", lower_update(layout, made, work), num_devices)
    found = costs.update_costs(config, layout.qwen, work, made.bytes, mesh)
    parts = {**made.bytes, "batch": batch_bytes(layout, work)}
    parts["gradients, activations, temporaries"] = max(0, compiled.peak_bytes - sum(parts.values()))
    usable = machine.usable_bytes
    roofline = make_roofline(
        "update", machine, found.executed_flops, found.useful_flops, found.moved_bytes,
        link_seconds(machine, compiled.collectives, coordinates_of(layout, machine)),
    )  # fmt: skip
    return Phase(
        compiled.peak_bytes, usable, {name: size for name, size in parts.items() if size}, found.useful_flops,
        tuple(("update", one) for one in compiled.collectives), (roofline,) if compiled.fits else (),
        _why_not("the update", compiled, compiled.peak_bytes, usable), compiled.seconds, _shape_of(work),
    )  # fmt: skip


def _shape_of(work: UpdateWork) -> dict[str, int]:
    micro, shards, rows, length = work.batch.text.token_ids.shape
    return {
        "micro-batches": micro,
        "packed rows a shard": rows,
        "tokens a row": length,
        "keys before a row": work.batch.text.prefix_index.shape[-1],
        "targets a shard": work.batch.target_ids.shape[-1],
        "vision rows": 0 if work.batch.vision is None else work.batch.vision.segment.shape[1],
        "windows a vision row": 0 if work.batch.vision is None else work.batch.vision.segment.shape[2],
        "shards": shards,
    }


def _why_not(what: str, compiled: Compiled, peak: int, usable: int) -> str:
    if compiled.fits and peak <= usable:
        return ""
    return f"{what} wants {peak / 2**30:.2f} GiB of a device, and {usable / 2**30:.2f} GiB are there"


def plan_sample(layout: Layout, longest: Longest, machine: Machine, held: int) -> Phase:
    """`held`: bytes of the training state, which lies on the device while the sampler runs."""
    num_devices, usable = layout.mesh.size, machine.usable_bytes
    relaid = compile_program("sampler's layout", sample.lower_layout(layout), num_devices)
    if not relaid.fits:
        return _no_sampler(f"the sampler's copy of the weights does not fit: {relaid.said}", relaid.peak_bytes, usable)
    params = sample.sampling_params(layout, relaid.executable)
    copy = bytes_per_device(params)
    try:
        work = sample.sample_work(layout, longest, usable, held + copy)
    except UserError as error:
        return _no_sampler(str(error), held + copy, usable)
    steps = work.num_steps
    filled = compile_program("prefill", sample.lower_prefill(layout, longest, work, params), num_devices)
    lowered, loop_bytes = sample.lower_decode(layout, work, params)
    drawn = compile_program("decode loop", lowered, num_devices)

    between = loop_bytes if work.num_waves > 1 else 0  # slots wait while the next wave is prefilled
    peaks = {
        "new layout": held + copy + max(0, relaid.beside_arguments - copy),
        "prefill": held + filled.peak_bytes + between,
        "decode loop": held + drawn.peak_bytes,
    }
    worst = max(peaks, key=lambda name: peaks[name])
    parts = {"training state": held, "sampling copy": copy}
    if worst != "new layout":
        parts["caches"] = work.plan.bytes_per_device
    parts[f"temporaries ({worst})"] = max(0, peaks[worst] - sum(parts.values()))
    failed = next((one for one in (filled, drawn) if not one.fits), None)
    why = _why_not(f"the sampler's {worst}", failed or drawn, peaks[worst], usable)
    rooflines, flops = _sample_rooflines(layout, longest, machine, work, (relaid, filled, drawn), copy, loop_bytes)
    collectives = [("new layout", one) for one in relaid.collectives]
    collectives += [("prefill", _times(one, work.num_waves)) for one in filled.collectives]
    collectives += [("decode", _times(one, steps if None in one.loops else 1)) for one in drawn.collectives]
    shape = {
        "requests": len(work.asked.requests),
        "slots": work.plan.num_slots,
        "slots that have room": work.most_slots,
        "prompts a wave": work.plan.wave_rows,
        "waves": work.num_waves,
        "decode steps": steps,
    }
    return Phase(
        peaks[worst], usable, parts, flops, tuple(collectives), tuple(rooflines) if failed is None else (), why,
        relaid.seconds + filled.seconds + drawn.seconds, shape,
    )  # fmt: skip


def _no_sampler(why: str, peak: int, usable: int) -> Phase:
    return Phase(peak, usable, {}, 0.0, (), (), why, 0.0, {})


def _times(one: Collective, count: int) -> Collective:
    return dataclasses.replace(one, count=one.count * count)


def _sample_rooflines(
    layout: Layout,
    longest: Longest,
    machine: Machine,
    work: sample.SampleWork,
    programs: tuple[Compiled, Compiled, Compiled],
    copy: int,
    loop_bytes: int,
) -> tuple[list[Roofline], float]:
    """Of layout, prefill and decode, and the products that are needed of one device."""
    qwen, mesh, steps = layout.qwen, layout.mesh, work.num_steps
    where = coordinates_of(layout, machine)
    links = [link_seconds(machine, one.collectives, where) for one in programs]
    tensor, shards = mesh.shape["tensor"], row_shards(mesh)
    embedding = 0 if qwen.tied else qwen.vocab * qwen.d_model * np.dtype(layout.dtype).itemsize // tensor
    logits = 4 * 4 * work.plan.num_slots // shards * qwen.vocab // tensor
    prefilled = costs.prefill_costs(
        qwen, longest, work.needs.num_prompts * (shards if work.plan.shared else 1), work.num_waves, mesh.size, shards,
        tensor,
    )  # fmt: skip
    drawn = costs.decode_costs(
        qwen, longest, len(work.asked.requests), steps * work.plan.num_slots, steps,
        copy - embedding + loop_bytes + logits, mesh.size,
    )  # fmt: skip
    rooflines = [
        make_roofline("new layout", machine, 0.0, 0.0, 3.0 * copy, links[0]),
        make_roofline(
            "prefill",
            machine,
            prefilled.executed_flops,
            prefilled.useful_flops,
            prefilled.moved_bytes,
            work.num_waves * links[1],
        ),
        make_roofline("decode", machine, drawn.executed_flops, drawn.useful_flops, drawn.moved_bytes, steps * links[2]),
    ]
    return rooflines, prefilled.useful_flops + drawn.useful_flops
