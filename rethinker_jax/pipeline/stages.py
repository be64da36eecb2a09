"""What a stage of each kind does: the commands, one after the other, in this process. Each goes on where it was cut.

Of several processes all do what needs the model, and the first one does the rest while the others wait.
"""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rethinker_jax.config import Config
from rethinker_jax.curation.command import SelectOptions, select
from rethinker_jax.curation.report import report_path
from rethinker_jax.curation.sources import read_golds
from rethinker_jax.devices import start_jax
from rethinker_jax.distill.command import DistillOptions, distill
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.asks import choose_protocol
from rethinker_jax.evaluation.command import evaluate
from rethinker_jax.export import export
from rethinker_jax.json_lines import object_of
from rethinker_jax.loop import train
from rethinker_jax.options import EvaluateOptions, SampleOptions
from rethinker_jax.pipeline.plan import Planned
from rethinker_jax.processes import first_does, first_says, is_first
from rethinker_jax.prompts.dataset import Part, parts_of
from rethinker_jax.sample import sample
from rethinker_jax.sft import fine_tune
from rethinker_jax.validation import best_step
from rethinker_jax.verify.command import verify_file


def run_stage(planned: Planned) -> None:
    """Make what the stage leaves, from the beginning or from where it was cut. Raises UserError, Stopped."""
    start_jax(planned.config)
    RUN_KIND[planned.stage.kind](planned)


def final_config(planned: Planned) -> Config:
    """The config with the image root of rows that an earlier stage wrote, which is known once it has run.

    `select` writes rows elsewhere than they were read: paths in them start where its report says.
    """
    config = planned.config
    made = [Path(one.path) for one in planned.inputs if one.role in ("rows", "data") and one.stage]
    if config.data.image_root or not made:
        return config
    root = first_says(_image_root(report_path(made[0])) if is_first() else "")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, image_root=root))


def _image_root(report: Path) -> str:
    try:
        return object_of(report.read_bytes()).get("image_root", "")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{report}: wanted what `select` wrote, which says where images lie ({error}). Remove the file; the stage "
            "is then run anew."
        ) from error


def _sft(planned: Planned) -> None:
    fine_tune(planned.config, planned.stage.name)


def _rl(planned: Planned) -> None:
    train(planned.config, planned.stage.name)
    if first_says(planned.output.exists()):
        return
    checkpoint = planned.stage.checkpoint
    if checkpoint == "best":
        checkpoint = str(first_says(best_step(planned.directory)))
    export(planned.directory, planned.output, checkpoint)


def _sample(planned: Planned) -> None:
    """Draw, and judge what was drawn by the answers of the rows."""
    config, rows = planned.config, _needed(planned, "data")
    drawn = planned.directory / "drawn.jsonl"
    asked = SampleOptions(
        model=planned.model,
        data=rows,
        image=(),
        question=None,
        output=drawn,
        n=planned.stage.n or 1,
        seed=config.run.seed,
        prompt_template=config.data.prompt_template,
    )
    sample(asked, config)

    def judge() -> None:
        golds = read_golds(rows, config.data.image_root, config.run.max_bad_rows)
        verify_file(drawn, planned.output, config.verifier, golds)

    first_does(judge, "verify")


def _distill(planned: Planned) -> None:
    """Describe and reason, and judge the traces by the answers of the rows."""
    config, rows = planned.config, _needed(planned, "data")
    drawn = planned.directory / "drawn.jsonl"

    def describe_and_judge() -> None:
        golds = read_golds(rows, config.data.image_root, config.run.max_bad_rows)
        _drop_unreported(drawn)
        distill(DistillOptions(rows, drawn), config)
        verify_file(drawn, planned.output, config.verifier, golds)

    first_does(describe_and_judge, "distill")


def _select(planned: Planned) -> None:
    samples, rows = planned.path_of("samples"), _needed(planned, "rows")

    def choose() -> None:
        _drop_unreported(planned.output)
        read = None if samples is None else Path(samples)
        select(SelectOptions(read, rows, planned.output, planned.config.select.mode), planned.config)

    first_does(choose, "select")


def _evaluate(planned: Planned) -> None:
    stage, config = planned.stage, planned.config
    protocol = choose_protocol(stage.protocol, stage.n, stage.benchmark)
    asked = EvaluateOptions(
        model=planned.model,
        benchmark=stage.benchmark,
        data=planned.path_of("data"),
        protocol=protocol.name,
        output=planned.output,
        n=stage.n or protocol.decoding.n,
        seed=config.run.seed,
    )
    path = evaluate(asked, config)
    if is_first():
        print(path)


RUN_KIND = {"distill": _distill, "sft": _sft, "rl": _rl, "sample": _sample, "select": _select, "evaluate": _evaluate}


def _drop_unreported(output: Path) -> None:
    """Remove what a process wrote that was killed before it wrote the report beside: its command would refuse it."""
    if not report_path(output).is_file():
        output.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)


def _needed(planned: Planned, role: str) -> str:
    found = planned.path_of(role)
    assert found is not None, "the recipe was checked"
    return found


def download(hub: str, output: Path) -> None:
    """Write the rows of a hub id to a parquet file, whole or not at all. Raises UserError.

    So the rows cannot change under the pipeline, count by their content, and are there for every command.
    """
    (part,) = parts_of(hub)
    write_part(part, output)


def write_part(part: Part, output: Path) -> None:
    """The rows as they are, images as their bytes where they have them."""
    rows = [row for row in part.rows if isinstance(row, dict)]
    if not rows:
        raise UserError(f"{part.name}: wanted at least one row, came none")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        pq.write_table(pa.Table.from_pylist(rows), temporary, row_group_size=512)
        temporary.replace(output)
    except pa.ArrowException as error:
        raise UserError(f"{part.name}: its rows cannot be written as parquet ({error}). Name a local copy.") from error
    finally:
        temporary.unlink(missing_ok=True)
