"""How long a program would take if nothing but arithmetic, memory and links took time: a bound, not a measurement.

Three times are counted on their own: products at the device's peak, bytes through its memory, bytes through its links.
`predicted_seconds` is the longest of the three, as if all were done at the same time. What a run loses to that, kernels
below the peak, transfers that nothing hides, waiting for the host, is not in it.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from rethinker_jax.planning.hlo import Collective
from rethinker_jax.planning.machines import Machine

HOP_SECONDS = 1e-6  # for a message to the next chip of a slice; of GPUs nothing is counted


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one program, on one device: seconds of each kind, and the products that the model needs of it."""

    name: str
    compute: float
    memory: float
    links: float
    useful_flops: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def without_overlap(self) -> float:
        return self.compute + self.memory + self.links

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(times, key=lambda name: times[name])


def mfu(programs: Sequence[Roofline]) -> float:
    """Share of the device's peak that the products needed are, of programs that run one after the other."""
    seconds = sum(one.seconds for one in programs)
    useful = math.fsum(one.useful_flops / one.peak_flops for one in programs)
    return useful / seconds if seconds else 0.0


def link_bandwidth(machine: Machine, group: Sequence[int], where: Sequence[tuple[int, ...]]) -> tuple[float, int]:
    """(bytes a second that a device of the group can take in, hops) of a collective among devices of these numbers.

    `where`: coordinates of every device in the order of the mesh, of several slices behind their number; of GPUs
    (host, GPU).

    Between slices: the network. In a slice: one link for every side along which the group is spread, two where that
    side is a ring. GPUs: NVLink inside a host, the network where the group spans several.
    """
    chip = machine.chip
    if machine.is_gpu:
        hosts = {where[number][0] for number in group}
        return (chip.link if len(hosts) == 1 else chip.network), 0
    coordinates = [where[number] for number in group]
    if machine.slices > 1:
        if len({place[0] for place in coordinates}) > 1:
            return chip.network, 0
        coordinates = [place[1:] for place in coordinates]
    links = hops = 0
    for side in range(chip.sides):
        spread = len({place[side] for place in coordinates})
        if spread > 1:
            ring = spread == machine.shape[side] and spread % chip.wraps == 0
            links += 2 if ring else 1
            hops += spread // 2 if ring else spread - 1
    # Two cores of one chip: as fast as one link.
    return chip.link * max(links, 1), max(hops, 1)


def link_seconds(machine: Machine, collectives: Iterable[Collective], where: Sequence[tuple[int, ...]]) -> float:
    """Of all collectives, one after the other."""
    total = 0.0
    for one in collectives:
        if len(one.group) < 2:
            continue
        bandwidth, hops = link_bandwidth(machine, one.group, where)
        if one.kind == "collective-permute" and not machine.is_gpu:
            # To one neighbour; XLA sends the other half the other way round, at the same time.
            bandwidth, hops = machine.chip.link * (2 if len(one.group) > 2 else 1), 1
        latency = HOP_SECONDS * hops * (2 if one.kind == "all-reduce" else 1) if not machine.is_gpu else 0.0
        total += one.count * (one.bytes / bandwidth + latency)
    return total


def make_roofline(
    name: str, machine: Machine, executed_flops: float, useful_flops: float, moved_bytes: float, link_time: float
) -> Roofline:
    """All of one device."""
    chip = machine.chip
    return Roofline(
        name,
        executed_flops / chip.peak_flops,
        moved_bytes / chip.hbm_bandwidth,
        link_time,
        useful_flops,
        chip.peak_flops,
    )
