"""The RL run, top to bottom: prompt → rollout → verify → advantage → replay → update."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rethinker_jax import health, peers, replay, validation
from rethinker_jax.chosen_mesh import on_mesh
from rethinker_jax.config import Config
from rethinker_jax.console import RunProgress, parameter_line, print_summary
from rethinker_jax.devices import CompileCounter, peak_flops, start_jax
from rethinker_jax.errors import UserError
from rethinker_jax.evaluate import Evaluation, evaluate
from rethinker_jax.experience import loss_of, make_batches, trainer_log_probs
from rethinker_jax.metrics import MetricsLog, read_metrics
from rethinker_jax.models.flops import update_flops
from rethinker_jax.models.parts import count_parameters
from rethinker_jax.options import ProfileSteps
from rethinker_jax.phases import Laps, during
from rethinker_jax.processes import exchange, first_says
from rethinker_jax.profiling import Profiler
from rethinker_jax.prompts_ahead import PromptsAhead
from rethinker_jax.report import write_report
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rollout import Group
from rethinker_jax.rounds import Place, draw_rounds
from rethinker_jax.run_data import Order, Splits, data_order, load_splits, usable_prompts
from rethinker_jax.run_directory import RunDirectory, versions
from rethinker_jax.step_metrics import (
    UpdateWork,
    batch_metrics,
    mean_metrics,
    packing_metrics,
    rollout_metrics,
    sampling_metrics,
    share,
    speed_metrics,
)
from rethinker_jax.step_rows import num_waiting, rows_of_step
from rethinker_jax.stopping import StopRequest, listening
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.training.losses import next_kl_coefficient
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import Problem, Prompt
from rethinker_jax.verify.pool import VerifierPool

SHOWN = ("reward", "accuracy", "effective_share", "tokens_per_second")


@dataclasses.dataclass
class Progress:
    """What changes from step to step, and is in every checkpoint. `before` are the scores of the evaluation before."""

    step: int
    state: TrainState
    buffer: tuple[replay.Experience, ...]
    before: dict[str, float] | None
    started: tuple[float, float]  # of wall and CPU clock, moved back by what earlier processes of this run spent
    kl_coefficient: float
    cursor: int = 0  # the place in the data order from which the next rollout batch is drawn
    validation_before: dict[str, float] | None = None

    @property
    def spent(self) -> dict[str, float]:
        return {"wall_s": time.monotonic() - self.started[0], "cpu_s": time.process_time() - self.started[1]}


def train(config: Config, name: str, profile: ProfileSteps | None = None) -> Path:
    """The `train` command: run `config` to its end, from its last checkpoint if there is one. Returns its directory.

    `profile`: the steps to leave a trace of.
    """
    started = time.monotonic(), time.process_time()
    run = RunDirectory(Path(config.run.dir or f"runs/{name}"), "rl")
    with run.locked(), listening() as stop:
        run.check_config(config)
        summary = run.read_summary()
        if not summary.get("after") or summary.get("num_steps", 0) < config.run.num_steps:
            start_jax(config)
            splits = load_splits(config, run)
            # Before the model: a reward function that cannot be used is said at once.
            with VerifierPool(config.verifier) as pool, Scorer(config, pool) as scorer:
                config = on_mesh(config, "rl")
                system = load_system(config)
                kept = config.run.keep_checkpoints, config.run.keep_best if config.data.validation else 0
                store = CheckpointStore(run.path / "checkpoints", *kept, manifest=run.manifest(config))
                with contextlib.closing(store):
                    updater, progress = begin(config, system, store, splits, started)
                    run.start(config)
                    # Behind a damaged checkpoint, lines are redone.
                    with MetricsLog(run.path, progress.step, writes=run.writes) as log:
                        run_steps(
                            run, config, name, system, splits, updater, progress, scorer, log, store, stop, profile
                        )
        elif profile is not None:
            print("--profile: this run is finished, no step is traced", file=sys.stderr)
        if run.writes:
            paths = {"report": write_report(run.path), "checkpoint": run.path / "checkpoints"}
            bad_rows = run.path / "bad_rows.jsonl"
            paths |= {"rows left out, by name": bad_rows} if bad_rows.is_file() else {}
            print_summary(run.read_summary(), paths)
    return run.path


def run_steps(
    run: RunDirectory,
    config: Config,
    name: str,
    system: System,
    splits: Splits,
    updater: Updater,
    progress: Progress,
    scorer: Scorer,
    log: MetricsLog,
    store: CheckpointStore,
    stop: StopRequest,
    profile: ProfileSteps | None = None,
) -> None:
    """Evaluate, train, evaluate; leave checkpoints, metrics, rollouts and a summary in `run`."""
    test = [prompt for _, prompt in usable_prompts(config, system, list(enumerate(splits.test)), -1, run)]
    order, num_steps = data_order(config, splits.train), config.run.num_steps
    with (
        RunProgress(num_steps, progress.step, title=name, quiet=not run.writes) as shown,
        Profiler(profile, progress.step, num_steps, run.path, shown.note) as profiler,
        PromptsAhead(system.builder, splits.train, order, config.rollout.prompts_per_step) as ahead,
    ):
        shown.note(parameter_line(count_parameters(progress.state.params, config.model.freeze)))
        if progress.before is None:
            shown.phase("evaluation before")
            progress.before = evaluate_and_keep("before", config, system, progress.state, test, scorer, run).scores
        if validation.is_due(config, 0) and progress.validation_before is None:
            shown.phase("validation before")
            progress.validation_before = validate(config, system, splits, progress, scorer, run)
        shown.phase("training")
        watch, due, laps = health.Watch(config, log.path, progress.step), False, Laps()
        while progress.step < num_steps:
            with stop.held(), profiler.step(progress.step):
                metrics, groups = train_step(config, system, updater, splits.train, order, scorer, progress, run, ahead)
                measured = None
                if validation.is_due(config, progress.step):
                    shown.phase("validation")
                    measured = validate(config, system, splits, progress, scorer, run)
                    metrics |= validation.as_metrics(measured)
                    shown.note(validation.as_line(progress.step, measured))
                ringing, said = watch.look(progress.step - 1, metrics)
                for line in said:
                    shown.note(line)
                metrics |= ringing | laps.metrics()
                recorded = is_recorded(config, progress.step - 1) or watch.stops
                write_step(run, log, progress.step - 1, metrics, groups if recorded else None)
                watch.refuse(store.directory, store.latest_step)
                chosen_from = measured is not None and config.run.keep_best > 0
                stop_asked = stop.agree(exchange(stop.asked))
                due = due or progress.step % config.run.save_every == 0
                if (due and not watch.is_suspect) or progress.step == num_steps or stop_asked or chosen_from:
                    save(store, progress, splits, measured)
                    due = False
                shown.update(progress.step, {name: metrics[name] for name in SHOWN})
        shown.phase("evaluation after")
        found = evaluate_and_keep("after", config, system, progress.state, test, scorer, run)
    store.wait()
    if run.writes:
        summary = summarize(config, name, progress, found, read_metrics(log.path))
        run.write_summary(summary | {"rows_left_out": health.rows_left_out(run.path / "bad_rows.jsonl")})


@during("write")
def write_step(
    run: RunDirectory, log: MetricsLog, step: int, metrics: Mapping[str, float], groups: Sequence[Group] | None
) -> None:
    """The line of a step, and its rollouts where they are recorded."""
    log.write(step, metrics)
    if groups is not None:
        run.write_rollouts(step, groups)


@during("validation")
def validate(
    config: Config, system: System, splits: Splits, progress: Progress, scorer: Scorer, run: RunDirectory
) -> dict[str, float]:
    """What `validation.measure` says of the weights of now."""
    return validation.measure(config, system, splits.validation, progress.state, scorer, run)


@during("evaluation")
def evaluate_and_keep(
    when: str,
    config: Config,
    system: System,
    state: TrainState,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    run: RunDirectory,
) -> Evaluation:
    """The evaluation `before` or `after`, its samples left in the run."""
    found = evaluate(system, system.sampling_params(state.params), prompts, config, scorer)
    run.write_evaluation(when, found.groups)
    return found


def is_recorded(config: Config, step: int) -> bool:
    """Whether the rollouts of this step are kept, and the rows that were trained on."""
    return step % config.run.rollouts_every == 0 or step + 1 == config.run.num_steps


def begin(
    config: Config, system: System, store: CheckpointStore, splits: Splits, started: tuple[float, float]
) -> tuple[Updater, Progress]:
    """The state at the first step, or at the last checkpoint."""
    rows_per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    num_updates = config.run.num_steps * (rows_per_step // config.training.batch_size)
    updater = make_updater(config, system, num_updates, loss_of(config, system))
    if first_says(store.latest_step) is None:
        return updater, Progress(0, updater.init(system.params), (), None, started, config.loss.kl_coefficient)
    shapes = updater.shapes(system.params)
    system.drop_params()
    saved = store.restore(shapes, system.mesh)
    if saved.meta["data"] != splits.hash:
        raise UserError(
            f"data.train: {config.data.train} does not hold the rows with which the run in {store.directory.parent} "
            "began, and its replay buffer names them by number. Put them back, or name another run.dir."
        )
    if validation.is_due(config, 0) and saved.meta.get("validation_data") != splits.validation_hash:
        raise UserError(
            f"data.validation: {config.data.validation} does not hold the rows on which the run in "
            f"{store.directory.parent} was measured before. Put them back, or name another run.dir."
        )
    started = started[0] - saved.meta["wall_s"], started[1] - saved.meta["cpu_s"]
    coefficient = saved.meta.get("kl_coefficient", config.loss.kl_coefficient)
    step, buffer = saved.meta["step"], replay.from_arrays(saved.arrays)
    cursor = saved.meta.get("cursor", step * config.rollout.prompts_per_step)
    return updater, Progress(
        step, saved.state, buffer, saved.meta["before"], started, coefficient, cursor,
        saved.meta.get("validation_before"),
    )  # fmt: skip


def train_step(
    config: Config,
    system: System,
    updater: Updater,
    problems: Sequence[Problem],
    order: Order,
    scorer: Scorer,
    progress: Progress,
    run: RunDirectory,
    ahead: PromptsAhead | None = None,
) -> tuple[dict[str, float], list[Group]]:
    """One step: rollout batches, mostly one, and optimizer steps. Changes `progress`; returns metrics and rollouts.

    With `ahead` the prompts of the batch behind them are made meanwhile.
    """
    begin_time, compiled = time.monotonic(), CompileCounter()
    peers.at(f"step {progress.step}")
    update = int(jax.device_get(progress.state.num_updates))

    # prompt, rollout, verify, advantage
    waiting = num_waiting(config, progress.buffer, update)
    place = Place(progress.step, progress.cursor, progress.kl_coefficient, waiting)
    rounds = draw_rounds(config, system, updater, progress.state, problems, order, scorer, run, place, ahead)
    groups, progress.cursor = rounds.groups, rounds.cursor
    metrics = rounds.metrics | rollout_metrics(groups, config.advantage.epsilon) | sampling_metrics(rounds.rolled)

    # replay
    prompt_of = {group.problem: group.prompt for group in groups}
    rows = rows_of_step(
        config, system, updater, progress.state, rounds, prompt_of, progress.buffer, progress.step
    )  # fmt: skip
    progress.buffer = rows.buffer
    metrics |= rows.metrics

    # update
    follow_kl(config, progress, metrics, sum(len(group.rollouts) for group in groups))
    made, work = learn(config, system, updater, problems, rows.batches, prompt_of, progress, run)
    metrics |= made
    metrics["skipped_updates"] = int(jax.device_get(progress.state.num_skipped))
    if is_recorded(config, progress.step):
        with during("write"):
            run.write_trained(progress.step, work.trained)

    progress.step += 1
    metrics["replay_size"] = len(progress.buffer)
    metrics |= ahead.counts() if ahead is not None else {}
    metrics["seconds_compile"] = compiled.seconds
    peak = peak_flops(jax.devices()[0].device_kind, config.run.peak_tflops, system.dtype)
    seconds = time.monotonic() - begin_time
    metrics |= speed_metrics(system.model.config, groups, work, seconds, rounds.seconds, peak)
    return metrics, groups


def learn(
    config: Config,
    system: System,
    updater: Updater,
    problems: Sequence[Problem],
    batches: Sequence[Sequence[replay.Experience]],
    prompt_of: dict[int, Prompt],
    progress: Progress,
    run: RunDirectory,
) -> tuple[dict[str, float], UpdateWork]:
    """The optimizer steps of one step, each filled from the buffer. Changes `progress`; returns means of their metrics.

    `batches`: their rows before that. `prompt_of` has the prompts of these by row number; those of replayed rows are
    added.
    """
    found, work, begin_time = [], UpdateWork(), time.monotonic()
    drawn_at, rollout = int(jax.device_get(progress.state.num_updates)), replay.joined(batches)
    for number, raw in enumerate(batches):
        update = int(jax.device_get(progress.state.num_updates))
        epsilon, name = config.advantage.epsilon, (config.run.seed, update)
        with during("replay"):
            chosen = replay.select(raw, progress.buffer, config.replay, epsilon, name, rollout, drawn_at)
        progress.buffer = chosen.buffer
        sums: dict[str, Any] = {}
        if chosen.fresh or chosen.replayed:  # else nothing to learn from: no sample differs from its siblings
            replayed = {one.problem: problems[one.problem] for one in chosen.replayed if one.problem not in prompt_of}
            prompt_of |= dict(usable_prompts(config, system, list(replayed.items()), progress.step, run))
            with during("pack"):
                packed = make_batches(config, system, prompt_of, chosen, number == 0)
            with during("update"):  # until the device has done it: its numbers are read right here
                progress.state, made = updater.step(progress.state, packed.batches, progress.kl_coefficient)
                made = jax.device_get(made)
            sums = made | packing_metrics(packed)
            work.tokens += packed.num_tokens
            work.flops += update_flops(
                system.model.config, packed.num_tokens, packed.num_pairs, packed.num_targets, packed.grids,
                config.model.freeze, config.model.lora.rank > 0,
            )  # fmt: skip
            if config.loss.kl == "loss":
                sums["kl_coefficient"] = progress.kl_coefficient
                follow_kl(config, progress, made, len(chosen.fresh) + len(chosen.replayed))
        if number > 0 or trainer_log_probs(config, system):  # the policy is the sampler's own in the first one only
            sums = {key: value for key, value in sums.items() if not key.startswith("sampler_trainer_gap")}
        found.append(batch_metrics(raw, chosen, epsilon, update, sums))
        work.trained.append((update, chosen))
    work.seconds = time.monotonic() - begin_time
    return mean_metrics(found), work


def follow_kl(config: Config, progress: Progress, metrics: Mapping[str, Any], num_rows: int) -> None:
    """Moves the coefficient of the KL after the rows it was measured on, where a controller does."""
    if config.loss.kl_controller == "adaptive" and "kl" in metrics:
        progress.kl_coefficient = next_kl_coefficient(
            config.loss, progress.kl_coefficient, float(metrics["kl"]), num_rows
        )


@during("checkpoint")
def save(
    store: CheckpointStore, progress: Progress, splits: Splits, measured: Mapping[str, float] | None = None
) -> None:
    """Begin to write a checkpoint; `measured` is what its weights reach on the validation rows."""
    meta = {"step": progress.step, "before": progress.before, "data": splits.hash} | progress.spent
    meta |= {"kl_coefficient": progress.kl_coefficient, "cursor": progress.cursor}
    if splits.validation:
        meta |= {"validation_before": progress.validation_before, "validation_data": splits.validation_hash}
    saved = Saved(progress.state, replay.to_arrays(progress.buffer), meta)
    store.save(progress.step, saved, measured["reward"] if measured is not None else None)


def summarize(
    config: Config,
    name: str,
    progress: Progress,
    after: Evaluation,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """What `summary.json` holds. Shares of training are means over its first and last tenth, at least five steps."""
    width = max(5, len(rows) // 10)

    def ends(key: str) -> dict[str, float]:
        return {
            "first": share([row[key] for row in rows[:width]]),
            "last": share([row[key] for row in rows[-width:]]),
        }

    device = jax.devices()[0]
    found = {"validation": validation.summary_of(progress.validation_before, validation.curve(rows))}
    return {
        "name": name,
        "num_steps": config.run.num_steps,
        "before": progress.before,
        "after": after.scores,
        "after_per_source": after.per_source,
        **(found if config.data.validation else {}),
        "zero_advantage_share": ends("zero_advantage_share"),
        "effective_share": ends("effective_share"),
        "alarms": health.alarms_in(rows),
        "parameters": count_parameters(progress.state.params, config.model.freeze),
        **progress.spent,
        "seed": config.run.seed,
        "device": f"{len(jax.devices())} × {device.device_kind}",
    } | versions()
