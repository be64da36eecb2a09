"""The commands `sample` and `score`: a model's completions, and its log-probs of given ones, as JSON lines."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rethinker_jax.chosen_mesh import on_mesh
from rethinker_jax.config import Config, LossConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.trained import Trained, companions_hash, weights_hash
from rethinker_jax.models.sharding import parts_of
from rethinker_jax.options import SampleOptions, ScoreOptions
from rethinker_jax.output_files import (
    Row,
    alone,
    begun,
    check_asked,
    check_writable,
    finished_lines,
    hash_of,
    line_writer,
    versions,
    write_whole,
)
from rethinker_jax.processes import check_same, first_says, is_first
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.run_data import agreed, build_prompts, rows_hash
from rethinker_jax.sampling.sampler import Budgets, Drawn, Request
from rethinker_jax.system import System, load_system, make_updater, model_directory
from rethinker_jax.training.batch import pack_micro_batches
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.types import Completion, Problem, Prompt


def sample(options: SampleOptions, config: Config) -> None:
    """Draw `n` completions of every problem and write them as they end; a file is put in order at the end.

    An output file that exists is gone on with: problems that have all their lines there are not drawn again. What was
    asked stands beside it, in FILE.asked.json, so that two models never share a file. Of several processes the first
    one reads and writes these files. Raises UserError.
    """
    config = _configured(config, options.model, options.prompt_template)
    problems = _one_shot(options) if options.data is None else _problems(options.data, config)
    if options.output is None:
        write = line_writer(sys.stdout) if is_first() else _not_written
        _draw(options, config, _loaded(options, config, problems), problems, frozenset(), write)
        return
    output = options.output.resolve()  # a link is written through
    finished: dict[str, list[bytes]] = {}
    asked: Row = {}
    if is_first():
        check_writable(output, "--output")
        asked = _asked(options, config, problems)
    with alone(output) if is_first() else contextlib.nullcontext():
        if is_first():
            asked = check_asked(output, asked)
            finished = finished_lines(output, options.n, "sample")
        done = frozenset(first_says(list(finished)))
        system = _loaded(options, config, problems)  # before anything is written
        with begun(output, finished, asked) if is_first() else contextlib.nullcontext() as file:
            write = _not_written if file is None else line_writer(file)
            _draw(options, config, system, problems, done, write)
        if is_first():
            _sort(output, [problem.id for problem in problems])


def _loaded(options: SampleOptions, config: Config, problems: Sequence[Problem]) -> System:
    """The model; of one shot also its prompt is tried."""
    system = load_system(on_mesh(config, "sample"))
    if options.data is None:
        _needed_prompts(system, problems)
    return system


def _draw(
    options: SampleOptions,
    config: Config,
    system: System,
    problems: Sequence[Problem],
    finished: frozenset[str],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Draws the problems that are not among the finished ones. Raises UserError if no row could be used."""
    left = [problem for problem in problems if problem.id not in finished]
    num_finished, num_left_out = len(problems) - len(left), 0
    params = system.sampling_params(system.params)
    settings = dataclasses.replace(config.sampling, num_slots=_num_slots(config, options.n))
    size = min(_chunk_size(config, options.n), max(len(left), 1))
    with RunProgress(len(problems), num_finished, title="sample", unit="problem", quiet=not is_first()) as shown:
        for start in range(0, len(left), size):
            chunk = left[start : start + size]
            prompts = _prompts(system, chunk, shown)
            num_left_out += len(chunk) - len(prompts)
            if num_left_out > config.run.max_bad_rows:
                raise UserError(f"{options.data}: {num_left_out} rows left out, over run.max_bad_rows; see above.")
            requests = [Request(prompt, number) for prompt in prompts for number in range(options.n)]
            writer = _Writer(requests, options.n, write, shown, num_finished + num_left_out)
            system.sampler.generate(
                params, requests, settings, Budgets(settings.max_new_tokens), seed=options.seed, step=0,
                num_prompts=size, on_finished=writer.finished,
            )  # fmt: skip
            num_finished += len(prompts)
    if not num_finished:
        raise UserError(f"{options.data}: no row could be used; see above.")


PACE = ("num_slots", "steps_per_call", "prefill_tokens", "cache_gib")  # of `sampling`: they change no completion
REQUESTS_PER_SLOT = 32  # of one call of the sampler: its slots then stay busy for nine tenths of the time
MOST_PROMPTS = 256  # of one call: their pixels are held together


def _num_slots(config: Config, n: int) -> int:
    return config.sampling.num_slots or config.rollout.prompts_per_step * n


def prompts_at_once(num_slots: int, n: int) -> int:
    """How many prompts with n samples each one call of the sampler takes, so that its slots stay busy."""
    return min(-(-REQUESTS_PER_SLOT * num_slots // n), MOST_PROMPTS)


def _chunk_size(config: Config, n: int) -> int:
    """How many problems go through the sampler together."""
    return max(config.rollout.prompts_per_step, prompts_at_once(_num_slots(config, n), n))


def _sort(output: Path, ids: Sequence[str]) -> None:
    """Lines by problem and sample, however often the command was gone on with."""
    place_of = {name: place for place, name in enumerate(ids)}

    def place(line: str) -> tuple[int, int]:
        row = json.loads(line)
        return place_of.get(row["id"], len(place_of)), row["sample"]

    lines = output.read_text(encoding="utf-8").split("\n")[:-1]
    write_whole(output, "".join(line + "\n" for line in sorted(lines, key=place)))


class _Writer:
    """Writes completions as they end, and shows how far it is. A problem is finished with its last sample."""

    def __init__(
        self,
        requests: Sequence[Request],
        n: int,
        write: Callable[[dict[str, Any]], None],
        shown: RunProgress,
        done: int,
    ):
        self._requests, self._write, self._shown, self._done = requests, write, shown, done
        self._missing = dict.fromkeys((request.prompt.problem.id for request in requests), n)
        self._num_tokens = 0
        self._began_at = time.monotonic()

    def finished(self, ended: Sequence[tuple[int, Drawn]]) -> None:
        for number, drawn in ended:
            request = self._requests[number]
            self._write(_line(request, drawn.completion))
            self._num_tokens += len(drawn.completion)
            name = request.prompt.problem.id
            self._missing[name] -= 1
            self._done += not self._missing[name]
        if ended:
            pace = self._num_tokens / (time.monotonic() - self._began_at)
            self._shown.update(self._done, {"tokens_per_second": pace})


def _line(request: Request, completion: Completion) -> dict[str, Any]:
    truncated = completion.truncated_log_probs
    assert truncated is not None, "the sampler records them"
    return {
        "id": request.prompt.problem.id,
        "sample": request.sample,
        "completion": completion.text,
        "completion_ids": completion.token_ids.tolist(),
        "log_probs": [float(value) for value in completion.log_probs],
        "truncated_log_probs": [float(value) for value in truncated],
        "finish_reason": completion.finish_reason,
    }


def score(options: ScoreOptions, config: Config) -> None:
    """Write the log-probs of every row's `completion_ids`, or of its `completion` and the end token.

    An output file appears whole or not at all. Raises UserError.
    """
    config = _configured(config, options.model, options.prompt_template)
    problems = _problems(options.data, config)
    output = None if options.output is None else options.output.resolve()  # a link is written through
    if output is not None and is_first():
        check_writable(output, "--output")
    system = load_system(on_mesh(config, "score"))
    parts = parts_of(system.mesh)
    ids_of = {problem.id: _completion_ids(problem, system, options.data) for problem in problems}
    updater = make_updater(config, system, 1, LossConfig())
    size = config.rollout.prompts_per_step
    with (
        _replacing(output) if is_first() else contextlib.nullcontext(_not_written) as write,
        RunProgress(len(problems), title="score", quiet=not is_first()) as shown,
    ):
        for start in range(0, len(problems), size):
            chunk = problems[start : start + size]
            ids = [ids_of[problem.id] for problem in chunk]
            rows = []
            for prompt, tokens in zip(_needed_prompts(system, chunk), ids, strict=True):
                none = np.zeros(len(tokens), bool)
                rows.append(TrainRow(prompt, tokens, none, none, np.zeros(len(tokens), np.float32)))
            longest = max(map(len, ids))
            packed = pack_micro_batches(rows, system.geometry, longest, size, 0, config.buckets, parts)
            log_probs = jax.device_get(updater.log_probs(system.params, packed.batches[0]))
            for problem, tokens, values in zip(chunk, ids, log_probs, strict=False):
                found = [float(value) for value in values[: len(tokens)]]
                write({"id": problem.id, "token_ids": tokens.tolist(), "log_probs": found})
            shown.update(start + len(chunk), {})


def _configured(config: Config, model: str, template: str) -> Config:
    """The config with what the options say."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=model),
        data=dataclasses.replace(config.data, prompt_template=template),
    )


def _problems(source: str, config: Config) -> Sequence[Problem]:
    limit = config.run.max_bad_rows
    found = read_problems(source, image_root=config.data.image_root, max_bad_rows=limit, answers=False)
    check_same(source, lambda: rows_hash(found.problems))
    if is_first():
        for row in found.bad_rows:
            print(f"left out ({row.kind}): {row.where}: {row.why}", file=sys.stderr)
    return found.problems


def _one_shot(options: SampleOptions) -> list[Problem]:
    images = tuple(Path(image).read_bytes() for image in options.image)
    return [Problem("question", options.question or "", "", images)]


def _needed_prompts(system: System, problems: Sequence[Problem]) -> list[Prompt]:
    """Their prompts. Raises UserError, in all processes, where one cannot be made."""
    prompts, bad = build_prompts(system, problems)
    for _, why in agreed(bad).values():
        raise UserError(f"{why}. Remove the row, or raise data.max_prompt_tokens.")
    return [prompts[place] for place in range(len(problems))]


def _prompts(system: System, problems: Sequence[Problem], shown: RunProgress) -> list[Prompt]:
    """The prompts that can be made; the others are said and left out."""
    prompts, bad = build_prompts(system, problems)
    bad = agreed(bad)
    for kind, why in bad.values():
        shown.note(f"left out ({kind}): {why}")
    return [prompts[place] for place in range(len(problems)) if place not in bad]


def _completion_ids(problem: Problem, system: System, source: str) -> np.ndarray:
    ids, text = problem.row.get("completion_ids"), problem.row.get("completion")
    vocab = system.model.config.vocab
    if ids is not None and len(ids):
        if not all(isinstance(token, int) and 0 <= token < vocab for token in ids):
            raise UserError(
                f"{source}, row {problem.id!r}: wanted completion_ids from 0 to {vocab - 1}, came {str(ids)[:80]}."
            )
        return np.array(ids, np.int32)
    if isinstance(text, str) and text:
        return np.append(system.tokenizer.encode(text), system.tokenizer.end_token_ids[0]).astype(np.int32)
    raise UserError(f"{source}, row {problem.id!r}: wanted `completion` (text) or `completion_ids`; it has neither.")


def _asked(options: SampleOptions, config: Config, problems: Sequence[Problem]) -> dict[str, Any]:
    """What the lines of an output file depend on, and who made them."""
    asked = {
        "model": options.model,
        **model_identity(options.model),
        "init": config.model.init,
        "data": options.data,
        "rows": hash_of(map(_content, problems)),
        "question": options.question,
        "n": options.n,
        "seed": options.seed,
        "dtype": config.model.dtype,
        "prompt_template": options.prompt_template,
        "sampling": {key: value for key, value in dataclasses.asdict(config.sampling).items() if key not in PACE},
        "pixels": [config.data.min_pixels, config.data.max_pixels],
        **versions(),
    }
    return json.loads(json.dumps(asked))  # tuples are lists in the file


def model_identity(model: str) -> dict[str, str]:
    """What a model directory is, wherever it lies and whenever it was written."""
    trained = Trained(Config(), model_directory(model))
    return {"weights": weights_hash(trained), "companions": companions_hash(trained)}


def _content(problem: Problem) -> tuple[str, str, list[str]]:
    """What is asked in a row; an image that is not there is told by the builder of prompts."""
    images = [
        one if isinstance(one, bytes) else Path(one).read_bytes() if Path(one).is_file() else b""
        for one in problem.images
    ]
    return problem.id, problem.question, [hashlib.sha256(image).hexdigest() for image in images]


def _not_written(row: Row) -> None:
    """What the other processes do with a line that the first one writes."""


@contextlib.contextmanager
def _replacing(output: Path | None) -> Generator[Callable[[dict[str, Any]], None]]:
    """Write JSON lines to `output`, which appears whole at the end, or to standard output."""
    if output is None:
        yield line_writer(sys.stdout)
        return
    temporary = output.with_name(output.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield line_writer(file)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
