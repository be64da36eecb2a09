"""`--mesh auto`: the search of `search.py` for the devices that are there. Nothing is compiled.

The sizes that it finds hang on the config, the model's shapes, the number and kind of the devices, and the smallest
memory among the processes of a job: all of them find the same.
"""

import dataclasses
import os

import jax

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.device_bytes import Work, draws, learns
from rethinker_jax.errors import UserError
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.models.sharding import num_slices
from rethinker_jax.planning.machines import CHIPS
from rethinker_jax.planning.search import MARGIN, RINGS, Estimate, Speeds, fitting
from rethinker_jax.planning.work import longest_of
from rethinker_jax.processes import exchange

GIB = 2**30
# Of devices that no table knows, such as a simulation's: all that matters is that links are slow and memory is faster.
UNKNOWN = Speeds(flops=1e12, memory=1e11, links=1e10)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A mesh, and in a few words why this one."""

    mesh: MeshConfig
    why: str


def choose_mesh(config: Config, qwen: QwenConfig, max_pixels: int, work: Work) -> Chosen:
    """The quickest mesh of all visible devices on which the work is estimated to fit.

    All processes of a job must call it. Raises UserError where nothing fits.
    """
    devices = jax.devices()
    usable = min(exchange(usable_bytes(jax.local_devices()[0])))
    speeds, slices = speeds_of_device(devices[0]), num_slices(devices)
    return best_mesh(config, qwen, max_pixels, len(devices), usable, speeds, work, slices)


def best_mesh(
    config: Config,
    qwen: QwenConfig,
    max_pixels: int,
    num_devices: int,
    usable: int,
    speeds: Speeds,
    work: Work = "rl",
    slices: int = 1,
) -> Chosen:
    """The quickest whose estimate fits. Raises UserError where none does, naming the least that is wanted."""
    config = as_searched(config, work)
    longest = longest_of(config, qwen, max_pixels)
    found, least = fitting(config, qwen, longest, num_devices, usable, speeds, work=work, slices=slices)
    if found:
        return Chosen(found[0].mesh, _why(found, usable))
    raise UserError(
        f"--mesh auto: no mesh of {num_devices} device{'s' * (num_devices > 1)} is estimated to fit into {MARGIN:.0%} "
        f"of {usable / GIB:.1f} GiB; the least is {least.peak_bytes / GIB:.1f} GiB with {mesh_words(least.mesh)}. "
        f"Take more devices, {', '.join(_levers(config, work))}. A mesh that is named is not held against the estimate."
    )


def _levers(config: Config, work: Work) -> list[str]:
    """What could be done to fit that is not done yet."""
    found = ["lower training.micro_batch_tokens"] if work != "sample" else []
    if draws(work, config):
        found.append("lower sampling.prefill_tokens or sampling.max_new_tokens")
    if learns(work):
        done = {
            "model.remat=full": config.model.remat == "full",
            "optimizer.moments=mu_bfloat16": config.optimizer.moments != "float32",
            "optimizer.offload=true": config.optimizer.offload,
        }
        left = [words for words, is_done in done.items() if not is_done]
        found += [f"set {' or '.join(left)}"] if left else []
    return found


def as_searched(config: Config, work: Work) -> Config:
    """The config with the sizes of the work where the search reads them: of fine-tuning, its batch and completions."""
    if work != "sft":
        return config
    sft = config.sft
    return dataclasses.replace(
        config,
        sampling=dataclasses.replace(config.sampling, max_new_tokens=sft.max_completion_tokens),
        rollout=dataclasses.replace(config.rollout, prompts_per_step=sft.batch_size, samples_per_prompt=1),
        training=dataclasses.replace(config.training, batch_size=sft.batch_size),
        rethink=dataclasses.replace(config.rethink, rule="off"),
    )


def _why(found: list[Estimate], usable: int) -> str:
    best = found[0]
    needs = f"estimated to take {best.peak_bytes / GIB:.3g} of {usable / GIB:.3g} GiB a device"
    if len(found) == 1:
        return f"the only one that fits, {needs}"
    slower = found[1].seconds / best.seconds - 1
    return f"the quickest of {len(found)} that fit, {needs}; {mesh_words(found[1].mesh)} would take {slower:.0%} longer"


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
