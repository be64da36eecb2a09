"""Measure what loading a checkpoint costs: host memory over time, and bytes read by each process. Linux only.

    python scripts/measure_loading.py make DIR [--layers 12] [--width 2048] [--dtype bfloat16]
    python scripts/measure_loading.py load DIR [--mesh fsdp=8] [--devices 8] [--processes 1] [--save OUT]

`make` writes random weights in several files with an index (the default: 2.4 GB). `load` starts fresh processes with
simulated CPU devices, loads the directory as training does, into float32, and prints one JSON line a process. With
`--save` it writes them again, in the dtype of config.json and files of half a gigabyte.

    params        bytes of the parameters on this process's devices, replicas counted
    largest       bytes of the largest tensor of the checkpoint, as stored
    peak_anon     the most anonymous memory above that before the load; what was allocated
    peak_file     the same of file-backed pages: code, and what a mapped file would leave behind
    peak_rss      the same of the kernel's own high-water mark of both (VmHWM)
    read, stored  bytes that this process read (/proc/self/io), and bytes of the checkpoint's files
    save_peak     the most anonymous memory above that before saving
    curve         [bytes read, anonymous bytes above the start] in twelve steps
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 500 * 10**6  # of a file


def make_config(layers: int, width: int, dtype: str) -> dict[str, Any]:
    """A Qwen2.5-VL with the proportions of the published 3B, and a quarter of its vocabulary."""
    heads = width // 128
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": 16 * width,
        "hidden_size": width,
        "intermediate_size": 43 * width // 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(2, heads // 8),
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
        "vision_config": {
            "depth": max(2, layers * 2 // 3),
            "hidden_size": 5 * width // 8,
            "intermediate_size": 13 * width // 8,
            "num_heads": max(2, heads // 2),
            "in_chans": 3,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    }


def make(directory: Path, layers: int, width: int, dtype: str) -> None:
    from rethinker_jax.models.qwen_config import read_config
    from rethinker_jax.models.weight_table import weight_table

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(make_config(layers, width, dtype), indent=1))
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    shapes = {name: entry.hf_shape for entry in weight_table(read_config(directory)) for name in entry.names}
    for name, shape in shapes.items():
        values = rng.random(shape, np.float32) - np.float32(0.5)
        shard[name] = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def memory() -> tuple[int, int, int]:
    """(anonymous, file-backed, high-water mark) bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("Rss", "VmHWM"))}
    return 1024 * int(found["RssAnon"]), 1024 * int(found["RssFile"]), 1024 * int(found["VmHWM"])


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


class Watch:
    """Samples memory and reading every 5 ms, as differences to the start: (bytes read, anonymous, file-backed)."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int, int]] = []
        self.peak_rss = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self._start = (bytes_read(), *memory())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        self.peak_rss = memory()[2] - self._start[1] - self._start[2]

    def _run(self) -> None:
        while not self._done.wait(0.005):
            self._sample()

    def _sample(self) -> None:
        read, (anon, file, _) = bytes_read(), memory()
        self.samples.append((read - self._start[0], anon - self._start[1], file - self._start[2]))


def load(directory: Path, mesh: str, output: Path | None) -> None:
    """What one process does; its devices and its place in the job are in the environment."""
    import jax
    import jax.numpy as jnp

    from rethinker_jax.config import Config, RunConfig
    from rethinker_jax.devices import start_jax
    from rethinker_jax.mesh_spec import parse_mesh
    from rethinker_jax.models import weights
    from rethinker_jax.models.qwen_config import read_config
    from rethinker_jax.models.sharding import make_mesh
    from rethinker_jax.system import training_shardings

    start_jax(Config(run=RunConfig(compilation_cache="")))
    config = read_config(directory)
    shardings = training_shardings(config, make_mesh(parse_mesh(mesh)))
    jax.block_until_ready(jnp.ones(8) + 1)  # the compiler is part of the start, not of the load
    started, cpu = time.monotonic(), time.process_time()
    with Watch() as watch:
        config, params = weights.load_params(directory, config, jnp.float32, shardings)
        jax.block_until_ready(params)
    held = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    samples = watch.samples
    found = {
        "params": sum(held),
        "largest": largest_tensor(directory),
        "peak_anon": max(anon for _, anon, _ in samples),
        "peak_file": max(file for _, _, file in samples),
        "peak_rss": watch.peak_rss,
        "read": samples[-1][0],
        "stored": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }
    if output is not None:
        output.mkdir(exist_ok=True)
        weights.MAX_SHARD_BYTES = SHARD_BYTES
        with Watch() as saving:
            weights.save_params(output, config, params, config.dtype)
        found["save_peak"] = max(anon for _, anon, _ in saving.samples)
    marks = np.linspace(0, samples[-1][0], 12)
    found["curve"] = [next((read, anon) for read, anon, _ in samples if read >= mark) for mark in marks]
    print(json.dumps(found))


def largest_tensor(directory: Path) -> int:
    from rethinker_jax.models.safetensors_files import open_safetensors

    with open_safetensors(directory) as files:
        return max(int(np.prod(stored.shape)) * stored.dtype.itemsize for stored in files.where.values())


def start_processes(directory: Path, mesh: str, output: Path | None, devices: int, processes: int) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // processes)}
    if processes > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, __file__, "one", str(directory), "--mesh", mesh]
    command += ["--save", str(output)] if output else []
    started = [
        subprocess.Popen(
            command,
            env=environment | ({"JAX_PROCESS_ID": str(number)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    for process in started:
        out, _ = process.communicate()
        print(*[line for line in out.splitlines() if line.startswith("{")], sep="\n")  # gloo prints too
    return max(abs(process.returncode) for process in started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "load", "one"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mesh", default="fsdp=8")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.what == "make":
        make(options.directory, options.layers, options.width, options.dtype)
    elif options.what == "one":
        load(options.directory, options.mesh, options.save)
    else:
        return start_processes(options.directory, options.mesh, options.save, options.devices, options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
