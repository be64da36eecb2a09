"""The commands `sample` and `score`: a model's completions, and its log-probs of given ones, as JSON lines."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rethinker_jax.config import Config, LossConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.errors import UserError
from rethinker_jax.options import SampleOptions, ScoreOptions
from rethinker_jax.prompts.build import BadPrompt
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.sampling.sampler import Budgets, Request
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import TrainRow, pack_rows
from rethinker_jax.types import Problem, Prompt


def sample(options: SampleOptions, config: Config) -> None:
    """Draw `n` completions of every problem and write them as they are finished.

    An output file that exists is gone on with: problems that have all their lines there are not drawn again.
    """
    config = _configured(config, options.model, options.prompt_template)
    problems = _one_shot(options) if options.data is None else _problems(options.data, config)
    done = _finished_ids(options.output, options.n)
    left = [problem for problem in problems if problem.id not in done]
    system = load_system(config)
    params = system.sampling_params(system.params)
    budgets = Budgets(config.sampling.max_new_tokens)
    size = config.rollout.prompts_per_step
    with (
        _writer(options.output) as write,
        RunProgress(len(problems), len(problems) - len(left), title="sample") as shown,
    ):
        for start in range(0, len(left), size):
            prompts = _prompts(system, left[start : start + size], shown)
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
            shown.update(len(problems) - len(left) + start + len(prompts), {})


def score(options: ScoreOptions, config: Config) -> None:
    """Write the log-probs of every row's `completion_ids`, or of its `completion` and the end token."""
    config = _configured(config, options.model, options.prompt_template)
    problems = _problems(options.data, config)
    system = load_system(config)
    updater = make_updater(config, system, 1, LossConfig())
    size = config.rollout.prompts_per_step
    with _writer(options.output) as write, RunProgress(len(problems), title="score") as shown:
        for start in range(0, len(problems), size):
            chunk = problems[start : start + size]
            ids = [_completion_ids(problem, system, options.data) for problem in chunk]
            rows = []
            for problem, tokens in zip(chunk, ids, strict=True):
                none = np.zeros(len(tokens), bool)
                rows.append(TrainRow(_prompt(system, problem), tokens, none, none, np.zeros(len(tokens), np.float32)))
            batch = pack_rows(rows, system.geometry, max(map(len, ids)), size)
            log_probs = jax.device_get(updater.log_probs(system.params, batch))
            for problem, tokens, values in zip(chunk, ids, log_probs, strict=False):
                found = [float(value) for value in values[: len(tokens)]]
                write({"id": problem.id, "token_ids": tokens.tolist(), "log_probs": found})
            shown.update(start + len(chunk), {})


def _configured(config: Config, model: str, template: str) -> Config:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=model),
        data=dataclasses.replace(config.data, prompt_template=template),
    )


def _problems(source: str, config: Config) -> Sequence[Problem]:
    return read_problems(
        source, image_root=config.data.image_root, max_bad_rows=config.run.max_bad_rows, answers=False
    ).problems


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


def _finished_ids(output: Path | None, n: int) -> set[str]:
    """Ids that have `n` lines in `output`; lines of other ids, and a torn last one, are dropped from the file."""
    if output is None or not output.is_file():
        return set()
    kept: dict[str, list[str]] = {}
    for number, line in enumerate(output.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            kept.setdefault(json.loads(line)["id"], []).append(line)
        except (ValueError, KeyError, TypeError):
            print(f"{output} line {number} is not whole; its problem is drawn again", file=sys.stderr)
    finished = {name: lines for name, lines in kept.items() if len(lines) == n}
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text("".join(line + "\n" for lines in finished.values() for line in lines), encoding="utf-8")
    temporary.replace(output)
    return set(finished)


@contextlib.contextmanager
def _writer(output: Path | None) -> Generator[Callable[[dict[str, Any]], None]]:
    """Append JSON lines to `output`, or to standard output."""
    with contextlib.ExitStack() as stack:
        if output is None:
            file = sys.stdout
        else:
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(output.open("a", encoding="utf-8"))
            except OSError as error:
                raise UserError(f"--output {output}: cannot be written ({error.strerror}).") from error

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

        yield write
