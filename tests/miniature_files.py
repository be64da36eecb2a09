"""Miniatures of published files: where they are, and what the tests of benchmarks do with them."""

import io
from pathlib import Path

from PIL import Image

from rethinker_jax.benchmarks.catalog import ReadItems, read_benchmark
from rethinker_jax.benchmarks.items import Item

MINIATURES = Path(__file__).parent / "miniatures"


def png(grey: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(tmp_path: Path) -> Path:
    """A root with images/a.png to d.png, with a secret next to it."""
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    for grey, name in enumerate("abcd"):
        (root / "images" / f"{name}.png").write_bytes(png(grey))
    (tmp_path / "outside.png").write_bytes(png())
    return root


def read(name: str, root: Path, file: str = "") -> ReadItems:
    """A benchmark's miniature, its images below `root`."""
    path = MINIATURES / (file or f"{name}.jsonl")
    return read_benchmark(name, str(path), image_root=str(root), media_cache=str(root.parent / "cache"))


def by_id(found: ReadItems) -> dict[str, Item]:
    return {item.problem.id: item for item in found.items}
