"""How much padding the update's packed rows have, and how many shapes a run would compile, without a model.

    python scripts/simulate_packing.py [--groups 16] [--samples 8] [--shards 1] [--micro-tokens 0] [--steps 40]

Completions have log-normal lengths, cut at `--longest`; their mean doubles from `--mean` on over the steps. Prompts are
of 300 to 1,500 tokens, without images. Prints one JSON line; padding is the share of places without a token.
"""

import argparse
import json

import numpy as np

from rethinker_jax.models.sharding import Parts
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.training.batch import pack_micro_batches
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.types import Problem, Prompt

SEED = 0


def make_rows(rng: np.random.Generator, groups: int, samples: int, mean: float, longest: int) -> list[TrainRow]:
    rows = []
    for _ in range(groups):
        size = int(rng.integers(300, 1500))
        zeros = np.zeros(size, np.int32)
        prompt = Prompt(Problem("", "", ""), zeros, np.zeros((3, size), np.int32), zeros - 1, size)
        for length in np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, samples), 1, longest).astype(int):
            values = np.zeros(length, np.float32)
            rows.append(TrainRow(prompt, values.astype(np.int32), values == 0, values > 0, values, 1.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--micro-tokens", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--mean", type=float, default=400)
    parser.add_argument("--longest", type=int, default=2048)
    options = parser.parse_args()
    rng, shapes, padding = np.random.default_rng(SEED), set(), []
    for step in range(options.steps):
        mean = options.mean * (1 + step / options.steps)
        rows = make_rows(rng, options.groups, options.samples, mean, options.longest)
        parts = Parts(options.shards, options.shards)
        packed = pack_micro_batches(
            rows, VisionGeometry(), options.longest, len(rows), options.micro_tokens, parts=parts
        )
        batch = packed.batches[0]
        arrays = batch.text.token_ids, batch.text.prefix_index, batch.target_ids, batch.advantages
        shapes.add((len(packed.batches), *(array.shape for array in arrays)))
        padding.append(1 - packed.num_tokens / packed.num_places)
    found = {"padding_mean": round(float(np.mean(padding)), 3), "padding_max": round(max(padding), 3)}
    print(json.dumps(vars(options) | found | {"shapes": len(shapes)}))


if __name__ == "__main__":
    main()
