"""Fine-tuning against the step of torch and transformers."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_cases import make_config
from reference_ours import load
from sft_rows import Row, picture, talk, write

from rethinker_jax.config import Config, ModelConfig, OptimizerConfig, RunConfig, SftConfig
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.weights import hf_tensors
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.sft.conversation import SftRow
from rethinker_jax.sft.encode import RowEncoder
from rethinker_jax.sft.loop import SFT_LOSS, Setup, pack
from rethinker_jax.sft.rows import open_split
from rethinker_jax.system import load_system, make_updater

pytestmark = pytest.mark.usefixtures("quick_compilation")
# The line above a row says what it is there for.
PARITY_ROWS: list[Row] = [
    # text alone, short
    {"messages": talk(1, False)["messages"]},
    # a picture, a longer answer
    {"messages": [talk(2, True)["messages"][0], {"role": "assistant", "content": "It shows " + "1 2 3 4 " * 4}]},
    # two pictures between text, a system message, and a second turn
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>and <image> are?"},
            {"role": "assistant", "content": "7"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes, 7"},
        ]
    },
]
NUM_PARITY_STEPS = 3
RATE = 1e-3


def test_three_steps_are_transformers_own(tmp_path: Path) -> None:
    """AdamW on the completion-only loss of rows of unequal lengths, with and without images, against torch in float32.

    The rows' ids and labels come from transformers' chat template, the loss is the one of its forward pass. Catches a
    mean over rows, a label that is off by one, weight decay on the wrong side of Adam, and clipping after it.
    """
    torch: Any = pytest.importorskip("torch", reason="torch is not installed (pip install 'rethinker_jax[parity]')")
    import reference_torch

    build_model_directory(tmp_path)
    raw = make_config("untied", json.loads((tmp_path / "config.json").read_text()))
    load(raw, tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [
        row | {"images": names} for row, names in zip(PARITY_ROWS, ([], ["0.png"], ["1.png", "2.png"]), strict=True)
    ]
    write(tmp_path / "rows.jsonl", rows)
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        model=ModelConfig(path=str(tmp_path)),
        optimizer=OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_steps=0, weight_decay=0.1),
        sft=SftConfig(data=str(tmp_path / "rows.jsonl"), batch_size=3, max_completion_tokens=64),
    )
    system, split = load_system(config), open_split(config, lambda bad: None)
    encoder = RowEncoder(system.builder, 64)
    setup = Setup(config, "parity", RunDirectory(tmp_path / "run", "sft"), system, encoder, split, NUM_PARITY_STEPS)
    learned = [split.train.read(number) for number in range(3)]
    batches = pack(setup, [encoder.encode(row).row for row in learned])

    theirs = reference_torch.make_model(raw)
    inputs = torch_inputs(torch, tmp_path, raw, encoder, learned)
    start = {reference_torch.hub_name(name): one.detach().numpy().copy() for name, one in theirs.named_parameters()}
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    updater = make_updater(config, system, NUM_PARITY_STEPS, SFT_LOSS)
    state = updater.init(system.params)
    for step in range(NUM_PARITY_STEPS):
        optimizer.zero_grad()
        theirs.model.rope_deltas = None
        loss = theirs(**inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        state, metrics = updater.step(state, batches)
        assert math.isclose(float(metrics["nll"]), loss.item(), rel_tol=1e-5), step
        assert math.isclose(float(metrics["gradient_norm"]), norm.item(), rel_tol=1e-4), step
        if step == 0:
            named = [(name, one.grad) for name, one in theirs.named_parameters() if one.grad is not None]
            gradients = {reference_torch.hub_name(name): grad.numpy().copy() for name, grad in named}
            wanted = {reference_torch.hub_name(n): p.detach().numpy().copy() for n, p in theirs.named_parameters()}
            ours = {name: np.array(value) for name, value in hf_tensors(system.model.config, state.params, np.float32)}
            compare_first_step(start, gradients, wanted, ours)


def compare_first_step(
    start: dict[str, np.ndarray], gradients: dict[str, np.ndarray], wanted: dict[str, np.ndarray], ours: dict[str, Any]
) -> None:
    """Adam's first step is rate · g / (|g| + 1e-8): a sign, however small g is.

    Where g is lost in the rounding of its tensor (below 1e-4 of the largest), the sign is chance, and only the size of
    the step is held; elsewhere, the step itself to 1/500 of the rate. What is left there is float32's rounding of the
    weights (6e-8 of up to 3, over a rate of 1e-3) and the 1e-8, measured together: 1/2000.
    """
    assert ours.keys() == wanted.keys()
    num_clear, num_all = 0, 0
    for name, gradient in gradients.items():
        difference = np.abs(ours[name] - wanted[name])
        clear = np.abs(gradient) > 1e-4 * np.abs(gradient).max()
        num_clear, num_all = num_clear + int(clear.sum()), num_all + int((gradient != 0).sum())
        assert difference[clear].max(initial=0.0) <= 0.002 * RATE, name
        assert difference.max() <= 2.01 * RATE, name
        assert (np.abs(wanted[name] - start[name])[clear] > 0.5 * RATE).mean() > 0.5 if clear.any() else True, name
    assert num_clear > 0.9 * num_all


def torch_inputs(torch: Any, directory: Path, raw: Row, encoder: RowEncoder, rows: Sequence[SftRow]) -> Row:
    """Arguments of transformers' forward: ids by its chat template, labels of the assistants' texts and ends alone."""
    import reference_torch
    from reference_cases import Row as Reference
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    references, labels = [], []
    for row, given in zip(rows, PARITY_ROWS, strict=True):
        images = encoder.prompt(row).images
        counts = iter([patches.grid[1] * patches.grid[2] // 4 for patches in images])
        ids, wanted = [], []
        messages = [one | {"content": as_parts(one["content"])} for one in given["messages"]]
        for place, message in enumerate(messages):
            # What each message adds to the text; the assistant's line before its text is not learned.
            before = tokenizer.apply_chat_template(messages[:place], tokenize=False) if place else ""
            begun = len(before)
            if message["role"] == "assistant":
                begun = len(tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True))
            text = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
            for piece, is_learned in (
                (text[len(before) : begun], False),
                (text[begun:], message["role"] == "assistant"),
            ):
                for part in piece.replace("<|image_pad|>", "@<|image_pad|>@").split("@"):
                    part = "<|image_pad|>" * next(counts) if part == "<|image_pad|>" else part
                    more = tokenizer(part, add_special_tokens=False)["input_ids"]
                    ids += more
                    wanted += more if is_learned else [-100] * len(more)
            if message["role"] == "assistant":  # the template's line break behind the end token
                wanted[-1] = -100
        references.append(Reference(np.array(ids), images))
        labels.append(wanted)
    inputs = reference_torch.make_inputs(references, raw)
    seq = inputs["input_ids"].shape[1]
    padded = [wanted + [-100] * (seq - len(wanted)) for wanted in labels]
    return inputs | {"labels": torch.tensor(padded)}


def as_parts(content: str) -> list[Row]:
    """A text with image tags as parts, as transformers' template wants them."""
    pieces = content.split("<image>")
    parts: list[Row] = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]
