"""Measure a whole GRPO step, rollout to AdamW, beside TRL's GRPOTrainer if asked: one JSON line.

    python scripts/bench_update.py [--preset m50] [--compare trl] [--trl-python PATH]

The model is bench_sampling.py's, random and written as a Hugging Face directory that both sides load. A prompt is one
picture of 224 pixels (64 tokens) and a question of digits in the chat template, 116 tokens in all. End, pad and vision
tokens are never drawn, so every completion has exactly `--new-tokens` tokens. A step is one rollout of
`--prompts` x `--samples` rows and one optimizer step on all of them: rewards (the share of odd token ids, on both
sides, so that no verifier is measured), advantages by the group's standard deviation, the clipped loss averaged over
tokens, no reference model, AdamW with the gradient clipped. Everything is float32 and on one core (`--core`).

    cpu_s, wall_s       medians over `--repeats` warm steps; cpu_s is that of all threads. `runs` has all of them
    tokens_per_cpu_s    completion tokens, by the CPU seconds of the whole step
    phases              medians of CPU seconds. Ours: rollout, until the last token is drawn, and update, all that
                        follows. Log-probs are part of the update: in float32 the old ones are the sampler's.
                        TRL's are explained in bench_update_trl.py
    first_step          compiling and, of ours, building the prompts are in it; no warm step compiles
    ratio               trl.cpu_s / ours.cpu_s; _without_data: without TRL's phases data and processor, since ours keeps
                        prompts that were built once
    floor               bench_floor.py counts the products and says how long they take; repeated: the same without
                        sharing, which is how TRL works

A trainer's time depends on the rows that it runs at once. `--trl-micro-batch` gives that to TRL, 0 = all of them; of
several its fastest counts, and unless told otherwise it is tried with all and with 8. Ours runs all at once, unless
`--set` changes its config.

`--compare trl` starts bench_update_trl.py with `--trl-python`, the interpreter of an environment made by

    pip install torch==2.13.0
    pip install transformers==5.23.0 trl==1.16.0 accelerate datasets pillow
    pip install --no-deps torchvision==0.28.0

torch is its build for CPUs, of which there is no torchvision: the script gets along with the one for CUDA.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_floor import floor
from bench_sampling import GRID, PRESETS, SCRIPTS, SEED, build_directory, never_drawn, pin
from PIL import Image

from rethinker_jax.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from rethinker_jax.config_file import load_config, save_config
from rethinker_jax.errors import UserError
from rethinker_jax.loop import Progress, begin, train_step
from rethinker_jax.models.qwen25vl import init_params
from rethinker_jax.models.weights import save_params
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.rewards.scorer import Pending, Response, Scorer
from rethinker_jax.run_data import Splits
from rethinker_jax.run_directory import RunDirectory, versions
from rethinker_jax.sampling.sampler import Sampler
from rethinker_jax.system import System, load_system
from rethinker_jax.training.checkpoint import CheckpointStore
from rethinker_jax.training.update import Updater
from rethinker_jax.types import Problem, Verdict

PROMPT_TOKENS = 116
PIXELS = 224
LEARNING_RATE = 1e-6
PEER_MODULES = ("torch", "torchvision", "transformers", "trl", "accelerate", "datasets")
MICRO_BATCH = 8  # of TRL, the size that was fastest where its activations do not fit into the caches
LOGGED = ("reward", "entropy", "gradient_norm", "zero_advantage_share", "images_encoded", "prompts_prefilled")


def make_problems(tokenizer: ChatTokenizer, count: int) -> list[Problem]:
    """Random pictures, and as many random digits, each a token, as make the prompt `PROMPT_TOKENS` long."""
    rng = np.random.default_rng(SEED)
    problems = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)).save(file, "PNG")
        bare = Problem(id=f"bench {number}", question="", answer="", images=(file.getvalue(),))
        around = len(tokenizer.encode_problem(bare, "none", [GRID[1] * GRID[2] // 4]))
        digits = rng.integers(0, 10, PROMPT_TOKENS - around)
        problems.append(dataclasses.replace(bare, question="".join(map(str, digits))))
    return problems


class OddIds(Scorer):
    """The reward is the share of odd token ids. Takes the scorer's place, and notes when the last token was drawn."""

    def __init__(self) -> None:  # without the processes of the verifier
        self.drawn_at = 0.0  # on the clock of this process's CPU time

    def submit(self, responses: Sequence[Response]) -> Pending:
        self.drawn_at = time.process_time()
        return Rewarded(tuple(responses))


class Rewarded(Pending):
    def __init__(self, responses: tuple[Response, ...]) -> None:
        object.__setattr__(self, "responses", responses)  # all that is read: the dataclass is frozen

    def done(self) -> bool:
        return True

    def result(self) -> list[Verdict]:
        rewards = [float(np.mean(completion.token_ids % 2)) for _, completion in self.responses]
        return [Verdict("wrong", reward, None, "odd ids") for reward in rewards]


def make_config(directory: Path, options: argparse.Namespace) -> Config:
    rows = options.prompts * options.samples
    config = Config(
        run=RunConfig(seed=SEED, num_steps=1 + options.repeats, compilation_cache=""),
        model=ModelConfig(path=str(directory), dtype="float32"),
        mesh=MeshConfig(data=1, fsdp=1),
        data=DataConfig(prompt_template="none"),
        sampling=SamplingConfig(max_new_tokens=options.new_tokens, ignore_eos=True),
        rollout=RolloutConfig(prompts_per_step=options.prompts, samples_per_prompt=options.samples),
        advantage=AdvantageConfig(estimator="group_std"),
        replay=ReplayConfig(mode="none"),
        loss=LossConfig(clip_high=0.2, nll_coefficient=0.0),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0, b2=0.999),
        training=TrainingConfig(batch_size=rows),
    )
    path = directory / "bench.yaml"
    save_config(config, path)
    return load_config(path, options.set)


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our side, loaded: `step()` is one step of a run, as the loop makes it."""

    config: Config
    system: System
    problems: tuple[Problem, ...]
    updater: Updater
    progress: Progress
    run: RunDirectory

    def step(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Times, as an entry of `runs`, and the step's metrics."""
        scorer, order = OddIds(), DataOrder(len(self.problems), SEED)
        cpu, wall = time.process_time(), time.perf_counter()
        metrics, groups = train_step(
            self.config, self.system, self.updater, self.problems, order, scorer, self.progress, self.run
        )
        jax.block_until_ready(self.progress.state)
        ended, wall = time.process_time(), time.perf_counter() - wall
        lengths = {len(rollout.completion) for group in groups for rollout in group.rollouts}
        assert lengths == {self.config.sampling.max_new_tokens}, lengths
        phases = {"rollout": round(scorer.drawn_at - cpu, 4), "update": round(ended - scorer.drawn_at, 4)}
        return {"cpu_s": round(ended - cpu, 4), "wall_s": round(wall, 4), "phases": phases}, metrics


def load_ours(directory: Path, options: argparse.Namespace) -> Ours:
    config = make_config(directory, options)
    system = load_system(config)
    tokenizer = system.tokenizer
    never = np.array(never_drawn(system.model.config, tokenizer), np.int32)
    sampler = Sampler(
        system.model, system.mesh, tokenizer, system.geometry, tokenizer.end_token_ids, never, config.buckets
    )
    system = dataclasses.replace(system, sampler=sampler)
    problems = tuple(make_problems(tokenizer, options.prompts))
    with contextlib.closing(CheckpointStore(directory / "run" / "checkpoints", 1)) as store:
        updater, progress = begin(config, system, store, Splits(problems, ()), (time.monotonic(), time.process_time()))
    return Ours(config, system, problems, updater, progress, RunDirectory(directory / "run", "rl"))


def median_of(runs: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians of the runs, each phase's for itself, so that their sum may differ a little from `cpu_s`."""
    cpu, wall = (statistics.median(run[key] for run in runs) for key in ("cpu_s", "wall_s"))
    phases = {name: statistics.median(run["phases"][name] for run in runs) for name in runs[0]["phases"]}
    return {
        "cpu_s": round(cpu, 4), "wall_s": round(wall, 4), "tokens_per_cpu_s": round(tokens / cpu, 1),
        "phases": {name: round(seconds, 4) for name, seconds in phases.items()}, "runs": list(runs),
    }  # fmt: skip


def measure_ours(ours: Ours, options: argparse.Namespace) -> dict[str, Any]:
    first, metrics = ours.step()
    compile_s, runs = metrics["seconds_compile"], []
    for _ in range(options.repeats):
        run, metrics = ours.step()
        assert metrics["seconds_compile"] == 0, "compiled during the measured steps"
        runs.append(run)
    tokens = options.prompts * options.samples * options.new_tokens
    return median_of(runs, tokens) | {
        "settings": options.set,
        "first_step": first | {"compile_s": round(compile_s, 2)},
        "logged": {name: metrics[name] for name in LOGGED if name in metrics},
    }


def check_peer(python: str) -> None:
    """Raises UserError where this interpreter cannot run the other side."""
    code = f"import importlib.util as u; print(*[m for m in {PEER_MODULES} if u.find_spec(m) is None])"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--trl-python: wanted a Python interpreter, but {python} does not run: {error}.") from error
    if missing := answer.stdout.split():
        raise UserError(
            f"--compare trl: {python} lacks {', '.join(missing)}. Name the interpreter of an environment that has all "
            "of it with --trl-python; `--help` says how to make one."
        )


def measure_trl(directory: Path, ours: Ours, options: argparse.Namespace, micro_batch: int) -> dict[str, Any]:
    built = [ours.system.builder.build(problem) for problem in ours.problems]
    np.savez(
        directory / "prompts.npz",
        token_ids=np.stack([prompt.token_ids for prompt in built]),
        patches=np.stack([prompt.images[0].patches for prompt in built]),
    )
    for number, problem in enumerate(ours.problems):
        image = problem.images[0]
        assert isinstance(image, bytes)
        (directory / f"image_{number}.png").write_bytes(image)
    job = {name: vars(options)[name] for name in ("prompts", "samples", "new_tokens", "repeats")} | {
        "micro_batch": micro_batch, "learning_rate": LEARNING_RATE, "suppressed": ours.system.sampler.never.tolist(),
        "questions": [problem.question for problem in ours.problems],
    }  # fmt: skip
    # GNU's OpenMP spins while it waits, which costs up to ten times the CPU seconds.
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [options.trl_python, str(SCRIPTS / "bench_update_trl.py"), str(directory), json.dumps(job)]
    child = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(child.stdout.splitlines()[-1])
    first, *runs = answer["steps"]
    tokens = options.prompts * options.samples * options.new_tokens
    counts = {name: runs[-1][name] for name in ("images", "tokens", "decoder_passes")}
    runs = [{key: run[key] for key in ("cpu_s", "wall_s", "phases")} for run in runs]
    found = median_of(runs, tokens) | {"micro_batch": micro_batch or options.prompts * options.samples}
    return found | {"first_step": first, "versions": answer["versions"], "logged": answer["logged"], "run": counts}


def compare(mine: Mapping[str, Any], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The other side by its fastest setting, and how many times our CPU seconds it takes."""
    best = min(theirs, key=lambda one: one["cpu_s"])
    trained = best["cpu_s"] - best["phases"]["data"] - best["phases"]["processor"]
    return {
        "trl": best,
        "trl_others": [{key: one[key] for key in ("micro_batch", "cpu_s", "runs")} for one in theirs if one != best],
        "ratio": round(best["cpu_s"] / mine["cpu_s"], 3),
        "ratio_without_data": round(trained / mine["cpu_s"], 3),
    }


def hardware() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {platform.machine()}, {os.cpu_count()} cores"


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.compare:
        check_peer(options.trl_python)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = build_directory(directory, options.preset)
        save_params(directory, config, init_params(config, SEED), "float32")
        ours = load_ours(directory, options)
        mine = measure_ours(ours, options)
        found: dict[str, Any] = {
            "preset": options.preset,
            "parameters": json.loads(PRESETS.read_text())[options.preset]["parameters"],
            "shapes": {
                "prompts": options.prompts, "samples": options.samples, "new_tokens": options.new_tokens,
                "prompt_tokens": PROMPT_TOKENS, "image_tokens": GRID[1] * GRID[2] // config.vision.merge_size**2,
            },
            "dtype": "float32", "hardware": hardware(), "core": options.core, **versions(), "ours": mine,
        }  # fmt: skip
        if options.compare:
            theirs = [measure_trl(directory, ours, options, micro) for micro in options.trl_micro_batch]
            found |= compare(mine, theirs)
        found["floor"] = floor(config, options.prompts, options.samples, PROMPT_TOKENS, options.new_tokens)
        found["ours_over_floor"] = round(mine["cpu_s"] / found["floor"]["shared"]["seconds_of_step"], 2)
        return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="m50", choices=json.loads(PRESETS.read_text()))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="warm steps that are measured")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="of our side's config")
    parser.add_argument("--compare", choices=("trl",))
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment with trl")
    parser.add_argument("--trl-micro-batch", type=int, nargs="+", help="its rows at once; 0 = all")
    parser.add_argument("--core", type=int, help="to run on; the first that may be used if absent")
    options = parser.parse_args(arguments)
    if min(options.prompts, options.new_tokens, options.repeats) < 1 or options.samples < 2:
        parser.error("wanted 2 or more --samples, which an advantage compares, and 1 or more of all else")
    rows = options.prompts * options.samples
    if options.trl_micro_batch is None:
        options.trl_micro_batch = [0, MICRO_BATCH] if rows > MICRO_BATCH and rows % MICRO_BATCH == 0 else [0]
    for micro in options.trl_micro_batch:
        if micro < 0 or (micro and rows % micro):
            parser.error(f"a micro-batch of {micro} rows does not divide the {rows} rows of a step")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.core = pin(options.core)
    try:
        found = run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
