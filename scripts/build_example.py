"""Rebuild the warm-start checkpoint of the embedded example from nothing.

    python scripts/build_example.py [--output DIR] [section.key=value ...]

Runs the stages of configs/example_pipeline.yaml that come before RL, from random weights, and writes the last model to
DIR (default: rethinker_jax/example/model, which ships with the package). Overrides hold for every stage; the stages
lie in runs/example_pipeline and are gone on with.
"""

import argparse
import shutil
import sys
from pathlib import Path

from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.pipeline import run_pipeline
from rethinker_jax.system import EXAMPLE_MODEL

RECIPE = Path(__file__).parent.parent / "configs" / "example_pipeline.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=EXAMPLE_MODEL)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    try:
        if not (EXAMPLE_MODEL / "config.json").is_file():
            build_model_directory(EXAMPLE_MODEL)
        directory = run_pipeline(RECIPE, options.overrides, None, last="habits")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    shutil.copytree(directory / "habits" / "model", options.output, dirs_exist_ok=True)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
