"""Writes tests/golden/*.npz: what transformers answers to the cases of tests/reference_cases.py.

    PYTHONPATH=tests:. python scripts/make_golden.py        # needs the parity extra: pip install -e ".[parity]"

A file holds the config, the tokens, checksums of the generated weights and pixels, and of each case the logits, the
loss, norms and signed sums of all gradients, and the tokens that greedy decoding chose. Weights are generated again by
whoever reads it.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch  # ty: ignore[import-not-found]
import transformers
from reference_cases import CASES, VARIANTS, checksum, make_config, make_rows, sums  # ty: ignore[import-not-found]
from reference_torch import answer, make_model  # ty: ignore[import-not-found]

from rethinker_jax.example.model_config import build_model_directory

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
# A greedy token is only a fact if it wins by far more than float32 rounding moves logits (1e-4 of their size).
SMALLEST_GAP = 5e-3


def make_golden(variant: str) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as directory:
        build_model_directory(directory)
        config = make_config(variant, json.loads((pathlib.Path(directory) / "config.json").read_text()))
    model = make_model(config)
    arrays = {
        "config": np.array(json.dumps(config)),
        "versions": np.array(f"torch {torch.__version__}, transformers {transformers.__version__}"),
    }
    for case in CASES:
        rows = make_rows(case, config)
        result = answer(model, rows, config)
        if result.gap < SMALLEST_GAP:
            raise SystemExit(f"{variant}/{case}: two greedy tokens are only {result.gap:.1e} apart; change the case.")
        for number, (row, logits) in enumerate(zip(rows, result.logits, strict=True)):
            arrays[f"{case}/{number}/token_ids"] = row.token_ids
            arrays[f"{case}/{number}/checksum"] = np.array([checksum(image.patches) for image in row.images], np.uint32)
            arrays[f"{case}/{number}/logits"] = logits
        arrays[f"{case}/loss"] = np.array(result.loss)
        arrays[f"{case}/greedy"] = result.greedy
        names = sorted(result.gradients)
        arrays[f"{case}/gradient_sums"] = np.stack([sums(name, result.gradients[name]) for name in names])
        arrays["names"] = np.array(names)
        print(f"{variant}/{case}: loss {result.loss:.4f}, smallest greedy lead {result.gap:.4f}")
    return arrays


def main() -> None:
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for variant in VARIANTS:
        np.savez_compressed(GOLDEN / f"{variant}.npz", allow_pickle=False, **make_golden(variant))


if __name__ == "__main__":
    main()
