"""Ours against transformers, live: a model with random weights, written by transformers and read by us.

Errors are parts of the size of what is compared: of logits, the largest difference over their standard deviation; of
gradients, the norm of the difference over the norm, of the worst tensor. Needs torch (the parity extra).
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference_torch
from published import FORMS
from reference_cases import LIVE_CASES, NUM_GREEDY, SHAPES, Row, make_config, make_prompt, make_rows, never_drawn
from reference_ours import for_device, geometry_of, greedy, loss_and_gradients

from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.qwen25vl import Model, Params, define_model
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.weights import hf_tensors, load_params
from rethinker_jax.prompts.batch import pack_prompts
from rethinker_jax.prompts.windows import bucket, num_windows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One case of one shape. `worst` names the gradient that is furthest; `gap` is transformers' smallest greedy lead,
    as a part of the logits' size."""

    case: str
    logits: float
    left_padded: float
    loss: float
    gradients: float
    worst: str
    greedy_equal: bool
    gap: float


def compare(name: str, directory: Path) -> Iterator[Comparison]:
    """All live cases of the shape `name`; `directory` is empty and takes the checkpoint."""
    build_model_directory(directory)
    flat = make_config(name, json.loads((directory / "config.json").read_text()))
    theirs = reference_torch.make_model(flat)
    reference_torch.write_checkpoint(theirs, directory, SHAPES[name].layout, SHAPES[name].cut)
    (directory / "config.json").write_text(json.dumps(FORMS[SHAPES[name].form](flat)))
    config, params = load_params(directory, read_config(directory), jnp.float32)
    model = define_model(config)
    rows = {case: make_rows(case, flat) for case in LIVE_CASES}
    prompts = {case: [make_prompt(row, flat) for row in rows[case]] for case in rows}
    # The sampler refuses a prompt that ends in an image: it feeds the last token again, as text.
    asked = [one for case in rows for one in prompts[case] if one.image_index[-1] < 0]
    found = greedy(model, params, asked, directory, never_drawn(flat), NUM_GREEDY)
    drawn = {id(prompt): tokens for prompt, tokens in zip(asked, found, strict=True)}
    shape, padding = _common_shape(model, rows), None
    for case in rows:
        answer = reference_torch.answer(theirs, rows[case], flat)
        batch = for_device(pack_prompts(prompts[case], geometry_of(config), batch_size=3, **shape))
        padding = batch.vision or padding  # of text alone, a tower full of padding: its gradients must be zero
        batch = dataclasses.replace(batch, vision=batch.vision or jax.tree.map(np.zeros_like, padding))
        (loss, logits), gradients = loss_and_gradients(model, params, batch)
        ours = [np.asarray(logits)[number, : len(row.token_ids)] for number, row in enumerate(rows[case])]
        error, worst = _gradient_error(model, gradients, answer.gradients)
        scale = float(np.concatenate(answer.logits).std())
        yield Comparison(
            case,
            logits=_largest(ours, answer.logits) / scale,
            left_padded=_largest(ours, answer.left_logits) / scale,
            loss=abs(float(loss) - answer.loss),
            gradients=error,
            worst=worst,
            greedy_equal=all(
                drawn.get(id(prompt), wanted) == wanted
                for prompt, wanted in zip(prompts[case], answer.greedy.tolist(), strict=True)
            ),
            gap=answer.gap / scale,
        )


def _common_shape(model: Model, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Arguments of `pack_prompts` by which all cases have one shape, to compile once."""
    geometry = geometry_of(model.config)
    sizes = {
        case: [num_windows(image.grid, geometry) for row in of_case for image in row.images]
        for case, of_case in rows.items()
    }
    longest = max(len(row.token_ids) for of_case in rows.values() for row in of_case)
    widest = max(max(of_case, default=0) for of_case in sizes.values())
    return {"vision_buckets": [(3, widest)], "seq_minimum": bucket(longest, 8)}


def _largest(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def _gradient_error(model: Model, gradients: Params, theirs: dict[str, np.ndarray]) -> tuple[float, str]:
    """(error, tensor) of the worst tensor. Where theirs is zero, ours must be too."""
    named = dict(hf_tensors(model.config, gradients, np.float32))
    assert named.keys() == theirs.keys()
    errors = []
    for name, wanted in theirs.items():
        difference, size = (float(np.linalg.norm(x.astype(np.float64))) for x in (named[name] - wanted, wanted))
        errors.append((difference / size if size else float(difference > 0), name))
    return max(errors)
