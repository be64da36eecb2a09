"""One process of a job that samples, goes on, scores, evaluates and selects; see `test_commands_in_processes.py`.

    JAX_COORDINATOR_ADDRESS=... JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 python job_commands.py FOLDER

FOLDER is for what is written; what it reads lies in the folder where this is started.
"""

import sys
from pathlib import Path

from rethinker_jax import commands
from rethinker_jax.config_file import load_config
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.command import evaluate
from rethinker_jax.main import main
from rethinker_jax.options import EvaluateOptions, SampleOptions, ScoreOptions
from rethinker_jax.pipeline import run_pipeline
from rethinker_jax.processes import is_first
from rethinker_jax.sample import sample, score

FOLDER = Path(sys.argv[1])


def work(_: object) -> None:
    config = load_config(Path("small.yaml"), ["mesh.data=2"])
    start_jax(config)
    asked = SampleOptions(
        model="example", data="rows.parquet", image=(), question=None, output=FOLDER / "drawn.jsonl", n=2, seed=0,
        prompt_template=config.data.prompt_template,
    )  # fmt: skip
    sample(asked, config)
    if is_first():  # as after a kill: all of two rows, one line of a third, and half a line
        drawn = (FOLDER / "drawn.jsonl").read_bytes()
        (FOLDER / "straight.jsonl").write_bytes(drawn)
        lines = drawn.splitlines(keepends=True)
        (FOLDER / "drawn.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    sample(asked, config)

    template = config.data.prompt_template
    score(ScoreOptions("example", "whole.parquet", FOLDER / "scores.jsonl", template), config)
    try:
        score(ScoreOptions("example", "rows.parquet", FOLDER / "none.jsonl", template), config)
    except UserError as error:
        print(f"refused: {error}", flush=True)

    of_rows = EvaluateOptions(
        model="example", benchmark="rows", data="rows.parquet", protocol="own_sampled",
        output=FOLDER / "result.json", n=2, seed=0,
    )  # fmt: skip
    evaluate(of_rows, config)
    evaluate(of_rows, config)  # all is there

    run_pipeline(Path("recipe.yaml"), [f"dir={FOLDER}/chain"], None)
    run_pipeline(Path("recipe.yaml"), [f"dir={FOLDER}/chain"], None)
    print("done", flush=True)


commands.COMMANDS["report"] = commands.dataclasses.replace(commands.COMMANDS["report"], run=work)
sys.exit(main(["report", "x"]))
