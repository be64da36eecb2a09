"""The commands: what each is asked, what its help says, and the function that runs it.

What does the work is imported inside the functions, so that help and `verify` start at once and never import jax.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from rethinker_jax.commands_evaluate import evaluate_options, run_evaluate
from rethinker_jax.commands_plan import plan_options, run_plan
from rethinker_jax.config import Config
from rethinker_jax.config_file import config_name, load_config, load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.options import EVALUATE_NAMES, SampleOptions, ScoreOptions, parse_profile
from rethinker_jax.request import Request, with_model


def _no_options(parser: argparse.ArgumentParser) -> None:
    """For commands that are told everything by their config."""


def _profile_option(parser: argparse.ArgumentParser) -> None:
    # Written as --profile=STEPS by `main`, so that a config behind it is not taken for its value.
    said = "trace a few steps and say where their time goes: the 2nd to 4th of this process, or as in --profile 5-6"
    parser.add_argument("--profile", metavar="FIRST-LAST", help=said)


def _train(request: Request) -> None:
    profile = parse_profile(request.options.profile)
    config = request.config(lambda overrides: load_config(None, overrides))
    from rethinker_jax.devices import start_jax
    from rethinker_jax.loop import train

    start_jax(config)
    train(config, config_name(request.config_path()), profile)


def _sft(request: Request) -> None:
    profile = parse_profile(request.options.profile)
    config = request.config(lambda overrides: load_config(None, overrides))
    from rethinker_jax.devices import start_jax
    from rethinker_jax.sft import fine_tune

    start_jax(config)
    fine_tune(config, config_name(request.config_path()), profile)


def _pipeline(request: Request) -> None:
    path = request.config_path()
    if path is None:
        raise UserError("pipeline: wanted the YAML file of a recipe, as in pipeline configs/NAME.yaml")
    if not path.is_file():
        raise UserError(f"pipeline: {path}: no such file")
    from rethinker_jax.pipeline import dry_run, run_pipeline

    if request.options.dry_run:
        dry_run(path, request.overrides, request.mesh)
    else:
        run_pipeline(path, request.overrides, request.mesh)


def _pipeline_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="checks every stage, prints what it will cost, runs none"
    )


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
    config = with_model(config, options.model)
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
    config = with_model(config, options.model)
    from rethinker_jax.devices import start_jax
    from rethinker_jax.sample import score

    start_jax(config)
    template = options.prompt_template or config.data.prompt_template
    score(ScoreOptions(config.model.path, options.data, options.output, template), config)


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", metavar="FILE", type=Path, help="JSON lines of responses and answers")
    parser.add_argument("--data", metavar="ROWS", help="rows that hold the answers: the input is lines of `sample`")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON lines (default: standard output)")


def _verify(request: Request) -> None:
    config = request.config(load_defaults)
    if request.options.input is None:
        raise UserError("verify: wanted --input FILE, JSON lines of {id, response, answer}")
    if not request.options.input.exists():
        raise UserError(f"verify: --input {request.options.input}: no such file")
    from rethinker_jax.verify.command import verify_file

    golds = None
    if request.options.data is not None:
        from rethinker_jax.curation.sources import read_golds

        golds = read_golds(request.options.data, config.data.image_root, config.run.max_bad_rows)
    verify_file(request.options.input, request.options.output, config.verifier, golds)


def _select_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", metavar="FILE", type=Path, help="lines of `sample`, `verify --data` or `evaluate`")
    parser.add_argument("--data", metavar="ROWS", help="the rows that were sampled: parquet, JSON lines, example:SPLIT")
    parser.add_argument("--output", metavar="FILE", type=Path, help="in the form of the rows; a report beside it")
    parser.add_argument("--mode", choices=("rows", "traces"), help="(default: select.mode)")


def _select(request: Request) -> None:
    options, config = request.options, request.config(load_defaults)
    if options.data is None or options.output is None:
        raise UserError("select: wanted --data ROWS and --output FILE")
    if options.input is not None and not options.input.exists():
        raise UserError(f"select: --input {options.input}: no such file")
    from rethinker_jax.curation.command import SelectOptions, select

    select(SelectOptions(options.input, options.data, options.output, options.mode or config.select.mode), config)


def _distill_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="ROWS", help="rows: parquet, JSON lines, a hub id, or example:SPLIT")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON lines; replies are kept beside it")


def _distill(request: Request) -> None:
    options, config = request.options, request.config(load_defaults)
    if options.data is None or options.output is None:
        raise UserError("distill: wanted --data ROWS and --output FILE.jsonl")
    from rethinker_jax.distill.command import DistillOptions, distill

    distill(DistillOptions(options.data, options.output), config)


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", type=Path, help="the directory to write")
    which = "of a run: best by validation reward, or that of step N (default: last)"
    parser.add_argument("--checkpoint", metavar="best|last|N", help=which)


def _export(request: Request) -> None:
    source = _one_path(request, "export", "a run directory or a checkpoint")
    if request.options.output is None:
        raise UserError("export: wanted --output DIR, the directory to write")
    from rethinker_jax.export import export

    export(source, request.options.output, request.options.checkpoint)


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
        "[CONFIG.yaml] [--mesh [SPEC]] [--profile [FIRST-LAST]] [section.key=value ...]",
        "Samples completions, verifies them, and learns from the verdicts, with an evaluation before and after.\n"
        "Writes config.yaml, metrics.jsonl, rollouts/, checkpoints/, tensorboard/, summary.json and report.html to\n"
        "run.dir, and goes on from the last checkpoint that it finds there.",
        _train,
        _profile_option,
        tuple(field.name for field in dataclasses.fields(Config) if field.name not in ("sft", "select", "distill")),
    ),
    "sft": Command(
        "supervised fine-tuning on completions",
        "[CONFIG.yaml] [--mesh [SPEC]] [--profile [FIRST-LAST]] sft.data=ROWS [section.key=value ...]",
        "Learns the completions of rows that hold a problem and its `completion`. Resumes from its run directory.",
        _sft,
        _profile_option,
        ("run", "model", "mesh", "data", "optimizer", "training", "sft"),
    ),
    "pipeline": Command(
        "a recipe of several stages, resumable per stage",
        "CONFIG.yaml [--dry-run] [--mesh [SPEC]] [model=DIR] [sources.NAME=PATH] [section.key=value ...]",
        "Runs the stages of a recipe one after the other: distill, sample, select, sft, rl, evaluate. A stage that is\n"
        "done is not run again unless what it depends on changed. manifest.json in the run directory says what each\n"
        "started from, read and left. Overrides hold for every stage, stages.NAME.section.key=value for one.\n"
        "model=DIR is the base, run.dir=DIR the pipeline's directory; data: sources.NAME=PATH, stages.NAME.data=PATH.",
        _pipeline,
        _pipeline_options,
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
        "--input FILE [--data ROWS] [--output FILE] [verifier.key=value ...]",
        "Reads {id, response, answer, choices?, type?}, writes {id, verdict, reward, extracted, rule, ms}.\n"
        "With --data it reads lines of `sample`, takes the answers from the rows, and adds the verdict to each line.\n"
        "With --output, the same command goes on where an interrupted or killed one ended.",
        _verify,
        _verify_options,
        ("run", "data", "verifier"),
        takes_mesh=False,
    ),
    "select": Command(
        "rows or traces that are worth learning from, by their samples; needs no accelerator",
        "--input FILE --data ROWS --output FILE [--mode rows|traces] [CONFIG.yaml] [select.filters=[...]] [...]",
        "Judges the samples that have no verdict, runs the filters, and writes the rows with pass_rate, num_samples\n"
        "and difficulty (mode rows), or a row with its completion for each sample (mode traces), which `sft` reads.\n"
        "FILE.report.json says what every filter took, in all and by source. docs/curation.md has the filters.",
        _select,
        _select_options,
        ("run", "data", "verifier", "select"),
        takes_mesh=False,
    ),
    "distill": Command(
        "reasoning traces: a model describes the images, a text model reasons; by servers or our sampler",
        "--data ROWS --output FILE.jsonl [CONFIG.yaml] [--mesh [SPEC]] distill.reason.model=M [section.key=value ...]",
        "Writes {id, sample, completion, finish_reason, caption}, distill.reason.n lines a row, for `verify --data`\n"
        "and `select --mode traces`. A model is a directory, or with distill.*.url one of an OpenAI-style server.\n"
        "FILE.captions.jsonl and FILE.replies.jsonl keep every reply: the same command asks only for what is missing.\n"
        "FILE.jsonl.report.json says what failed. docs/distill.md has the prompts and the form of the traces.",
        _distill,
        _distill_options,
        ("run", "model", "mesh", "data", "sampling", "distill"),
    ),
    "evaluate": Command(
        "a model over a benchmark: accuracy with its interval, pass@k, and all generations",
        "--model DIR --benchmark NAME [--data PATH] --output FILE [--n N] [options] [section.key=value ...]",
        "Draws n samples an item by the training sampler, judges them by the training rule and also leniently, and\n"
        "writes FILE.json, FILE.generations.jsonl and FILE.html. The same command goes on where a killed one ended.\n"
        "--regrade, --merge, --compare, --table and --export work on files that are there and need no model.\n"
        + EVALUATE_NAMES,
        run_evaluate,
        evaluate_options,
        ("run", "model", "mesh", "data", "sampling", "verifier", "rethink", "evaluation"),
    ),
    "export": Command(
        "a run or a checkpoint as a Hugging Face directory",
        "RUN_OR_CHECKPOINT --output DIR [--checkpoint best|last|N]",
        "The directory is one that transformers and vLLM load. A run means its last checkpoint, unless told otherwise.",
        _export,
        _export_options,
        takes_mesh=False,
    ),
    "plan": Command(
        "what a config takes on TPUs or GPUs that are not there, and how fast it could be; needs no accelerator",
        "CONFIG.yaml --topology NAME [--mesh SPEC] [--json FILE] [--suggest] [--quick] [section.key=value ...]",
        "Compiles the sampler and the update step for the topology and prints memory, products and collectives of a\n"
        "device, and a bound on speed. TPUs want libtpu, GPUs jax's CUDA plugin; model.path may be a directory with a\n"
        "config.json alone, or a published name such as Qwen2.5-VL-7B-Instruct. docs/plans.md has examples.",
        run_plan,
        plan_options,
        tuple(field.name for field in dataclasses.fields(Config) if field.name not in ("sft", "select", "distill")),
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
