"""Stored completions under another model: mean negative log-prob per token, by the teacher-forced pass of `score`.

Completions are kept as texts, so they are encoded again with that model's tokenizer; one that ended by itself gets an
end token behind it. A model that wrote them itself may have cut the same text into other tokens.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from rethinker_jax.benchmarks.protocols import find_protocol
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.config import Config, LossConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.asks import asks_hash, asks_of, read_items
from rethinker_jax.evaluation.results import read_generations
from rethinker_jax.evaluation.trained import find_model, load_trained, weights_hash
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.sharding import parts_of
from rethinker_jax.output_files import Row, check_writable, versions, write_whole
from rethinker_jax.processes import check_same, is_first
from rethinker_jax.run_data import agreed, build_prompts
from rethinker_jax.system import System, make_updater
from rethinker_jax.training.batch import pack_micro_batches
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.types import Problem, Prompt


def perplexity(generations: Path, data: str | None, output: Path | None, config: Config) -> None:
    """Writes one JSON object to `output`, or standard output. `data`: where the benchmark lies now, None = as before.

    `config` names the model and, for the prompts, what the protocol of the generations says. Raises UserError.
    """
    found = read_generations(generations)
    asked = found.asked
    check_same(str(generations), lambda: _hash_of_file(generations))
    if output is not None and is_first():
        check_writable(output, "--output")
    protocol = find_protocol(asked["protocol"]["name"])
    asks = asks_of(read_items(asked["benchmark"], data or asked["data"], config).items, protocol)
    if asks_hash(asks) != asked["items"]:
        raise UserError(
            f"{data or asked['data']}: the items are not those that the generations answer. Name the same data by "
            "--data and data.image_root."
        )
    problems = {ask.problem.id: ask.problem for ask in asks}
    trained = find_model(config)
    system, params = load_trained(trained, "score")
    nll = _nll(system, params, found.records, problems, trained.config)
    if not is_first():
        return
    parts = {
        "all": list(zip(found.records, nll, strict=True)),
        "correct": [pair for pair in zip(found.records, nll, strict=True) if pair[0].correct],
        "not_correct": [pair for pair in zip(found.records, nll, strict=True) if not pair[0].correct],
    }
    result = {
        "model": config.model.path,
        "weights": weights_hash(trained),
        "generations": _hash_of_file(generations),
        **{name: _summary([values for _, values in pairs]) for name, pairs in parts.items()},
        **versions(),
    }
    text = json.dumps(result, indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        write_whole(output, text)


def _nll(
    system: System, params: Params, records: Sequence[Record], problems: dict[str, Problem], config: Config
) -> list[np.ndarray]:
    """Negative log-probs of every record's tokens, in order of the records."""
    updater = make_updater(config, system, 1, LossConfig())
    size = min(config.evaluation.batch_size, len(records))
    parts = parts_of(system.mesh)
    ids = [_token_ids(record, system) for record in records]
    by_length = sorted((place for place in range(len(records)) if len(ids[place])), key=lambda place: len(ids[place]))
    found = [np.zeros(0, np.float32)] * len(records)
    with RunProgress(len(by_length), title="perplexity", unit="completion", quiet=not is_first()) as shown:
        for start in range(0, len(by_length), size):
            places = by_length[start : start + size]
            prompts = _prompts(system, {name: problems[name] for name in (records[place].id for place in places)})
            rows = []
            for place in places:
                none = np.zeros(len(ids[place]), bool)
                prompt = prompts[records[place].id]
                rows.append(TrainRow(prompt, ids[place], none, none, np.zeros(len(none), np.float32)))
            longest = max(len(ids[place]) for place in places)
            packed = pack_micro_batches(rows, system.geometry, longest, size, 0, config.buckets, parts)
            values = np.asarray(jax.device_get(updater.log_probs(params, packed.batches[0])))
            for row, place in enumerate(places):
                found[place] = -values[row, : len(ids[place])]
            shown.update(start + len(places), {})
    return found


def _prompts(system: System, problems: Mapping[str, Problem]) -> dict[str, Prompt]:
    """Of each of them. Raises UserError where one cannot be made, in all processes."""
    made, bad = build_prompts(system, list(problems.values()))
    for _, why in agreed(bad).values():
        raise UserError(f"{why}. Raise data.max_prompt_tokens, or give the model larger bounds.")
    return {name: made[place] for place, name in enumerate(problems)}


def _hash_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _token_ids(record: Record, system: System) -> np.ndarray:
    ids = system.tokenizer.encode(record.completion.encode("utf-8", "replace").decode())  # halves of characters go
    if record.finish_reason == "stop":
        ids = np.append(ids, system.tokenizer.end_token_ids[0])
    return ids.astype(np.int32)


def _summary(values: Sequence[np.ndarray]) -> Row:
    """Means over tokens, exactly summed; null where there are none."""
    num_tokens = sum(map(len, values))
    mean = math.fsum(float(value) for one in values for value in one) / num_tokens if num_tokens else None
    return {
        "num_completions": len(values),
        "num_tokens": num_tokens,
        "nll_per_token": mean,
        "perplexity": math.exp(mean) if mean is not None and mean < 700 else None,
    }
