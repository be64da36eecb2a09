"""Rows that cannot be used, of every kind at once, through the train command: counted by kind, listed, survived."""

import json
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main

CONFIG = """
base: package:example
run: {dir: out, num_steps: 3, save_every: 1, rollouts_every: 1}
data: {train: train.jsonl, test: test.parquet, image_root: images, shuffle: false}
rollout: {prompts_per_step: 4, samples_per_prompt: 4}
training: {batch_size: 8}
reward: {terms: {accuracy: 1.0, "rewards.py:score": 0.0}}
evaluation: {num_problems: 0, num_sampled_problems: 0}
"""
# It runs in the first step, when the paths of all rows were found to be there.
REWARDS = """
import pathlib
def score(row):
    pathlib.Path("images/vanishes.png").unlink(missing_ok=True)
    return 0.0
"""
Row = dict[str, Any]


def png_header(width: int, height: int) -> bytes:
    """A picture that says it has so many pixels, and has none."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Eight rows of the example with their pictures as files, in a folder in which the command is given."""
    monkeypatch.chdir(tmp_path)
    write_split("train.parquet", "train", 30)
    write_split("test.parquet", "test", 4)
    Path("images").mkdir()
    Path("small.yaml").write_text(CONFIG)
    Path("rewards.py").write_text(REWARDS)
    rows = []
    for row in pq.read_table("train.parquet").to_pylist():
        names = [f"{row['id']}-{place}.png" for place in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            Path("images", name).write_bytes(image["bytes"])
        rows.append({"id": row["id"], "question": row["question"], "answer": row["answer"], "images": names})
    pictured = [row for row in rows if len(row["images"]) == 1]
    return pictured[:8]


def bad_when_read(row: Row) -> dict[str, tuple[str, Row]]:
    """id → kind, and a row that reading must leave out; `row` is a good one."""
    Path("secret.png").write_bytes(Path("images", row["images"][0]).read_bytes())
    Path("images/link.png").symlink_to(Path("secret.png").resolve())
    changed: dict[str, tuple[str, Row]] = {
        "question": ("empty_question", {"question": " "}),
        "answer": ("empty_answer", {"answer": ""}),
        "list": ("bad_answer", {"answer": ["4"]}),
        "letter": ("bad_gold", {"answer": "E", "choices": ["4", "5"], "type": "mcq"}),
        "gone": ("image_missing", {"images": ["nowhere.png"]}),
        "upwards": ("image_path", {"images": ["../secret.png"]}),
        "absolute": ("image_path", {"images": ["/etc/hostname"]}),
        "link": ("image_path", {"images": ["link.png"]}),
        "null": ("image_path", {"images": ["a\0b.png"]}),
        "address": ("image_url", {"images": ["http://127.0.0.1/x.png"]}),
        "tags": ("image_count", {"question": "<image><image>?"}),
        "number": ("bad_image", {"images": [7]}),
    }
    return {name: (kind, row | change | {"id": name}) for name, (kind, change) in changed.items()}


def bad_when_met(row: Row) -> dict[str, tuple[str, Row]]:
    """The same for rows that a step must leave out."""
    whole = Path("images", row["images"][0]).read_bytes()
    for name, data in (("torn", whole[:60]), ("bomb", png_header(50_000, 50_000)), ("vanishes", whole)):
        Path("images", f"{name}.png").write_bytes(data)
    changed: dict[str, tuple[str, Row]] = {
        "torn": ("bad_image", {"images": ["torn.png"]}),
        "bomb": ("bad_image", {"images": ["bomb.png"]}),
        "vanishes": ("bad_image", {"images": ["vanishes.png"]}),
        "long": ("too_long", {"question": row["question"] + " and again" * 100}),
    }
    return {name: (kind, row | change | {"id": name}) for name, (kind, change) in changed.items()}


def test_rows_of_every_kind_are_survived(good: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve rows and two lines that are no rows are left out in reading; of the twelve that are left, in three steps
    of four, four are left out when they are met. Catches a kind that ends the run, a bad row that is trained on, a file
    outside of the root that is read, and a count that hides what it counts."""
    early, late = bad_when_read(good[0]), bad_when_met(good[0])
    torn, bomb, vanishes, long = (row for _, row in late.values())
    met = [*good[:5], torn, good[5], vanishes, good[6], bomb, good[7], long]
    lines = [json.dumps(row) for row in [*(row for _, row in early.values()), *met]]
    Path("train.jsonl").write_text("\n".join([*lines, '{"id": 1, "quest', "[]"]) + "\n")

    assert main(["small.yaml", "run.max_bad_rows=12", "run.dir=none"]) == 2  # 13 are seen before any gold is read
    assert "13 of 26 rows cannot be used" in capsys.readouterr().err
    assert main(["small.yaml", "run.max_bad_rows=17", "run.dir=less"]) == 2
    assert "18 rows cannot be used, more than run.max_bad_rows=17" in capsys.readouterr().err
    assert len(Path("less/metrics.jsonl").read_text().splitlines()) == 2

    Path("images/vanishes.png").write_bytes(Path("images", good[0]["images"][0]).read_bytes())
    assert main(["small.yaml", "run.max_bad_rows=18"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    found = [json.loads(line) for line in Path("out/bad_rows.jsonl").read_text().splitlines()]
    # What cannot be read has no id: it is named by its place.
    place_of = {f"train.jsonl row {place}": name for place, name in enumerate(early)}
    kind_of = {place_of.get(row["id"], row["id"]): row["kind"] for row in found}
    unread = {"train.jsonl row 24": "bad_json", "train.jsonl row 25": "bad_json"}
    assert kind_of == {name: kind for name, (kind, _) in (early | late).items()} | unread
    assert [row["step"] for row in found if row["step"] >= 0] == [1, 1, 2, 2]
    counts = Counter(kind_of.values())
    assert counts["image_path"] == 4 and counts["bad_image"] == 4
    assert json.loads(Path("out/summary.json").read_text())["rows_left_out"] == counts
    assert "rows left out: 18: 4 bad_image, 4 image_path, 2 bad_json, 1 bad_answer" in shown
    page = Path("out/report.html").read_text()
    assert "18: 4 bad_image" in page
    drawn = [json.loads(line)["problem"]["id"] for path in sorted(Path("out/rollouts").glob("step_*.jsonl"))
             for line in path.read_text().splitlines()]  # fmt: skip
    assert drawn == [row["id"] for row in good]


def test_an_image_that_vanishes_after_it_was_drawn(good: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """The picture of a row of step 0 goes while its responses are judged: the step is learned from and written down.

    Catches a traceback of the writer, and a replay that must read the picture again.
    """
    name = good[1]["images"][0]
    Path("rewards.py").write_text(REWARDS.replace("vanishes.png", name))
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    assert main(["small.yaml", "run.num_steps=2"]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in Path("out/rollouts/step_000000.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if line["problem"]["id"] == good[1]["id"]]
    assert line["images"] == [""] and len(line["samples"]) == 4
