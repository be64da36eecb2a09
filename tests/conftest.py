"""One compilation cache for the whole suite, its subprocesses included: most of the suite's time is compiling.

XLA's own passes are all there; LLVM behind them, which takes most of the time, makes less of an effort: programs of the
tests compile in about half the time and run as fast.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = (
    "--xla_backend_optimization_level=1",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",  # a busy machine may keep a simulated device waiting
    os.environ.get("XLA_FLAGS", ""),  # of two the last one holds
)
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()


# The files that take longest, the longest first: one of them begun last would be waited for by the other process alone.
LONG = (
    "test_end_to_end.py", "test_pipeline_runs.py", "test_kills.py", "test_processes.py", "test_elastic.py",
    "test_commands_in_processes.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long comes first, if the order is left alone (`--no-loadscope-reorder`)."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For modules whose tests cost little but compiling."""
    import jax  # after the environment above is set

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
