"""A few rows as they are learned, for the report: read back from token ids and mask, not from the rows' text."""

import base64
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.output_files import write_whole
from rethinker_jax.prompts.images import load_image, to_rgb
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.sft.encode import Encoded

NUM_SAMPLES = 8
MAX_SIDE = 384  # pixels of the pictures that are kept


def write_samples(directory: Path, tokenizer: ChatTokenizer, rows: Sequence[Encoded]) -> None:
    """samples.jsonl: {id, prompt_text, images, spans: [{text, learned}], num_tokens, num_learned, is_cut}."""
    lines = [json.dumps(_sample(tokenizer, one), ensure_ascii=False) + "\n" for one in rows]
    write_whole(directory / "samples.jsonl", "".join(lines))


def _sample(tokenizer: ChatTokenizer, one: Encoded) -> dict[str, Any]:
    row = one.row
    return {
        "id": row.prompt.problem.id,
        "prompt_text": row.prompt.text,
        "images": [_picture(image) for image in row.prompt.problem.images],
        "spans": learned_spans(tokenizer, one),
        "num_tokens": len(row.completion_ids),
        "num_learned": int(row.nll_mask.sum()),
        "is_cut": one.is_cut,
    }


def learned_spans(tokenizer: ChatTokenizer, one: Encoded) -> list[dict[str, Any]]:
    """Runs of learned and of other tokens of the completion, as text with its special tokens spelled out."""
    pairs = zip(one.row.completion_ids.tolist(), one.row.nll_mask.tolist(), strict=True)
    return [
        {"text": tokenizer.decode([token for token, _ in run], skip_special=False), "learned": learned}
        for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]


def _picture(image: bytes | str) -> str:
    """A small copy, base64 of a WebP."""
    small = to_rgb(load_image(image))
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
