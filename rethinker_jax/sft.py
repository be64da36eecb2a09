"""Supervised fine-tuning on completions: rows → prompts and target tokens → the same update as RL, with an NLL loss."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from rethinker_jax.config import Config, LossConfig
from rethinker_jax.config_file import save_config
from rethinker_jax.console import RunProgress
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import SFT_SEED, Stage, sft_examples
from rethinker_jax.export import write_model_directory
from rethinker_jax.metrics import MetricsLog
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import TrainBatch, TrainRow, pack_micro_batches
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.types import Problem

Span = tuple[str, bool]  # text, and whether it is learned
SFT_LOSS = LossConfig(nll_coefficient=1.0)
# The embedded example's stages: clean solutions and captions; the same with a share of second looks; bad habits.
EXAMPLE_STAGES: dict[str, tuple[Stage, float]] = {
    "example:sft-clean": ("clean", 0.0),
    "example:sft-look": ("clean", 0.25),
    "example:sft-noisy": ("noisy", 0.0),
}
SILENT = 0.85  # share of second looks whose trigger is not learned: the skill is there, but not volunteered
EXAMPLE_ROWS = 1 << 20  # the example's rows are made when asked for; this many before they repeat


@dataclasses.dataclass(frozen=True)
class SftRows:
    """Rows by number: `read(i)` gives the problem and the spans of its completion."""

    count: int
    read: Callable[[int], tuple[Problem, tuple[Span, ...]]]


def open_rows(config: Config) -> SftRows:
    """The rows of `sft.data`: example:sft-STAGE, or a file whose rows have a `completion`.

    A completion is a text (all of it learned) or a list of {text, loss}. Raises UserError for anything else.
    """
    source = config.sft.data
    if source in EXAMPLE_STAGES:
        stage, second_looks = EXAMPLE_STAGES[source]

        def make(index: int) -> tuple[Problem, tuple[Span, ...]]:
            example = sft_examples(stage, SFT_SEED, index, second_looks, SILENT)
            return example.problem, example.spans

        return SftRows(EXAMPLE_ROWS, make)
    if not source:
        raise UserError(
            f"sft.data: wanted a file with a completion column, or one of {', '.join(EXAMPLE_STAGES)}; nothing came. "
            "Set it."
        )
    problems = read_problems(
        source, image_root=config.data.image_root, max_bad_rows=config.run.max_bad_rows, answers=False
    ).problems
    rows = [(problem, _spans(problem, source)) for problem in problems]
    return SftRows(len(rows), rows.__getitem__)


def _spans(problem: Problem, source: str) -> tuple[Span, ...]:
    completion = problem.row.get("completion")
    if isinstance(completion, str) and completion:
        return ((completion, True),)
    try:
        spans = tuple((str(span["text"]), bool(span["loss"])) for span in completion or ())
    except (TypeError, KeyError):
        spans = ()
    if not spans:
        raise UserError(
            f"{source}, row {problem.id!r}: wanted `completion`, a text or a list of {{text, loss}}; "
            f"came {completion!r:.80}."
        )
    return spans


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
    start_jax(config)
    run_dir = Path(config.run.dir or f"runs/{name}")
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    rows = open_rows(config)
    system = load_system(config)
    order = DataOrder(rows.count, config.run.seed, config.data.shuffle)
    updater = make_updater(config, system, config.sft.num_steps, SFT_LOSS)
    state = updater.init(system.params)
    store = CheckpointStore(run_dir / "checkpoints", config.run.keep_checkpoints)
    first = store.latest_step or 0
    if first:
        state = store.restore(state, system.mesh).state

    def build(step: int) -> list[TrainBatch]:
        indices = [order[step * config.sft.batch_size + i] for i in range(config.sft.batch_size)]
        made = [sft_row(system, *rows.read(index), config.sft.max_completion_tokens) for index in indices]
        micro = config.training.micro_batch_size or config.sft.batch_size
        return pack_micro_batches(made, system.geometry, config.sft.max_completion_tokens, len(made), micro)

    with (
        MetricsLog(run_dir, first) as log,
        RunProgress(config.sft.num_steps, first, title=name) as progress,
        ThreadPoolExecutor(1) as ahead,
    ):
        coming = ahead.submit(build, first)
        for step in range(first, config.sft.num_steps):
            begin = time.monotonic()
            batches = coming.result()
            coming = ahead.submit(build, step + 1)
            state, metrics = updater.step(state, batches)
            found = {"nll": float(metrics["nll"]), "gradient_norm": float(metrics["gradient_norm"])}
            log.write(step, found | {"seconds": time.monotonic() - begin})
            progress.update(step + 1, {"loss": found["nll"]})
            if (step + 1) % config.run.save_every == 0 or step + 1 == config.sft.num_steps:
                store.save(step + 1, Saved(state, {}, {"step": step + 1}))
    store.close()
    write_model_directory(system.directory, run_dir / "model", system.model.config, jax.device_get(state.params))
    return run_dir
