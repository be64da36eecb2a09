"""Starting jax, each time in a process of its own, because it can be started only once."""

import os
import subprocess
import sys
from pathlib import Path

from commands import REPOSITORY, TIMEOUT_S, free_port

START = """
import sys
import jax
from rethinker_jax import peers
from rethinker_jax.config import Config, RunConfig
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import UserError
config = Config(run=RunConfig(compilation_cache=sys.argv[1]))
try:
    start_jax(config)
    start_jax(config)
except UserError as error:
    sys.exit(f"error: {error}")
print(jax.device_count(), jax.process_count(), jax.process_index(), jax.default_backend())
jax.jit(lambda x: x + 1)(1.0)
peers.finish()  # as the program ends
"""


def start(cache: Path | str, **environment: str) -> subprocess.Popen[str]:
    names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [sys.executable, "-c", START, str(cache)],
        cwd=REPOSITORY,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out.strip()


def test_eight_simulated_devices_and_the_cache(tmp_path: Path):
    """One device would make every sharding test pass for nothing; jax caches nothing this quick by default."""
    assert answer(start(tmp_path / "a" / "cache", JAX_NUM_CPU_DEVICES="8")) == "8 1 0 cpu"
    assert list((tmp_path / "a" / "cache").iterdir())


def test_a_cache_that_cannot_be_made_is_survived(tmp_path: Path):
    (tmp_path / "file").write_text("")
    process = start(tmp_path / "file" / "cache", JAX_PLATFORMS="cpu")
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0 and out.startswith("1 1 0")
    assert "warning: run.compilation_cache" in err


def test_two_processes_join_one_job():
    """Without joining, each would be a whole run of its own, and both would write the same files."""
    address = f"127.0.0.1:{free_port()}"
    job = {"JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [start("", **job, JAX_PROCESS_ID=str(index)) for index in range(2)]
    assert sorted(answer(process) for process in processes) == ["4 2 0 cpu", "4 2 1 cpu"]


def test_half_a_job_description_is_refused():
    """Ignoring it would start two separate runs."""
    process = start("", JAX_PLATFORMS="cpu", JAX_NUM_PROCESSES="2")
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "JAX_NUM_PROCESSES set without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID" in err
