"""What `--model` names: a Hugging Face directory, `example`, a run directory or one of its checkpoints."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

from rethinker_jax.chosen_mesh import on_mesh
from rethinker_jax.config import Config
from rethinker_jax.config_file import load_config
from rethinker_jax.device_bytes import Work
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.runs import find_run
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.processes import first_says
from rethinker_jax.system import System, load_system, make_updater, model_directory
from rethinker_jax.training.checkpoint import CheckpointStore

CHUNK_BYTES = 1 << 24
# What is not a weight and travels with it.
COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model to load. `config` names its directory; `run` and `step` the checkpoint whose weights take their place."""

    config: Config
    directory: Path
    run: Path | None = None
    step: int = 0

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in order of their names."""
        if self.run is None:
            return sorted(self.directory.glob("*.safetensors"))
        return sorted(path for path in (self.run / "checkpoints" / str(self.step) / "state").rglob("*"))


def find_model(config: Config) -> Trained:
    """What `config.model.path` names; of a run, the model section of its config holds. Raises UserError."""
    found = find_run(config.model.path)
    if found is None:
        return Trained(config, model_directory(config.model.path))
    run, step = found
    model = dataclasses.replace(load_config(run / "config.yaml", []).model, attention=config.model.attention)
    if config.model.dtype != "auto":
        model = dataclasses.replace(model, dtype=config.model.dtype)
    return checkpoint_of(run, step, dataclasses.replace(config, model=model))


def checkpoint_of(run: Path, step: int | None, config: Config) -> Trained:
    """A checkpoint of a run, the last one for None. Raises UserError where there is none."""
    with contextlib.closing(CheckpointStore(run / "checkpoints", keep=0)) as store:
        step = store.latest_step if step is None else step
    step = first_says(step)  # another process may see an older state of the disk
    if step is None:
        raise UserError(f"{run} holds no complete checkpoint. Let the run reach its first one.")
    return Trained(config, model_directory(config.model.path), run, step)


def load_trained(trained: Trained, work: Work = "sample") -> tuple[System, Params]:
    """The system, and the weights in the training layout. Raises UserError."""
    config = on_mesh(trained.config, work)
    system = load_system(config)
    if trained.run is None:
        return system, system.params
    run_config = load_config(trained.run / "config.yaml", [])
    updater = make_updater(dataclasses.replace(run_config, model=config.model), system, 1, run_config.loss)
    with contextlib.closing(CheckpointStore(trained.run / "checkpoints", keep=0)) as store:
        shapes = updater.shapes(system.params)
        system.drop_params()
        saved = store.restore(shapes, system.mesh, trained.step)
    return system, saved.state.params


def weights_hash(trained: Trained) -> str:
    """SHA-256 over the names and bytes of the files that hold the weights."""
    return _hash_files(trained.weight_files)


def companions_hash(trained: Trained) -> str:
    """The same over what is not a weight: config, tokenizer, chat template, image processor."""
    return _hash_files(trained.directory / name for name in sorted(COMPANIONS))


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            continue
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(CHUNK_BYTES), b""):
                digest.update(block)
    return digest.hexdigest()
