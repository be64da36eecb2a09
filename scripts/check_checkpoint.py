"""Compares this package with transformers on a model directory: tokens, pixels, logits and greedy text.

    PYTHONPATH=. python scripts/check_checkpoint.py DIR [--dtype float32|bfloat16] [--tolerance T] [--new-tokens N]

Prints one table row per built-in prompt and exits with 0 if all is equal within the tolerance, else with 1; with 2 if
DIR cannot be used or torch is missing (pip install 'rethinker_jax[parity]'). The two models are in memory one after the
other, each once, ours twice while the sampler's layout is made: 3B takes 30 GB in float32 and 15 GB in bfloat16.

Errors are the largest difference of logits over their standard deviation. In bfloat16 the two round in different
places, so only float32 says whether the port is exact; the default tolerances are 1e-3 and 0.5. A greedy token may
differ only where transformers' lead over the second is smaller than twice the error of the logits.
"""

import argparse
import dataclasses
import functools
import gc
import io
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from rethinker_jax.config import BucketsConfig, MeshConfig, SamplingConfig
from rethinker_jax.errors import UserError
from rethinker_jax.models.precision import DTYPES
from rethinker_jax.models.qwen25vl import Model, Params, define_model
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import make_mesh
from rethinker_jax.models.weights import load_params
from rethinker_jax.prompts.batch import PromptBatch, pack_prompts
from rethinker_jax.prompts.build import PromptBuilder
from rethinker_jax.prompts.images import ImageSettings, load_image
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.sampling.prefill import sampling_layout
from rethinker_jax.sampling.sampler import Budgets, Request, Sampler
from rethinker_jax.types import Problem, Prompt

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}


@dataclasses.dataclass(frozen=True)
class Said:
    """What one side says of one prompt: float32 logits [seq, vocab], greedy ids, and the lead of each over the second
    (transformers' only)."""

    logits: np.ndarray
    greedy: list[int]
    leads: list[float]


def draw_picture(width: int, height: int, seed: int) -> bytes:
    """PNG of coloured shapes on a gradient; the same for the same arguments."""
    draw_from = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    picture = Image.fromarray(np.stack([np.tile(ramp, (height, 1))] * 3, axis=-1))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, size = (int(draw_from.integers(0, limit)) for limit in (width, height, max(width, height) // 2))
        colour = tuple(int(value) for value in draw_from.integers(0, 256, 3))
        (draw.ellipse if draw_from.random() < 0.5 else draw.rectangle)((x, y, x + size, y + size), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def make_problems() -> dict[str, Problem]:
    """The built-in prompts: text, one image, two images between text, and one long and thin."""
    first, second, thin = draw_picture(140, 196, 0), draw_picture(210, 84, 1), draw_picture(560, 28, 2)
    questions = {
        "text": ("What is 17 * 23? Think step by step.", ()),
        "one image": ("Describe the picture.", (first,)),
        "two images": ("Compare <image> with <image>: which has more circles?", (first, second)),
        "thin image": ("Which colours are in this strip?", (thin,)),
    }
    return {
        name: Problem(id=name, question=question, answer="", images=images)
        for name, (question, images) in questions.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Model, params: Params, batch: PromptBatch) -> jax.Array:
    table = None if batch.vision is None else model.encode_images(params, batch.vision)
    return model.logits(params, model.hidden(params, batch.text, table))


def ask_ours(directory: Path, prompts: list[Prompt], builder: PromptBuilder, dtype: str, count: int) -> list[Said]:
    """Logits by the trainer's forward pass, greedy ids by the sampler; all prompts in one batch."""
    config, params = load_params(directory, read_config(directory), DTYPES[dtype])
    model = define_model(config)
    batch = pack_prompts(prompts, builder.geometry, seq_minimum=32)
    if batch.vision is not None:
        batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, merged_index=()))
    padded = np.asarray(_forward(model, params, batch))
    logits = [padded[row, : len(prompt)] for row, prompt in enumerate(prompts)]
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    params = sampling_layout(model, params, mesh, DTYPES[dtype])
    never = np.array(builder.tokenizer.never_sampled_ids(config.vocab), np.int32)
    sampler = Sampler(model, mesh, builder.tokenizer, builder.geometry, (), never, BucketsConfig())
    settings = SamplingConfig(temperature=0.0, max_new_tokens=count)
    requests = [Request(prompt, 0) for prompt in prompts]
    drawn, _ = sampler.generate(params, requests, settings, Budgets(first=count), seed=0, step=0)
    return [
        Said(one, completion.completion.token_ids.tolist(), []) for one, completion in zip(logits, drawn, strict=True)
    ]


def ask_transformers(
    directory: Path, prompts: list[Prompt], builder: PromptBuilder, dtype: str, count: int
) -> list[Said]:
    """The same prompts, one at a time."""
    import torch  # ty: ignore[import-not-found]
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True, attn_implementation="eager"
    ).eval()
    never = builder.tokenizer.never_sampled_ids(model.config.text_config.vocab_size)
    said = []
    for prompt in prompts:
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(prompt.token_ids[None].astype(np.int64))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if prompt.images:
            inputs["pixel_values"] = torch.from_numpy(np.concatenate([image.patches for image in prompt.images]))
            inputs["image_grid_thw"] = torch.tensor([image.grid for image in prompt.images])
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == builder.tokenizer.image_token_id).long()
        with torch.no_grad():
            model.model.rope_deltas = None  # kept from call to call
            logits = model(**inputs, use_cache=False).logits[0].float().numpy()
            model.model.rope_deltas = None
            out = model.generate(
                **inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count, eos_token_id=None,
                suppress_tokens=list(never), pad_token_id=builder.tokenizer.pad_id, repetition_penalty=1.0,
                temperature=None, top_p=None, top_k=None, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        best = torch.stack(out.scores).float().topk(2, dim=-1).values[:, 0]
        greedy = out.sequences[0, len(prompt) :].tolist()
        said.append(Said(logits, greedy, (best[:, 0] - best[:, 1]).tolist()))
    return said


def check_inputs(directory: Path, prompts: dict[str, Prompt], problems: dict[str, Problem]) -> list[str]:
    """What transformers' tokenizer and PIL image processor make differently; [] if nothing."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    processor = Qwen2VLImageProcessorPil.from_pretrained(str(directory))
    wrong = []
    for name, prompt in prompts.items():
        text = prompt.text
        for image in prompt.images:
            tokens = len(image.patches) // processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|placeholder|>" * tokens, 1)
        ids = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"))["input_ids"]
        if ids != prompt.token_ids.tolist():
            wrong.append(f"{name}: transformers' tokenizer gives other ids")
        if prompt.images:
            images = [load_image(ref) for ref in problems[name].images]
            pixels = processor(images=images, return_tensors="np")["pixel_values"]
            if not np.array_equal(pixels, np.concatenate([image.patches for image in prompt.images])):
                wrong.append(f"{name}: transformers' PIL image processor gives other pixels")
    return wrong


def compare_said(name: str, ours: Said, theirs: Said, tolerance: float, builder: PromptBuilder) -> tuple[str, bool]:
    """(table row, is it well)."""
    scale = float(theirs.logits.std())
    largest = float(np.abs(ours.logits - theirs.logits).max())
    agree = float((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).mean())
    same = next((i for i, pair in enumerate(zip(ours.greedy, theirs.greedy, strict=True)) if pair[0] != pair[1]), None)
    well = largest <= tolerance * scale and (same is None or theirs.leads[same] < 2 * largest)
    greedy = "equal" if same is None else f"differ from token {same} on, where the lead is {theirs.leads[same]:.1e}"
    text = builder.tokenizer.decode(theirs.greedy)[:40].replace("\n", " ").replace("|", "/")
    length = len(theirs.logits)
    return f"| {name} | {length} | {largest / scale:.1e} | {100 * agree:.1f} % | {greedy} | {text!r} |", well


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=sorted(TOLERANCES), default="float32")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest error of logits; 0 = by dtype")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    try:
        import torch  # ty: ignore[import-not-found]
    except ImportError:
        print(
            "torch is not installed, which this comparison needs: pip install 'rethinker_jax[parity]'", file=sys.stderr
        )
        return 2
    try:
        config = read_config(options.directory)
        vision = config.vision
        builder = PromptBuilder(
            ChatTokenizer(options.directory),
            ImageSettings.from_directory(options.directory),
            VisionGeometry(vision.patch_size, vision.merge_size, vision.window_size),
            "none",
        )
        problems = make_problems()
        prompts = {name: builder.build(problem) for name, problem in problems.items()}
        asked = [*prompts.values()], builder, options.dtype, options.new_tokens
        ours = ask_ours(options.directory, *asked)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    gc.collect()  # our weights, before the others come
    theirs = ask_transformers(options.directory, *asked)
    tolerance = options.tolerance or TOLERANCES[options.dtype]
    print(f"{options.directory}: {options.dtype}, jax {jax.__version__}, torch {torch.__version__}\n")
    print("| prompt | tokens | largest error of logits | same best token | greedy | transformers' text |")
    print("|---|---|---|---|---|---|")
    wrong = check_inputs(options.directory, prompts, problems)
    for name, one, other in zip(prompts, ours, theirs, strict=True):
        row, well = compare_said(name, one, other, tolerance, builder)
        print(row)
        if not well:
            wrong.append(f"{name}: logits or greedy tokens differ by more than {tolerance:g} of the logits' size")
    print("\n" + ("\n".join(wrong) or f"Equal within {tolerance:g} of the logits' size."))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
