"""Recipes for the tests of pipelines: rows, stages as YAML, and a chain of selections that needs no model."""

import json
from pathlib import Path
from typing import Any

import pytest

from rethinker_jax.main import main

Json = dict[str, Any]


def go_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with eight rows: ids r0 to r7, a column `level` from 0 to 7."""
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl", 8)
    return tmp_path


def write_rows(path: str, count: int, answer: str = "4") -> None:
    rows = [{"id": f"r{number}", "question": "2 + 2?", "answer": answer, "level": number} for number in range(count)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(text: str) -> Path:
    Path("recipe.yaml").write_text(text)
    return Path("recipe.yaml")


def stage(name: str, kind: str = "sft", **more: object) -> str:
    """One stage in YAML's flow form."""
    return "  - " + json.dumps({"name": name, "kind": kind} | more) + "\n"


ROWS: Json = {"data": "rows.jsonl"}
SET_SFT: Json = {"data": "example:sft-clean"}


def level(least: int) -> Json:
    return {"select.filters": [{"column": {"column": "level", "min": least}}]}


# Three selections that need no model: `second` reads what `first` leaves, `other` does not.
CHAIN = (
    "name: chain\nsources: {mine: rows.jsonl}\nstages:\n"
    + stage("first", "select", data={"source": "mine"}, set=level(2))
    + stage("other", "select", data="rows.jsonl", set=level(1))
    + stage("second", "select", data={"from": "first"}, set=level(4))
)


def run_chain(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[str]:
    """Runs the chain; returns the stages that were run."""
    assert main(["pipeline", "recipe.yaml", *words]) == code
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[1].rstrip(":") for line in lines if line.startswith("stage ") and line.endswith(": select")]


def entries(directory: str = "runs/chain") -> dict[str, Json]:
    return {one["name"]: one for one in json.loads(Path(directory, "manifest.json").read_text())["stages"]}
