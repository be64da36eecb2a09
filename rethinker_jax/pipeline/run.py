"""The `pipeline` command: stages that are not done yet, one after the other, and what the manifest says of them.

Of several processes the first one keeps the manifest and decides what is to be done, and all do it.
"""

import contextlib
import dataclasses
import gc
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax import peers
from rethinker_jax.config import MeshConfig
from rethinker_jax.curation.report import report_path
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.json_lines import object_of
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import make_mesh
from rethinker_jax.output_files import differences, hash_of
from rethinker_jax.pipeline.budget import check_budgets, count_rows
from rethinker_jax.pipeline.keys import Contents
from rethinker_jax.pipeline.plan import Planned, hash_of_input, keys_of, plan, settings_of
from rethinker_jax.pipeline.recipe import MODEL_KINDS, SAMPLE_KINDS, Asked, read_recipe
from rethinker_jax.pipeline.stages import download, final_config, run_stage
from rethinker_jax.processes import check_same, first_does, first_says, is_first
from rethinker_jax.run_directory import RunDirectory, hold, versions, write_whole
from rethinker_jax.stopping import listening
from rethinker_jax.system import model_directory

Entry = dict[str, Any]


# What is read of an entry, which may have been changed by hand.
FORM: Mapping[str, type | tuple[type, ...]] = {
    "name": str, "kind": str, "key": str, "status": str, "wall_s": (int, float), "settings": dict, "inputs": dict,
    "parent": (dict, type(None)),
}  # fmt: skip


def run_pipeline(path: Path, overrides: Sequence[str], mesh: MeshConfig | None, last: str = "") -> Path:
    """The `pipeline` command: run every stage that is not done yet, up to `last`. Returns the pipeline's directory.

    A stage is done when its key and what it read and left are what the manifest says. One of which they are not begins
    anew; what it left before is set aside, not removed. Raises UserError, Stopped.
    """
    asked = read_recipe(path, overrides)
    stages = plan(asked, mesh, last)
    check_budgets(stages, read_config(model_directory(asked.recipe.model)))
    start_jax(stages[0].config)
    check_same(str(path), lambda: [_work_of(one) for one in stages])
    for one in stages:
        if one.stage.kind != "select" and not one.config.mesh.search:
            make_mesh(one.config.mesh)
        if one.stage.kind == "distill":
            _check_alone(one)
    words = [str(path), *overrides, *(_mesh_words(mesh))]
    with hold(asked.directory) if is_first() else contextlib.nullcontext(), listening():
        first_does(lambda: _download_all(stages), "download")
        journal = first_does(lambda: _open_journal(asked, stages, shlex.join(["pipeline", *words])), "hashes")
        for one in stages:
            _run_one(journal, one)
            gc.collect()  # the next stage wants the room of this one's weights
    return asked.directory


def _work_of(planned: Planned) -> str:
    """Hash of what all processes have to do alike."""
    config = planned.config
    run, verifier = config.run, config.verifier
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(run, compilation_cache=""),
        verifier=dataclasses.replace(verifier, num_workers=0),
    )
    return hash_of([planned.stage, config])


def _check_alone(planned: Planned) -> None:
    """Raises UserError, before hours of other stages, where a stage would draw in one process what several hold."""
    settings = planned.config.distill
    if peers.count() > 1 and not (settings.caption.url and settings.reason.url):
        raise UserError(
            f"stage {planned.stage.name}: distill draws from a model of its own in one process alone, and this job has "
            f"{peers.count()}. Serve the model (distill.caption.url, distill.reason.url), or run the pipeline up to "
            "this stage in one process."
        )


def _download_all(stages: Sequence[Planned]) -> None:
    for given in dict.fromkeys(given for one in stages for given in one.inputs if given.hub):
        if not Path(given.path).is_file():
            download(given.hub, Path(given.path))


def _mesh_words(mesh: MeshConfig | None) -> list[str]:
    return [] if mesh is None else ["--mesh", mesh_words(mesh)]


class Manifest:
    """manifest.json: an entry a stage, in the order of the recipe; written whole after every change."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.path = path
        self._names = names

    def read(self, name: str) -> Entry | None:
        return next((entry for entry in self._entries() if entry["name"] == name), None)

    def write(self, entry: Entry) -> None:
        """Put a stage's entry in its place; entries of stages that the recipe lost stay behind the others."""
        entries = {one["name"]: one for one in self._entries()} | {entry["name"]: entry}
        names = [name for name in dict.fromkeys([*self._names, *entries]) if name in entries]
        text = json.dumps({"stages": [entries[name] for name in names]}, indent=2)
        write_whole(self.path, text + "\n")

    def _entries(self) -> list[Entry]:
        if not self.path.is_file():
            return []
        try:
            entries = object_of(self.path.read_bytes()).get("stages")
            if not isinstance(entries, list):
                raise ValueError("stages is no list")
            for number, entry in enumerate(entries, 1):
                _check_entry(entry, f"entry {number}")
            return entries
        except ValueError as error:
            raise UserError(
                f"{self.path}: wanted a manifest as the pipeline writes it ({error}). Put it back as it was, or remove "
                "the file to start the pipeline anew."
            ) from error


def _check_entry(entry: object, where: str) -> None:
    """Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no object")
    wrong = [key for key, kind in FORM.items() if not isinstance(entry.get(key), kind)]
    data = entry["inputs"].get("data") if not wrong else []
    if wrong or not isinstance(data, list) or not all(isinstance(one, dict) and "role" in one for one in data):
        raise ValueError(f"{where}: {wrong[0] if wrong else 'inputs.data'} is not what it should be")


@dataclasses.dataclass(frozen=True)
class Journal:
    """What the first process knows of the stages: their keys, what files hold, and the manifest that it keeps."""

    manifest: Manifest
    keys: dict[str, str]
    contents: Contents
    command: str


def _open_journal(asked: Asked, stages: Sequence[Planned], command: str) -> Journal:
    contents = Contents(asked.directory / "hashes.json")
    keys = keys_of(stages, model_directory(asked.recipe.model), contents)
    return Journal(
        Manifest(asked.directory / "manifest.json", [one.stage.name for one in stages]), keys, contents, command
    )


def _run_one(journal: Journal | None, planned: Planned) -> None:
    """Run one stage, or go on with it, unless it is done; the manifest says so before and after."""
    planned = dataclasses.replace(planned, config=final_config(planned))
    entry = first_does(lambda: _begin(journal, planned), "manifest")
    if first_says(entry is None):
        return
    if journal is None or entry is None:  # another process keeps the manifest
        run_stage(planned)
        return
    manifest, started, spent = journal.manifest, time.monotonic(), entry["wall_s"]
    manifest.write(entry)
    entry["status"] = "failed"
    try:
        run_stage(planned)
        entry |= {"status": "done", "output_sha256": _output_hash(planned, journal.contents)}
        entry["output_rows"] = count_rows(str(planned.output)) if planned.stage.kind not in MODEL_KINDS else None
    except (Stopped, KeyboardInterrupt):
        entry["status"] = "stopped"
        raise
    except UserError as error:
        entry["error"] = str(error)
        raise
    finally:
        manifest.write(entry | {"wall_s": spent + time.monotonic() - started})


def _begin(journal: Journal | None, planned: Planned) -> Entry | None:
    """The entry with which a stage runs, what lies there being made ready for it; None where the stage is done."""
    assert journal is not None, "the process that keeps it decides"
    name, contents = planned.stage.name, journal.contents
    before = journal.manifest.read(name)
    entry = _entry(planned, journal.keys, contents) | {"command": journal.command}
    changed = ["the manifest does not know it"] if before is None else _changes(before, entry, planned, contents)
    if before is not None and not changed and before["status"] == "done" and planned.output.exists():
        print(f"stage {name}: done before")
        return None
    spent = 0.0
    if before is not None and (not changed or _differs_in_choice(before, entry)):
        spent = before["wall_s"]
        _go_on(planned, bool(changed))
    elif planned.directory.exists():
        aside = _set_aside(planned.directory, before)
        print(f"stage {name}: begins anew ({'; '.join(changed)}); what was there is in {aside}")
    source = f" from {planned.parent}" if planned.parent else ""
    print(f"stage {name}: {planned.stage.kind}{source}")
    return entry | {"status": "running", "wall_s": spent}


def _go_on(planned: Planned, choose: bool) -> None:
    """Make what lies there of the stage ready to be gone on with, or its model to be chosen again.

    Where things lie, the mesh and the like may differ from what a run began with, and it would refuse them.
    """
    if choose and planned.output.exists():
        aside = _free_name(planned.output)
        planned.output.rename(aside)
        print(f"stage {planned.stage.name}: its model is chosen anew; the one before is in {aside}")
    kind = planned.stage.kind
    if kind == "sft" or kind == "rl":
        run = RunDirectory(planned.directory, kind)
        if run.changes(planned.config):
            run.start(planned.config)


def _differs_in_choice(before: Entry, entry: Entry) -> bool:
    """Whether nothing but the checkpoint that becomes the model is another."""

    def rest(one: Entry) -> list[object]:
        settings = {key: value for key, value in one["settings"].items() if key != "checkpoint"}
        return [one["kind"], one.get("parent"), settings, _content_of(one)]

    was, now = before["settings"].get("checkpoint"), entry["settings"].get("checkpoint")
    return was != now and rest(before) == rest(entry)


def _entry(planned: Planned, keys: dict[str, str], contents: Contents) -> Entry:
    """What is known of a stage before it runs. Reads what the stages before it made."""
    stage = planned.stage
    data = [
        {
            "role": given.role,
            "path": given.path,
            "stage": given.stage,
            "hub": given.hub,
            "sha256": hash_of_input(given, contents),
            "rows": count_rows(given.path),
        }
        for given in planned.inputs
    ]
    model = {"model": planned.model, "model_sha256": contents.model(model_directory(planned.model))}
    return {
        "name": stage.name,
        "kind": stage.kind,
        "status": "",
        "starts_from": planned.parent,
        "output": str(planned.output),
        "inputs": (model if planned.model else {}) | {"data": data},
        "key": keys[stage.name],
        "parent": {"name": planned.parent, "key": keys[planned.parent]} if planned.parent else None,
        "settings": settings_of(planned),
    } | versions()


def _changes(before: Entry, entry: Entry, planned: Planned, contents: Contents) -> list[str]:
    """Why a stage must begin anew, a phrase each; none where it is done or can go on."""
    if before.get("key") != entry["key"] or _content_of(before) != _content_of(entry):
        return _reasons(before, entry) or ["something that it depends on is another"]
    if before["status"] == "done":
        was = before.get("output_sha256")
        if planned.output.exists() and _output_hash(planned, contents) != was:
            return [f"{planned.output} is not what the stage left"]
        if planned.stage.kind == "select" and not report_path(planned.output).is_file():
            return [f"{report_path(planned.output)} is not there"]
    return []


def _content_of(entry: Entry) -> list[str]:
    inputs = entry.get("inputs", {})
    return [inputs.get("model_sha256", ""), *(one.get("sha256", "") for one in inputs.get("data", []))]


def _reasons(before: Entry, entry: Entry) -> list[str]:
    """What differs, as far as the two entries say it."""
    keys = ("kind", "starts_from")
    found = [f"{key} was {before.get(key)}, is {entry[key]}" for key in keys if before.get(key) != entry[key]]
    was, now = before.get("settings", {}), entry["settings"]
    missing = {key: None for key in was if key not in now}
    found += [f"{key} was {old!r:.60}, is {new!r:.60}" for key, old, new in differences(was, now | missing)]
    inputs, data = entry["inputs"], {one["role"]: one for one in before.get("inputs", {}).get("data", [])}
    if before.get("inputs", {}).get("model_sha256") != inputs.get("model_sha256"):
        found.append(f"the model {inputs.get('model', '')} is another")
    found += [
        f"{one['path']} is another" for one in inputs["data"]
        if data.get(one["role"], {}).get("sha256") != one["sha256"]
    ]  # fmt: skip
    parent = (before.get("parent") or {}).get("key"), (entry["parent"] or {}).get("key")
    if not found and parent[0] != parent[1]:
        found.append(f"the stage {entry['starts_from']} was run anew")
    return found


def _output_hash(planned: Planned, contents: Contents) -> str:
    if planned.stage.kind in MODEL_KINDS:
        return contents.model(planned.output)
    return (
        contents.samples(planned.output) if planned.stage.kind in SAMPLE_KINDS else contents.rows(str(planned.output))
    )


def _set_aside(stage: Path, entry: Entry | None) -> Path:
    """Rename a stage's directory, its manifest entry in it."""
    write_whole(stage / "manifest_entry.json", json.dumps(entry, indent=2) + "\n")
    return stage.rename(_free_name(stage))


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return aside
