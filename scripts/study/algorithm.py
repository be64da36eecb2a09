"""The ablations of VL-Rethinker on the embedded family: every arm with several seeds, tables and figures of all.

    python scripts/study/algorithm.py [--seeds 5] [--processes 2] [--runs DIR] [--output DIR] [--collect-only]

Runs lie in --runs; what is done is not run again, and what was cut goes on. `--collect-only` makes tables and figures
of what is there. Results: OUTPUT/algorithm.json, algorithm-*.svg, and the tables between the markers of algorithm.md.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import algorithm_figures
import algorithm_tables
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from algorithm_results import collect
from study_runs import REPOSITORY, Failed, Job, options_of, run_all

from rethinker_jax.example.dataset import PROBLEM_SCHEMA, write_split

CONFIG = REPOSITORY / "scripts" / "study" / "algorithm.yaml"
WRONG_SHARE = 0.2  # of the answers that the regime `noise` trains on

Words = tuple[str, ...]
SECOND_LOOKS: Words = ("rethink.rule=random", "loss.nll_coefficient=0.05")  # the coefficient of the released code
DECAY: Words = ("rethink.schedule=linear", "rethink.until_step=20")
ARMS: Mapping[str, Words] = {
    "grpo": ("replay.mode=none",),
    "grpo_double_rate": ("replay.mode=none", "optimizer.learning_rate=1.4e-4"),
    "filter": ("replay.mode=filter",),
    "dynamic": ("replay.mode=dynamic",),
    "ssr": (),
    "ssr_bootstrap": ("replay.form=bootstrap",),
    "ssr_deque": ("replay.form=deque",),
    "ssr_rethink": SECOND_LOOKS,
    "ssr_rethink_decay": (*SECOND_LOOKS, *DECAY),
}
PARTS = ("train", "validation", "test")
REPLAYS = ("grpo", "filter", "dynamic", "ssr", "ssr_bootstrap", "ssr_deque")
# Which arms each regime compares; the first one is what the others are compared with.
REGIMES: Mapping[str, tuple[str, ...]] = {
    "shipped": (*REPLAYS, "ssr_rethink", "ssr_rethink_decay"),
    "stage_two": ("ssr", "ssr_rethink", "ssr_rethink_decay"),
    "steep": (*REPLAYS, "grpo_double_rate"),
    "slow": ("grpo", "ssr"),
    "faint": ("grpo", "ssr", "ssr_rethink"),
    "noise": ("grpo", "ssr"),
}


def regime_words(regime: str, seed: int, root: Path) -> Words:
    """What all arms of a regime have in common."""
    warm, parent = f"model.path={root / 'warm_start'}", f"model.path={parent_model(root)}"
    steep = (warm, "data.train=example:steep-train", "run.num_steps=60")
    faint = tuple(f"data.{part}=example:faint-{part}" for part in PARTS)
    return {
        "shipped": (warm,),
        "stage_two": (f"model.path={stage_one_model(root, seed)}", "run.num_steps=30"),
        "steep": steep,
        "slow": (*steep, "optimizer.learning_rate=2e-5"),
        "faint": (parent, *faint),
        "noise": (warm, f"data.train={root / 'data' / 'noise.parquet'}"),
    }[regime]


def parent_model(root: Path) -> Path:
    """The clean parent: the model before it was taught the habits that RL is to undo."""
    return root / "runs" / "example_pipeline" / "look" / "model"


def stage_one_model(root: Path, seed: int) -> Path:
    return root / "stage_one" / f"{seed}"


def run_of(root: Path, regime: str, arm: str, seed: int) -> Path:
    return root / regime / arm / f"{seed}"


def jobs(root: Path, seeds: int) -> Iterator[Job]:
    """Models first, then seed by seed, so that a study cut short has whole seeds."""
    building = ("--output", str(root / "warm_start"))
    weights = root / "warm_start" / "model.safetensors"
    yield Job("models", building, weights, program=(str(REPOSITORY / "scripts" / "build_example.py"),))
    for regime, member in (("shipped", ""), ("faint", "faint-")):
        directory = run_of(root, regime, "parent", 0)
        words = (f"model.path={parent_model(root)}", f"data.test=example:{member}test", "run.num_steps=0")
        words += ("data.validation=", "evaluation.validate_every=0")
        yield _training(f"{regime}/parent/0", words, directory, ("models",))
    for seed in range(seeds):
        for regime, arms in REGIMES.items():
            after = ("models",)
            if regime == "stage_two":
                after = (f"stage_one/{seed}",)
                yield _export(root, seed)
            for arm in arms:
                words = (*regime_words(regime, seed, root), *ARMS[arm], f"run.seed={seed}")
                yield _training(f"{regime}/{arm}/{seed}", words, run_of(root, regime, arm, seed), after)


def _training(name: str, words: Words, directory: Path, after: Words) -> Job:
    return Job(name, ("train", str(CONFIG), *words, f"run.dir={directory}"), directory / "report.html", after)


def _export(root: Path, seed: int) -> Job:
    source, model = run_of(root, "shipped", "ssr", seed), stage_one_model(root, seed)
    words = ("export", str(source), "--output", str(model))
    return Job(f"stage_one/{seed}", words, model / "model.safetensors", (f"shipped/ssr/{seed}",))


def write_noisy_rows(root: Path) -> None:
    """The example's training rows, `WRONG_SHARE` of them with an answer that is none."""
    clean, noisy = root / "data" / "clean.parquet", root / "data" / "noise.parquet"
    if noisy.is_file():
        return
    write_split(clean, "train")
    rows, rng = pq.read_table(clean).to_pylist(), np.random.default_rng(0)
    for row in rows:
        if rng.random() < WRONG_SHARE:
            others = [one for one in row["choices"] if one != row["answer"]]
            row["answer"] = str(rng.choice(others)) if others else str(int(row["answer"]) + int(rng.integers(1, 6)))
    pq.write_table(pa.Table.from_pylist(rows, schema=PROBLEM_SCHEMA), noisy)


def main() -> int:
    options = options_of(__doc__, 5, "runs/study")
    root = options.runs.resolve()
    if not options.collect_only:
        (root / "data").mkdir(parents=True, exist_ok=True)
        write_noisy_rows(root)
        try:
            run_all(list(jobs(root, options.seeds)), root, options.processes)
        except Failed as failed:
            print(failed, file=sys.stderr)
            return 1
    options.output.mkdir(parents=True, exist_ok=True)
    results = collect(root, REGIMES, ["python", *sys.argv])
    (options.output / "algorithm.json").write_text(json.dumps(results, indent=1) + "\n")
    algorithm_tables.write(options.output / "algorithm.md", results)
    algorithm_figures.draw(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
