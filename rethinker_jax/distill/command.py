"""`main distill`: rows → descriptions of their images → replies of a reasoner → lines as `sample` writes them.

Replies are kept beside the output as they come, under everything that they depend on, so that a run that was killed, or
one with another style, asks only for what is missing. The output appears whole or not at all.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.config import Config
from rethinker_jax.config_curation import DistillConfig, ReasonConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.curation.report import report_path
from rethinker_jax.distill.asks import Ask, Failures, Role, body_of, check_role, section_of, served_identity
from rethinker_jax.distill.replies import ReplyFile, key_of
from rethinker_jax.distill.served import Served, image_bytes
from rethinker_jax.distill.texts import description, joined, reason_prompt, trace
from rethinker_jax.errors import UserError
from rethinker_jax.output_files import alone, check_writable, versions, write_whole
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.prompts.images import BadImage
from rethinker_jax.terminal import printable
from rethinker_jax.types import Problem


@dataclasses.dataclass(frozen=True)
class DistillOptions:
    """`distill`: traces for every row of `data`, into JSON lines."""

    data: str
    output: Path


@dataclasses.dataclass(frozen=True)
class Model:
    """How a model is asked (`ask_all` of Served or Local), and what its replies depend on besides the question."""

    ask_all: Callable[[Sequence[Ask], ReplyFile, RunProgress, int], Failures]
    identity: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What became of the asks of a step: how many there are, how many were new, and the failures by reason."""

    total: int
    new: int
    failures: Failures


@dataclasses.dataclass(frozen=True)
class Described:
    """A problem and what the reasoner reads of its images; None where it has none."""

    problem: Problem
    caption: str | None


def distill(options: DistillOptions, config: Config) -> None:
    """Describe, reason, and write the traces with a report beside them. Raises UserError."""
    roles = (config.distill.caption, config.distill.reason)
    found = read_problems(
        options.data, image_root=config.data.image_root, max_bad_rows=config.run.max_bad_rows, answers=False
    )
    for row in found.bad_rows:
        print(printable(f"left out ({row.kind}): {row.where}: {row.why}"), file=sys.stderr)
    with_images = any(problem.images for problem in found.problems)
    for role in roles if with_images else roles[1:]:
        check_role(role, body_of(role, config.distill))
    output = options.output.resolve()  # a link is written through
    _check_output(output, options)
    captioner = _model(roles[0], config) if with_images else None
    reasoner = _model(roles[1], config)
    with (
        alone(output),
        ReplyFile(output.with_suffix(".captions.jsonl")) as captions,
        ReplyFile(output.with_suffix(".replies.jsonl")) as replies,
    ):
        described, of_captions = _describe(found.problems, captioner, captions, config)
        of_replies = _reason(described, config.distill.reason, reasoner, replies)
        num_left_out = len(found.problems) - len(described)
        with _written(output, _lines(described, config.distill, reasoner, replies)) as counts:
            # First: lines without it, as after a kill, would be taken for somebody else's.
            report = _report(options, config, (of_captions, of_replies), counts, num_left_out)
            write_whole(report_path(output), json.dumps(report, indent=2) + "\n")
    _print(report, output)


def _model(role: Role, config: Config) -> Model:
    if role.url:
        return Model(Served(role, config.distill).ask_all, served_identity(role, body_of(role, config.distill)))
    from rethinker_jax.distill.local import Local, local_identity  # imports jax, which a server needs none of

    return Model(Local(role, config).ask_all, local_identity(role, config))


def _check_output(output: Path, options: DistillOptions) -> None:
    """Raises UserError where the output could not be written, or would replace what `distill` did not write."""
    if output.suffix != ".jsonl":
        raise UserError(f"--output {options.output}: wanted a name that ends in .jsonl")
    check_writable(output, "--output")
    if output.exists() and Path(options.data).exists() and output.samefile(options.data):
        raise UserError(f"--output {options.output} is the file that is read; name another")
    if output.exists() and not report_path(output).is_file():
        raise UserError(
            f"--output {options.output} is there and was not written by `distill` (there is no "
            f"{report_path(output).name} beside it). Remove it, or name another."
        )


def _describe(
    problems: Sequence[Problem], captioner: Model | None, captions: ReplyFile, config: Config
) -> tuple[list[Described], Asked]:
    """The problems whose images all have a description, or that have none. Equal images are described once."""
    if captioner is None:
        return [Described(problem, None) for problem in problems], Asked(0, 0, collections.Counter())
    unread: Failures = collections.Counter()
    keys_of: dict[str, list[str]] = {}  # of the images of a row
    asks: dict[str, Ask] = {}
    prompt = config.distill.caption.prompt
    for problem in problems:
        try:
            digests = [hashlib.sha256(image_bytes(image)).hexdigest() for image in problem.images]
        except BadImage as error:
            unread["bad_image"] += 1
            print(printable(f"left out (bad_image): row {problem.id!r}: {error}"), file=sys.stderr)
            continue
        keys_of[problem.id] = [key_of("caption", digest, prompt, captioner.identity) for digest in digests]
        for key, digest, image in zip(keys_of[problem.id], digests, problem.images, strict=True):
            asks.setdefault(key, Ask(key, digest[:32], f"an image of row {problem.id!r}", prompt, image=image))
    asked = _ask(captioner, list(asks.values()), captions, "caption", "image")
    described = [
        Described(problem, _caption(keys_of[problem.id], captions)) for problem in problems if problem.id in keys_of
    ]
    described = [one for one in described if one.caption != ""]
    asked = dataclasses.replace(asked, failures=asked.failures + unread)
    num_left_out = len(problems) - len(described)
    if not described or num_left_out > config.run.max_bad_rows:
        raise UserError(
            f"distill.caption: {num_left_out} of {len(problems)} rows have no description "
            f"({_reasons(asked.failures) or 'the captioner wrote nothing'}); wanted one of a row at least, and no more "
            f"than run.max_bad_rows={config.run.max_bad_rows} without. {captions.path.name} keeps what there is; the "
            "same command goes on from there."
        )
    return described, asked


def _caption(keys: Sequence[str], captions: ReplyFile) -> str | None:
    """What the reasoner reads of the images: None where there are none, "" where one has no description."""
    if not keys:
        return None
    known = [reply for reply in map(captions.get, keys) if reply is not None]
    return description(known) if len(known) == len(keys) else ""


def _reason(described: Sequence[Described], role: ReasonConfig, reasoner: Model, replies: ReplyFile) -> Asked:
    asks = []
    for one in described:
        problem = one.problem
        prompt = reason_prompt(role, problem.question, one.caption, len(problem.images))
        keys = _reply_keys(one, role, reasoner)
        asks += [Ask(key, problem.id, f"row {problem.id!r}", prompt, sample) for sample, key in enumerate(keys)]
    return _ask(reasoner, asks, replies, "reason", "reply")


def _reply_keys(one: Described, role: ReasonConfig, reasoner: Model) -> list[str]:
    """The key of each sample."""
    template = role.text_prompt if one.caption is None else role.prompt
    parts = ("reason", key_of(one.problem.id, one.problem.question), key_of(one.caption), template, reasoner.identity)
    return [key_of(*parts, sample) for sample in range(role.n)]


def _ask(model: Model, asks: Sequence[Ask], replies: ReplyFile, title: str, unit: str) -> Asked:
    """Asks for what is not kept yet."""
    missing = [ask for ask in asks if ask.key not in replies]
    first = len(asks) - len(missing)
    failures: Failures = collections.Counter()
    if missing:
        with RunProgress(len(asks), first, title=title, unit=unit) as shown:
            failures = model.ask_all(missing, replies, shown, first)
    return Asked(len(asks), len(missing), failures)


def _lines(
    described: Sequence[Described], config: DistillConfig, reasoner: Model, replies: ReplyFile
) -> Iterator[tuple[dict[str, Any], str]]:
    """(line, what became of its answer) of every reply that there is, by row and sample."""
    for one in described:
        for sample, key in enumerate(_reply_keys(one, config.reason, reasoner)):
            reply = replies.get(key)
            if reply is None:
                continue
            completion, outcome = trace(joined(reply), config.style)
            drawn = dict(reply.drawn) if completion == reply.text else {}  # they are those of the very text
            yield (
                {"id": one.problem.id, "sample": sample, "completion": completion}
                | drawn
                | {"finish_reason": reply.finish_reason, "caption": one.caption},
                outcome,
            )


@contextlib.contextmanager
def _written(
    output: Path, lines: Iterator[tuple[dict[str, Any], str]]
) -> Generator[dict[str, collections.Counter[str]]]:
    """Writes the lines, one in memory at a time, and counts them; they are in their place when the block has ended.

    Raises UserError where there are none.
    """
    temporary = output.with_name(output.name + ".tmp")
    answers: collections.Counter[str] = collections.Counter()
    endings: collections.Counter[str] = collections.Counter()
    try:
        with temporary.open("w", encoding="ascii") as file:
            for line, outcome in lines:
                file.write(json.dumps(line) + "\n")
                answers[outcome] += 1
                endings[str(line["finish_reason"] or "unknown")] += 1
        if not answers:
            raise UserError("distill.reason: no reply came; see above. Nothing was written.")
        yield {"answers": answers, "finish_reasons": endings}
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _report(
    options: DistillOptions,
    config: Config,
    asked: tuple[Asked, Asked],
    counts: dict[str, collections.Counter[str]],
    num_without_caption: int,
) -> dict[str, Any]:
    steps = {
        section_of(role): {"total": step.total, "asked_now": step.new, "failures": dict(step.failures)}
        for role, step in zip((config.distill.caption, config.distill.reason), asked, strict=True)
    }
    return {
        "data": options.data,
        "output": str(options.output),
        "settings": dataclasses.asdict(config.distill),
        **steps,
        "rows_without_caption": num_without_caption,
        "num_written": counts["answers"].total(),
        **{name: dict(counted) for name, counted in counts.items()},
        **versions(("rethinker_jax",)),
    }


def _print(report: dict[str, Any], output: Path) -> None:
    for section, unit in (("distill.caption", "descriptions"), ("distill.reason", "replies")):
        step = report[section]
        failed = _reasons(step["failures"])
        more = f"; failed: {failed}. The same command asks for them again" if failed else ""
        print(f"{section}: {step['total']} {unit}, {step['asked_now']} of them asked for now{more}", file=sys.stderr)
    answers = ", ".join(f"{name} {count}" for name, count in report["answers"].items())
    print(f"{output}: {report['num_written']} traces (answers: {answers})", file=sys.stderr)


def _reasons(failures: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(failures.items(), key=lambda item: -item[1]))
