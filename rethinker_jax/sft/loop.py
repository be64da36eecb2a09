"""The `sft` command, top to bottom: rows → batches → updates, with validation and evaluation around them."""

import contextlib
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rethinker_jax import health, peers
from rethinker_jax.chosen_mesh import on_mesh
from rethinker_jax.config import Config, LossConfig, SftConfig
from rethinker_jax.console import RunProgress, parameter_line
from rethinker_jax.devices import start_jax
from rethinker_jax.errors import UserError
from rethinker_jax.export import write_model_directory
from rethinker_jax.metrics import MetricsLog, read_metrics
from rethinker_jax.models.parts import count_parameters
from rethinker_jax.options import ProfileSteps
from rethinker_jax.phases import Laps, during
from rethinker_jax.processes import check_same, exchange, first_says, is_mine
from rethinker_jax.profiling import Profiler
from rethinker_jax.prompts.build import BadPrompt
from rethinker_jax.prompts.dataset import BadRow
from rethinker_jax.prompts.order import DataOrder
from rethinker_jax.report import write_report
from rethinker_jax.run_data import Bad, agreed
from rethinker_jax.run_directory import RunDirectory, versions
from rethinker_jax.sft.conversation import SftRow
from rethinker_jax.sft.encode import Encoded, RowEncoder
from rethinker_jax.sft.evaluation import Evaluator, open_evaluator
from rethinker_jax.sft.rows import SftRows, Split, open_split
from rethinker_jax.sft.samples import NUM_SAMPLES, write_samples
from rethinker_jax.sft.validation import measure
from rethinker_jax.stopping import StopRequest, listening
from rethinker_jax.system import System, load_system, make_updater, pack_to_train
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.layout import TrainBatch, TrainRow
from rethinker_jax.training.update import TrainState, Updater

SFT_LOSS = LossConfig(nll_coefficient=1.0)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same from step to step. `num_steps` is the config's, or what its epochs come to."""

    config: Config
    name: str
    run: RunDirectory
    system: System
    encoder: RowEncoder
    split: Split
    num_steps: int
    noting: threading.Lock = dataclasses.field(
        default_factory=threading.Lock
    )  # the next batch is made beside validation

    @property
    def num_places(self) -> int:
        """Rows that are met in all, the last batch being short where epochs end within it; 0 = batches are full."""
        return self.config.sft.num_epochs * self.split.train.count

    @functools.cached_property
    def order(self) -> DataOrder:
        return DataOrder(self.split.train.count, self.config.run.seed, self.config.data.shuffle)


@dataclasses.dataclass
class Progress:
    """What changes from step to step, and is in every checkpoint."""

    step: int
    state: TrainState
    started: float  # of the wall clock, moved back by what earlier processes of this run spent
    before: dict[str, float] | None = None  # scores of the evaluation before, where there is one
    validated_before: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """The micro-batches of a step, and shares of its rows: cut to fit, and left out for being too long."""

    micro_batches: tuple[TrainBatch, ...]
    cut_share: float
    dropped_share: float


def fine_tune(config: Config, name: str, profile: ProfileSteps | None = None) -> Path:
    """The `sft` command. Returns the run directory; its `model/` is the tuned Hugging Face directory.

    `profile`: the steps to leave a trace of.
    """
    started = time.monotonic()
    run = RunDirectory(Path(config.run.dir or f"runs/{name}"), "sft")
    model = run.path / "model"
    with run.locked(), listening() as stop:
        run.check_config(config)
        if not is_finished(config.sft, run.read_summary()) or not model.is_dir():
            start_jax(config)
            split = open_split(config, functools.partial(_note, run, config))
            check_same("sft.data", lambda: [split.train.count, split.train.hash, len(split.validation)])
            num_steps = count_steps(config.sft, split.train.count)
            with open_evaluator(config, run) as evaluator:
                config = on_mesh(config, "sft")
                system = load_system(config)
                encoder = RowEncoder(system.builder, config.sft.max_completion_tokens)
                setup = Setup(config, name, run, system, encoder, split, num_steps)
                kept = config.run.keep_checkpoints
                store = CheckpointStore(run.path / "checkpoints", kept, manifest=run.manifest(config))
                with contextlib.closing(store):
                    updater, progress = begin(setup, store, started)
                    run.start(config)
                    _write_samples(setup)
                    with MetricsLog(run.path, progress.step, writes=run.writes) as log:
                        after = run_steps(setup, updater, progress, evaluator, log, store, stop, profile)
            write_model_directory(
                system.directory, model, system.model.config, system.merged_params(progress.state.params)
            )
            if run.writes:
                run.write_summary(summarize(setup, progress, after, read_metrics(log.path)))
        elif profile is not None:
            print("--profile: this run is finished, no step is traced", file=sys.stderr)
        if run.writes:
            report = write_report(run.path)
            print(f"loss: {run.read_summary()['nll']}\nmodel: {model}\nreport: {report}")
    return run.path


def is_finished(sft: SftConfig, summary: dict[str, Any]) -> bool:
    """Whether a run that left this summary has come as far as the config asks."""
    key = "num_epochs" if sft.num_epochs else "num_steps"
    return summary.get(key, 0) >= (sft.num_epochs or sft.num_steps)


def count_steps(sft: SftConfig, num_rows: int) -> int:
    """Optimizer steps: the config's, or as many as its epochs need, the last with the rows that are left (ceil)."""
    return -(-sft.num_epochs * num_rows // sft.batch_size) if sft.num_epochs else sft.num_steps


def _note(run: RunDirectory, config: Config, bad: BadRow) -> None:
    run.note_bad_row(-1, bad.where, bad.kind, bad.why, config.run.max_bad_rows)


def begin(setup: Setup, store: CheckpointStore, started: float) -> tuple[Updater, Progress]:
    """The state at the first step, or at the last checkpoint."""
    config, system, rows = setup.config, setup.system, setup.split.train
    updater = make_updater(config, system, setup.num_steps, SFT_LOSS)
    if first_says(store.latest_step) is None:
        return updater, Progress(0, updater.init(system.params), started)
    shapes = updater.shapes(system.params)
    system.drop_params()
    saved = store.restore(shapes, system.mesh)
    if saved.meta["data"] != rows.hash:
        raise UserError(
            f"sft.data: {config.sft.data} does not hold the rows with which the run in {store.directory.parent} began. "
            "Put them back, or name another run.dir."
        )
    meta = saved.meta
    progress = Progress(meta["step"], saved.state, started - meta["wall_s"], meta["before"], meta["validated_before"])
    return updater, progress


def run_steps(
    setup: Setup,
    updater: Updater,
    progress: Progress,
    evaluator: Evaluator | None,
    log: MetricsLog,
    store: CheckpointStore,
    stop: StopRequest,
    profile: ProfileSteps | None = None,
) -> dict[str, float] | None:
    """To the last step; batches are made one step ahead. Returns the scores of the evaluation after, if any."""
    config, first, num_steps = setup.config, progress.step, setup.num_steps
    with (
        RunProgress(num_steps, first, title=setup.name, quiet=not setup.run.writes) as shown,
        Profiler(profile, first, num_steps, setup.run.path, shown.note) as profiler,
        ThreadPoolExecutor(1) as ahead,
    ):
        shown.note(parameter_line(count_parameters(progress.state.params, config.model.freeze)))
        if evaluator is not None and progress.before is None:
            shown.phase("evaluation before")
            progress.before = evaluator.scores(setup.system, progress.state.params, "before")
        if setup.split.validation and progress.validated_before is None:
            shown.phase("validation before")
            progress.validated_before = validate(setup, updater, progress.state)
        shown.phase("training")
        coming: Future[Batch | Encodings] | None = None
        said: set[str] = set()
        watch, due, laps = health.Watch(config, log.path, first), False, Laps()
        for step in range(first, num_steps):
            with stop.held(), profiler.step(step):
                with during("prompts"):  # most of it was done beside the step before
                    found_ahead = prepare(setup, step) if coming is None else coming.result()
                    batch = found_ahead if isinstance(found_ahead, Batch) else make_batch(setup, step, found_ahead)
                coming = ahead.submit(prepare, setup, step + 1) if step + 1 < num_steps else None
                found = learn(setup, updater, progress, batch)
                ringing, lines = watch.look(step, found)
                for line in lines:
                    shown.note(line)
                metrics = found | ringing | laps.metrics()
                with during("write"):
                    log.write(step, metrics)
                watch.refuse(store.directory, store.latest_step)
                _say_overlong(setup, shown, step, batch, said)
                shown.update(step + 1, {"loss": found["nll"]})
                stop_asked = stop.agree(exchange(stop.asked))
                due = due or (step + 1) % config.run.save_every == 0
                if (due and not watch.is_suspect) or step + 1 == num_steps or stop_asked:
                    save(store, progress, setup.split.train)
                    due = False
        if evaluator is None:
            return None
        shown.phase("evaluation after")
        return evaluator.scores(setup.system, progress.state.params, "after")


def learn(setup: Setup, updater: Updater, progress: Progress, batch: Batch) -> dict[str, float]:
    """One optimizer step, and the validation where it is due. Changes `progress`; returns metrics."""
    sft = setup.config.sft
    with during("update"):  # until the device has done it: its numbers are read right here
        progress.state, metrics = updater.step(progress.state, batch.micro_batches)
        found = {key: float(metrics[key]) for key in ("nll", "gradient_norm", "skipped_update")}
    progress.step += 1
    found |= {"cut_share": batch.cut_share, "skipped_updates": int(jax.device_get(progress.state.num_skipped))}
    if sft.overlong == "drop":
        found["dropped_share"] = batch.dropped_share
    if setup.split.validation and (progress.step % sft.validate_every == 0 or progress.step == setup.num_steps):
        found |= validate(setup, updater, progress.state)
    return found


@during("checkpoint")
def save(store: CheckpointStore, progress: Progress, rows: SftRows) -> None:
    meta = {
        "step": progress.step,
        "data": rows.hash,
        "wall_s": time.monotonic() - progress.started,
        "before": progress.before,
        "validated_before": progress.validated_before,
    }
    store.save(progress.step, Saved(progress.state, {}, meta))


@dataclasses.dataclass(frozen=True)
class Encodings:
    """Rows of a batch by place, encoded, and why others are not: of several processes, as far as this one knows."""

    rows: tuple[SftRow, ...]
    encoded: Mapping[int, Encoded]
    bad: Bad


def prepare(setup: Setup, step: int) -> "Batch | Encodings":
    """The batch of a step; where processes have yet to agree on its rows, what it is made from. In any thread."""
    size = setup.config.sft.batch_size
    last = min((step + 1) * size, setup.num_places or (step + 1) * size)
    numbers = [setup.order[place] for place in range(step * size, last)]
    found = encode(setup, [setup.split.train.read(number) for number in numbers])
    return found if peers.watched() else make_batch(setup, step, found)


def make_batch(setup: Setup, step: int, found: Encodings) -> Batch:
    """The micro-batches of a step. Rows that cannot become a prompt are listed in the run and left out."""
    made = usable(setup, step, found)
    kept = [one for one in made if not (one.is_cut and setup.config.sft.overlong == "drop")]
    if not kept:
        why = "each is too long or bad" if made else f"see {setup.run.path / 'bad_rows.jsonl'}"
        raise UserError(f"step {step}: none of its {len(found.rows)} rows can be used; {why}.")
    cut = sum(one.is_cut for one in kept) / len(kept)
    return Batch(pack(setup, [one.row for one in kept]), cut, 1 - len(kept) / len(made))


def encode(setup: Setup, rows: Sequence[SftRow]) -> Encodings:
    """Of several processes each decodes the pictures of its share."""
    encoded: dict[int, Encoded] = {}
    bad: Bad = {}
    for place, row in enumerate(rows):
        try:
            encoded[place] = setup.encoder.encode(row)
            if is_mine(place):
                setup.system.builder.decode(encoded[place].row.prompt)
        except BadPrompt as error:
            bad[place] = error.kind, str(error)
    return Encodings(tuple(rows), encoded, bad)


def usable(setup: Setup, step: int, found: Encodings) -> list[Encoded]:
    """The rows that can be used; the others are listed in the run. Every process has to ask, in its main thread."""
    bad = agreed(found.bad)
    for place, (kind, why) in bad.items():
        with setup.noting:
            limit = setup.config.run.max_bad_rows
            setup.run.note_bad_row(step, found.rows[place].problem.id, kind, why, limit)
    return [found.encoded[place] for place in range(len(found.rows)) if place not in bad]


def pack(setup: Setup, rows: Sequence[TrainRow]) -> tuple[TrainBatch, ...]:
    """At most a batch of rows as micro-batches of one shape."""
    config, system = setup.config, setup.system
    return pack_to_train(config, system, rows, config.sft.max_completion_tokens, config.sft.batch_size).batches


@during("validation")
def validate(setup: Setup, updater: Updater, state: TrainState) -> dict[str, float]:
    """Loss and token accuracy on the validation rows, whose completions are cut as in training."""
    rows, size = setup.split.validation, setup.config.sft.batch_size
    made = (usable(setup, -1, encode(setup, rows[start : start + size])) for start in range(0, len(rows), size))
    batches = (batch for some in made if some for batch in pack(setup, [one.row for one in some]))
    found = measure(updater, state.params, batches)
    if not found:
        raise UserError("sft.validation: none of its rows can be used; see bad_rows.jsonl in the run directory.")
    return found


def _say_overlong(setup: Setup, shown: RunProgress, step: int, batch: Batch, said: set[str]) -> None:
    """Says once that completions do not fit."""
    limit = f"sft.max_completion_tokens={setup.config.sft.max_completion_tokens}"
    for word, share in (("learned without their end", batch.cut_share), ("left out", batch.dropped_share)):
        if share and word not in said:
            said.add(word)
            shown.note(f"step {step}: {share:.0%} of the completions are longer than {limit} and are {word}")


def _write_samples(setup: Setup) -> None:
    """The first rows of the first step, for the report."""
    if any(exchange((setup.run.path / "samples.jsonl").is_file())):
        return
    numbers = [setup.order[place] for place in range(min(NUM_SAMPLES, setup.split.train.count))]
    made = usable(setup, 0, encode(setup, [setup.split.train.read(number) for number in numbers]))
    if setup.run.writes:
        write_samples(setup.run.path, setup.system.tokenizer, made)


def summarize(
    setup: Setup, progress: Progress, after: dict[str, float] | None, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `summary.json` holds; `nll` is the mean over the last tenth of the steps, at least five."""
    last = [row["nll"] for row in rows[-max(5, len(rows) // 10) :] if row["nll"] is not None]
    validated = [(row["validation_nll"], row["step"]) for row in rows if row.get("validation_nll") is not None]
    found: dict[str, Any] = {
        "name": setup.name,
        "num_steps": setup.num_steps,
        "num_epochs": setup.config.sft.num_epochs,
        "num_rows": setup.split.train.count,
        "nll": float(np.mean(last)) if last else None,
    }
    if validated and progress.validated_before is not None:
        for key, before in progress.validated_before.items():
            found[key] = {"before": before, "after": [row[key] for row in rows if key in row][-1]}
        found["validation_nll"] |= dict(zip(("best", "best_step"), min(validated), strict=True))
    if after is not None:
        found |= {"before": progress.before, "after": after}
    return (
        found
        | {
            "parameters": count_parameters(progress.state.params, setup.config.model.freeze),
            "wall_s": time.monotonic() - progress.started,
            "seed": setup.config.run.seed,
            "device": f"{len(jax.devices())} × {jax.devices()[0].device_kind}",
        }
        | versions()
    )
