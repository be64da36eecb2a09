"""The commands `sample` and `score`: a model's completions, and its log-probs of given ones, as JSON lines."""

import contextlib
import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from rethinker_jax.config import Config, LossConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.errors import UserError
from rethinker_jax.models.sharding import row_shards
from rethinker_jax.options import SampleOptions, ScoreOptions
from rethinker_jax.prompts.build import BadPrompt
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.run_directory import check_writable, hash_of, write_whole
from rethinker_jax.sampling.sampler import Budgets, Request
from rethinker_jax.system import System, load_system, make_updater, model_directory
from rethinker_jax.training.batch import TrainRow, pack_rows
from rethinker_jax.types import Problem, Prompt


def sample(options: SampleOptions, config: Config) -> None:
    """Draw `n` completions of every problem and write them as they are finished.

    An output file that exists is gone on with: problems that have all their lines there are not drawn again. What was
    asked stands beside it, in FILE.asked.json, so that two models never share a file. Raises UserError.
    """
    config = _configured(config, options.model, options.prompt_template)
    problems = _one_shot(options) if options.data is None else _problems(options.data, config)
    output = None if options.output is None else options.output.resolve()  # a link is written through
    asked, finished = _asked(options, config), {}
    if output is not None:
        check_writable(output, "--output")
        _check_asked(output, asked)
        finished = _finished(output, options.n)
    left = [problem for problem in problems if problem.id not in finished]
    system = load_system(config)
    one_shot = [_prompt(system, problem) for problem in problems] if options.data is None else []
    params = system.sampling_params(system.params)
    budgets = Budgets(config.sampling.max_new_tokens)
    size = 1 if one_shot else config.rollout.prompts_per_step
    num_drawn = len(problems) - len(left)
    num_left_out = 0
    with (
        _appending(output, finished, asked) as write,
        RunProgress(len(problems), num_drawn, title="sample") as shown,
    ):
        for start in range(0, len(left), size):
            chunk = left[start : start + size]
            prompts = _prompts(system, chunk, shown)
            num_left_out += len(chunk) - len(prompts)
            if num_left_out > config.run.max_bad_rows:
                raise UserError(f"{options.data}: {num_left_out} rows left out, over run.max_bad_rows; see above.")
            requests = [Request(prompt, number) for prompt in prompts for number in range(options.n)]
            if not requests:
                continue
            drawn, _ = system.sampler.generate(
                params, requests, config.sampling, budgets, seed=options.seed, step=0, num_prompts=size
            )
            for request, one in zip(requests, drawn, strict=True):
                completion = one.completion
                write(
                    {
                        "id": request.prompt.problem.id,
                        "sample": request.sample,
                        "completion": completion.text,
                        "completion_ids": completion.token_ids.tolist(),
                        "log_probs": [float(value) for value in completion.log_probs],
                        "finish_reason": completion.finish_reason,
                    }
                )
            num_drawn += len(prompts)
            shown.update(num_drawn + num_left_out, {})
    if not num_drawn:
        raise UserError(f"{options.data}: no row could be used; see above.")


def score(options: ScoreOptions, config: Config) -> None:
    """Write the log-probs of every row's `completion_ids`, or of its `completion` and the end token.

    An output file appears whole or not at all. Raises UserError.
    """
    config = _configured(config, options.model, options.prompt_template)
    problems = _problems(options.data, config)
    output = None if options.output is None else options.output.resolve()  # a link is written through
    if output is not None:
        check_writable(output, "--output")
    system = load_system(config)
    ids_of = {problem.id: _completion_ids(problem, system, options.data) for problem in problems}
    updater = make_updater(config, system, 1, LossConfig())
    size = config.rollout.prompts_per_step
    with _replacing(output) as write, RunProgress(len(problems), title="score") as shown:
        for start in range(0, len(problems), size):
            chunk = problems[start : start + size]
            ids = [ids_of[problem.id] for problem in chunk]
            rows = []
            for problem, tokens in zip(chunk, ids, strict=True):
                none = np.zeros(len(tokens), bool)
                rows.append(TrainRow(_prompt(system, problem), tokens, none, none, np.zeros(len(tokens), np.float32)))
            batch = pack_rows(rows, system.geometry, max(map(len, ids)), size, config.buckets, row_shards(system.mesh))
            log_probs = jax.device_get(updater.log_probs(system.params, batch))
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
    for row in found.bad_rows:
        print(f"left out ({row.kind}): {row.where}: {row.why}", file=sys.stderr)
    return found.problems


def _one_shot(options: SampleOptions) -> list[Problem]:
    images = tuple(Path(image).read_bytes() for image in options.image)
    return [Problem("question", options.question or "", "", images)]


def _prompt(system: System, problem: Problem) -> Prompt:
    try:
        return system.builder.build(problem)
    except BadPrompt as error:
        raise UserError(f"{error}. Remove the row, or raise data.max_prompt_tokens.") from error


def _prompts(system: System, problems: Sequence[Problem], shown: RunProgress) -> list[Prompt]:
    """The prompts that can be made; the others are said and left out."""
    prompts = []
    for problem in problems:
        try:
            prompts.append(system.builder.build(problem))
        except BadPrompt as error:
            shown.note(f"left out ({error.kind}): {error}")
    return prompts


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


def _asked(options: SampleOptions, config: Config) -> dict[str, Any]:
    """What the lines of an output file depend on."""
    images = [hashlib.sha256(Path(image).read_bytes()).hexdigest() for image in options.image]
    asked = {
        "model": str(model_directory(options.model).resolve()),
        "weights": hash_of(
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(model_directory(options.model).glob("*.safetensors"))
        ),
        "data": options.data,
        "question": options.question,
        "images": images,
        "n": options.n,
        "seed": options.seed,
        "dtype": config.model.dtype,
        "prompt_template": options.prompt_template,
        "sampling": dataclasses.asdict(config.sampling),
        "pixels": [config.data.min_pixels, config.data.max_pixels],
    }
    return json.loads(json.dumps(asked))  # tuples are lists in the file


def _check_asked(output: Path, asked: dict[str, Any]) -> None:
    """Refuse to go on with a file that another model or other settings began."""
    path = output.with_name(output.name + ".asked.json")
    if not path.is_file() or not output.is_file() or not output.stat().st_size:
        return
    before = json.loads(path.read_text())
    changed = [
        f"{key} was {before.get(key)!r:.80}, is {asked[key]!r:.80}" for key in asked if before.get(key) != asked[key]
    ]
    if changed:
        raise UserError(
            f"--output {output} holds the lines of another request: {'; '.join(changed)}. Name another file."
        )


def _finished(output: Path, n: int) -> dict[str, list[bytes]]:
    """Id → its `n` lines in `output`. Problems with fewer lines are drawn again, and a torn last line is left out.

    Raises UserError for a file that was not made by `sample`.
    """
    if not output.is_file():
        return {}
    lines_of: dict[str, list[bytes]] = {}
    lines = output.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            lines_of.setdefault(row["id"], []).append(line)
            if row["sample"] >= n or len(lines_of[row["id"]]) > n:
                raise UserError(f"--output {output} holds more than --n {n} samples a row. Name another file.")
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):  # a line without its newline was torn
                raise UserError(
                    f"--output {output} line {number} is not a line of `sample` ({error}); nothing was changed. "
                    "Name another file."
                ) from error
    return {name: lines for name, lines in lines_of.items() if len(lines) == n}


@contextlib.contextmanager
def _appending(
    output: Path | None, finished: dict[str, list[bytes]], asked: dict[str, Any]
) -> Generator[Callable[[dict[str, Any]], None]]:
    """Append JSON lines to `output`, which begins with the finished ones, or write them to standard output."""
    if output is None:
        yield _line_writer(sys.stdout)
        return
    write_whole(output.with_name(output.name + ".asked.json"), json.dumps(asked, indent=2) + "\n")
    write_whole(output, b"".join(line + b"\n" for lines in finished.values() for line in lines).decode())
    with output.open("a", encoding="utf-8") as file:
        yield _line_writer(file)


@contextlib.contextmanager
def _replacing(output: Path | None) -> Generator[Callable[[dict[str, Any]], None]]:
    """Write JSON lines to `output`, which appears whole at the end, or to standard output."""
    if output is None:
        yield _line_writer(sys.stdout)
        return
    temporary = output.with_name(output.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield _line_writer(file)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _line_writer(file: io.TextIOBase | TextIO) -> Callable[[dict[str, Any]], None]:
    def write(row: dict[str, Any]) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    return write
