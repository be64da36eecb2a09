"""Rows for the tests of fine-tuning: sums as conversations, and pictures of one size."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from reference_cases import noise

Row = dict[str, Any]


def picture(number: int) -> bytes:
    pixels = (noise(3, f"picture {number}", (56, 56, 3)) * 60 + 128).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def talk(number: int, image: bool) -> Row:
    question = {"role": "user", "content": f"{'<image>' * image}add {number} 5?"}
    answer = {"role": "assistant", "content": f"{number}+5={number + 5} \\boxed{{{number + 5}}}"}
    return {"id": f"talk-{number}", "messages": [question, answer], "images": ["0.png"] * image}


def write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
