"""The command `evaluate`: its options, and the form that was asked for. See `commands.py`."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.options import EvaluateOptions
from rethinker_jax.request import Request, with_model


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory, run directory or checkpoint")
    parser.add_argument("--benchmark", metavar="NAME", help="a benchmark's name, or rows for rows of your own")
    parser.add_argument("--data", metavar="PATH", help="folder, file or hub id (default: where it was published)")
    parser.add_argument("--protocol", metavar="NAME", default="", help="prompt, pixels and decoding (see above)")
    parser.add_argument("--n", metavar="N", type=int, help="samples per item (default: the protocol's)")
    parser.add_argument("--seed", metavar="N", type=int, help="names the random stream (default: run.seed)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the result; generations and a page beside it")
    parser.add_argument("--shard", metavar="I/N", help="the items whose number is I modulo N; see --merge")
    parser.add_argument("--force-rethink", action="store_true", help="a trigger after every completion that ends")
    parser.add_argument("--regrade", metavar="FILE", type=Path, help="judges these generations again, without a model")
    parser.add_argument("--merge", metavar="FILE", nargs="+", type=Path, help="joins generations of shards to --output")
    parser.add_argument("--compare", metavar="FILE", nargs="+", help="results, item by item; all of it to a .json")
    parser.add_argument("--table", metavar="WORD", nargs="+", help="markdown, latex or csv, then results")
    parser.add_argument("--by", metavar="DIMENSION", help="with --table: accuracies by a category, as by version")
    parser.add_argument("--export", metavar="WORD", nargs="+", help="lm_eval or vlmevalkit, then results; --output DIR")
    parser.add_argument("--perplexity", metavar="FILE", type=Path, help="of these generations under --model")


def run_evaluate(request: Request) -> None:
    options = request.options
    form = _form_of_evaluate(vars(options))
    if form == "perplexity":
        _perplexity(request)
        return
    if form:
        _evaluate_finished(request)
        return
    if options.benchmark is None or options.output is None:
        raise UserError("evaluate: wanted --benchmark NAME and --output FILE")
    if options.n is not None and options.n < 1:
        raise UserError(f"evaluate: --n {options.n}: wanted 1 or more")
    from rethinker_jax.evaluation.asks import MAX_PROMPT_TOKENS, choose_protocol, overrides_of, read_shard
    from rethinker_jax.evaluation.runs import trained_as

    protocol = choose_protocol(options.protocol, options.n, options.benchmark)
    given = with_model(request.config(load_defaults), options.model)
    own = given.data if request.config_path() else trained_as(given.model.path)
    request = dataclasses.replace(request, overrides=(*overrides_of(protocol, own), *request.overrides))
    config = request.config(lambda rest: load_defaults([f"data.max_prompt_tokens={MAX_PROMPT_TOKENS}", *rest]))
    config = with_model(config, options.model)
    if not any(word.startswith("rethink.temperature=") for word in request.overrides):
        config = dataclasses.replace(
            config, rethink=dataclasses.replace(config.rethink, temperature=config.sampling.temperature)
        )
    n = protocol.decoding.n if options.n is None else options.n
    if n > 1 and not config.sampling.temperature:
        raise UserError(f"evaluate: --n {n} at temperature 0 draws the same {n} times; set sampling.temperature.")
    asked = EvaluateOptions(
        model=config.model.path,
        benchmark=options.benchmark,
        data=options.data,
        protocol=protocol.name,
        output=options.output,
        n=n,
        seed=config.run.seed if options.seed is None else options.seed,
        shard=read_shard(options.shard),
        force_rethink=options.force_rethink,
    )
    from rethinker_jax.devices import start_jax
    from rethinker_jax.evaluation.command import evaluate
    from rethinker_jax.processes import is_first

    start_jax(config)
    path = evaluate(asked, config)
    if is_first():
        print(path)


def _form_of_evaluate(given: Mapping[str, Any]) -> str:
    """The form that works on files that are there, "" for an evaluation. Raises UserError for what it does not read."""
    forms = [name for name in ("regrade", "merge", "compare", "table", "export", "perplexity") if given[name]]
    if len(forms) > 1:
        raise UserError(f"evaluate: wanted one of {' and '.join(f'--{name}' for name in forms)}")
    form = forms[0] if forms else ""
    unread = ["benchmark", "protocol", "n", "seed", "shard", "force_rethink"] if form else []
    unread += ["model", "data"] if form not in ("", "perplexity") else []
    unread += ["by"] if form != "table" else []
    told = [f"--{name.replace('_', '-')}" for name in unread if given[name] not in (None, "", False)]
    if told:
        raise UserError(f"evaluate: {f'--{form}' if form else 'an evaluation'} does not read {' and '.join(told)}")
    return form


def _evaluate_finished(request: Request) -> None:
    """The forms of `evaluate` that need no model."""
    options = request.options
    if options.merge and options.output is None:
        raise UserError("evaluate: --merge wants --output FILE")
    from rethinker_jax.evaluation import finished, regrade

    if options.compare:
        finished.print_comparison(options.compare, options.output)
    elif options.table:
        finished.print_table(options.table, options.output, options.by)
    elif options.export:
        finished.export_results(options.export, options.output)
    elif options.merge:
        print(regrade.merge(options.merge, options.output, request.config(load_defaults).verifier))
    else:
        print(regrade.regrade(options.regrade, options.output, request.config(load_defaults).verifier))


def _perplexity(request: Request) -> None:
    options = request.options
    from rethinker_jax.evaluation.results import generations_of, read_generations

    generations = generations_of(options.perplexity)
    said = read_generations(generations).asked["protocol"]
    keys = ("prompt_template", "max_prompt_tokens", "min_pixels", "max_pixels")
    prompts = tuple(f"data.{key}={said[key]}" for key in keys)
    config = with_model(
        dataclasses.replace(request, overrides=(*prompts, *request.overrides)).config(load_defaults), options.model
    )
    from rethinker_jax.devices import start_jax
    from rethinker_jax.evaluation.perplexity import perplexity

    start_jax(config)
    perplexity(generations, options.data, options.output, config)
