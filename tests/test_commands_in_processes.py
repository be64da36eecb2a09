"""`sample`, `score` and `evaluate` in two processes with a device each, against one process with both devices."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run_job
from PIL import Image
from recipes import CHAIN

from rethinker_jax.example.dataset import write_split

MEMBER = Path(__file__).parent / "job_commands.py"
CONFIG = """
base: package:example
rollout: {prompts_per_step: 4, samples_per_prompt: 2}
training: {batch_size: 8}
sampling: {max_new_tokens: 24, temperature: 1.0}
evaluation: {batch_size: 2, samples_per_problem: 2}
verifier: {num_workers: 1}
"""
NUM_ROWS, BROKEN = 5, 1  # the row at place 1 is decoded by process 1


def broken_jpeg() -> bytes:
    """A JPEG that breaks off behind its header: only who decodes it can know. (PIL decodes a PNG to look for EXIF.)"""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()[:-400]


def printed_by(folder: Path, name: str, count: int) -> list[str]:
    """What each of `count` processes printed; they share two devices, and all exit with 0."""
    (folder / name).mkdir()
    codes, printed = run_job(folder, name, [(str(MEMBER), name)] * count, 2 // count)
    assert codes == [0] * count, printed
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "small.yaml").write_text(CONFIG)
    write_split(folder / "rows.parquet", "train", NUM_ROWS)
    table = pq.read_table(folder / "rows.parquet")
    rows = [row | {"completion": f"{row['answer']} \\boxed{{{row['answer']}}}"} for row in table.to_pylist()]
    schema = table.schema.append(pa.field("completion", pa.string()))
    pq.write_table(pa.Table.from_pylist(rows[:BROKEN] + rows[BROKEN + 1 :], schema=schema), folder / "whole.parquet")
    rows[BROKEN]["images"][0]["bytes"] = broken_jpeg()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "rows.parquet")
    (folder / "recipe.yaml").write_text(CHAIN)
    lines = [{"id": f"r{number}", "question": "2 + 2?", "answer": "4", "level": number} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_lines(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Token for token; log-probs, which are sums over devices in another order, to 1e-5."""
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for one, other in zip(mine, theirs, strict=True):
        for key, value in one.items():
            if "log_probs" in key:
                np.testing.assert_allclose(other[key], value, atol=1e-5, err_msg=key)
            else:
                assert other[key] == value, key


def test_a_job_of_processes_is_one_command(folder: Path) -> None:
    """Catches a process that draws or judges on its own; rows that one leaves out and the others keep, for a picture
    that it alone decodes or for lines that it alone sees in a file; and a file or a line that two of them write."""
    (alone_said,) = printed_by(folder, "alone", 1)
    first_said, second_said = printed_by(folder, "many", 2)
    alone, many = folder / "alone", folder / "many"
    assert sorted(path.relative_to(alone) for path in alone.rglob("*")) == sorted(
        path.relative_to(many) for path in many.rglob("*")
    )
    assert sorted(path.name for path in many.iterdir() if path.is_file()) == [
        "drawn.jsonl", "drawn.jsonl.asked.json", "result.generations.jsonl", "result.generations.jsonl.asked.json",
        "result.html", "result.json", "scores.jsonl", "straight.jsonl",
    ]  # fmt: skip

    drawn = lines_of(alone / "drawn.jsonl")
    assert len(drawn) == 2 * (NUM_ROWS - 1) and len({row["id"] for row in drawn}) == NUM_ROWS - 1
    assert all(row["completion_ids"] for row in drawn)
    for name in ("straight.jsonl", "drawn.jsonl", "scores.jsonl"):
        assert_same_lines(lines_of(alone / name), lines_of(many / name))
    scores = lines_of(many / "scores.jsonl")
    assert len(scores) == NUM_ROWS - 1 and all(len(row["log_probs"]) == len(row["token_ids"]) > 0 for row in scores)

    generations = "result.generations.jsonl"
    assert (alone / generations).read_bytes() == (many / generations).read_bytes()
    result, other = (json.loads((run / "result.json").read_text()) for run in (many, alone))
    for key in result.keys() - {"made_by", "judge"}:  # which name the commit
        assert result[key] == other[key], key
    assert [one["kind"] for one in result["left_out"]] == ["bad_image"]
    records = lines_of(many / "result.generations.jsonl")
    assert len(records) == 2 * (NUM_ROWS - 1) and {row["verdict"] for row in records} & {"correct", "wrong"}

    # Of the chain, `first` leaves the rows of level 2 on, and `second` of these those of level 4 on.
    stages = json.loads((many / "chain" / "manifest.json").read_text())["stages"]
    assert [(one["status"], one["output_rows"]) for one in stages] == [("done", 6), ("done", 7), ("done", 4)]

    # The first one shows what one process shows; the other says what ends it, and nothing else.
    for said in (alone_said, first_said):
        assert said.count("left out (bad_image)") == 4, said  # two calls of each command
        assert said.count(": done before") == 3, said
    assert not any(word in second_said for word in ("left out", "stage ", "problem 4", "completion")), second_said
    assert all(said.count("refused: problem") == 1 and "done" in said for said in (alone_said, first_said, second_said))
