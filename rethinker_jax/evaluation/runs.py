"""Run directories as models: what a path names, and how a model was asked in training."""

from pathlib import Path

from rethinker_jax.config import Config, DataConfig
from rethinker_jax.config_file import load_config


def find_run(path: str | Path) -> tuple[Path, int | None] | None:
    """(run directory, step) of a run or of one of its checkpoints, step None for a run; None for anything else."""
    path = Path(path).expanduser()
    is_checkpoint = path.parent.name == "checkpoints" and path.name.isdecimal() and path.is_dir()
    run = path.parent.parent if is_checkpoint else path
    if not (run / "config.yaml").is_file() or not (run / "checkpoints").is_dir():
        return None
    return run, int(path.name) if is_checkpoint else None


def trained_as(path: str) -> DataConfig:
    """Prompt template and pixel bounds of the model's training; the defaults for a directory that does not say them."""
    found = find_run(path)
    if found is not None:
        return load_config(found[0] / "config.yaml", []).data
    return load_config(None, []).data if path == "example" else Config().data
