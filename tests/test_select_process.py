"""`select` as a process of its own: what it imports, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TIMEOUT_S, stop_at

from rethinker_jax.main import main

WORDS = ("--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "out.jsonl", "select.filters=[correct]")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a row and its two samples, one of them right."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"id": "a", "question": "a?", "answer": "3"}) + "\n")
    samples = [
        {"id": "a", "sample": number, "completion": f"<answer>{3 + number}</answer>", "verdict": verdict}
        for number, verdict in enumerate(("correct", "wrong"))
    ]
    Path("samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return tmp_path


@pytest.mark.parametrize("place", ["write_whole", "write_rows"])
@pytest.mark.parametrize("before", [False, True])
def test_killed_at_the_end_the_same_command_does_it(here: Path, place: str, before: bool) -> None:
    """Catches rows that are taken for somebody else's because the report beside them was still to come."""
    if before:
        assert main(["select", *WORDS]) == 0
    killed = stop_at(f"rethinker_jax.curation.command:{place}", 1, signal.SIGKILL, "select", *WORDS, log=here / "log")
    assert killed == -signal.SIGKILL and Path("out.jsonl").is_file() == before
    assert main(["select", *WORDS]) == 0
    assert json.loads(Path("out.jsonl").read_text())["pass_rate"] == 0.5


def test_select_imports_no_jax(here: Path) -> None:
    """Catches an import with which the command, or its verifier, would seize the accelerator."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rethinker_jax.main", "select", *WORDS],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    modules = {line.split("|")[-1].strip() for line in process.stderr.splitlines() if line.startswith("import time:")}
    assert "rethinker_jax.curation.command" in modules and not modules & {"jax", "transformers", "torch"}
