"""`main evaluate` on the example's model and eight of its problems: drawing, judging, counting, going on."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rethinker_jax.benchmarks.catalog import read_benchmark
from rethinker_jax.benchmarks.record_files import read_records, write_records
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.config import Config
from rethinker_jax.config_file import load_config, save_config
from rethinker_jax.evaluation.asks import asks_of, choose_protocol
from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.output_files import alone
from rethinker_jax.system import load_system, make_updater
from rethinker_jax.training.checkpoint import CheckpointStore, Saved
from rethinker_jax.verify.judge import judge

REPOSITORY = Path(__file__).parent.parent
TIMEOUT_S = 300
N, NUM_ITEMS = 2, 8
ASK = ("evaluate", "--model", "example", "--benchmark", "rows", "--data", "rows.parquet")
SMALL = (
    "sampling.max_new_tokens=24", "sampling.steps_per_call=8", "evaluation.batch_size=2",
)  # fmt: skip
RESULT_FILES = ("{}.json", "{}.generations.jsonl", "{}.generations.jsonl.asked.json")


def evaluate(output: str, *words: str) -> int:
    return main([*ASK, "--n", str(N), "--output", f"{output}.json", *SMALL, *words])


def contents(name: str) -> list[bytes]:
    return [Path(file.format(name)).read_bytes() for file in RESULT_FILES]


def result_of(name: str) -> dict[str, Any]:
    return json.loads(Path(f"{name}.json").read_text())


def records_of(name: str) -> list[Record]:
    return read_records(Path(f"{name}.generations.jsonl"))


def any_right(name: str, id: str) -> bool:
    return any(record.correct for record in records_of(name) if record.id == id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a straight evaluation of them, `whole`."""
    place = tmp_path_factory.mktemp("evaluation")
    write_split(place / "rows.parquet", "test", NUM_ITEMS)
    with contextlib.chdir(place):
        assert evaluate("whole") == 0
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_the_numbers_are_those_of_the_generations() -> None:
    """Catches a number over the wrong items, pass@k of the wrong samples, and a verdict of another rule."""
    result, records = result_of("whole"), records_of("whole")
    golds = {row["id"]: row for row in pq.read_table("rows.parquet").to_pylist()}
    assert [(record.id, record.sample) for record in records] == [(id, n) for id in sorted(golds) for n in range(N)]
    for record in records:
        gold = golds[record.id]
        assert record.verdict == judge(record.completion, gold["answer"], gold["choices"] or (), gold["type"]).verdict
    right = {id: [record.correct for record in records if record.id == id] for id in golds}
    num_right = sum(map(sum, right.values()))
    assert 0 < num_right < N * NUM_ITEMS  # else much below would hold by itself
    assert result["accuracy"]["value"] == pytest.approx(num_right / (N * NUM_ITEMS))
    assert result["accuracy"]["low"] < result["accuracy"]["value"] < result["accuracy"]["high"]
    assert result["pass@k"]["1"] == pytest.approx(num_right / (N * NUM_ITEMS))
    assert result["pass@k"]["2"] == pytest.approx(sum(map(any, right.values())) / NUM_ITEMS)
    silent = sum(record.verdict == "no_answer" for record in records)
    assert result["no_answer_share"] == pytest.approx(silent / len(records))
    cut = sum(record.finish_reason == "length" for record in records)
    assert result["truncated_share"] == pytest.approx(cut / len(records))
    lenient = sum(record.lenient == "correct" for record in records)
    assert result["lenient_accuracy"]["value"] == pytest.approx(lenient / len(records)) and lenient >= num_right
    for source, found in result["per_category"]["source"].items():
        shares = [sum(right[id]) / N for id in golds if golds[id]["source"] == source]
        assert found["num_problems"] == len(shares)
        assert found["accuracy"]["value"] == pytest.approx(sum(shares) / len(shares))
    assert (result["num_problems"], result["num_samples"], result["benchmark"]) == (NUM_ITEMS, N, "rows")


def test_a_result_says_what_made_it() -> None:
    """Catches a number that nobody could make again."""
    result = result_of("whole")
    protocol, made_by, verdicts_by = result["protocol"], result["made_by"], result["judge"]
    assert protocol["name"] == "own_sampled" and protocol["temperature"] == 0.6
    assert protocol["max_new_tokens"] == 24 and protocol["prompt_template"] == "none"  # overrides win
    assert (protocol["min_pixels"], protocol["max_pixels"]) == (784, 50176)  # the model directory's own, written out
    assert made_by["seed"] == 0 and made_by["model"] == "example" and made_by["data"] == "rows.parquet"
    assert {len(made_by[key]) for key in ("weights", "companions", "items")} == {64} == {len(verdicts_by["rules"])}
    assert {"commit", "versions", "device", "dtype"} <= made_by.keys()
    assert {"jax", "transformers"} <= made_by["versions"].keys() and "math-verify" in verdicts_by["versions"]


# Kills itself as soon as one line of the file is written: a signal from outside may come too late on a busy machine.
KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from rethinker_jax.evaluation.listener import Listener
from rethinker_jax.main import main

write = Listener.records

def write_one(listener, records):
    write(listener, records[:1])
    if records:
        os.kill(os.getpid(), signal.SIGKILL)

Listener.records = write_one
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_started_again_it_ends_as_the_straight_run() -> None:
    """Catches items drawn twice or lost, a torn line that is kept, and noise that depends on what is left to draw."""
    lines = Path("killed.generations.jsonl")
    words = [*ASK, "--n", str(N), "--output", "killed.json", *SMALL]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_MIDDLE, *words],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert lines.read_bytes().count(b"\n") == 1 and not Path("killed.json").exists()
    # Besides what the kill left: an item with one of its samples, and a torn line.
    whole = Path("whole.generations.jsonl").read_bytes().split(b"\n")
    there = {json.loads(line)["id"] for line in lines.read_bytes().split(b"\n")[:-1]}
    other = next(line for line in whole if json.loads(line)["id"] not in there)
    lines.write_bytes(lines.read_bytes().rpartition(b"\n")[0] + b"\n" + other + b"\n" + whole[-2][:40])
    assert evaluate("killed") == 0
    assert contents("killed") == contents("whole")


def test_what_is_finished_is_not_drawn_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a model that is loaded for nothing, and lines of two requests in one file."""
    before = contents("whole")
    assert evaluate("whole") == 0
    assert "attention:" not in capsys.readouterr().err  # said when a model is loaded
    assert evaluate("whole", "--seed", "3") == 2
    assert "seed was 0, is 3" in capsys.readouterr().err
    assert evaluate("whole", "sampling.top_p=0.5") == 2
    assert "protocol.top_p was 0.95, is 0.5" in capsys.readouterr().err
    assert contents("whole") == before
    shutil.copy("whole.generations.jsonl", "orphan.generations.jsonl")
    assert evaluate("orphan") == 2
    assert "is there without orphan.generations.jsonl.asked.json" in capsys.readouterr().err


def test_shards_make_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches items that no shard or two shards draw, noise that depends on the shard, and a merge of half of them."""
    files = [f"shards.shard-{number}-of-3.generations.jsonl" for number in range(3)]
    for number in (2, 0, 1):
        assert evaluate("shards", "--shard", f"{number}/3") == 0
    assert [len(read_records(Path(file))) for file in files] == [6, 6, 4]  # 8 items: 0 3 6, 1 4 7, 2 5
    assert not Path("shards.json").exists()
    assert main(["evaluate", "--merge", *files[:2], "--output", "shards.json"]) == 2
    assert "wanted the shards 0 to 2 of 3" in capsys.readouterr().err
    assert main(["evaluate", "--regrade", files[0]]) == 2 and "one shard" in capsys.readouterr().err
    assert main(["evaluate", "--merge", *files[::-1], "--output", "shards.json"]) == 0
    assert contents("shards") == contents("whole")


def test_the_order_of_the_rows_and_the_size_of_a_batch_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches noise named by a row's number, and results in the order of the file."""
    (folder / "turned").mkdir()
    table = pq.read_table("rows.parquet")
    pq.write_table(table.take(list(range(NUM_ITEMS))[::-1]), folder / "turned" / "rows.parquet")
    monkeypatch.chdir(folder / "turned")
    assert evaluate("turned", "evaluation.batch_size=4") == 0
    turned = contents("turned")
    monkeypatch.chdir(folder)
    assert turned == contents("whole")


def test_regrading_needs_no_jax_and_gives_the_same_bytes() -> None:
    """Catches a judge that seizes the accelerator, a verdict that is copied, and a result that depends on the time."""
    shutil.copy("whole.generations.jsonl.asked.json", "spoilt.generations.jsonl.asked.json")
    spoilt = [
        dataclasses.replace(record, verdict="timeout", extracted="7", lenient="wrong") for record in records_of("whole")
    ]
    write_records(Path("spoilt.generations.jsonl"), spoilt[::-1])
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rethinker_jax.main", "evaluate", "--regrade",
         "spoilt.generations.jsonl", "--output", "again.json"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    modules = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if line.startswith("import")}
    assert "rethinker_jax.verify.pool" in modules and not modules & {"jax", "transformers"}
    assert contents("again") == contents("whole")
    assert main(["evaluate", "--regrade", "again.generations.jsonl"]) == 0  # in its place
    assert contents("again") == contents("whole")


def test_unfinished_generations_are_not_graded(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an accuracy over the items that happened to be drawn."""
    write_records(Path("part.generations.jsonl"), records_of("whole")[:-1])
    assert main(["evaluate", "--regrade", "part.generations.jsonl"]) == 2
    assert "part.generations.jsonl.asked.json" in capsys.readouterr().err
    shutil.copy("whole.generations.jsonl.asked.json", "part.generations.jsonl.asked.json")
    assert main(["evaluate", "--regrade", "part.generations.jsonl"]) == 2
    assert "has the samples [0]" in capsys.readouterr().err
    write_records(Path("part.generations.jsonl"), records_of("whole")[:-N])
    assert main(["evaluate", "--regrade", "part.generations.jsonl"]) == 2
    assert "7 items, wanted 8" in capsys.readouterr().err
    assert not Path("part.json").exists()


def test_forced_second_looks() -> None:
    """Catches first responses that forcing changes, completions that end without a trigger, and wrong bounds."""
    assert evaluate("forced", "--force-rethink", "rethink.max_new_tokens=12") == 0
    records, result = records_of("forced"), result_of("forced")
    assert [(one.completion, one.verdict) for one in records] == [
        (one.completion, one.verdict) for one in records_of("whole")
    ]
    settings = result["protocol"]["force_rethink"]
    assert settings["temperature"] == 0.6  # of the protocol
    for record in records:
        assert (record.forced_verdict is not None) == (record.finish_reason == "stop")
        if record.forced_verdict is not None:
            assert record.forced.startswith(record.completion)
            assert record.forced.removeprefix(record.completion).startswith(tuple(settings["triggers"]))
            assert record.forced_verdict == judge(record.forced, record.answer, record.choices, record.type).verdict
    # Of all samples; one that was cut at its limit counts after as before.
    after = [(one.forced_verdict or one.verdict) == "correct" for one in records]
    either = [one.correct or now for one, now in zip(records, after, strict=True)]
    look = result["second_look"]
    assert look["after"]["value"] == pytest.approx(sum(after) / len(records))
    assert look["oracle"]["value"] == pytest.approx(sum(either) / len(records))
    assert look["before"] == result["accuracy"]
    assert main(["report", "forced.json"]) == 0
    page = Path("forced.html").read_text()
    assert '"kind":"trigger"' in page and '"kind":"second_look"' in page


def test_what_cannot_be_asked_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches rows that vanish, an item too long that is scored as wrong in silence, and trying it again for ever."""
    rows = pq.read_table("rows.parquet").to_pylist()[:3]
    rows[1]["question"] = "count blue " * 300
    rows[2]["answer"] = ""
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema("rows.parquet")), "hard.parquet")
    words = ["evaluate", "--model", "example", "--benchmark", "rows", "--data", "hard.parquet", "--n", "2"]
    words += ["--output", "hard.json", *SMALL, "data.max_prompt_tokens=200"]
    assert main(words) == 0
    said = capsys.readouterr().err
    result = result_of("hard")
    assert (result["num_problems"], result["num_left_out"]) == (1, 2)
    assert [one["kind"] for one in result["left_out"]] == ["empty_answer", "too_long"]
    assert rows[1]["id"] == result["left_out"][1]["id"] and "left out (too_long)" in said
    before = contents("hard")
    assert main(words) == 0 and contents("hard") == before
    assert "attention:" not in capsys.readouterr().err
    assert main(["evaluate", "--regrade", "hard.generations.jsonl"]) == 0 and contents("hard") == before


def test_comparison_tables_and_exports(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a table of other numbers than the files', and exports that do not hold all samples."""
    for suffix in (".json", ".generations.jsonl"):
        shutil.copy(f"whole{suffix}", f"twin{suffix}")
    assert main(["evaluate", "--compare", "whole.json", "twin.json"]) == 0
    assert "| whole | twin | 8 | +0.0" in capsys.readouterr().out
    assert main(["evaluate", "--compare", "whole.json", "twin.json", "--output", "pairs.json"]) == 0
    (pair,) = json.loads(Path("pairs.json").read_text())
    solved = [id for id in {one.id for one in records_of("whole")} if any_right("whole", id)]
    assert sorted(pair["solvable"]["both"]) == sorted(solved) and pair["solvable"]["only_a"] == []
    assert main(["evaluate", "--table", "markdown", "whole.json", "--by", "source"]) == 0
    assert capsys.readouterr().out.startswith("| source | items | whole |")
    value = f"{100 * result_of('whole')['accuracy']['value']:.1f}"
    for form, sign in (("markdown", "|"), ("latex", "&"), ("csv", ",")):
        assert main(["evaluate", "--table", form, "whole.json"]) == 0
        printed = capsys.readouterr().out
        assert value in printed and sign in printed and "example" in printed
    assert main(["evaluate", "--table", "csv", "whole.json", "--output", "table.csv"]) == 0
    assert value in Path("table.csv").read_text()
    assert main(["evaluate", "--export", "lm_eval", "whole.json", "--output", "theirs"]) == 0
    assert len(Path("theirs/samples_rows_whole.jsonl").read_text().splitlines()) == NUM_ITEMS
    assert json.loads(Path("theirs/results_whole.json").read_text())["model_name"] == "example"
    assert main(["evaluate", "--export", "vlmevalkit", "whole.json", "--output", "theirs"]) == 0
    assert Path("theirs/whole_rows.tsv").read_text().count("\n") == 1 + N * NUM_ITEMS


def test_a_page_shows_what_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a page without pictures, or with the numbers of another file."""
    assert main(["report", "whole.json"]) == 0
    assert capsys.readouterr().out.strip() == "whole.html"
    page = Path("whole.html").read_text()
    assert page.count("data:image/png;base64,") == sum(
        len(row["images"]) for row in pq.read_table("rows.parquet").to_pylist()
    )
    assert f"{100 * result_of('whole')['accuracy']['value']:.1f}%" in page
    texts = [json.dumps(record.completion)[1:-1] for record in records_of("whole") if "<" not in record.completion]
    assert texts and all(text in page for text in texts)
    Path("rows.parquet").rename("away.parquet")
    try:
        assert main(["report", "whole.json"]) == 0  # without its pictures
    finally:
        Path("away.parquet").rename("rows.parquet")
    assert "data:image/png" not in Path("whole.html").read_text()


def test_perplexity_is_that_of_score(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches log-probs of the wrong tokens or rows, a missing end token, and a mean over completions."""
    records = records_of("whole")
    assert all(record.finish_reason == "stop" for record in records)  # `score` puts an end token behind every text
    rows = {row["id"]: row for row in pq.read_table("rows.parquet").to_pylist()}
    asks = asks_of(read_benchmark("rows", "rows.parquet").items, choose_protocol("", N, "rows"))
    asked = {ask.problem.id: {"question": ask.problem.question, "choices": []} for ask in asks}  # options in the text
    given = [
        rows[one.id] | asked[one.id] | {"id": f"{one.id}-{one.sample}", "completion": one.completion} for one in records
    ]
    pq.write_table(pa.Table.from_pylist(given), "given.parquet")
    words = ["score", "--model", "example", "--data", "given.parquet", "--prompt-template", "none"]
    assert main([*words, "--output", "scored.jsonl"]) == 0, capsys.readouterr().err
    scored = [json.loads(line)["log_probs"] for line in Path("scored.jsonl").read_text().splitlines()]
    flat = [-value for values in scored for value in values]
    words = ["evaluate", "--perplexity", "whole.generations.jsonl", "--model", "example", "--output", "ppl.json"]
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads(Path("ppl.json").read_text())["all"]
    assert (found["num_tokens"], found["num_completions"]) == (len(flat), len(records))
    assert found["nll_per_token"] == pytest.approx(sum(flat) / len(flat), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-4)
    # Half a character, which no tokenizer takes, is no traceback.
    write_records(Path("odd.generations.jsonl"), [dataclasses.replace(records[0], completion="a\ud800"), *records[1:]])
    shutil.copy("whole.generations.jsonl.asked.json", "odd.generations.jsonl.asked.json")
    assert main(["evaluate", "--perplexity", "odd.generations.jsonl", "--model", "example"]) == 0


def test_a_run_directory_and_a_checkpoint_are_models(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the warm start in place of the checkpoint's weights, and an older checkpoint than the last."""
    config = dataclasses.replace(load_config(None, []), run=dataclasses.replace(Config().run, dir="run"))
    system = load_system(config)
    updater = make_updater(config, system, 1, config.loss)
    (Path("run") / "checkpoints").mkdir(parents=True)
    save_config(config, Path("run/config.yaml"))
    with contextlib.closing(CheckpointStore(Path("run/checkpoints"), keep=2)) as store:
        state = updater.init(system.params)
        store.save(2, Saved(state, {}, {}))
        store.wait()
        # A model that says nothing: its normalisation before the head is zero.
        params = dict(state.params)
        params["text"] = dict(params["text"]) | {"norm": jax.tree.map(jnp.zeros_like, params["text"]["norm"])}
        store.save(5, Saved(dataclasses.replace(state, params=params), {}, {}))
        store.wait()
    for name, model in (("checkpoint", "run/checkpoints/2"), ("run", "run")):
        words = ["evaluate", "--model", model, "--benchmark", "rows", "--data", "rows.parquet", "--n", str(N)]
        assert main([*words, "--output", f"of_{name}.json", *SMALL]) == 0, capsys.readouterr().err
    assert records_of("of_checkpoint") == records_of("whole")
    assert records_of("of_run") != records_of("whole")
    steps = [result_of(name)["made_by"]["step"] for name in ("whole", "of_checkpoint", "of_run")]
    assert steps == [None, 2, 5]
    assert len({result_of(name)["made_by"]["weights"] for name in ("whole", "of_checkpoint", "of_run")}) == 3


ROWS = ("--benchmark", "rows", "--data", "rows.parquet", "--output", "new.json")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--benchmark", "mathvsta", "--output", "new.json"), "did you mean 'mathvista'"),
        ((*ROWS, "--protocol", "vl_rethink"), "did you mean 'vl_rethinker'"),
        ((*ROWS, "--model", "nowhere"), "came 'nowhere'"),
        ((*ROWS, "--n", "0"), "--n 0: wanted 1 or more"),
        ((*ROWS, "--n", "2", "--protocol", "vl_rethinker"), "at temperature 0 draws the same 2 times"),
        ((*ROWS, "--shard", "3/3"), "--shard 3/3: wanted I/N"),
        ((*ROWS, "--shard", "8/9"), "shard 8/9 has none of them"),
        ((*ROWS, "sampling.temprature=1"), "did you mean sampling.temperature?"),
        (("--benchmark", "rows", "--data", "row.parquet", "--output", "new.json"), "did you mean rows.parquet"),
        (("--benchmark", "rows", "--data", "rows.parquet"), "wanted --benchmark NAME and --output FILE"),
        (("--benchmark", "rows", "--data", "rows.parquet", "--output", "/proc/new.json"), "cannot be written"),
        (("--regrade", "no.json"), "no.generations.jsonl"),
        ((*ROWS[:-1], "whole.generations.jsonl"), "is of a file beside a result"),
        (("--table", "csv", "whole.json", "--by", "sorce"), "did you mean source?"),
        (("--regrade", "no.generations.jsonl"), "no.generations.jsonl"),
        (("--merge", "whole.generations.jsonl"), "--merge wants --output"),
        (("--compare", "whole.json"), "two or more"),
        (("--table", "mrkdown", "whole.json"), "did you mean markdown?"),
        (("--table", "csv"), "wanted result files"),
        (("--export", "lm_eval", "whole.json"), "--export wants --output DIR"),
        (("--table", "csv", "whole.json", "--compare", "whole.json"), "wanted one of --compare and --table"),
        (
            ("--regrade", "whole.json", "--n", "3", "--force-rethink"),
            "--regrade does not read --n and --force-rethink",
        ),
        (("--perplexity", "whole.json", "--benchmark", "rows"), "--perplexity does not read --benchmark"),
        ((*ROWS, "--by", "source"), "an evaluation does not read --by"),
        (("--perplexity", "no.generations.jsonl"), "no.generations.jsonl"),
    ],
)
def test_bad_requests(words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, a message that names nothing, and a file left behind."""
    before = sorted(path.name for path in Path().iterdir())
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and part in error
    assert sorted(path.name for path in Path().iterdir()) == before


def test_two_processes_do_not_share_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches lines of two processes between each other, and a second one that begins the file anew."""
    before = contents("whole")
    with alone(Path("whole.generations.jsonl").resolve()):
        assert evaluate("whole") == 2 and "another process is writing" in capsys.readouterr().err
        assert main(["evaluate", "--regrade", "whole.json"]) == 2
    assert contents("whole") == before
    assert not list(Path().glob(".*.lock"))
