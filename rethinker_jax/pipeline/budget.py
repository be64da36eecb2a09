"""What a recipe will cost, by arithmetic from configs and shapes alone: `pipeline RECIPE --dry-run`."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow.parquet as pq

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.curation.chain import describe, read_filters
from rethinker_jax.device_bytes import Work, held_bytes, learns, stand_in
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.asks import choose_protocol
from rethinker_jax.example.dataset import SPLIT_SIZES
from rethinker_jax.mesh_spec import mesh_words
from rethinker_jax.models.lora import adapter_layout
from rethinker_jax.models.parts import PARTS, count_parameters
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen25vl import param_shapes
from rethinker_jax.models.qwen_config import QwenConfig
from rethinker_jax.pipeline.plan import Planned, plan
from rethinker_jax.pipeline.recipe import MODEL_KINDS, read_recipe
from rethinker_jax.planning.auto_mesh import choose_mesh
from rethinker_jax.planning.named_models import find_model
from rethinker_jax.sft.rows import EXAMPLE_ROWS, EXAMPLE_STAGES
from rethinker_jax.system import model_directory
from rethinker_jax.training.optimizer import num_warmup_steps

NAME_WIDTH = 11


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, by what they are for; activations, logits, caches and buffers come on top.

    host  bytes of the host's memory for each device.
    """

    state: Mapping[str, int]
    update: Mapping[str, int]
    rollout: Mapping[str, int]
    host: int = 0


def dry_run(path: Path, overrides: Sequence[str], mesh: MeshConfig | None) -> None:
    """Print every stage's budget; run nothing and write nothing. Raises UserError for whatever a run would refuse."""
    asked = read_recipe(path, overrides)
    stages = plan(asked, mesh)
    base = find_model(str(model_directory(asked.recipe.model)))
    check_budgets(stages, base.config)
    total = count_parameters(param_shapes(base.config), ())["total"]
    print(f"{asked.recipe.name}: {len(stages)} stages in {asked.directory}; base {asked.recipe.model}, {_short(total)}")
    for one in stages:
        source = f" from {one.parent}" if one.parent else ""
        print(f"\n{one.stage.name}: {one.stage.kind}{source}")
        for name, text in budget_lines(one, base.config, base.max_pixels):
            print(f"  {name:<{NAME_WIDTH}}{text}")
    print(
        "\nMemory is arithmetic, of one device: weights, gradients, moments and copies. Activations, logits, caches "
        "and the compiler's buffers come on top."
    )


def check_budgets(stages: Sequence[Planned], qwen: QwenConfig) -> None:
    """Raises UserError for what does not fit the base model: adapters, dtypes, rows."""
    problems = []
    for one in stages:
        try:
            resolve_dtype(one.config.model.dtype, qwen.dtype)
            if one.stage.kind in MODEL_KINDS:
                _trained_shapes(one.config, qwen)
            problems += [f"stage {one.stage.name}: {text}" for text in _too_few_rows(one)]
        except UserError as error:
            problems.append(f"stage {one.stage.name}: {error}")
    if problems:
        raise UserError("the recipe's stages cannot be run as they are:\n" + "\n".join(problems))


def _too_few_rows(one: Planned) -> Iterator[str]:
    rows, wanted = _num_rows(one), one.config.rollout.prompts_per_step
    if one.stage.kind == "rl" and one.config.run.num_steps and rows is not None and rows < wanted:
        yield f"wanted at least rollout.prompts_per_step={wanted} rows, found {rows} in {one.path_of('data')}"


def budget_lines(one: Planned, qwen: QwenConfig, max_pixels: int) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known of a stage. `max_pixels`: of the base model's images."""
    reads = "; ".join(_told_input(given.role, given.path, given.stage, given.hub) for given in one.inputs)
    yield "reads", reads or f"{one.stage.benchmark}, from where it was published"
    kind = one.stage.kind
    if kind == "rl":
        yield from _rl_lines(one.config, _num_rows(one), one.stage.checkpoint)
    elif kind == "sft":
        yield from _sft_lines(one.config, _num_rows(one))
    elif kind == "select":
        yield "filters", ", ".join(describe(found) for found in read_filters(one.config.select.filters))
    elif kind == "distill":
        yield from _distill_lines(one.config, _num_rows(one))
    else:
        yield "samples", _samples_line(one)
    if kind in MODEL_KINDS:
        yield "trained", _trained_line(one.config, qwen)
    if kind != "select":
        yield "memory", _memory_line(one, qwen, max_pixels)
    yield "leaves", str(one.output)


def _told_input(role: str, path: str, stage: str, hub: str) -> str:
    where = f" of stage {stage}" if stage else f" (hub: {hub})" if hub else ""
    count = count_rows(path)
    rows = "" if role in ("ratings", "reward", "caption", "reason") else ", rows not known yet"
    return f"{role} {path}{where}{rows if count is None else f', {count:,} rows'}"


def _rl_lines(config: Config, num_rows: int | None, checkpoint: str) -> Iterator[tuple[str, str]]:
    prompts, samples, steps = config.rollout.prompts_per_step, config.rollout.samples_per_prompt, config.run.num_steps
    batch, made = config.training.batch_size, prompts * samples
    updates = made // batch
    yield (
        "rollouts",
        (
            f"{steps:,} x {prompts:,} prompts x {samples} samples = {steps * made:,} samples, up to "
            f"{config.sampling.max_new_tokens:,} tokens each"
        ),
    )
    yield (
        "updates",
        (
            f"{updates} a rollout, {steps * updates:,} in all, of training.batch_size = {batch:,} samples "
            f"({batch / samples:g} prompts, which is what EasyR1's global_batch_size counts)"
        ),
    )
    yield "rate", _rate_line(config, steps * updates)
    if config.data.validation:
        every = config.evaluation.validate_every
        yield "validation", f"every {every} steps; checkpoint {checkpoint} becomes the model"
    yield "epochs", _unknown(num_rows, lambda rows: f"{steps * prompts / rows:.2f} over {rows:,} rows")


def _sft_lines(config: Config, num_rows: int | None) -> Iterator[tuple[str, str]]:
    sft = config.sft
    if num_rows is not None and sft.validation_fraction and not sft.validation:
        held = math.ceil(num_rows * sft.validation_fraction)
        yield "held out", f"{held:,} of {num_rows:,} rows, to measure on"
        num_rows -= held
    if sft.num_epochs:
        yield (
            "updates",
            _unknown(
                num_rows,
                lambda rows: f"{math.ceil(sft.num_epochs * rows / sft.batch_size):,} of {sft.batch_size} rows",
                f"{sft.num_epochs} epoch(s) of batches of {sft.batch_size} rows",
            ),
        )
        yield "epochs", f"{sft.num_epochs}"
        steps = None if num_rows is None else math.ceil(sft.num_epochs * num_rows / sft.batch_size)
    else:
        steps = sft.num_steps
        yield "updates", f"{steps:,} of {sft.batch_size} rows"
        yield "epochs", _unknown(num_rows, lambda rows: f"{steps * sft.batch_size / rows:.2f} over {rows:,} rows")
    yield "rate", _rate_line(config, steps)
    yield "length", f"completions up to {sft.max_completion_tokens:,} tokens, longer ones: {sft.overlong}"


def _rate_line(config: Config, updates: int | None) -> str:
    optimizer = config.optimizer
    fraction = f"{optimizer.warmup_fraction:g} of the updates" if optimizer.warmup_fraction else ""
    warmup = fraction or f"{optimizer.warmup_steps} updates"
    known = "" if not fraction or updates is None else f" ({num_warmup_steps(optimizer, updates)})"
    return f"{optimizer.learning_rate:g}, {optimizer.schedule}, warm-up {warmup}{known}"


def _distill_lines(config: Config, num_rows: int | None) -> Iterator[tuple[str, str]]:
    caption, reason = config.distill.caption, config.distill.reason
    for name, role in (("captions", caption), ("reasoner", reason)):
        where = f" at {role.url}" if role.url else ""
        yield name, f"{role.model}{where}, temperature {role.temperature:g}, up to {role.max_tokens:,} tokens"
    yield "samples", _unknown(num_rows, lambda rows: f"{rows:,} rows x {reason.n}", f"{reason.n} a row")


def _samples_line(one: Planned) -> str:
    stage, config = one.stage, one.config
    n = stage.n or 1
    name = ""
    if stage.kind == "evaluate":
        protocol = choose_protocol(stage.protocol, stage.n, stage.benchmark)
        n, name = stage.n or protocol.decoding.n, f"{stage.benchmark} by {protocol.name}: "
    sampling = config.sampling
    how = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, up to {sampling.max_new_tokens:,} tokens"
    count = _unknown(_num_rows(one), lambda rows: f"{rows:,} rows x {n} = {rows * n:,} samples", f"{n} a row")
    return f"{name}{count}; {how}"


def _unknown(number: int | None, text: Any, otherwise: str = "not known before the rows are there") -> str:
    return otherwise if number is None else text(number)


def _num_rows(one: Planned) -> int | None:
    path = one.path_of("data") or one.path_of("rows")
    return None if path is None else count_rows(path)


def count_rows(source: str) -> int | None:
    """Rows of a source, usable or not; None where it is not there, or no file of rows."""
    if source in EXAMPLE_STAGES:
        return EXAMPLE_ROWS
    if source.startswith("example:"):
        return SPLIT_SIZES.get(source.removeprefix("example:"))
    path = Path(source).expanduser()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix in (".parquet", ".jsonl") for file in files):
        return None
    return sum(_count_file(file) for file in files)


def _count_file(path: Path) -> int:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(bool(line.strip()) for line in file)
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise UserError(f"cannot read {path} as parquet: {error}") from error


def _trained_shapes(config: Config, qwen: QwenConfig) -> Any:
    """Shapes of all parameters, adapters included. Raises UserError for adapters that do not fit."""
    lora = config.model.lora
    added = {"lora": adapter_layout(qwen, lora.rank, lora.targets, config.model.freeze)[1]} if lora.rank else {}
    return param_shapes(qwen) | added


def _trained_line(config: Config, qwen: QwenConfig) -> str:
    counts = count_parameters(_trained_shapes(config, qwen), config.model.freeze)
    adapted = counts["adapters"] > 0
    told = [
        f"{part} {_short(counts[part])}{' frozen' if adapted or part in config.model.freeze else ''}" for part in PARTS
    ]
    told += [f"adapters {_short(counts['adapters'])}"] if adapted else []
    return f"{_short(counts['trained'])} of {_short(counts['total'])}: {', '.join(told)}"


def memory_of(config: Config, qwen: QwenConfig, mesh: MeshConfig, work: Work) -> Memory:
    """Bytes per device of a mesh of these sizes, as `system` and `training` lay the arrays out."""
    held = held_bytes(config, qwen, stand_in(mesh), work)
    parts = {
        "weights": held.weights, "moments": held.optimizer, "reference": held.reference, "average": held.average,
    }  # fmt: skip
    update: dict[str, int] = {}
    if learns(work):
        # Those of a micro-batch are added to those before it.
        update["gradients"] = held.trained * (2 if config.training.micro_batch_tokens else 1)
        update |= {"copy": held.cast} if resolve_dtype(config.model.dtype, qwen.dtype) != jnp.float32 else {}
    rollout = {"sampling copy": held.copy} if held.copy else {}
    return Memory({name: size for name, size in parts.items() if size}, update, rollout, held.on_host)


def _memory_line(one: Planned, qwen: QwenConfig, max_pixels: int) -> str:
    kind = one.stage.kind
    if kind == "distill":
        return "of the models that are asked; a server's is its own"
    work: Work = kind if kind == "rl" or kind == "sft" else "sample"
    mesh, found_by = _mesh_of(one.config, qwen, max_pixels, work)
    found = memory_of(one.config, qwen, mesh, work)
    told = [f"state {_bytes(found.state)}"]
    told += [f"an update adds {_bytes(found.update)}"] if found.update else []
    told += [f"drawing adds {_bytes(found.rollout)}"] if found.rollout else []
    told += [f"{_size(found.host)} of moments on the host"] if found.host else []
    return f"{mesh_words(mesh)}{found_by}: {'; '.join(told)}"


def _mesh_of(config: Config, qwen: QwenConfig, max_pixels: int, work: Work) -> tuple[MeshConfig, str]:
    """The mesh of a stage on the visible devices, and whether it was searched for; -1 is at least 1."""
    mesh = config.mesh
    if mesh.search:
        return choose_mesh(config, qwen, max_pixels, work).mesh, " (found by --mesh auto)"
    sizes = mesh.sizes
    fixed = math.prod(size for size in sizes.values() if size > 0)
    left = max(jax.device_count() // fixed, 1)
    return mesh.with_sizes({axis: left for axis, size in sizes.items() if size < 0}), ""


def _bytes(parts: Mapping[str, int]) -> str:
    told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return f"{_size(sum(parts.values()))} ({told})" if len(parts) > 1 else told


def _size(number: int) -> str:
    """12.4 GB, 2.1 MB."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _short(count: int) -> str:
    """8.29 B, 52.4 M, 840."""
    for size, letter in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
