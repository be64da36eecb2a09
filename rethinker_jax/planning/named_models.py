"""Which model a config names: a directory that holds config.json, or one of the published sizes, known by its name.

The sizes below come with the package, so that a config can be planned before its weights are there.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen_config import QwenConfig, parse_config, read_config
from rethinker_jax.prompts.images import ImageSettings
from rethinker_jax.system import EXAMPLE_MODEL

MODELS = Path(__file__).parent / "models"
MAX_PIXELS = 12845056  # of the published preprocessor_config.json


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """Sizes of a model, the bound of its images in pixels, and where both came from."""

    config: QwenConfig
    max_pixels: int
    source: str


def published_names() -> list[str]:
    return sorted(path.stem for path in MODELS.glob("*.json"))


def find_model(path: str) -> NamedModel:
    """The model that `model.path` names. Raises UserError where it is neither a directory nor a published name."""
    directory = EXAMPLE_MODEL if path == "example" else Path(path).expanduser()
    if directory.is_dir():
        return NamedModel(read_config(directory), _max_pixels(directory), str(directory))
    name = path.rstrip("/").rpartition("/")[2]
    known = published_names()
    if name not in known:
        raise UserError(
            f"model.path: wanted a directory with a config.json, or one of {', '.join(known)}, came {path!r}, which is "
            "neither. `plan` needs no weights: config.json is enough."
        )
    raw: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    return NamedModel(parse_config(raw), MAX_PIXELS, f"{name}, as published")


def _max_pixels(directory: Path) -> int:
    names = ("preprocessor_config.json", "processor_config.json")
    if any((directory / name).is_file() for name in names):
        return ImageSettings.from_directory(directory).max_pixels
    return MAX_PIXELS
