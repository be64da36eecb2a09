"""Prints the parity table of docs/parity.md: shape x case x largest error against transformers, as Markdown.

    PYTHONPATH=tests:. python scripts/parity_table.py [SHAPE ...]    # needs the parity extra

Exits with 1 if a number is above the tests' tolerance. About a minute on one core.
"""

import datetime
import platform
import sys
import tempfile
from pathlib import Path

import jax
import torch  # ty: ignore[import-not-found]
import transformers
from parity import compare  # ty: ignore[import-not-found]
from reference_cases import SHAPES  # ty: ignore[import-not-found]
from transformers.utils.logging import set_verbosity_error

TOLERANCE = 1e-4


def main(names: list[str]) -> int:
    set_verbosity_error()
    print(
        f"{datetime.date.today()}, float32, {platform.machine()} CPU, Python {platform.python_version()}, "
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    print("| shape | case | logits | left-padded | loss | gradients | worst gradient | greedy |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for name in names or SHAPES:
        with tempfile.TemporaryDirectory() as directory:
            for one in compare(name, Path(directory)):
                worst = max(worst, one.logits, one.left_padded, one.loss, one.gradients, float(not one.greedy_equal))
                print(
                    f"| {name} | {one.case} | {one.logits:.1e} | {one.left_padded:.1e} | {one.loss:.1e} | "
                    f"{one.gradients:.1e} | `{one.worst}` | {'equal' if one.greedy_equal else 'DIFFERENT'} |",
                    flush=True,
                )
    print(f"\nLargest: {worst:.1e}; tolerance: {TOLERANCE:.0e}.")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
