"""Measure the sampling loop, beside transformers' `generate` if asked: one JSON line.

    python scripts/bench_sampling.py [--preset m50] [--compare hf] [--greedy] [--long-tail]

The model is random, of a shape in bench_presets.json, and so are the prompts: one image of 224 pixels (64 tokens) and
52 other tokens. It is written as a Hugging Face directory, which both sides load. End, pad and vision tokens are never
drawn, so every completion has exactly `--new-tokens` tokens. Everything is float32 and on one core (`--core`).

    cpu_s, wall_s     medians over `--repeats`; cpu_s is that of all threads of the process. `runs` has all of them
    prefill_cpu_s     the same call with one new token: images, prompts, one choice, and what the host does.
                      Ours feeds the last prompt token a second time, so one decode step is in it
    decode_cpu_s      cpu_s without prefill_cpu_s
    compile_s         in XLA, before the runs; first_call_cpu_s is all of the first call
    slot_use          share of slot steps that wrote a token; _before_drain: until the last request was begun

Our side also computes every token's log-prob and its text, transformers' does not. `--compare hf` needs torch (the
parity extra) and starts bench_sampling_hf.py, which says what its modes are. `greedy` has the most probable tokens of
all sides, the first `--check-tokens` of them: CRC-32s, and the share of completions in which a mode agrees with ours.

`--long-tail` gives every request a budget of its own: log-normal, of mean 400, cut at 2048.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rethinker_jax.config import BucketsConfig, MeshConfig, SamplingConfig
from rethinker_jax.devices import CompileCounter
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.attention_kernels import choose_attention
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen25vl import Params, define_model, init_params
from rethinker_jax.models.qwen_config import QwenConfig, read_config
from rethinker_jax.models.sharding import make_mesh
from rethinker_jax.models.weights import save_params
from rethinker_jax.prompts.positions import mrope_positions
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.run_directory import versions
from rethinker_jax.sampling.prefill import sampling_layout
from rethinker_jax.sampling.sampler import Budgets, Counters, Request, Sampler
from rethinker_jax.types import ImagePatches, Problem, Prompt

SCRIPTS = Path(__file__).parent
PRESETS = SCRIPTS / "bench_presets.json"
SEED = 0
GRID = (1, 16, 16)  # of an image of 224 pixels, in patches
TEXT_BEFORE, TEXT_AFTER = 20, 30  # tokens around the image, vision_start and vision_end not counted
TAIL_MEAN, TAIL_MAX, TAIL_SIGMA = 400, 2048, 1.0  # tokens; sigma of the logarithm


def build_directory(directory: Path, preset: str) -> QwenConfig:
    """A Hugging Face directory of the preset's shape that lacks only the weights."""
    shape = json.loads(PRESETS.read_text())[preset]
    build_model_directory(directory)
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw |= shape["text"] | {"vision_config": raw["vision_config"] | shape["vision"]}
    path.write_text(json.dumps(raw, indent=1))
    return read_config(directory)


def make_prompts(config: QwenConfig, tokenizer: ChatTokenizer, count: int) -> list[Prompt]:
    """Random text around one random image, all prompts of one length."""
    rng = np.random.default_rng(SEED)
    vision = config.vision
    image_tokens = GRID[1] * GRID[2] // vision.merge_size**2
    never = set(never_drawn(config, tokenizer))
    ordinary = np.array([index for index in range(len(tokenizer)) if index not in never])
    prompts = []
    for number in range(count):
        ids = [*rng.choice(ordinary, TEXT_BEFORE).tolist(), config.vision_start_token]
        ids += [config.image_token] * image_tokens + [config.vision_end_token]
        token_ids = np.array(ids + rng.choice(ordinary, TEXT_AFTER).tolist(), np.int32)
        is_image = token_ids == config.image_token
        positions, after = mrope_positions(token_ids, config.image_token, [GRID], vision.merge_size)
        patches = rng.standard_normal((GRID[1] * GRID[2], vision.patch_dim), np.float32)
        prompts.append(
            Prompt(
                problem=Problem(id=f"bench {number}", question="", answer=""),
                token_ids=token_ids,
                positions=positions,
                image_index=np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32),
                next_position=after,
                images=(ImagePatches(patches, GRID),),
            )
        )
    return prompts


def never_drawn(config: QwenConfig, tokenizer: ChatTokenizer) -> list[int]:
    """Ids that are suppressed on both sides: what ends or pads a completion, and what stands for vision."""
    known = set(tokenizer.never_sampled_ids(config.vocab))
    vision = known & set(range(len(tokenizer)))  # ids without a token may be drawn: here the vocabulary is made up
    return sorted(vision | {*tokenizer.end_token_ids, tokenizer.pad_id})


def tail_budgets(count: int) -> list[int]:
    """`count` budgets of a log-normal law, its scale chosen so that their mean is right after the cut."""
    noise = np.exp(TAIL_SIGMA * np.random.default_rng(SEED).standard_normal(count))
    low, high = 1.0, float(TAIL_MAX)
    for _ in range(50):
        scale = (low + high) / 2
        low, high = (scale, high) if np.clip(scale * noise, 1, TAIL_MAX).mean() < TAIL_MEAN else (low, scale)
    return [int(budget) for budget in np.clip(np.round(low * noise), 1, TAIL_MAX)]


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our side, loaded: `draw(new_tokens, temperature)` makes one call."""

    sampler: Sampler
    params: Params
    prompts: Sequence[Prompt]
    samples: int
    slots: int
    steps_per_call: int

    def draw(self, new_tokens: int, temperature: float, budgets: Sequence[int] = ()) -> tuple[np.ndarray, Counters]:
        """Tokens of all completions, one after the other: [tokens]. `budgets`: one a request, `new_tokens` the most."""
        pairs = [(prompt, sample) for prompt in self.prompts for sample in range(self.samples)]
        requests = [Request(prompt, sample) for prompt, sample in pairs]
        if budgets:
            requests = [Request(*pair, budget=budget) for pair, budget in zip(pairs, budgets, strict=True)]
        settings = SamplingConfig(
            temperature=temperature, max_new_tokens=new_tokens, num_slots=self.slots, ignore_eos=True,
            steps_per_call=self.steps_per_call,
        )  # fmt: skip
        drawn, counters = self.sampler.generate(
            self.params, requests, settings, Budgets(first=new_tokens), seed=SEED, step=0
        )
        return np.concatenate([one.completion.token_ids for one in drawn]), counters


def load_ours(directory: Path, config: QwenConfig, options: argparse.Namespace) -> Ours:
    tokenizer = ChatTokenizer(directory)
    dtype = resolve_dtype("float32", config.dtype)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1))
    model = define_model(config, attention=choose_attention("auto", config, dtype, mesh))
    geometry = VisionGeometry(config.vision.patch_size, config.vision.merge_size, config.vision.window_size)
    never = np.array(never_drawn(config, tokenizer), np.int32)
    sampler = Sampler(model, mesh, tokenizer, geometry, tokenizer.end_token_ids, never, BucketsConfig())
    params = jax.block_until_ready(sampling_layout(model, init_params(config, SEED), mesh, dtype))
    prompts = make_prompts(config, tokenizer, options.prompts)
    return Ours(sampler, params, prompts, options.samples, options.slots, options.steps_per_call)


def timed(call: Callable[[], object]) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return {"cpu_s": round(time.process_time() - cpu, 4), "wall_s": round(time.perf_counter() - wall, 4)}


def summarize(runs: Sequence[dict[str, float]], prefill: Sequence[dict[str, float]], tokens: int) -> dict[str, Any]:
    """Medians of the runs; `prefill` are the runs with one new token, none where they were not made."""
    cpu, wall = (statistics.median(run[key] for run in runs) for key in ("cpu_s", "wall_s"))
    found: dict[str, Any] = {"cpu_s": cpu, "wall_s": wall, "tokens_per_cpu_s": round(tokens / cpu, 1)}
    if prefill:
        first = statistics.median(run["cpu_s"] for run in prefill)
        found |= {"prefill_cpu_s": first, "decode_cpu_s": round(cpu - first, 4)}
    return found | {"runs": list(runs)}


def measure_ours(ours: Ours, options: argparse.Namespace, temperature: float) -> dict[str, Any]:
    budgets = tail_budgets(options.prompts * options.samples) if options.long_tail else []
    most = TAIL_MAX if budgets else options.new_tokens
    compiled = CompileCounter()
    first = timed(lambda: ours.draw(most, temperature, budgets))
    compile_s = compiled.seconds
    runs = [timed(lambda: ours.draw(most, temperature, budgets)) for _ in range(options.repeats)]
    assert compiled.seconds == compile_s, "compiled during the measured runs"
    tokens, counters = ours.draw(most, temperature, budgets)
    prefill = []
    if not budgets:
        ours.draw(1, temperature)
        prefill = [timed(lambda: ours.draw(1, temperature)) for _ in range(options.repeats)]
    return summarize(runs, prefill, len(tokens)) | {
        "tokens": len(tokens),
        "compile_s": round(compile_s, 2),
        "first_call_cpu_s": first["cpu_s"],
        "images": counters.images,
        "prompts": counters.prompts,
        "slot_use": round(counters.busy_steps / counters.slot_steps, 4),
        "slot_use_before_drain": slot_use_before_drain(counters),
    }


def slot_use_before_drain(counters: Counters) -> float | None:
    """None where every request has a slot from the start, so that there is nothing but the drain."""
    steps = counters.slot_steps - counters.drain_slot_steps
    return round((counters.busy_steps - counters.drain_busy_steps) / steps, 4) if steps else None


def measure_hf(directory: Path, ours: Ours, options: argparse.Namespace, temperature: float) -> dict[str, Any]:
    """What the child process prints: {"versions": …, "modes": {mode: {"runs", "prefill", "images", "prompts"}}}."""
    sampler = ours.sampler
    config = sampler.model.config
    save_params(directory, config, init_params(config, SEED), "float32")
    np.savez(
        directory / "prompts.npz",
        token_ids=np.stack([prompt.token_ids for prompt in ours.prompts]),
        patches=np.stack([prompt.images[0].patches for prompt in ours.prompts]),
        grids=np.stack([prompt.images[0].grid for prompt in ours.prompts]),
        suppressed=sampler.never,
    )
    job = {
        "samples": ours.samples, "new_tokens": options.new_tokens, "repeats": options.repeats,
        "check_tokens": options.check_tokens, "temperature": temperature, "image_token": config.image_token,
    }  # fmt: skip
    # GNU's OpenMP spins while it waits, which costs up to ten times the CPU seconds.
    threads = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "bench_sampling_hf.py"), str(directory), json.dumps(job)]
    child = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def check_greedy(directory: Path, ours: Ours, tokens: int) -> dict[str, Any]:
    """CRC-32 of every side's most probable tokens, and the share of completions that agree with ours."""
    mine = ours.draw(tokens, 0.0)[0].reshape(-1, tokens)
    found: dict[str, Any] = {"new_tokens": tokens, "ours": {"crc32": _crc32(mine)}}
    with np.load(directory / "greedy.npz") as modes:
        for mode, theirs in modes.items():
            same = float((theirs == mine).all(axis=1).mean())
            found[mode] = {"crc32": _crc32(theirs), "same_as_ours": same}
    return found


def _crc32(tokens: np.ndarray) -> int:
    return zlib.crc32(tokens.astype("<i4").tobytes())


def pin(core: int | None) -> int | None:
    """Binds this process and its children to one core, the first it may use if none is named; None = cannot."""
    if sys.platform != "linux":
        return None
    chosen = min(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {chosen})
    return chosen


def run(options: argparse.Namespace) -> dict[str, Any]:
    temperature = 0.0 if options.greedy else 1.0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = build_directory(directory, options.preset)
        ours = load_ours(directory, config, options)
        mine = measure_ours(ours, options, temperature)
        found: dict[str, Any] = {
            "preset": options.preset,
            "parameters": json.loads(PRESETS.read_text())[options.preset]["parameters"],
            "shapes": {
                "prompts": options.prompts, "samples": options.samples, "slots": options.slots,
                "new_tokens": "long tail" if options.long_tail else options.new_tokens,
                "prompt_tokens": len(ours.prompts[0]), "image_tokens": int((ours.prompts[0].image_index >= 0).sum()),
            },
            "dtype": "float32", "temperature": temperature, "device": jax.devices()[0].device_kind,
            "machine": platform.machine(), "core": options.core, **versions(), "ours": mine,
        }  # fmt: skip
        if options.compare == "hf":
            answer = measure_hf(directory, ours, options, temperature)
            tokens = options.prompts * options.samples * options.new_tokens
            modes = {
                mode: summarize(one["runs"], one["prefill"], tokens) | {key: one[key] for key in ("images", "prompts")}
                for mode, one in answer["modes"].items()
            }
            found["hf"] = {"versions": answer["versions"]} | modes
            speed = mine["tokens_per_cpu_s"]
            found["ratios"] = {mode: round(speed / one["tokens_per_cpu_s"], 3) for mode, one in modes.items()}
            found["greedy"] = check_greedy(directory, ours, options.check_tokens)
        return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="m50", choices=json.loads(PRESETS.read_text()))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=0, help="completions decoded at once; 0 = all")
    parser.add_argument("--steps-per-call", type=int, default=64, help="decode steps between two looks of the host")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--long-tail", action="store_true", help="a budget for every request")
    parser.add_argument("--compare", choices=("hf",))
    parser.add_argument("--check-tokens", type=int, default=32, help="greedy tokens that all sides must agree on")
    parser.add_argument("--core", type=int, help="to run on; the first that may be used if absent")
    options = parser.parse_args(arguments)
    if min(options.prompts, options.samples, options.new_tokens, options.repeats, options.check_tokens) < 1:
        parser.error("--prompts, --samples, --new-tokens, --repeats and --check-tokens: wanted 1 or more")
    if options.long_tail and options.compare:
        parser.error("--long-tail with --compare: transformers' generate has no budget for each row")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.core = pin(options.core)
    print(json.dumps(run(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
