"""Supervised fine-tuning on completions: rows → prompts and target tokens → the same update as RL, with an NLL loss."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rethinker_jax.config import Config, LossConfig
from rethinker_jax.console import RunProgress, parameter_line
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import SFT_SEED, Stage, sft_examples
from rethinker_jax.export import write_model_directory
from rethinker_jax.metrics import MetricsLog, read_metrics
from rethinker_jax.models.parts import count_parameters
from rethinker_jax.models.sharding import row_shards
from rethinker_jax.prompts.build import BadPrompt
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.run_directory import RunDirectory, hash_of, versions
from rethinker_jax.stopping import StopRequest, listening
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import TrainBatch, TrainRow, pack_micro_batches
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import Problem

Span = tuple[str, bool]  # text, and whether it is learned
SFT_LOSS = LossConfig(nll_coefficient=1.0)
# The embedded example's stages: clean solutions and captions; the same with second looks; bad habits.
EXAMPLE_STAGES: dict[str, tuple[Stage, float]] = {
    "example:sft-clean": ("clean", 0.0),
    "example:sft-look": ("clean", 0.7),
    "example:sft-noisy": ("noisy", 0.0),
}
SILENT = 0.85  # share of second looks whose trigger is not learned: the skill is there, but not volunteered
EXAMPLE_ROWS = 1 << 20  # the example's rows are made when asked for; this many before they repeat


@dataclasses.dataclass(frozen=True)
class SftRows:
    """Rows by number: `read(i)` gives the problem and the spans of its completion. Other rows have another `hash`."""

    count: int
    hash: str
    read: Callable[[int], tuple[Problem, tuple[Span, ...]]]


def open_rows(config: Config, run: RunDirectory) -> SftRows:
    """The rows of `sft.data`: example:sft-STAGE, or a file whose rows have a `completion`.

    A completion is a text (all of it learned) or a list of {text, loss}. Rows that cannot be used are listed in `run`.
    """
    source = config.sft.data
    if source in EXAMPLE_STAGES:
        stage, second_looks = EXAMPLE_STAGES[source]

        def make(index: int) -> tuple[Problem, tuple[Span, ...]]:
            example = sft_examples(stage, SFT_SEED, index, second_looks, SILENT)
            return example.problem, example.spans

        return SftRows(EXAMPLE_ROWS, source, make)
    if not source:
        raise UserError(
            f"sft.data: wanted a file with a completion column, or one of {', '.join(EXAMPLE_STAGES)}; nothing came. "
            "Set it."
        )
    limit = config.run.max_bad_rows
    found = read_problems(source, image_root=config.data.image_root, max_bad_rows=limit, answers=False)
    if not any("completion" in problem.row for problem in found.problems):
        raise UserError(f"{source}: wanted a column `completion`, found none. Name the file that has the completions.")
    for bad in found.bad_rows:
        run.note_bad_row(-1, bad.where, bad.kind, bad.why, limit)
    rows = []
    for problem in found.problems:
        spans = _spans(problem.row.get("completion"))
        if spans:
            rows.append((problem, spans))
        else:
            came = f"{problem.row.get('completion')!r:.80}"
            why = f"wanted `completion`, a text or a list of {{text, loss}}; came {came}"
            run.note_bad_row(-1, problem.id, "bad_completion", why, limit)
    if not rows:
        raise UserError(f"{source}: no row has a `completion` that can be learned; see {run.path / 'bad_rows.jsonl'}.")
    hash = hash_of((problem.id, problem.question, spans) for problem, spans in rows)
    return SftRows(len(rows), hash, rows.__getitem__)


def _spans(completion: object) -> tuple[Span, ...]:
    """The spans of a completion, none where it is not one."""
    if isinstance(completion, str):
        return ((completion, True),) if completion else ()
    if not isinstance(completion, list) or not all(
        isinstance(span, dict) and isinstance(span.get("text"), str) and isinstance(span.get("loss"), bool)
        for span in completion
    ):
        return ()
    return tuple((span["text"], span["loss"]) for span in completion)


def sft_row(system: System, problem: Problem, spans: tuple[Span, ...], max_tokens: int) -> TrainRow:
    """Target tokens of one row: each span encoded by itself, then the end token, which is learned."""
    pieces = [system.tokenizer.encode(text) for text, _ in spans]
    mask = np.concatenate([np.full(len(ids), learned) for ids, (_, learned) in zip(pieces, spans, strict=True)])
    ids = np.append(np.concatenate(pieces), system.tokenizer.end_token_ids[0]).astype(np.int32)[:max_tokens]
    mask = np.append(mask, True)[:max_tokens]
    none = np.zeros(len(ids), bool)
    return TrainRow(system.builder.build(problem), ids, none, mask, np.zeros(len(ids), np.float32), fresh=False)


def fine_tune(config: Config, name: str) -> Path:
    """The `sft` command. Returns the run directory; its `model/` is the tuned Hugging Face directory."""
    started = time.monotonic()
    run = RunDirectory(Path(config.run.dir or f"runs/{name}"), "sft")
    model = run.path / "model"
    with run.locked(), listening() as stop:
        run.check_config(config)
        if run.read_summary().get("num_steps", 0) < config.sft.num_steps or not model.is_dir():
            start_jax(config)
            rows = open_rows(config, run)
            system = load_system(config)
            run.start(config)
            with (
                contextlib.closing(CheckpointStore(run.path / "checkpoints", config.run.keep_checkpoints)) as store,
                MetricsLog(run.path, store.latest_step or 0) as log,
            ):
                updater, state, spent = begin(config, system, rows, store)
                started -= spent
                state = run_steps(run, config, name, system, rows, updater, state, log, store, stop, started)
            merged = system.merged_params(state.params)
            write_model_directory(system.directory, model, system.model.config, merged)
            counts = count_parameters(state.params, config.model.freeze)
            run.write_summary(summarize(config, name, read_metrics(log.path), time.monotonic() - started, counts))
        print(f"loss: {run.read_summary()['nll']}\nmodel: {model}")
    return run.path


def begin(config: Config, system: System, rows: SftRows, store: CheckpointStore) -> tuple[Updater, TrainState, float]:
    """The state at the first step, or at the last checkpoint, and the seconds that earlier processes spent on it."""
    updater = make_updater(config, system, config.sft.num_steps, SFT_LOSS)
    if store.latest_step is None:
        return updater, updater.init(system.params), 0.0
    shapes = updater.shapes(system.params)
    system.drop_params()
    saved = store.restore(shapes, system.mesh)
    if saved.meta["data"] != rows.hash:
        raise UserError(
            f"sft.data: {config.sft.data} does not hold the rows with which the run in {store.directory.parent} began. "
            "Put them back, or name another run.dir."
        )
    return updater, saved.state, saved.meta["wall_s"]


def run_steps(
    run: RunDirectory,
    config: Config,
    name: str,
    system: System,
    rows: SftRows,
    updater: Updater,
    state: TrainState,
    log: MetricsLog,
    store: CheckpointStore,
    stop: StopRequest,
    started: float,
) -> TrainState:
    """From `state`, that of the newest checkpoint, to the last step. Batches are made one step ahead."""
    order = DataOrder(rows.count, config.run.seed, config.data.shuffle)
    first, num_steps, cut = store.latest_step or 0, config.sft.num_steps, False
    with RunProgress(num_steps, first, title=name) as progress, ThreadPoolExecutor(1) as ahead:
        progress.note(parameter_line(count_parameters(state.params, config.model.freeze)))
        coming = ahead.submit(next_batches, config, system, rows, order, first, run)
        for step in range(first, num_steps):
            with stop.held():
                begin = time.monotonic()
                batches, cut_share = coming.result()
                if step + 1 < num_steps:
                    coming = ahead.submit(next_batches, config, system, rows, order, step + 1, run)
                state, metrics = updater.step(state, batches)
                found = {key: float(metrics[key]) for key in ("nll", "gradient_norm")} | {"cut_share": cut_share}
                log.write(step, found | {"seconds": time.monotonic() - begin})
                if cut_share and not cut:
                    cut = True
                    progress.note(
                        f"step {step}: {cut_share:.0%} of the completions are longer than sft.max_completion_tokens="
                        f"{config.sft.max_completion_tokens} and are learned without their end"
                    )
                progress.update(step + 1, {"loss": found["nll"]})
                if (step + 1) % config.run.save_every == 0 or step + 1 == num_steps or stop.asked:
                    meta = {"step": step + 1, "data": rows.hash, "wall_s": time.monotonic() - started}
                    store.save(step + 1, Saved(state, {}, meta))
    return state


def next_batches(
    config: Config, system: System, rows: SftRows, order: DataOrder, step: int, run: RunDirectory
) -> tuple[list[TrainBatch], float]:
    """The micro-batches of a step, and the share of completions that were cut to fit.

    Rows that cannot become a prompt are listed in `run` and left out.
    """
    size, made, end = config.sft.batch_size, [], system.tokenizer.end_token_ids[0]
    for place in range(step * size, (step + 1) * size):
        problem, spans = rows.read(order[place])
        try:
            made.append(sft_row(system, problem, spans, config.sft.max_completion_tokens))
        except BadPrompt as error:
            run.note_bad_row(step, problem.id, error.kind, str(error), config.run.max_bad_rows)
    if not made:
        raise UserError(f"step {step}: none of its {size} rows can be used; see {run.path / 'bad_rows.jsonl'}.")
    micro = config.training.micro_batch_size or size
    num_cut = sum(int(row.completion_ids[-1]) != end for row in made)
    length, shards = config.sft.max_completion_tokens, row_shards(system.mesh)
    batches = pack_micro_batches(made, system.geometry, length, size, micro, config.buckets, shards)
    return batches, num_cut / len(made)


def summarize(
    config: Config, name: str, rows: list[dict[str, Any]], wall_s: float, parameters: dict[str, int]
) -> dict[str, Any]:
    """What `summary.json` holds; `nll` is the mean over the last tenth of the steps, at least five."""
    last = [row["nll"] for row in rows[-max(5, len(rows) // 10) :] if row["nll"] is not None]
    return {
        "name": name,
        "num_steps": config.sft.num_steps,
        "nll": float(np.mean(last)) if last else None,
        "parameters": parameters,
        "wall_s": wall_s,
        "seed": config.run.seed,
        "device": f"{len(jax.devices())} × {jax.devices()[0].device_kind}",
    } | versions()
