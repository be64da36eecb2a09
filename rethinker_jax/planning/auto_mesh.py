"""The search of `search.py` for the devices that are there: what `--mesh auto` is to call. It does not yet.

In a job of several processes the memory of all has to be compared first: each looks at its own.
"""

import os

import jax

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.planning.machines import CHIPS
from rethinker_jax.planning.named_models import find_model
from rethinker_jax.planning.search import Speeds, best_mesh
from rethinker_jax.planning.suggest import RINGS
from rethinker_jax.planning.work import longest_of

# Of devices that no table knows, such as a simulation's: all that matters is that links are slow and memory is faster.
UNKNOWN = Speeds(flops=1e12, memory=1e11, links=1e10)


def choose_mesh(config: Config) -> MeshConfig:
    """The quickest mesh of all visible devices on which the config is estimated to fit. Compiles nothing.

    It hangs on the config, the kind of the devices and the memory of this process's own. Raises UserError where nothing
    fits.
    """
    model = find_model(config.model.path)
    devices = jax.devices()
    longest = longest_of(config, model.config, model)
    usable = usable_bytes(jax.local_devices()[0])
    return best_mesh(config, model.config, longest, len(devices), usable, speeds_of_device(devices[0]))


def usable_bytes(device: jax.Device) -> int:
    """Of the device's memory, that jax may take; of a CPU's, its part of the computer's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def speeds_of_device(device: jax.Device) -> Speeds:
    kind = device.device_kind
    for chip in sorted(CHIPS.values(), key=lambda chip: -len(chip.kind)):  # "TPU v5 lite" before "TPU v5"
        if kind.startswith(chip.kind):
            return Speeds(chip.peak_flops, chip.hbm_bandwidth, chip.link * (RINGS if chip.sides else 1))
    return UNKNOWN
