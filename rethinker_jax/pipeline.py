"""A recipe of several stages, each a fine-tuning or an RL run that starts from the base model or from an earlier stage.

    name: example
    model: example              # the base; a Hugging Face directory
    stages:
      - name: see
        kind: sft               # sft or rl
        starts_from: base       # base, previous (the default), or the name of an earlier stage
        config: stage.yaml      # optional, beside the recipe, or package:NAME
        set: {sft.num_steps: 1000}

The pipeline's directory (`runs/<name>`) holds one run directory a stage, each with its `model/`, and `manifest.json`.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.config_file import config_hash, find_config, load_config, load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.export import export
from rethinker_jax.loop import train
from rethinker_jax.run_directory import FREE_KEYS, LENGTHS, RunDirectory, hold, versions, write_whole
from rethinker_jax.sft import fine_tune
from rethinker_jax.system import model_directory


@dataclasses.dataclass(frozen=True)
class Stage:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    kind: Literal["sft", "rl"]
    starts_from: str = "previous"
    config: str = ""
    set: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    model: str = "example"
    dir: str = ""


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises UserError with everything that is wrong."""
    try:
        recipe = TypeAdapter(Recipe).validate_python(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: wanted YAML ({error}).") from error
    except ValidationError as error:
        told = "\n".join(
            f"  {'.'.join(map(str, one['loc']))}: {one['msg']}, came {one['input']!r:.60}" for one in error.errors()
        )
        raise UserError(f"{path}: the recipe cannot be used:\n{told}") from error
    earlier: list[str] = []
    for stage in recipe.stages:
        if stage.name in earlier:
            raise UserError(f"{path}: stage {stage.name!r} is there twice. Give every stage a name of its own.")
        if stage.starts_from not in ("base", "previous", *earlier):
            raise UserError(
                f"{path}: stage {stage.name!r} starts from {stage.starts_from!r}; wanted base, previous, or an earlier "
                f"stage ({', '.join(earlier) or 'there is none'})."
            )
        earlier.append(stage.name)
    return recipe


def run_pipeline(path: Path, overrides: list[str], mesh: MeshConfig | None, last: str = "") -> Path:
    """The `pipeline` command: run every stage that is not done yet, up to `last`. Returns the pipeline's directory.

    A stage whose config or base was changed since begins anew; what it left before is set aside, not removed.
    """
    recipe = read_recipe(path)
    directory = Path(recipe.dir or f"runs/{recipe.name}")
    if mesh is not None:
        overrides = [*overrides, *[f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(mesh).items()]]
    # Every stage's config is read before the first one starts.
    outputs = {"base": recipe.model}
    planned: list[tuple[Stage, str, Config]] = []
    for stage in recipe.stages:
        if planned and planned[-1][0].name == last:
            break
        source = (planned[-1][0].name if planned else "base") if stage.starts_from == "previous" else stage.starts_from
        planned.append((stage, source, stage_config(path, stage, outputs[source], directory, overrides)))
        outputs[stage.name] = str(directory / stage.name / "model")
    model_directory(recipe.model)
    with hold(directory):
        for stage, source, config in planned:
            run_stage(directory, stage, source, outputs, config)
    return directory


def run_stage(directory: Path, stage: Stage, source: str, outputs: dict[str, str], config: Config) -> None:
    """Run one stage, or go on with it, unless it is done; the manifest says so before and after."""
    manifest = _read_manifest(directory)
    before = next((entry for entry in manifest if entry["name"] == stage.name), None)
    inputs = {
        "model": outputs[source],
        "model_hash": _hash_of(outputs[source]),
        "config_hash": config_hash(config),
    }
    entry = {
        "name": stage.name,
        "kind": stage.kind,
        "starts_from": source,
        "output": outputs[stage.name],
        "inputs": inputs,
    }
    changed = (
        [] if before is None else _changes(before, entry, RunDirectory(directory / stage.name, stage.kind), config)
    )
    if before is not None and not changed and before["status"] == "done" and Path(entry["output"]).is_dir():
        print(f"stage {stage.name}: done before")
        return
    if changed and (directory / stage.name).exists():
        aside = _set_aside(directory / stage.name)
        print(f"stage {stage.name}: begins anew ({'; '.join(changed)}); what was there is in {aside}")
    started = time.monotonic()
    _write_entry(directory, entry | {"status": "running"})
    print(f"stage {stage.name}: {stage.kind} from {source}")
    if stage.kind == "sft":
        fine_tune(config, stage.name)
    else:
        train(config, stage.name)
        if not Path(entry["output"]).exists():
            export(directory / stage.name, Path(entry["output"]))
    done = {"status": "done", "commit": versions()["commit"], "wall_s": time.monotonic() - started}
    _write_entry(directory, entry | done)


def stage_config(path: Path, stage: Stage, model: str, directory: Path, overrides: list[str]) -> Config:
    """The config of one stage: its file, then what the recipe sets, then the command line."""
    own = [f"{key}={json.dumps(value)}" for key, value in stage.set.items()]
    own += [f"run.dir={json.dumps(str(directory / stage.name))}", f"model.path={json.dumps(model)}"]
    if not stage.config:
        return load_defaults([*own, *overrides])
    file = find_config(stage.config) if stage.config.startswith("package:") else path.parent / stage.config
    return load_config(file, [*own, *overrides])


def _hash_of(model: str) -> str:
    """Hash of a model directory's weights; "" while it is not there, or for a base that ships with the package."""
    digest = hashlib.sha256()
    files = sorted(Path(model).glob("*.safetensors"))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else ""


def _changes(before: dict[str, Any], entry: dict[str, Any], run: RunDirectory, config: Config) -> list[str]:
    """Why a stage must begin anew. What a run leaves behind and where it caches may differ; its length may not."""
    changed = [
        f"{key} was {before.get(key)}, is {entry[key]}"
        for key in ("kind", "starts_from")
        if before.get(key) != entry[key]
    ]
    if before["inputs"].get("model_hash") != entry["inputs"]["model_hash"]:
        changed.append(f"the weights of {entry['inputs']['model']} are others")
    return changed + run.changes(config, FREE_KEYS - LENGTHS)


def _set_aside(stage: Path) -> Path:
    number = 1
    while (aside := stage.with_name(f"{stage.name}.old{number}")).exists():
        number += 1
    return stage.rename(aside)


def _read_manifest(directory: Path) -> list[dict[str, Any]]:
    path = directory / "manifest.json"
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text())["stages"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: wanted a manifest ({error}). Remove the file to start the pipeline anew.") from error


def _write_entry(directory: Path, entry: dict[str, Any]) -> None:
    """Put a stage's entry in the place of its former one, or behind the others."""
    stages = _read_manifest(directory)
    places = [place for place, one in enumerate(stages) if one["name"] == entry["name"]] or [len(stages)]
    stages[places[0] : places[0] + 1] = [entry]
    write_whole(directory / "manifest.json", json.dumps({"stages": stages}, indent=2) + "\n")
