"""A recipe as it is written: one YAML file, and what the command line changes of it. docs/pipelines.md has the form.

Here a recipe is refused or understood by itself; whether its configs, data and models can be used is asked by `plan`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from rethinker_jax.config_file import ConfigLoader
from rethinker_jax.config_keys import nearest
from rethinker_jax.errors import UserError

Kind = Literal["distill", "sample", "select", "sft", "rl", "evaluate"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
MODEL_KINDS = ("sft", "rl")  # stages that leave a model
SAMPLE_KINDS = ("distill", "sample")  # stages that leave samples of rows
ROW_KINDS = ("select",)  # stages that leave rows
RESERVED = re.compile(r"sources|(manifest|hashes)\.json(\.tmp)?|.+\.old[0-9]+")  # in the pipeline's directory
# Besides name, kind, data, config and set, which every stage may have.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "distill": ("starts_from",),
    "sample": ("starts_from", "n"),
    "select": (),
    "sft": ("starts_from",),
    "rl": ("starts_from", "checkpoint"),
    "evaluate": ("starts_from", "n", "benchmark", "protocol"),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """`data` is a path, {from: STAGE} or {source: NAME}; "" leaves it to the config.

    checkpoint  which one of an rl stage becomes its model; best is by the reward on `data.validation`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Name
    kind: Kind
    starts_from: str = "previous"
    data: str | Mapping[Literal["from", "source"], str] = ""
    config: str = ""
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    n: Annotated[int, Field(ge=1)] | None = None
    benchmark: str = ""
    protocol: str = ""
    checkpoint: Literal["last", "best"] = "last"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`sources` names data that several stages read, so that one word on the command line replaces it for all."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Name
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    model: str = "example"
    dir: str = ""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A recipe as it is to be run. `overrides` hold for every stage that is not named, `of_stage` for one, after them.

    `folder` is that of the recipe's file, where configs are looked for.
    """

    recipe: Recipe
    folder: Path
    overrides: tuple[str, ...]
    of_stage: Mapping[str, tuple[str, ...]]

    @property
    def directory(self) -> Path:
        return Path(self.recipe.dir or f"runs/{self.recipe.name}")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Asked:
    """Read a recipe with what the command line changes. Raises UserError with everything that is wrong."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=ConfigLoader)
        doubled = [] if node is None else _doubled_keys(node)
        if doubled:
            raise UserError(f"{path}: the recipe cannot be used:\n" + "\n".join(f"  {one}" for one in doubled))
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=ConfigLoader)
        recipe = TypeAdapter(Recipe).validate_python(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: wanted YAML ({error}).") from error
    except RecursionError as error:
        raise UserError(f"{path}: wanted YAML; this is too deep.") from error
    except ValidationError as error:
        told = "\n".join(f"  {_told(dict(one))}" for one in error.errors())
        raise UserError(f"{path}: the recipe cannot be used:\n{told}") from error
    asked = _with_overrides(recipe, path, overrides)
    problems = list(_problems(asked.recipe))
    if problems:
        raise UserError(f"{path}: the recipe cannot be used:\n" + "\n".join(f"  {one}" for one in problems))
    return asked


def _doubled_keys(node: yaml.Node) -> list[str]:
    """Keys that a mapping has twice: of those yaml would take the last without a word."""
    if isinstance(node, yaml.SequenceNode):
        return [one for child in node.value for one in _doubled_keys(child)]
    if not isinstance(node, yaml.MappingNode):
        return []
    found, line_of = [], {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in line_of:
            found.append(f"line {line}: {key.value} is already given in line {line_of[key.value]}")
        line_of[str(key.value)] = line
        found += _doubled_keys(value)
    return found


def _told(error: dict[str, Any]) -> str:
    """pydantic's complaint as a line: where, what was wanted, what came."""
    location = error["loc"][1:] if error["loc"][:1] == ("stages",) and len(error["loc"]) > 1 else error["loc"]
    place = [f"stage {step + 1}" if isinstance(step, int) else str(step) for step in location]
    where = ".".join(place) or "the file"
    if error["type"] == "unexpected_keyword_argument":
        fields = Stage if location != error["loc"] else Recipe
        known = [field.name for field in dataclasses.fields(fields)]
        return f"{where}: no such key{nearest(place[-1], known)} (there: {', '.join(known)})"
    if error["type"] == "literal_error" and error["loc"][-1] == "kind":
        return f"{where}: wanted one of {', '.join(FIELDS)}, came {error['input']!r:.60}"
    if "data" in place:
        return f"{where}: wanted a path, {{from: STAGE}} or {{source: NAME}}, came {error['input']!r:.60}"
    if error["type"].endswith("type") and not error["loc"]:
        return f"wanted `name` and `stages`, came {error['input']!r:.60}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, came {error['input']!r:.60}"


def _with_overrides(recipe: Recipe, path: Path, overrides: Sequence[str]) -> Asked:
    """`model=`, `dir=`, `sources.NAME=` and `stages.NAME.KEY=` change the recipe, all else its configs."""
    names = sorted((stage.name for stage in recipe.stages), key=len, reverse=True)
    rest: list[str] = []
    of_stage: dict[str, tuple[str, ...]] = {}
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("model", "model.path"):
            recipe = dataclasses.replace(recipe, model=value)
        elif key in ("dir", "run.dir"):
            recipe = dataclasses.replace(recipe, dir=value)
        elif key.startswith("sources."):
            name = key.removeprefix("sources.")
            if name not in recipe.sources:
                raise UserError(f"{word}: {path} has no source {name}{nearest(name, recipe.sources)}")
            recipe = dataclasses.replace(recipe, sources=recipe.sources | {name: value})
        elif key.startswith("stages."):
            own = key.removeprefix("stages.")
            name = next((name for name in names if own.startswith(f"{name}.")), None)
            if name is None:
                raise UserError(
                    f"{word}: {path} has no such stage{nearest(own.partition('.')[0], names)}; wanted "
                    "stages.NAME.data=PATH or stages.NAME.section.key=value"
                )
            own = own.removeprefix(f"{name}.")
            if own == "data":
                recipe = _with_data(recipe, name, value)
            else:
                of_stage[name] = (*of_stage.get(name, ()), f"{own}={value}")
        else:
            rest.append(word)
    return Asked(recipe, path.parent, tuple(rest), of_stage)


def _with_data(recipe: Recipe, name: str, data: str) -> Recipe:
    stages = (dataclasses.replace(one, data=data) if one.name == name else one for one in recipe.stages)
    return dataclasses.replace(recipe, stages=tuple(stages))


def _problems(recipe: Recipe) -> list[str]:
    """What is wrong between the stages, a sentence each."""
    earlier: dict[str, Stage] = {}
    later = {stage.name for stage in recipe.stages}
    found: list[str] = []
    for stage in recipe.stages:
        said = f"stage {stage.name}"
        if stage.name in earlier:
            found.append(f"{said}: the name is there twice; give every stage a name of its own")
        if stage.name in ("base", "previous"):
            found.append(f"{said}: base and previous mean something in starts_from; name the stage otherwise")
        if RESERVED.fullmatch(stage.name):
            found.append(f"{said}: the pipeline keeps something else under this name; name the stage otherwise")
        default = {field.name: field.default for field in dataclasses.fields(Stage)}
        said_too_much = [
            key
            for key in ("starts_from", "n", "benchmark", "protocol", "checkpoint")
            if key not in FIELDS[stage.kind] and dataclasses.asdict(stage)[key] != default[key]
        ]
        found += [f"{said}: a stage of kind {stage.kind} has no {key}; leave it out" for key in said_too_much]
        if stage.kind == "evaluate" and not stage.benchmark:
            found.append(f"{said}: wanted benchmark: a benchmark's name, or rows")
        found += [f"{said}: {one}" for one in _model_problems(stage, earlier, later)]
        found += [f"{said}: {one}" for one in _data_problems(stage, recipe, earlier, later)]
        earlier.setdefault(stage.name, stage)
    return found


def _model_problems(stage: Stage, earlier: Mapping[str, Stage], later: set[str]) -> list[str]:
    if stage.starts_from in ("base", "previous") or "starts_from" not in FIELDS[stage.kind]:
        return []
    found = earlier.get(stage.starts_from)
    models = [name for name, one in earlier.items() if one.kind in MODEL_KINDS]
    if found is None:
        why = "which comes later or is itself" if stage.starts_from in later else "which is no stage"
    elif found.kind not in MODEL_KINDS:
        why = f"a stage of kind {found.kind}, which makes no model"
    else:
        return []
    return [
        f"starts_from is {stage.starts_from!r}, {why}; wanted base, previous, or an earlier stage that makes a model "
        f"({', '.join(models) or 'there is none'})"
    ]


def _data_problems(stage: Stage, recipe: Recipe, earlier: Mapping[str, Stage], later: set[str]) -> list[str]:
    if isinstance(stage.data, str):
        if stage.data or stage.kind in ("sft", "rl", "evaluate"):
            return []
        return ["wanted data: a path, {from: STAGE} or {source: NAME}"]
    if len(stage.data) != 1:
        return [f"data: wanted either from or source, came {dict(stage.data)!r:.60}"]
    ((key, name),) = stage.data.items()
    if key == "source":
        known = ", ".join(recipe.sources) or "there is none"
        return [] if name in recipe.sources else [f"data: no source {name!r} in the recipe ({known})"]
    found = earlier.get(name)
    wanted = (*SAMPLE_KINDS, *ROW_KINDS) if stage.kind == "select" else ROW_KINDS
    fitting = [one.name for one in earlier.values() if one.kind in wanted]
    if found is None:
        why = "comes later or is the stage itself" if name in later else "is no stage"
    elif found.kind in SAMPLE_KINDS and stage.kind != "select":
        why = f"leaves samples, not rows (kind {found.kind}); put a select stage between"
    elif found.kind not in wanted:
        why = f"makes no data (kind {found.kind})"
    else:
        return []
    return [f"data: from {name!r}, which {why}; there: {', '.join(fitting) or 'no earlier stage that fits'}"]
