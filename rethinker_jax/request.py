"""A parsed command line, before anything is loaded."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.config_file import find_config, load_config
from rethinker_jax.config_keys import ALL_KEYS
from rethinker_jax.errors import UserError
from rethinker_jax.mesh_spec import mesh_overrides


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line: the command's options, the words that are no overrides, the overrides, the mesh."""

    options: argparse.Namespace
    words: tuple[str, ...]
    overrides: tuple[str, ...]
    mesh: MeshConfig | None

    def config_path(self) -> Path | None:
        """The one CONFIG.yaml, if it was given."""
        if len(self.words) > 1:
            raise UserError(f"wanted one CONFIG.yaml, came {' and '.join(self.words)}")
        if self.words and self.words[0] in ALL_KEYS:
            raise UserError(f"{self.words[0]}: wanted a value, as in {self.words[0]}=VALUE")
        return find_config(self.words[0]) if self.words else None

    def config(self, without_file: Callable[[Sequence[str]], Config]) -> Config:
        """The config of the file, or without one `without_file(overrides)`; --mesh goes before both."""
        overrides = list(self.overrides)
        if self.mesh is not None:
            overrides += mesh_overrides(self.mesh)
        path = self.config_path()
        return load_config(path, overrides) if path else without_file(overrides)


def with_model(config: Config, model: str | None) -> Config:
    """The config with the model of `--model`, where it was given."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=model)) if model else config
