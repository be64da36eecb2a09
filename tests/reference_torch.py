"""What transformers' Qwen2.5-VL says about the cases of `reference_cases.py`. Needs torch (the parity extra)."""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch  # ty: ignore[import-not-found]
from reference_cases import NUM_GREEDY, Row, make_weight, never_drawn
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

torch.set_num_threads(1)  # more of them wait for each other here: the models are tiny


@dataclasses.dataclass(frozen=True)
class Answer:
    """logits float32, one [seq, vocab] a row, of rows padded on the right; left_logits: on the left; loss: mean over
    all next-token predictions; gradients by hub name; greedy: int64 [rows, NUM_GREEDY], of rows padded on the left;
    gap: the smallest lead of a greedy token's logit over the second."""

    logits: list[np.ndarray]
    left_logits: list[np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]
    greedy: np.ndarray
    gap: float


def hub_name(name: str) -> str:
    """A parameter's name in memory (transformers 5) → in the hub's files."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def make_model(config: Mapping[str, Any]) -> Qwen2_5_VLForConditionalGeneration:
    """The float32 model, plain attention, with the weights of `make_weight`."""
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(directory)
    model = Qwen2_5_VLForConditionalGeneration._from_config(read, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(make_weight(hub_name(name), tuple(parameter.shape))))
    return model.eval()


def make_inputs(rows: Sequence[Row], config: Mapping[str, Any], left: bool = False) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward; rows padded on the right, or on the left for generation."""
    seq = max(len(row.token_ids) for row in rows)
    ids = np.full((len(rows), seq), config["pad_token_id"])
    mask = np.zeros((len(rows), seq), np.int64)
    for number, row in enumerate(rows):
        count = len(row.token_ids)
        where = slice(seq - count, seq) if left else slice(count)
        ids[number, where] = row.token_ids
        mask[number, where] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [image for row in rows for image in row.images]
    if images:
        inputs["pixel_values"] = np.concatenate([image.patches for image in images])
        inputs["image_grid_thw"] = np.array([image.grid for image in images])
        inputs["mm_token_type_ids"] = (ids == config["image_token_id"]).astype(np.int64)  # else positions are 1-D
    return {key: torch.from_numpy(value) for key, value in inputs.items()}


def answer(model: Qwen2_5_VLForConditionalGeneration, rows: Sequence[Row], config: Mapping[str, Any]) -> Answer:
    model.zero_grad(set_to_none=True)
    model.model.rope_deltas = None  # kept from call to call
    inputs = make_inputs(rows, config)
    logits = model(**inputs, use_cache=False).logits
    mask = inputs["attention_mask"]
    log_probs = torch.log_softmax(logits[:, :-1], dim=-1)
    nll = -log_probs.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    loss = (nll * mask[:, 1:]).sum() / mask[:, 1:].sum()
    loss.backward()
    gradients = {
        hub_name(name): (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).numpy().copy()
        for name, parameter in model.named_parameters()
    }
    greedy, gap = _greedy(model, rows, config)
    real = [logits[number, : len(row.token_ids)].detach().numpy() for number, row in enumerate(rows)]
    return Answer(real, _left_logits(model, rows, config), loss.item(), gradients, greedy, gap)


def _left_logits(
    model: Qwen2_5_VLForConditionalGeneration, rows: Sequence[Row], config: Mapping[str, Any]
) -> list[np.ndarray]:
    model.model.rope_deltas = None
    with torch.no_grad():
        logits = model(**make_inputs(rows, config, left=True), use_cache=False).logits
    return [logits[number, -len(row.token_ids) :].numpy() for number, row in enumerate(rows)]


def _greedy(
    model: Qwen2_5_VLForConditionalGeneration, rows: Sequence[Row], config: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    model.model.rope_deltas = None
    inputs = make_inputs(rows, config, left=True)
    out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        suppress_tokens=never_drawn(config),
        eos_token_id=None,
        pad_token_id=config["pad_token_id"],
        return_dict_in_generate=True,
        output_scores=True,
    )
    best = torch.stack(out.scores).topk(2, dim=-1).values
    return out.sequences[:, inputs["input_ids"].shape[1] :].numpy(), float((best[..., 0] - best[..., 1]).min())


def write_checkpoint(
    model: Qwen2_5_VLForConditionalGeneration, directory: pathlib.Path, layout: str, cut: bool
) -> None:
    """Save as transformers does. `layout`: "hub" names, "in memory" names, or the "base model" without a head."""
    part = model.model if layout == "base model" else model
    size = sum(parameter.numel() for parameter in part.parameters()) * 4
    part.save_pretrained(
        directory,
        save_original_format=layout != "in memory",
        max_shard_size=size // 3 if cut else 2 * size,
    )
