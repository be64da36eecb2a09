"""Judged generations in the layouts of other harnesses, for the viewers and leaderboards that read those.

lm-evaluation-harness: a results object, and one sample line an item with all its responses. VLMEvalKit: a table of
predictions (tab-separated; its own is a spreadsheet) and accuracies by category. The layouts are theirs, the numbers
and the verdicts ours: no judge model was asked.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rethinker_jax.benchmarks.groups import ItemSamples, group_records
from rethinker_jax.benchmarks.intervals import Z
from rethinker_jax.benchmarks.records import Record

STRICT, LENIENT = "strict-box", "lenient"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lm_eval_results(numbers: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The `results_*.json` of lm-evaluation-harness for one result of `evaluate`.

    Its standard error is half of our 95% interval over 1.96: the same spread, in its terms.
    """
    task = numbers["benchmark"]
    scores: dict[str, Any] = {"alias": task}
    for name, key in ((STRICT, "accuracy"), (LENIENT, "lenient_accuracy")):
        interval = numbers[key]
        scores[f"exact_match,{name}"] = interval["value"]
        scores[f"exact_match_stderr,{name}"] = (interval["high"] - interval["low"]) / (2 * Z)
    for k, value in numbers["pass@k"].items():
        scores[f"pass@{k},{STRICT}"] = value
    return {
        "results": {task: scores},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "output_type": "generate_until",
                "repeats": numbers["num_samples"],
                "num_fewshot": 0,
                "metadata": dict(numbers["protocol"]),
            }
        },
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"exact_match": True}},
        "n-samples": {task: {"original": numbers["num_problems"], "effective": numbers["num_problems"]}},
        "config": {"model": model, "model_args": {}, "limit": None},
        "model_name": model,
    }


def lm_eval_samples(records: Sequence[Record]) -> str:
    """The `samples_*.jsonl` of lm-evaluation-harness: a line an item, scored items only."""
    items = [item for item in group_records(records) if item.first.scored]
    return "".join(json.dumps(_lm_eval_line(number, item)) + "\n" for number, item in enumerate(items))


def _lm_eval_line(number: int, item: ItemSamples) -> dict[str, Any]:
    first = item.first
    doc = {
        "id": first.id,
        "question": first.question,
        "choices": list(first.choices),
        "answer": first.answer,
        "type": first.type,
        **{f"category_{name}": value for name, value in sorted(first.categories.items())},
    }
    return {
        "doc_id": number,
        "doc": doc,
        "target": first.answer,
        "arguments": {"gen_args_0": {"arg_0": first.question, "arg_1": {}}},
        "resps": [[record.completion for record in item.records]],
        "filtered_resps": ["" if r.extracted is None else r.extracted for r in item.records],
        "filter": STRICT,
        "metrics": ["exact_match"],
        "doc_hash": _hash(json.dumps(doc, sort_keys=True)),
        "prompt_hash": _hash(first.question),
        "target_hash": _hash(first.answer),
        "exact_match": item.accuracy,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def vlmevalkit_predictions(records: Sequence[Record]) -> str:
    """Its prediction table as tab-separated text, a line a scored sample: index, question, options, answer, ...

    `index` counts from 0 over items; with several samples it is repeated and `sample` tells them apart. `category` is
    the first dimension by name, `hit` 1 or 0, `res` the extracted answer.
    """
    items = [item for item in group_records(records) if item.first.scored]
    width = max((len(item.first.choices) for item in items), default=0)
    dimensions = sorted({name for item in items for name in item.first.categories})
    letters = [_letter(place) for place in range(width)]
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    header = ["index", "id", "sample", "question", *letters, "answer", "category", *dimensions]
    writer.writerow([*header, "prediction", "res", "hit", "log"])
    for index, item in enumerate(items):
        first = item.first
        options = [*first.choices, *[""] * (width - len(first.choices))]
        kinds = [first.categories.get(name, "") for name in dimensions]
        for r in item.records:
            shared = [index, first.id, r.sample, first.question, *options, first.answer, kinds[0] if kinds else ""]
            answer = "" if r.extracted is None else r.extracted
            row = [*shared, *kinds, r.completion, answer, int(r.correct), f"{r.verdict}: {r.rule}"]
            # Halves of characters, which no file could hold, are written as their escapes.
            writer.writerow([str(cell).encode("utf-8", "backslashreplace").decode() for cell in row])
    return file.getvalue()


def vlmevalkit_accuracy(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its accuracy records: one for everything and one a dimension, values in percent under their names."""
    overall = {"split": "all", "Overall": 100 * numbers["accuracy"]["value"]}
    return [overall] + [
        {"split": dimension, **{value: 100 * found["accuracy"]["value"] for value, found in values.items()}}
        for dimension, values in numbers["per_category"].items()
    ]


def _letter(place: int) -> str:
    return _LETTERS[place] if place < len(_LETTERS) else f"option_{place + 1}"
