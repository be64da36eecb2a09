"""Starting jax: which devices, which processes, where compiled programs are kept. Called before jax is used."""

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Not public: where jax keeps the client of the coordination service, and how it finds the job of a launcher.
from jax._src import distributed
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.clusters import ClusterEnv

from rethinker_jax import __version__, peers
from rethinker_jax.config import Config
from rethinker_jax.errors import UserError
from rethinker_jax.output_files import hash_of
from rethinker_jax.roll_call import call_the_roll


def start_jax(config: Config) -> None:
    """Sets jax up for this process; may be called again, and does nothing of what was done already.

    JAX_NUM_CPU_DEVICES=n is read by jax itself; as it asks for a simulation, the CPU is chosen unless JAX_PLATFORMS
    says otherwise. JAX_COMPILATION_CACHE_DIR goes before `run.compilation_cache`.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES") and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    if running_in_cloud_tpu_vm:
        os.environ["XLA_FLAGS"] = tpu_flags(os.environ.get("XLA_FLAGS", ""))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        _set_compilation_cache(config.run.compilation_cache)
    # jax skips programs that compile in under a second; a small run is made of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not jax.distributed.is_initialized():
        _join_job(config)


def tpu_flags(given: str) -> str:
    """XLA_FLAGS for TPUs: what was given, and without the pass that takes sums over devices out of loops.

    It does not take the update of a 7B model (libtpu 0.0.42: `while_loop_all_reduce_code_motion.cc ... RET_CHECK`), and
    makes wrong sums of an embedding's gradients over micro-batches (0.0.48: github.com/openxla/xla/issues/49143).
    """
    option = "--xla_disable_hlo_passes="
    return given if option in given else f"{given} {option}while-loop-all-reduce-code-motion".strip()


# Peak of dense bfloat16 products of one device, in TFLOP/s, by the beginning of its kind; the makers' figures.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
    "TPU7x": 1153.5,  # a chip is two devices to jax
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


def _join_job(config: Config) -> None:
    """Joins the other processes of a job, if a launcher started this one, and begins to watch them.

    Raises UserError where a process does not belong to the job, and Stopped where one is missing after
    RETHINKER_JOIN_TIMEOUT_S seconds (300). A job that has not moved for RETHINKER_STALL_TIMEOUT_S (3600: compiling a
    large program takes minutes) is ended.
    """
    found = find_job()
    if found is None:
        return
    address, count, index = found
    timeout_s, stall_s = _seconds("RETHINKER_JOIN_TIMEOUT_S", 300), _seconds("RETHINKER_STALL_TIMEOUT_S", 3600)
    call_the_roll(address, index, count, _program(config), timeout_s)
    # The signals are ours, and our watch is quicker than jax's heartbeat and says more.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(
        address, count, index, initialization_timeout=60, heartbeat_timeout_seconds=100, shutdown_timeout_seconds=60
    )
    board = distributed.global_state.client
    assert board is not None, "jax.distributed was initialized"
    peers.watch(board, index, count, address, stall_s)


def find_job() -> tuple[str, int, int] | None:
    """(coordinator's address, processes, number of this one), or None where this process was started alone.

    Read are JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID; else what srun and mpirun set for more
    than one process, and on TPU hosts what GKE sets or the machine's metadata say. Raises UserError where a launcher
    started several processes and does not say where they meet: alone, each would be a run of its own.
    """
    return _job_of_environment() or _job_of_launcher()


def _job_of_environment() -> tuple[str, int, int] | None:
    """From the variables that are jax's own. The address alone is for a launcher that does not tell it."""
    env = os.environ
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if env.get(name)]
    if len(given) == len(names):
        address, processes, process = (env[name] for name in names)
        if not (processes.isdigit() and process.isdigit() and int(process) < int(processes)):
            raise UserError(
                f"JAX_PROCESS_ID={process}, JAX_NUM_PROCESSES={processes}: wanted numbers, the first below the second"
            )
        return address, int(processes), int(process)
    if given and given != ["JAX_COORDINATOR_ADDRESS"]:
        raise UserError(
            f"{' and '.join(given)} set without {' and '.join(sorted(set(names) - set(given)))}; wanted all three"
        )
    return None


def _job_of_launcher() -> tuple[str, int, int] | None:
    """From a launcher that jax knows (jax/_src/clusters: the variables' names are from there)."""
    env = os.environ
    on_tpu = env.get("JAX_PLATFORMS") != "cpu"
    several = {
        "SLURM_STEP_NUM_TASKS": _number("SLURM_STEP_NUM_TASKS") > 1,
        "OMPI_COMM_WORLD_SIZE": _number("OMPI_COMM_WORLD_SIZE") > 1,
        "TPU_WORKER_HOSTNAMES": on_tpu and "," in env.get("TPU_WORKER_HOSTNAMES", ""),
        "MEGASCALE_NUM_SLICES": on_tpu and _number("MEGASCALE_NUM_SLICES") > 1,
    }
    launcher = next((name for name, says_so in several.items() if says_so), None)
    if launcher is None and not (on_tpu and running_in_cloud_tpu_vm):
        return None
    told = env.get("JAX_COORDINATOR_ADDRESS") or None
    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(told, None, None, None, None, 60)
    if launcher == "OMPI_COMM_WORLD_SIZE" and count is None:  # Open MPI 5 has not told jax's detection that it is there
        count, index = _number(launcher), _number("OMPI_COMM_WORLD_RANK", 0)
    if address is None or count is None or index is None:
        if launcher is None:
            return None
        raise UserError(
            f"{launcher}={env[launcher]}: this is one of several processes, and jax did not find out where they meet. "
            "Set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID (under Open MPI 5 the first "
            f"is enough), or unset {launcher} for a run of its own."
        )
    return (address, count, index) if count > 1 else None


def _number(name: str, default: int = 1) -> int:
    said = os.environ.get(name) or str(default)
    if not said.isdecimal():
        raise UserError(f"{name}={said}: wanted a whole number, as the launcher sets it")
    return int(said)


def _seconds(name: str, default: float) -> float:
    said = os.environ.get(name, str(default))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{name}={said}: wanted a number of seconds above 0")
    return seconds


def _program(config: Config) -> dict[str, str]:
    """What has to be the same in all processes of a job, by what it is called."""
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, compilation_cache=""),
        verifier=dataclasses.replace(config.verifier, num_workers=0),
    )
    return {
        "version of rethinker_jax": __version__,
        "version of jax": jax.__version__,
        "command line": " ".join(peers.COMMAND)[:1000],
        "config": hash_of([config])[:12],
    }
