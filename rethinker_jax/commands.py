"""The commands: what each is asked, what its help says, and the function that runs it.

What does the work is imported inside the functions, so that help and `verify` start at once and never import jax.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.config_file import config_name, find_config, load_config, load_defaults
from rethinker_jax.config_keys import ALL_KEYS
from rethinker_jax.errors import UserError
from rethinker_jax.options import EVALUATE_NAMES, EvaluateOptions, SampleOptions, ScoreOptions


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line: the command's options, the words that are no overrides, the overrides, the mesh."""

    options: argparse.Namespace
    words: tuple[str, ...]
    overrides: tuple[str, ...]
    mesh: MeshConfig | None

    def config_path(self) -> Path | None:
        """The one CONFIG.yaml, if it was given."""
        if len(self.words) > 1:
            raise UserError(f"wanted one CONFIG.yaml, came {' and '.join(self.words)}")
        if self.words and self.words[0] in ALL_KEYS:
            raise UserError(f"{self.words[0]}: wanted a value, as in {self.words[0]}=VALUE")
        return find_config(self.words[0]) if self.words else None

    def config(self, without_file: Callable[[Sequence[str]], Config]) -> Config:
        """The config of the file, or without one `without_file(overrides)`; --mesh goes before both."""
        overrides = list(self.overrides)
        if self.mesh is not None:
            overrides += [f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(self.mesh).items()]
        path = self.config_path()
        return load_config(path, overrides) if path else without_file(overrides)


def _no_options(parser: argparse.ArgumentParser) -> None:
    """For commands that are told everything by their config."""


def _train(request: Request) -> None:
    config = request.config(lambda overrides: load_config(None, overrides))
    from rethinker_jax.devices import start_jax
    from rethinker_jax.loop import train

    start_jax(config)
    train(config, config_name(request.config_path()))


def _sft(request: Request) -> None:
    config = request.config(lambda overrides: load_config(None, overrides))
    from rethinker_jax.devices import start_jax
    from rethinker_jax.sft import fine_tune

    start_jax(config)
    fine_tune(config, config_name(request.config_path()))


def _pipeline(request: Request) -> None:
    path = request.config_path()
    if path is None:
        raise UserError("pipeline: wanted the YAML file of a recipe, as in pipeline configs/NAME.yaml")
    if not path.is_file():
        raise UserError(f"pipeline: {path}: no such file")
    from rethinker_jax.pipeline import run_pipeline

    run_pipeline(path, list(request.overrides), request.mesh)


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory or checkpoint (default: model.path)")
    parser.add_argument("--data", metavar="ROWS", help="rows: parquet, JSON lines, a hub id, or example:SPLIT")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON lines (default: standard output)")
    parser.add_argument(
        "--prompt-template", metavar="NAME", help="or `none` for the bare question (default: data.prompt_template)"
    )


def _sample_options(parser: argparse.ArgumentParser) -> None:
    _prompt_options(parser)
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="for --question; may be repeated")
    parser.add_argument("--question", metavar="TEXT", help="one shot instead of --data")
    parser.add_argument("--n", metavar="N", type=int, default=1, help="completions per problem (default: 1)")
    parser.add_argument("--seed", metavar="N", type=int, help="names the random stream (default: run.seed)")


def _sample(request: Request) -> None:
    options, config = request.options, request.config(load_defaults)
    if (options.data is None) == (options.question is None):
        raise UserError("sample: wanted either --data ROWS or --question TEXT")
    if options.image and options.question is None:
        raise UserError("sample: --image belongs to --question TEXT")
    for image in options.image:
        if not Path(image).is_file():
            raise UserError(f"sample: --image {image}: no such file")
    if options.n < 1:
        raise UserError(f"sample: --n {options.n}: wanted 1 or more")
    config = _with_model(config, options.model)
    from rethinker_jax.devices import start_jax
    from rethinker_jax.sample import sample

    start_jax(config)
    asked = SampleOptions(
        model=config.model.path,
        data=options.data,
        image=tuple(options.image),
        question=options.question,
        output=options.output,
        n=options.n,
        seed=config.run.seed if options.seed is None else options.seed,
        prompt_template=options.prompt_template or config.data.prompt_template,
    )
    sample(asked, config)


def _score(request: Request) -> None:
    options, config = request.options, request.config(load_defaults)
    if options.data is None:
        raise UserError("score: wanted --data ROWS, problems with a completion or completion_ids each")
    config = _with_model(config, options.model)
    from rethinker_jax.devices import start_jax
    from rethinker_jax.sample import score

    start_jax(config)
    template = options.prompt_template or config.data.prompt_template
    score(ScoreOptions(config.model.path, options.data, options.output, template), config)


def _with_model(config: Config, model: str | None) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=model)) if model else config


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", metavar="FILE", type=Path, help="JSON lines of responses and answers")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON lines (default: standard output)")


def _verify(request: Request) -> None:
    config = request.config(load_defaults)
    if request.options.input is None:
        raise UserError("verify: wanted --input FILE, JSON lines of {id, response, answer}")
    if not request.options.input.exists():
        raise UserError(f"verify: --input {request.options.input}: no such file")
    from rethinker_jax.verify.command import verify_file

    verify_file(request.options.input, request.options.output, config.verifier)


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
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


def _evaluate(request: Request) -> None:
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
    given = _with_model(request.config(load_defaults), options.model)
    own = given.data if request.config_path() else trained_as(given.model.path)
    request = dataclasses.replace(request, overrides=(*overrides_of(protocol, own), *request.overrides))
    config = request.config(lambda rest: load_defaults([f"data.max_prompt_tokens={MAX_PROMPT_TOKENS}", *rest]))
    config = _with_model(config, options.model)
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

    start_jax(config)
    print(evaluate(asked, config))


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
    config = _with_model(
        dataclasses.replace(request, overrides=(*prompts, *request.overrides)).config(load_defaults), options.model
    )
    from rethinker_jax.devices import start_jax
    from rethinker_jax.evaluation.perplexity import perplexity

    start_jax(config)
    perplexity(generations, options.data, options.output, config)


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", type=Path, help="the directory to write")


def _export(request: Request) -> None:
    source = _one_path(request, "export", "a run directory or a checkpoint")
    if request.options.output is None:
        raise UserError("export: wanted --output DIR, the directory to write")
    from rethinker_jax.export import export

    export(source, request.options.output)


def _report(request: Request) -> None:
    path = _one_path(request, "report", "a run directory, or the result of an evaluation")
    if path.is_file():
        from rethinker_jax.evaluation.pages import write_page

        print(write_page(path))
        return
    from rethinker_jax.report import write_report

    print(write_report(path))


def _one_path(request: Request, command: str, wanted: str) -> Path:
    words = (*request.words, *request.overrides)
    if len(words) != 1:
        raise UserError(f"{command}: wanted {wanted}, came {' '.join(words) or 'nothing'}")
    if not Path(words[0]).exists():
        raise UserError(f"{command}: {words[0]}: no such directory; wanted {wanted}")
    return Path(words[0])


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what its help says, its own options, the config sections it lists, and the function that runs it."""

    summary: str
    usage: str
    details: str
    run: Callable[[Request], None]
    add_options: Callable[[argparse.ArgumentParser], None] = _no_options
    sections: tuple[str, ...] = ()
    takes_mesh: bool = True


COMMANDS: dict[str, Command] = {
    "train": Command(
        "reinforcement learning by a config (the default; without a config, the embedded example)",
        "[CONFIG.yaml] [--mesh [SPEC]] [section.key=value ...]",
        "Samples completions, verifies them, and learns from the verdicts, with an evaluation before and after.\n"
        "Writes config.yaml, metrics.jsonl, rollouts/, checkpoints/, tensorboard/, summary.json and report.html to\n"
        "run.dir, and goes on from the last checkpoint that it finds there.",
        _train,
        sections=tuple(field.name for field in dataclasses.fields(Config) if field.name != "sft"),
    ),
    "sft": Command(
        "supervised fine-tuning on completions",
        "[CONFIG.yaml] [--mesh [SPEC]] sft.data=ROWS [section.key=value ...]",
        "Learns the completions of rows that hold a problem and its `completion`. Resumes from its run directory.",
        _sft,
        sections=("run", "model", "mesh", "data", "optimizer", "training", "sft"),
    ),
    "pipeline": Command(
        "a recipe of several stages, resumable per stage",
        "CONFIG.yaml [--mesh [SPEC]] [section.key=value ...]",
        "Runs the stages of a recipe one after the other; a stage that is done is not run again. manifest.json in the\n"
        "run directory says what each started from and what it left. Overrides hold for every stage.",
        _pipeline,
    ),
    "sample": Command(
        "completions of a model, as JSON lines",
        "--model DIR (--data ROWS | --question TEXT [--image FILE ...]) [--n N] [options] [section.key=value ...]",
        "Writes {id, sample, completion, completion_ids, log_probs, finish_reason}, one line per completion.\n"
        "Without a config, the defaults below hold; sampling.temperature=0 is greedy.",
        _sample,
        _sample_options,
        ("run", "model", "mesh", "data", "sampling"),
    ),
    "score": Command(
        "per-token log-probs of given completions, as JSON lines",
        "--model DIR --data ROWS [options] [section.key=value ...]",
        "Every row holds a problem and its `completion` (text) or `completion_ids`.\n"
        "Writes {id, token_ids, log_probs}: natural log, full softmax, temperature 1.",
        _score,
        _prompt_options,
        ("model", "mesh", "data"),
    ),
    "verify": Command(
        "judges responses against answers; needs no accelerator",
        "--input FILE [--output FILE] [verifier.key=value ...]",
        "Reads {id, response, answer, choices?, type?}, writes {id, verdict, reward, extracted, rule, ms}.\n"
        "With --output, the same command goes on where an interrupted or killed one ended.",
        _verify,
        _verify_options,
        ("verifier",),
        takes_mesh=False,
    ),
    "evaluate": Command(
        "a model over a benchmark: accuracy with its interval, pass@k, and all generations",
        "--model DIR --benchmark NAME [--data PATH] --output FILE [--n N] [options] [section.key=value ...]",
        "Draws n samples an item by the training sampler, judges them by the training rule and also leniently, and\n"
        "writes FILE.json, FILE.generations.jsonl and FILE.html. The same command goes on where a killed one ended.\n"
        "--regrade, --merge, --compare, --table and --export work on files that are there and need no model.\n"
        + EVALUATE_NAMES,
        _evaluate,
        _evaluate_options,
        ("run", "model", "mesh", "data", "sampling", "verifier", "rethink", "evaluation"),
    ),
    "export": Command(
        "a run or a checkpoint as a Hugging Face directory",
        "RUN_OR_CHECKPOINT --output DIR",
        "The directory is one that transformers and vLLM load. A run means its last checkpoint.",
        _export,
        _export_options,
        takes_mesh=False,
    ),
    "report": Command(
        "a run, or an evaluation, as one HTML page",
        "RUN | FILE.json",
        "Writes report.html into the run directory and prints its path: curves, and rollouts with images and\n"
        "verdicts. Of a result of `evaluate`, FILE.html beside it: numbers, and generations with the same.",
        _report,
        takes_mesh=False,
    ),
}
