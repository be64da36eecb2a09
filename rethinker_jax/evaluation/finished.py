"""Finished results, side by side: comparisons, tables, and the layouts of other harnesses. Needs no model."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.benchmarks import exports
from rethinker_jax.benchmarks.compare import compare_all, read_result, read_run
from rethinker_jax.benchmarks.numbers import plain
from rethinker_jax.benchmarks.published import published_numbers
from rethinker_jax.benchmarks.record_files import generations_path, read_records
from rethinker_jax.benchmarks.tables import (
    MAX_FLIPS,
    Table,
    categories_table,
    comparisons_table,
    flips_table,
    results_table,
    to_csv,
    to_latex,
    to_markdown,
)
from rethinker_jax.config_keys import nearest
from rethinker_jax.errors import UserError
from rethinker_jax.output_files import check_writable, write_whole
from rethinker_jax.terminal import printable

TABLE_FORMATS: Mapping[str, Callable[[Table], str]] = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}
EXPORTS = ("lm_eval", "vlmevalkit")


def print_comparison(files: Sequence[str], output: Path | None) -> None:
    """Every pair of results, and the items on which the two of a pair differ, as Markdown.

    To an `output` that ends in .json: everything, with all flips and the ids of the solvable sets.
    """
    comparisons = compare_all([read_run(path, name) for path, name in _named(files)])
    if output is not None and output.suffix == ".json":
        _put(_json([plain(one) for one in comparisons]), output)
        return
    text = to_markdown(comparisons_table(comparisons))
    for one in comparisons:
        if one.protocol:
            text += f"\nprotocol of {one.a} and {one.b} differs in {', '.join(one.protocol)}\n"
        if one.flips:
            text += "\n" + to_markdown(flips_table(one))
        if len(one.flips) > MAX_FLIPS:
            text += f"\n{len(one.flips) - MAX_FLIPS} more; all of them with --output FILE.json\n"
    _put(text, output)


def print_table(words: Sequence[str], output: Path | None, dimension: str | None = None) -> None:
    """`FORMAT FILE...`: one row a result, with the published numbers of the same benchmarks below.

    With a `dimension` of the categories: one row a value of it, one column a result.
    """
    form, files = _format(words, "--table", tuple(TABLE_FORMATS))
    found = [(path, name, read_result(path)) for path, name in _named(files)]
    if dimension is None:
        table = results_table([(_model(result, path), result) for path, _, result in found], published_numbers())
    else:
        known = sorted({name for _, _, result in found for name in result["per_category"]})
        if dimension not in known:
            wanted = " or ".join(known) or "a result with categories"
            raise UserError(f"evaluate: --by {dimension}: wanted {wanted}{nearest(dimension, known)}")
        table = categories_table([(name, result) for _, name, result in found], dimension)
    _put(TABLE_FORMATS[form](table), output)


def export_results(words: Sequence[str], output: Path | None) -> None:
    """`FORMAT FILE...`: files of another harness's layout in the folder `output`; prints their paths."""
    form, files = _format(words, "--export", EXPORTS)
    if output is None:
        raise UserError("evaluate: --export wants --output DIR, the folder to write")
    texts: dict[str, str] = {}
    for path, name in _named(files):
        texts |= _exported(form, path, name)
    check_writable(output / next(iter(texts)), "--output")
    for name, text in texts.items():
        write_whole(output / name, text)
        print(output / name)


def _exported(form: str, path: Path, name: str) -> dict[str, str]:
    result, records = read_result(path), read_records(generations_path(path))
    benchmark = re.sub(r"[^\w.-]", "_", result["benchmark"])  # part of the files' names
    if form == "lm_eval":
        return {
            f"results_{name}.json": _json(exports.lm_eval_results(result, str(result.get("made_by", {}).get("model")))),
            f"samples_{benchmark}_{name}.jsonl": exports.lm_eval_samples(records),
        }
    return {
        f"{name}_{benchmark}.tsv": exports.vlmevalkit_predictions(records),
        f"{name}_{benchmark}_acc.json": _json(exports.vlmevalkit_accuracy(result)),
    }


def _format(words: Sequence[str], option: str, known: Sequence[str]) -> tuple[str, Sequence[str]]:
    form, *files = words
    if form not in known:
        raise UserError(f"evaluate: {option} {form}: wanted {' or '.join(known)} first{nearest(form, known)}")
    if not files:
        raise UserError(f"evaluate: {option} {form}: wanted result files behind it, as in {option} {form} FILE.json")
    return form, files


def _model(result: Mapping[str, Any], path: Path) -> str:
    """What a result is of, so that the benchmarks of one model share a row."""
    made_by = result.get("made_by") or {}
    step = made_by.get("step")
    return str(made_by.get("model", path.stem)) + (f", step {step}" if step is not None else "")


def _named(files: Sequence[str]) -> list[tuple[Path, str]]:
    """Paths with names that tell them apart: their stems, or where two are equal the paths as they were given."""
    paths = [Path(file) for file in files]
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path).replace("/", "_") for path in paths]
    return list(zip(paths, names, strict=True))


def _put(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        return
    check_writable(output, "--output")
    write_whole(output, text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
