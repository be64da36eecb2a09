"""A recipe resolved: for every stage its config, model, data and output, all checked before anything runs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.benchmarks.catalog import ROWS, find_benchmark
from rethinker_jax.config import Config, DataConfig, MeshConfig
from rethinker_jax.config_check import USER_TERM
from rethinker_jax.config_file import PACKAGE_PREFIX, find_config, load_config, load_defaults, override_of
from rethinker_jax.curation.chain import read_filters
from rethinker_jax.distill.asks import body_of, check_role
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.asks import MAX_PROMPT_TOKENS, choose_protocol, overrides_of
from rethinker_jax.mesh_spec import mesh_overrides
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.pipeline.keys import Contents, counted_settings, stage_key
from rethinker_jax.pipeline.recipe import MODEL_KINDS, SAMPLE_KINDS, Asked, Stage
from rethinker_jax.prompts.dataset import HUB_ID
from rethinker_jax.prompts.template import prompt_template
from rethinker_jax.sft.rows import EXAMPLE_STAGES
from rethinker_jax.system import model_directory


@dataclasses.dataclass(frozen=True)
class Input:
    """Something a stage reads. `path` is as commands take it; `stage` makes it, `hub` is where it is downloaded from.

    role  data, samples, rows, test, validation, ratings, reward, or the model caption or reason.
    """

    role: str
    path: str
    stage: str = ""
    hub: str = ""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage as it will run. `parent` is base or the stage whose `model` it starts from, "" where it needs none."""

    stage: Stage
    config: Config
    directory: Path
    parent: str
    model: str
    inputs: tuple[Input, ...]
    output: Path

    def path_of(self, role: str) -> str | None:
        return next((one.path for one in self.inputs if one.role == role), None)


def plan(asked: Asked, mesh: MeshConfig | None, last: str = "") -> tuple[Planned, ...]:
    """The stages up to `last` ("" = all). Raises UserError with all that is wrong with any of them."""
    directory = model_directory(asked.recipe.model)
    read_config(directory)
    made: dict[str, Planned] = {}
    problems: list[str] = []
    newest = "base"
    for stage in asked.recipe.stages:
        try:
            made[stage.name] = planned = _planned(asked, stage, newest, made, mesh)
            problems += [f"stage {stage.name}: {one}" for one in _problems(planned)]
        except UserError as error:
            problems.append(f"stage {stage.name}: {error}")
        newest = stage.name if stage.kind in MODEL_KINDS else newest
        if stage.name == last:
            break
    if problems:
        raise UserError("the recipe's stages cannot be run as they are:\n" + "\n".join(problems))
    return tuple(made.values())


def keys_of(stages: Sequence[Planned], base: Path, contents: Contents) -> dict[str, str]:
    """Stage → its key. Reads the base model and the data files; nothing of what stages make."""
    keys: dict[str, str] = {"base": contents.model(base)}
    for one in stages:
        inputs = [
            (given.role, keys[given.stage] if given.stage else hash_of_input(given, contents)) for given in one.inputs
        ]
        model = keys[one.parent] if one.parent else ""
        keys[one.stage.name] = stage_key(one.stage.kind, settings_of(one), model, inputs)
    return keys


def hash_of_input(given: Input, contents: Contents) -> str:
    if given.role in ("caption", "reason"):
        return contents.model(model_directory(given.path))
    return contents.samples(Path(given.path)) if given.role == "samples" else contents.rows(given.path)


def settings_of(planned: Planned) -> dict[str, Any]:
    """What a stage is told that decides what it leaves: its own words, and the keys of its config."""
    stage = planned.stage
    given = {"n": stage.n, "benchmark": stage.benchmark, "protocol": stage.protocol, "checkpoint": stage.checkpoint}
    told = {key: value for key, value in given.items() if value not in (None, "", "last")}
    return told | counted_settings(stage.kind, planned.config)


def _planned(asked: Asked, stage: Stage, newest: str, made: Mapping[str, Planned], mesh: MeshConfig | None) -> Planned:
    """Raises UserError for what cannot be resolved."""
    parent = "" if stage.kind == "select" else newest if stage.starts_from == "previous" else stage.starts_from
    missing = [name for name in (parent, _source_stage(stage)) if name not in ("", "base", *made)]
    if missing:
        raise UserError(f"cannot be checked while the stage {missing[0]} is wrong")
    model = "" if not parent else asked.recipe.model if parent == "base" else str(made[parent].output)
    directory = asked.directory / stage.name
    inputs = tuple(_data_inputs(asked, stage, made))
    own = made[parent].config.data if parent in made else None
    config = _config(asked, stage, directory, model, inputs, own, mesh)
    _check_places(stage, config, directory, model, inputs)
    inputs = (*inputs, *_config_inputs(asked, stage, config, bool(inputs)))
    return Planned(stage, _localised(config, inputs), directory, parent, model, inputs, _output(stage, config, inputs))


def _source_stage(stage: Stage) -> str:
    return "" if isinstance(stage.data, str) else stage.data.get("from", "")


def _data_inputs(asked: Asked, stage: Stage, made: Mapping[str, Planned]) -> Iterator[Input]:
    """What `data` names; samples come with the rows that were sampled."""
    name, role = _source_stage(stage), "rows" if stage.kind == "select" else "data"
    if name:
        maker = made[name]
        if maker.stage.kind not in SAMPLE_KINDS:
            yield Input(role, str(maker.output), name)
            return
        yield Input("samples", str(maker.output), name)
        rows = next(one for one in maker.inputs if one.role == "data")
        yield dataclasses.replace(rows, role=role)
        return
    source = stage.data if isinstance(stage.data, str) else asked.recipe.sources[stage.data["source"]]
    if source:
        yield _input(asked, role, source, stage.kind == "evaluate")


def _input(asked: Asked, role: str, source: str, any_file: bool = False) -> Input:
    """A source that no stage makes. Raises UserError for one that is not there."""
    path = Path(source).expanduser()
    if source.startswith("example:") or path.exists():
        return Input(role, source)
    if HUB_ID.fullmatch(source) and path.suffix not in (".parquet", ".jsonl", ".json") and not any_file:
        local = asked.directory / "sources" / f"{source.replace('/', '--').replace(':', '--')}.parquet"
        return Input(role, str(local), hub=source)
    raise UserError(
        f"{role}: there is no {source}; wanted a file or folder of rows, a hub id owner/name[:split], or example:SPLIT"
    )


def _config(
    asked: Asked,
    stage: Stage,
    directory: Path,
    model: str,
    inputs: Sequence[Input],
    trained_with: DataConfig | None,
    mesh: MeshConfig | None,
) -> Config:
    """The config of one stage: its file, then what the recipe sets, then the command line, then that for this stage."""
    words = [override_of("run.dir", str(directory))]
    words += [override_of("model.path", model)] if model else []
    key = {"rl": "data.train", "sft": "sft.data"}.get(stage.kind)
    words += [override_of(key, one.path) for one in inputs if key and one.role == "data"]
    words += [override_of(key, value) for key, value in stage.set.items()]
    words += asked.overrides
    if mesh is not None:
        words += mesh_overrides(mesh)
    words += asked.of_stage.get(stage.name, ())
    if stage.kind == "evaluate":
        return _evaluate_config(asked, stage, words, trained_with)
    config = _loaded(asked, stage, words)
    caption = config.distill.caption
    if stage.kind == "distill" and not caption.url and not caption.model:  # the stage's model describes
        caption = dataclasses.replace(caption, model=model)
        config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, caption=caption))
    return config


def _loaded(asked: Asked, stage: Stage, words: Sequence[str]) -> Config:
    if not stage.config:
        return load_defaults(words)
    is_package = stage.config.startswith(PACKAGE_PREFIX)
    return load_config(find_config(stage.config) if is_package else asked.folder / stage.config, words)


def _evaluate_config(asked: Asked, stage: Stage, words: Sequence[str], trained_with: DataConfig | None) -> Config:
    """As the command `evaluate` makes it: the protocol's decoding and prompt, and what is said goes after it."""
    protocol = choose_protocol(stage.protocol, stage.n, stage.benchmark)
    given = _loaded(asked, stage, words)
    own = given.data if stage.config or trained_with is None else trained_with
    asks = [f"data.max_prompt_tokens={MAX_PROMPT_TOKENS}", *overrides_of(protocol, own)]
    config = _loaded(asked, stage, [*asks, *words])
    if not any(word.startswith("rethink.temperature=") for word in words):
        rethink = dataclasses.replace(config.rethink, temperature=config.sampling.temperature)
        config = dataclasses.replace(config, rethink=rethink)
    return config


def _check_places(stage: Stage, config: Config, directory: Path, model: str, inputs: Sequence[Input]) -> None:
    """Raises UserError where a config says otherwise where a stage lies, starts from or reads."""
    wanted = {"run.dir": (config.run.dir, str(directory), "dir=DIR for the pipeline's directory")}
    if model:
        wanted["model.path"] = (config.model.path, model, "starts_from, or model=DIR for the base")
    data = next((one.path for one in inputs if one.role == "data"), None)
    if data is not None and stage.kind in MODEL_KINDS:
        key, value = ("data.train", config.data.train) if stage.kind == "rl" else ("sft.data", config.sft.data)
        wanted[key] = (value, data, f"data, or stages.{stage.name}.data=PATH")
    for key, (came, own, instead) in wanted.items():
        if came != own:
            raise UserError(f"{key} is set to {came!r}, but the recipe says {own!r}; use {instead}")


def _config_inputs(asked: Asked, stage: Stage, config: Config, has_data: bool) -> Iterator[Input]:
    """What the config names besides: rows to evaluate on, validation, ratings, reward functions. Raises UserError."""
    tested = config.evaluation.num_problems or config.evaluation.num_sampled_problems
    if stage.kind == "rl" and not has_data:
        yield _input(asked, "data", config.data.train)
    if stage.kind == "sft" and not has_data and config.sft.data in EXAMPLE_STAGES:
        yield Input("data", config.sft.data)
    elif stage.kind == "sft" and not has_data:
        if not config.sft.data:
            raise UserError("wanted data: a path, {from: STAGE} or {source: NAME}")
        yield _input(asked, "data", config.sft.data)
    if tested and (stage.kind == "rl" or (stage.kind == "sft" and config.sft.evaluate)):
        yield _input(asked, "test", config.data.test)
    validation = {"sft": config.sft.validation, "rl": config.data.validation}.get(stage.kind)
    if validation:
        yield _input(asked, "validation", validation)
    if stage.kind == "distill":
        caption, reason = config.distill.caption, config.distill.reason
        if not caption.url and caption.model != config.model.path:
            yield Input("caption", caption.model)
        if not reason.url:
            yield Input("reason", reason.model)
    if stage.kind == "select" and config.select.ratings:
        yield _input(asked, "ratings", config.select.ratings)
    if stage.kind == "rl":
        terms = {*config.reward.terms, *(name for terms in config.reward.by_type.values() for name in terms)}
        files = sorted({found["file"] for found in map(USER_TERM.fullmatch, terms) if found})
        yield from (_input(asked, "reward", file) for file in files)


def _localised(config: Config, inputs: Sequence[Input]) -> Config:
    """The config with the files that downloaded data will lie in."""
    place = {one.hub: one.path for one in inputs if one.hub}
    data = dataclasses.replace(
        config.data,
        train=place.get(config.data.train, config.data.train),
        test=place.get(config.data.test, config.data.test),
        validation=place.get(config.data.validation, config.data.validation),
    )
    sft = dataclasses.replace(
        config.sft,
        data=place.get(config.sft.data, config.sft.data),
        validation=place.get(config.sft.validation, config.sft.validation),
    )
    return dataclasses.replace(config, data=data, sft=sft)


def _output(stage: Stage, config: Config, inputs: Sequence[Input]) -> Path:
    folder = Path(config.run.dir)
    if stage.kind in MODEL_KINDS:
        return folder / "model"
    if stage.kind in SAMPLE_KINDS:
        return folder / "samples.jsonl"
    if stage.kind == "evaluate":
        return folder / "result.json"
    rows = next(one.path for one in inputs if one.role in ("rows", "data"))
    return folder / f"{config.select.mode}{'.jsonl' if rows.endswith('.jsonl') else '.parquet'}"


def _problems(planned: Planned) -> Iterator[str]:
    """What the stage's own command would refuse after its config was read, as far as it can be known now."""
    stage, config = planned.stage, planned.config
    if stage.kind == "distill":
        for role in (config.distill.caption, config.distill.reason):
            check_role(role, body_of(role, config.distill))
            if not role.url:
                model_directory(role.model)
    if stage.kind != "select":
        prompt_template(config.data.prompt_template)
    else:
        filters = read_filters(config.select.filters)
        has_samples = planned.path_of("samples") is not None
        if config.select.mode == "traces" and not (filters and has_samples):
            yield "select.mode traces wants data from a stage with samples, and select.filters"
        unfit = [one.name for one in filters if one.of_samples]
        if not has_samples and (unfit or not filters):
            yield f"wanted data from a stage with samples{', for the filter ' if unfit else ''}{' and '.join(unfit)}"
    if stage.kind == "evaluate":
        if stage.benchmark != ROWS:
            find_benchmark(stage.benchmark)
        elif planned.path_of("data") is None:
            yield "the benchmark rows wants data: a path, {from: STAGE} or {source: NAME}"
        n = stage.n or choose_protocol(stage.protocol, stage.n, stage.benchmark).decoding.n
        if n > 1 and not config.sampling.temperature:
            yield f"n is {n} at temperature 0, which draws the same {n} times; set sampling.temperature"
    if stage.checkpoint == "best" and not (config.data.validation and config.run.keep_best):
        yield (
            "checkpoint: best wants what measures and keeps it: data.validation, evaluation.validate_every, and "
            "run.keep_best above 0"
        )
    if stage.kind == "sample" and (stage.n or 1) > 1 and not config.sampling.temperature:
        yield f"n is {stage.n} at temperature 0, which draws the same {stage.n} times; set sampling.temperature"
