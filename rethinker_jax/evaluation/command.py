"""`main evaluate`: draws what is not there yet, judges it, and writes the numbers at the end."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rethinker_jax.benchmarks.catalog import ReadItems
from rethinker_jax.benchmarks.protocols import Protocol, find_protocol
from rethinker_jax.benchmarks.record_files import decode_record
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.config import Config
from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.evaluation.asks import Ask, asks_hash, asks_of, headline_of, read_items
from rethinker_jax.evaluation.generate import Drawing
from rethinker_jax.evaluation.judging import judge_identity
from rethinker_jax.evaluation.listener import Listener
from rethinker_jax.evaluation.pages import write_page_of
from rethinker_jax.evaluation.results import (
    Generations,
    LeftOut,
    paths_of,
    write_generations,
    write_result,
)
from rethinker_jax.evaluation.shared import SharedJudging
from rethinker_jax.evaluation.trained import Trained, companions_hash, find_model, load_trained, weights_hash
from rethinker_jax.models.precision import resolve_dtype
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.options import EvaluateOptions
from rethinker_jax.output_files import (
    Row,
    alone,
    asked_path,
    begun,
    check_asked,
    check_writable,
    finished_lines,
    versions,
)
from rethinker_jax.processes import check_same, first_says, is_first
from rethinker_jax.prompts.images import ImageSettings
from rethinker_jax.prompts.template import prompt_template
from rethinker_jax.run_data import rows_hash
from rethinker_jax.sample import PACE, prompts_at_once
from rethinker_jax.stopping import listening
from rethinker_jax.verify.pool import VerifierPool


def evaluate(options: EvaluateOptions, config: Config) -> Path:
    """Draw, judge and write; returns the path of the result, or of a shard's generations. Raises UserError, Stopped.

    A file of generations that exists is gone on with: items that have all their samples there are judged again, which
    is cheap, and not drawn again. Of several processes the first one reads and writes files.
    """
    paths = paths_of(options.output, options.shard)
    protocol = find_protocol(options.protocol)
    found = read_items(options.benchmark, options.data, config)
    asks = asks_of(found.items, protocol)
    mine = asks[options.shard[0] :: options.shard[1]]
    if not mine:
        raise UserError(
            f"{options.benchmark}: nothing to ask: of {len(found.items)} items the protocol {protocol.name} keeps "
            f"{len(asks)}, and shard {options.shard[0]}/{options.shard[1]} has none of them."
        )
    check_same(options.benchmark, lambda: rows_hash(one.problem for one in asks))
    trained = find_model(config)
    asked: Row = {}
    if is_first():
        check_writable(paths.generations, "--output")
        check_writable(paths.result, "--output")
        asked = _asked(options, trained, protocol, asks, len(found.items))
    held = alone(paths.generations) if is_first() else contextlib.nullcontext()
    with held, VerifierPool(config.verifier) as pool:
        judged = _judged(options, trained, protocol, found, mine, asked, paths.generations, pool)
        if not is_first():
            return paths.result if options.shard[1] == 1 else paths.generations
        write_generations(paths.generations, judged)
        if options.shard[1] > 1:
            return paths.generations
        result = write_result(paths.result, judged, pool)
    write_page_of(paths.result, judged.records, mine)
    _say_numbers(result)
    return paths.result


def _judged(
    options: EvaluateOptions,
    trained: Trained,
    protocol: Protocol,
    found: ReadItems,
    mine: Sequence[Ask],
    asked: Row,
    generations: Path,
    pool: VerifierPool,
) -> Generations:
    """All generations of `mine`: those that are there, and the others, drawn. Raises UserError, Stopped.

    Of several processes the first one has those that are there, and judges them; the others hear their names.
    """
    kept: dict[str, list[bytes]] = {}
    known: list[LeftOut] = []
    if is_first():
        asked = check_asked(generations, asked)
        kept, known = finished_lines(generations, options.n, "evaluate"), _known_left_out(generations)
    there = frozenset(first_says(list(kept)))
    missing = [LeftOut("", row.where, row.kind, row.why) for row in found.bad_rows]
    missing += [LeftOut(**one) for one in first_says([dataclasses.asdict(one) for one in known])]
    done = {*there, *(one.id for one in missing)}
    left = [ask for ask in mine if ask.problem.id not in done]
    listener = Listener(options.benchmark, len(mine), options.n, there, missing, quiet=not is_first())
    judging = SharedJudging(pool, protocol.extraction)
    judging.submit([_kept_record(line, generations) for lines in kept.values() for line in lines])
    begin = begun(generations, kept, asked) if is_first() else contextlib.nullcontext()
    with begin as listener.file, listener.shown:
        _draw(options, trained, left, len(mine), judging, listener)
    if not listener.found and not there:
        raise UserError(f"{options.benchmark}: no item could be used; see above.")
    return Generations(tuple(listener.found), asked, tuple(listener.missing), judge_identity(trained.config.verifier))


def _draw(
    options: EvaluateOptions,
    trained: Trained,
    asks: Sequence[Ask],
    num_mine: int,
    judging: SharedJudging,
    listener: Listener,
) -> None:
    """Draws the items, until all are drawn or the process is asked to stop (Stopped).

    `num_mine` is their number with those that are there: a run that is gone on with has the shapes of the straight one.
    """
    num_slots, num_items = sampler_sizes(trained.config, options.n, num_mine)
    try:
        with listening() as listener.stop:
            if asks:
                system, params = load_trained(trained)
                params = system.sampling_params(params)
                drawing = Drawing(trained.config, options.n, options.seed, options.force_rethink, num_items, num_slots)
                drawing.run(system, params, asks, judging, listener)
            listener.records(judging.ready(wait=True))
    except Stopped as stopped:
        raise Stopped(
            f"stopped after {len(listener.found)} completions; the whole items among them are kept, and the same "
            "command goes on from there",
            stopped.exit_code,
        ) from stopped


def sampler_sizes(config: Config, n: int, num_items: int) -> tuple[int, int]:
    """(completions drawn at once, items a call of the sampler): as many slots as an evaluation in a run has."""
    settings = config.evaluation
    num_slots = config.sampling.num_slots or settings.batch_size * min(n, settings.samples_per_problem)
    return num_slots, min(num_items, prompts_at_once(num_slots, n))


def _asked(options: EvaluateOptions, trained: Trained, protocol: Protocol, asks: Sequence[Ask], num_read: int) -> Row:
    """What the generations depend on, all of which stands in the result."""
    headline, macro_over = headline_of(options.benchmark)
    dtype = resolve_dtype(trained.config.model.dtype, read_config(trained.directory).dtype)
    asked = {
        "benchmark": options.benchmark,
        "protocol": _protocol(options, trained, protocol),
        "headline": headline,
        "macro_over": macro_over,
        "data": options.data,
        "image_root": trained.config.data.image_root,
        "items": asks_hash(asks),
        "num_items": len(asks),
        "num_not_measured": num_read - len(asks),
        "shard": options.shard,
        "n": options.n,
        "seed": options.seed,
        "model": options.model,
        "step": trained.step if trained.run is not None else None,
        "weights": weights_hash(trained),
        "companions": companions_hash(trained),
        "dtype": np.dtype(dtype).name,
        "device": jax.devices()[0].device_kind,
        **versions(),
    }
    return json.loads(json.dumps(asked))  # tuples are lists in the file


def _protocol(options: EvaluateOptions, trained: Trained, protocol: Protocol) -> Row:
    """How the model is asked: the protocol, with what the command line changed of it."""
    config = trained.config
    images = ImageSettings.from_directory(trained.directory, config.data.min_pixels, config.data.max_pixels)
    sampling = {key: value for key, value in dataclasses.asdict(config.sampling).items() if key not in PACE}
    rethinking = dataclasses.asdict(config.rethink)
    keys = ("triggers", "odds", "temperature", "max_new_tokens")
    template = prompt_template(config.data.prompt_template)
    return {
        "name": protocol.name,
        **{key: sampling.pop(key) for key in ("temperature", "top_p", "top_k", "max_new_tokens")},
        "other_sampling": sampling,
        "min_pixels": images.min_pixels,
        "max_pixels": images.max_pixels,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "prompt_template": config.data.prompt_template,
        "prompt": {
            "wording": protocol.wording,
            "images": protocol.images,
            "behind_the_question": protocol.suffix,
            "template": template.text,
        },
        "keep": protocol.keep,
        "extraction": protocol.extraction,
        "force_rethink": {key: rethinking[key] for key in keys} if options.force_rethink else None,
    }


def _kept_record(line: bytes, path: Path) -> Record:
    try:
        return decode_record(line)
    except ValueError as error:
        raise UserError(
            f"--output: {path} holds a line that is no judged generation ({error}). Name another file."
        ) from error


def _known_left_out(generations: Path) -> list[LeftOut]:
    """Items of a finished file of the same request that could not be drawn; trying again would tell nothing new."""
    path = asked_path(generations)
    if not path.is_file() or not _begun(generations):
        return []
    rows = json.loads(path.read_text(encoding="utf-8")).get("left_out", [])
    return [found for found in (LeftOut(**row) for row in rows) if found.id]


def _begun(generations: Path) -> bool:
    return generations.is_file() and generations.stat().st_size > 0


def _say_numbers(result: Row) -> None:
    """One line for people, on standard error; the path of the result goes to standard output."""
    accuracy, lenient = result["accuracy"], result["lenient_accuracy"]
    print(
        f"{result['benchmark']}: accuracy {100 * accuracy['value']:.1f}% [{100 * accuracy['low']:.1f}, "
        f"{100 * accuracy['high']:.1f}], lenient {100 * lenient['value']:.1f}%, {result['num_problems']} problems x "
        f"{result['num_samples']}, {result['num_left_out']} left out",
        file=sys.stderr,
    )
