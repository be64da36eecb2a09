"""What cannot be used: one clear message and exit code 2 before time is spent, or counted and survived in mid-run."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rethinker_jax.config_file import load_config, save_config
from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.run_directory import hold
from rethinker_jax.system import EXAMPLE_MODEL

REPOSITORY = Path(__file__).parent.parent
SMALL = """
base: package:example
run: {dir: out, num_steps: 2, save_every: 1, rollouts_every: 1}
data: {train: train.parquet, test: test.parquet}
rollout: {prompts_per_step: 4, samples_per_prompt: 4}
training: {batch_size: 8}
evaluation: {num_problems: 0, num_sampled_problems: 0}
"""
Row = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows, small.yaml and a model directory, in which commands are given."""
    monkeypatch.chdir(tmp_path)
    write_split(tmp_path / "train.parquet", "train", 12)
    write_split(tmp_path / "test.parquet", "test", 4)
    shutil.copytree(EXAMPLE_MODEL, tmp_path / "model")
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that must be refused before it leaves anything behind."""
    before = contents()
    code = main(list(words))
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.count("error: ") == 1 and said.out == ""
    assert contents() == before, "a refused command wrote or removed something"
    return said.err


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}


def rows() -> list[Row]:
    return pq.read_table("train.parquet").to_pylist()


def write_rows(changed: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(changed), "train.parquet")


def json_lines(path: str | Path) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def png_header(width: int, height: int) -> bytes:
    """A picture that says it has so many pixels, and has none."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["optimizer.lr=1"], "did you mean"),
        (["sampling.temprature=1", "run.seed=x"], "2 problems"),
        (["missing.yaml"], "no such"),
        (["small.yaml", "model.path=nowhere"], "nowhere"),
        (["small.yaml", "data.train=trian.parquet"], "did you mean train.parquet"),
        (["small.yaml", "data.test=nothing.parquet", "evaluation.num_problems=4"], "nothing.parquet"),
        (["small.yaml", "data.train=small.yaml"], "parquet"),
        (["small.yaml", "data.image_root=nowhere"], "image_root"),
        (["small.yaml", "data.prompt_template=nosuch"], "nosuch"),
        (["small.yaml", "--mesh", "data=3"], "visible device"),
        (["small.yaml", "--mesh", "fsdp=2,tensor=-1"], "visible device"),
        (["small.yaml", "run.dir=small.yaml/run"], "run.dir"),
        (["small.yaml", "run.dir=/proc/run"], "run.dir"),
        (["small.yaml", "run.dir=small.yaml"], "run.dir"),
        (["small.yaml", "rollout.prompts_per_step=16"], "found 12"),
        (["small.yaml", "data.max_pixels=1"], "max_pixels"),
        (["sft", "small.yaml"], "sft.data"),
        (["sft", "small.yaml", "sft.data=train.parquet"], "completion"),
        (["sft", "small.yaml", "sft.data=nothing.parquet"], "nothing.parquet"),
        (["pipeline", "missing.yaml"], "no such file"),
        (["pipeline", "small.yaml"], "stages"),
        (["export", "nowhere", "--output", "new"], "nowhere"),
        (["export", "model", "--output", "new"], "run directory"),
        (["report", "model"], "run directory"),
        (["sample", "--model", "model"], "--data"),
        (["sample", "--model", "nowhere", "--data", "train.parquet", "--output", "s.jsonl"], "nowhere"),
        (["sample", "--model", "model", "--data", "train.parquet", "--output", "/proc/s.jsonl"], "--output"),
        (["sample", "--model", "model", "--data", "train.parquet", "--output", "model"], "not a regular file"),
        (["sample", "--model", "model", "--data", "train.parquet", "--output", "small.yaml"], "says what made it"),
        (["sample", "--model", "model", "--question", "?", "--image", "nowhere.png"], "nowhere.png"),
        (["sample", "--model", "model", "--question", "?", "--image", "small.yaml"], "cannot read image"),
        (["score", "--model", "model", "--data", "train.parquet"], "completion"),
        (["score", "--model", "model", "--data", "train.parquet", "--output", "/proc/s.jsonl"], "--output"),
    ],
)
def test_a_command_that_cannot_be_done(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], wanted: str):
    """Catches a traceback, a success, a message that does not name the trouble, and a file left behind."""
    assert wanted in refused(capsys, *words)
    assert not Path("out").exists() and not Path("new").exists()


def spoil_nothing_there(model: Path) -> None:
    (model / "model.safetensors").unlink()


def spoil_truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def spoil_not_safetensors(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"not weights")


def spoil_patches(model: Path) -> None:
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temporal_patch_size": 1}))


def spoil_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def spoil_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def spoil_layers(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


def spoil_json(model: Path) -> None:
    (model / "config.json").write_text("{")


def spoil_config(model: Path) -> None:
    (model / "config.json").unlink()


def spoil_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


def spoil_preprocessor(model: Path) -> None:
    (model / "preprocessor_config.json").unlink()


def deep(name: str) -> Callable[[Path], None]:
    """JSON that nests deeper than a parser can follow."""

    def spoil(model: Path) -> None:
        (model / name).write_text("[" * 100_000)

    return spoil


def value(name: str, key: str, wrong: Any) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | {key: wrong}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (spoil_nothing_there, "*.safetensors"),
        (spoil_truncated, "model.safetensors"),
        (spoil_not_safetensors, "model.safetensors"),
        (spoil_patches, "temporal_patch_size"),
        (spoil_architecture, "llama"),
        (spoil_shape, "shape"),
        (spoil_layers, "missing"),
        (spoil_json, "config.json"),
        (spoil_config, "config.json"),
        (spoil_tokenizer, "tokenizer"),
        (spoil_preprocessor, "preprocessor_config.json"),
        (deep("config.json"), "config.json is not JSON"),
        (deep("preprocessor_config.json"), "preprocessor_config.json is not JSON"),
        (deep("generation_config.json"), "generation_config.json is not JSON"),
        (deep("tokenizer_config.json"), "tokenizer_config.json"),
        (deep("tokenizer.json"), "tokenizer.json"),
        (value("config.json", "tie_word_embeddings", "false"), "tie_word_embeddings must be true or false"),
        (value("preprocessor_config.json", "image_std", [0, 0, 0]), "image_std must be"),
        (value("generation_config.json", "eos_token_id", [1.7]), "eos_token_id must be"),
        (value("generation_config.json", "eos_token_id", "x"), "eos_token_id must be"),
    ],
)
def test_a_model_directory_that_cannot_be_used(here: Path, capsys: pytest.CaptureFixture[str], spoil: Any, wanted: str):
    """Catches weights that are loaded as something else, and an error that does not name the file."""
    spoil(here / "model")
    assert wanted in refused(capsys, "small.yaml", "model.path=model")
    assert wanted in refused(capsys, "sample", "--model", "model", "--data", "test.parquet", "--output", "s.jsonl")


def test_rows_that_cannot_be_used(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches rows dropped in silence, and a data set without the right columns trained on as something else."""
    good = rows()
    write_rows([{"id": row["id"], "quetsion": row["question"], "answer": row["answer"]} for row in good])
    said = refused(capsys, "small.yaml")
    assert "question" in said and "quetsion" in said
    write_rows([row | {"id": "same"} for row in good])
    assert "occurs twice" in refused(capsys, "small.yaml")
    write_rows([row | {"answer": ""} for row in good])
    assert "empty_answer" in refused(capsys, "small.yaml")
    write_rows([good[0] | {"answer": ""}, *good[1:]])
    assert "max_bad_rows" in refused(capsys, "small.yaml", "run.max_bad_rows=0")
    Path("train.parquet").write_bytes(b"PAR1" + bytes(100))
    assert "as parquet" in refused(capsys, "small.yaml")


def test_completions_that_cannot_be_scored_or_learned(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches token ids that wrap around in the embedding, and empty completions that are learned."""
    write_rows([row | {"completion_ids": [5, 10**6]} for row in rows()])
    assert "completion_ids from 0" in refused(
        capsys, "score", "--model", "model", "--data", "train.parquet", "--output", "s.jsonl"
    )
    write_rows([row | {"completion": ""} for row in rows()])
    assert main(["sft", "small.yaml", "sft.data=train.parquet"]) == 2
    assert "no row has a `completion`" in capsys.readouterr().err
    assert len(Path("out/bad_rows.jsonl").read_text().splitlines()) == 12


def test_prompts_that_are_too_long(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a command that leaves every row out and reports success."""
    words = ["--model", "model", "--data", "test.parquet", "data.max_prompt_tokens=4"]
    assert main(["sample", *words, "--output", "s.jsonl"]) == 2
    said = capsys.readouterr().err
    assert said.count("too_long") == 4 and "no row could be used" in said
    assert main(["small.yaml", "data.max_prompt_tokens=4"]) == 2
    assert "none of its 4 rows can be used" in capsys.readouterr().err


def test_one_run_directory_is_for_one_run(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches two processes that write to one directory, and a run that goes on under another config."""
    with hold(here / "out"):
        assert "another process" in refused(capsys, "small.yaml")
        assert "another process" in refused(capsys, "sft", "small.yaml", "sft.data=example:sft-clean")
    config = load_config(Path("small.yaml"), [])
    save_config(dataclasses.replace(config), Path("out/config.yaml"))
    Path("out/checkpoints").mkdir()
    said = refused(capsys, "small.yaml", "optimizer.learning_rate=1", "run.num_steps=9")
    assert "optimizer.learning_rate was 7e-05, is 1.0" in said and "num_steps" not in said
    Path("out/summary.json").write_text("{")
    assert "summary.json" in refused(capsys, "small.yaml")


def test_an_export_never_replaces(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches weights of another run overwritten."""
    Path("run/checkpoints").mkdir(parents=True)
    save_config(load_config(Path("small.yaml"), []), Path("run/config.yaml"))
    assert "not an empty directory" in refused(capsys, "export", "run", "--output", "model")
    assert "not an empty directory" in refused(capsys, "export", "run", "--output", "small.yaml")
    assert "cannot be written" in refused(capsys, "export", "run", "--output", "/proc/new")
    assert "no complete checkpoint" in refused(capsys, "export", "run", "--output", "new")


def test_bad_rows_in_mid_run_are_counted_and_survived(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a run that dies of one picture, and one that hides how many it left out."""
    good = rows()
    pictured = [place for place, row in enumerate(good) if len(row["images"]) == 1]
    torn, huge = pictured[:2]
    plain = next(place for place in range(12) if place not in (torn, huge))
    good[torn]["images"][0]["bytes"] = good[torn]["images"][0]["bytes"][:60]
    good[huge]["images"][0]["bytes"] = png_header(50_000, 50_000)
    good[plain]["question"] += " and again" * 100
    write_rows([*good, good[0] | {"id": "no answer", "answer": " "}])
    words = ["small.yaml", "run.num_steps=3"]  # three steps of four prompts meet all twelve rows
    assert main([*words, "run.max_bad_rows=3"]) == 2
    assert "4 rows cannot be used, more than run.max_bad_rows=3" in capsys.readouterr().err
    assert main([*words, "run.max_bad_rows=4"]) == 0, capsys.readouterr().err  # the same run goes on
    assert "rows left out" in capsys.readouterr().out
    bad = json_lines("out/bad_rows.jsonl")
    assert sorted((row["id"], row["kind"]) for row in bad) == sorted(
        [
            ("train.parquet row 12", "empty_answer"),
            (good[torn]["id"], "bad_image"),
            (good[huge]["id"], "bad_image"),
            (good[plain]["id"], "too_long"),
        ]
    )
    drawn = [row["problem"]["id"] for path in Path("out/rollouts").glob("*.jsonl") for row in json_lines(path)]
    left_out = {good[place]["id"] for place in (torn, huge, plain)}
    assert sorted(drawn) == sorted(row["id"] for row in good if row["id"] not in left_out)
    assert [row["step"] for row in json_lines("out/metrics.jsonl")] == [0, 1, 2]

    # It goes on with the rows and the config with which it began, or not at all.
    good[plain]["answer"] = "another"
    write_rows([*good, good[0] | {"id": "no answer", "answer": " "}])
    assert "data.train: train.parquet does not hold the rows" in refused(
        capsys, "small.yaml", "run.num_steps=4", "run.max_bad_rows=4"
    )
    Path("out/config.yaml").unlink()
    assert "without the config.yaml" in refused(capsys, "small.yaml", "run.num_steps=4", "run.max_bad_rows=4")
    assert len(json_lines("out/metrics.jsonl")) == 3


def test_a_damaged_checkpoint_is_said(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches fine-tuning that begins anew over its own past, dies of a traceback, or keeps the metrics behind the
    checkpoint that it goes on from."""
    words = ["sft", "small.yaml", "sft.data=example:sft-clean", "sft.num_steps=2", "sft.batch_size=2"]
    assert main(words) == 0, capsys.readouterr().err
    capsys.readouterr()
    shutil.copytree("out/checkpoints/1", "whole")
    for step in ("1", "2"):
        for path in sorted(Path("out/checkpoints", step, "state").rglob("*")):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:3])
    assert main([*words, "sft.num_steps=3"]) == 2
    said = capsys.readouterr().err
    assert "checkpoints/2 is damaged" in said and "checkpoints/1 is damaged" in said and "No complete" in said
    shutil.rmtree("out/checkpoints/1")
    shutil.move("whole", "out/checkpoints/1")
    assert main([*words, "sft.num_steps=3"]) == 0, capsys.readouterr().err
    assert "moved to 2.damaged; going on from checkpoint 1" in capsys.readouterr().err
    assert [row["step"] for row in json_lines("out/metrics.jsonl")] == [0, 1, 2]


def test_a_full_disk_loses_nothing(here: Path):
    """Catches a traceback, and a run that cannot go on from its last checkpoint once there is room."""
    disk = here / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        words = [sys.executable, "-m", "rethinker_jax.main", "sft", "small.yaml", f"run.dir={disk}/run"]
        words += ["sft.data=example:sft-clean", "sft.num_steps=4", "sft.batch_size=2", "run.keep_checkpoints=9"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        process = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 2, process.stderr
        assert "the disk is full" in process.stderr and "Traceback" not in process.stderr
        saved = [path.name for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdigit()]
        assert saved and "4" not in saved
        subprocess.run(["mount", "-o", "remount,size=90m", str(disk)], check=True)
        process = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        assert (disk / "run" / "model" / "model.safetensors").is_file()
        assert [row["step"] for row in json_lines(disk / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
