"""Starting jax: which devices, which processes, where compiled programs are kept. Called before jax is used."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rethinker_jax.config import Config
from rethinker_jax.errors import UserError


def start_jax(config: Config) -> None:
    """Sets jax up for this process; may be called again, and does nothing of what was done already.

    JAX_NUM_CPU_DEVICES=n is read by jax itself; as it asks for a simulation, the CPU is chosen unless JAX_PLATFORMS
    says otherwise. JAX_COMPILATION_CACHE_DIR goes before `run.compilation_cache`.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES") and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        _set_compilation_cache(config.run.compilation_cache)
    # jax skips programs that compile in under a second; a small run is made of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not jax.distributed.is_initialized():
        _join_job()


# Peak of dense bfloat16 products of one device, in TFLOP/s, by the beginning of its kind; the makers' figures.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
    "TPU7x": 2307.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


def peak_flops(kind: str, asked_tflops: float, dtype: Any) -> float | None:
    """FLOP/s that a device of this kind could do: as asked, or of its kind in bfloat16; None where that is unknown."""
    if asked_tflops:
        return asked_tflops * 1e12
    known = [peak for name, peak in PEAK_TFLOPS.items() if kind.startswith(name)]
    return known[0] * 1e12 if known and jnp.dtype(dtype) == jnp.bfloat16 else None


class CompileCounter:
    """Programs that this process compiled, or took from the compilation cache, since the counter was made."""

    def __init__(self) -> None:
        self._durations = _compile_durations()
        self._start = len(self._durations)

    @property
    def count(self) -> int:
        return len(self._durations) - self._start

    @property
    def seconds(self) -> float:
        return sum(self._durations[self._start :])


@functools.cache
def _compile_durations() -> list[float]:
    """Grows with every program: jax has no way to take a listener back, so there is one a process."""
    durations: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return durations


def _set_compilation_cache(directory: str) -> None:
    """Uses the directory, or none where it is "" or cannot be made: a run without a cache is slower, not wrong."""
    if not directory:
        return
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"warning: run.compilation_cache: {path} cannot be made ({error}); compiling anew", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))


def _join_job() -> None:
    """Joins the other processes of a multi-host job, if a launcher started this one.

    Read are JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, and the variables that srun, mpirun and
    the TPU runtime set for more than one process; with those jax finds the rest by itself.
    """
    env = os.environ
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if env.get(name)]
    if len(given) == len(names):
        address, processes, process = (env[name] for name in names)
        if not (processes.isdigit() and process.isdigit() and int(process) < int(processes)):
            raise UserError(
                f"JAX_PROCESS_ID={process}, JAX_NUM_PROCESSES={processes}: wanted numbers, the first below the second"
            )
        jax.distributed.initialize(address, int(processes), int(process))
    elif (
        int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    ):
        jax.distributed.initialize()
    elif given and given != ["JAX_COORDINATOR_ADDRESS"]:
        raise UserError(
            f"{' and '.join(given)} set without {' and '.join(sorted(set(names) - set(given)))}; wanted all three"
        )
