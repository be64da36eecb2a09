"""`select`: lines of samples and rows in, rows or traces and a report out; and the commands before and after it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rethinker_jax.config import Config
from rethinker_jax.config_file import load_defaults
from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.sample import _line
from rethinker_jax.sampling.sampler import Request
from rethinker_jax.sft.rows import open_rows
from rethinker_jax.types import Completion, Problem, Prompt

Row = dict[str, Any]
QUESTIONS = [  # id, answer, source
    ("a", "3", "sums"), ("b", "4", "sums"), ("c", "5", "plots"), ("d", "6", "plots"), ("e", "7", "maps"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with five rows, of which a, b, c and e have two samples: right and right, right and wrong, ..."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": name, "question": f"{name}?", "answer": answer, "source": of} for name, answer, of in QUESTIONS]
    write_lines("rows.jsonl", rows)
    said = {"a": ("3", "3"), "b": ("4", "9"), "c": ("9", "9"), "e": ("7", "9")}
    answer_of = {name: answer for name, answer, _ in QUESTIONS}
    judged = [
        sampled(name, place, text, verdict="correct" if text == answer_of[name] else "wrong")
        for name, texts in said.items()
        for place, text in enumerate(texts)
    ]
    write_lines("samples.jsonl", judged)
    write_lines("unjudged.jsonl", [{key: row[key] for key in row if key != "verdict"} for row in judged])
    return tmp_path


def write_lines(path: str, rows: Sequence[object]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def sampled(name: str, number: int, answer: str, **more: Any) -> Row:
    """A line as `sample` writes it; sample 0 has four words more than sample 1."""
    padding = "" if number else "one two three four "
    text = f"<think>{padding}so</think> thus <answer>{answer}</answer>"
    found = {"id": name, "sample": number, "completion": text, "completion_ids": [5, 6, 7]}
    return found | {"log_probs": [-1.0, -2.0, -3.0], "finish_reason": "stop"} | more


def lines(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(*words: str) -> None:
    assert main(["select", "--data", "rows.jsonl", "--output", "out.jsonl", *words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = sorted(os.listdir())
    code = main(["select", *words])
    said = capsys.readouterr()
    assert code == 2 and said.err.count("error: ") == 1 and said.out == "", said
    assert sorted(os.listdir()) == before, "a refused command wrote or removed something"
    return said.err


def test_rows_keep_their_bytes_and_get_what_was_measured(here: Path) -> None:
    """Pass rates: a 1, b 0.5, c 0, e 0.5; d has no samples. Catches a pass rate per sample, and rows written anew."""
    original = Path("rows.jsonl").read_text().splitlines()
    original[1] = '{"id" :"b", "question": "b?","answer": "4","source": "sums", "score": 1.50, "note":"é" }'
    Path("rows.jsonl").write_text("\n".join(original) + "\n")
    run("--input", "samples.jsonl", "select.filters=[{pass_rate: {min: 0.25, max: 0.75}}]")
    written = Path("out.jsonl").read_text().splitlines()
    assert written[0] == original[1][:-2] + ', "pass_rate": 0.5, "num_samples": 2, "difficulty": "easy"}'
    assert [json.loads(line)["id"] for line in written] == ["b", "e"]
    assert json.loads(written[1])["difficulty"] == "medium"  # maps: 0.5 between 0.25 and 1


def test_columns_that_are_there_are_replaced_not_doubled(here: Path) -> None:
    """As of a second selection. Catches a line with the key twice, which some readers refuse."""
    write_lines("rows.jsonl", [{"id": "a", "question": "a?", "answer": "3", "pass_rate": 0.125, "note": "\u00e9"}])
    write_lines("samples.jsonl", [sampled("a", 0, "3", verdict="correct")])
    run("--input", "samples.jsonl")
    assert Path("out.jsonl").read_text().count("pass_rate") == 1
    assert lines("out.jsonl")[0] == {
        "id": "a", "question": "a?", "answer": "3", "pass_rate": 1.0, "note": "é", "num_samples": 1, "difficulty": None,
    }  # fmt: skip


def test_the_report_says_what_every_filter_took(here: Path) -> None:
    """correct leaves a (2), b (1), e (1) of 8 samples; the shorter of a's two is sample 1."""
    run("--input", "unjudged.jsonl", "--mode", "traces", "select.filters=[correct, {pick: shortest}]")
    said = json.loads(Path("out.jsonl.report.json").read_text())
    assert (said["num_rows"], said["num_without_samples"], said["num_written"]) == (5, 1, 3)
    assert (said["samples"]["num_samples"], said["samples"]["judged_here"]) == (8, 8)
    assert said["samples"]["verdicts"]["correct"] == 4 and said["samples"]["verdicts"]["wrong"] == 4
    assert said["samples"]["per_source"]["sums"] == {"problems": 2, "samples": 4, "pass_rate": 0.75, "any_right": 1.0}
    flows = [
        [step[key] for key in ("problems_in", "problems_out", "samples_in", "samples_out")] for step in said["filters"]
    ]
    assert flows == [[4, 3, 8, 4], [3, 3, 4, 3]]
    assert said["filters"][0]["per_source"]["plots"]["samples_out"] == 0
    assert said["filters"][0]["per_source"]["sums"]["pass_rate"] == 0.75
    assert [(row["id"], row["completion"].split()[0]) for row in lines("out.jsonl")] == [
        ("a", "<think>so</think>"), ("b", "<think>one"), ("e", "<think>one"),
    ]  # fmt: skip


def test_difficulty_of_sources_by_ratings_and_error_rates(here: Path) -> None:
    """
    Error rates: sums 0.25, maps 0.5, plots 1 -> z -1.07, -0.27, 1.34. Ratings 8, 0, 1 -> z 1.40, -0.84, -0.56.
    Averages 0.17, -0.55, 0.39: maps easy, sums medium, plots hard. Catches either of the two alone.
    """
    run("--input", "samples.jsonl")
    assert {row["source"]: row["difficulty"] for row in lines("out.jsonl")} == {
        "sums": "easy", "maps": "medium", "plots": "hard",
    }  # fmt: skip
    Path("ratings.yaml").write_text("{sums: 8, maps: 0, plots: 1, elsewhere: 3}")
    run("--input", "samples.jsonl", "select.ratings=ratings.yaml", "select.difficulty=medium")
    assert [row["id"] for row in lines("out.jsonl")] == ["a", "b"]
    said = json.loads(Path("out.jsonl.report.json").read_text())
    assert [one["source"] for one in said["difficulty"]["sources"]] == ["maps", "sums", "plots"]
    assert said["filters"][0]["options"] == {"keep": ["medium"]} and said["replaced"] is True


def test_verdicts_that_are_there_are_taken(here: Path) -> None:
    """Also against what the text says: the lines may have been judged by other golds. Catches judging again."""
    rows = [sampled("a", 0, "3", verdict="wrong"), sampled("a", 1, "9", verdict="correct"), sampled("b", 0, "4")]
    write_lines("samples.jsonl", rows)
    run("--input", "samples.jsonl", "--mode", "traces", "select.filters=[correct]")
    assert [(row["id"], row["pass_rate"]) for row in lines("out.jsonl")] == [("a", 0.5), ("b", 1.0)]
    assert json.loads(Path("out.jsonl.report.json").read_text())["samples"]["judged_here"] == 1


def test_generations_of_evaluate_are_samples_too(here: Path) -> None:
    """Their ids are those of the rows; they have num_tokens and a verdict, and no log_probs."""
    record = {"id": "a", "sample": 0, "question": "a?", "answer": "3", "choices": [], "type": "auto", "categories": {}}
    record |= {"completion": "x", "finish_reason": "stop", "num_tokens": 7, "verdict": "correct", "extracted": "3"}
    write_lines("samples.jsonl", [record])
    run("--input", "samples.jsonl", "--mode", "traces", "select.filters=[correct, {tokens: {max: 7}}]")
    assert [row["completion"] for row in lines("out.jsonl")] == ["x"]


def test_openvlthinkers_rule_asks_about_its_own_answer(here: Path) -> None:
    """Gold 3. "3 cm" is cleaned to 3; "3.0" is left to the verifier, without the box before it."""
    texts = [
        "<answer>3 cm</answer>",
        r"\boxed{9} <answer>3.0</answer>",
        r"\boxed{3}",
        "<answer>4</answer>",
        "<answer>3",
    ]
    write_lines(
        "samples.jsonl",
        [sampled("a", place, "", verdict="wrong") | {"completion": text} for place, text in enumerate(texts)],
    )
    run("--input", "samples.jsonl", "--mode", "traces", "select.filters=[{correct: openvlthinker_v1_2}]")
    assert [row["completion"] for row in lines("out.jsonl")] == texts[:2]
    assert [row["id"] for row in lines("out.jsonl")] == ["a:0", "a:1"]


def test_parquet_comes_out_as_it_went_in(here: Path) -> None:
    """Catches decoded or lost images, lost types, and row numbers that restart in every batch of 64."""
    write_split("train.parquet", "train", 150)
    rows = pq.read_table("train.parquet")
    ids = rows.column("id").to_pylist()
    chosen = [3, 64, 149]
    write_lines("samples.jsonl", [sampled(ids[place], 0, "9", verdict="correct") for place in reversed(chosen)])
    words = ["--data", "train.parquet", "--input", "samples.jsonl", "--output", "out.parquet"]
    assert main(["select", *words]) == 0
    kept = pq.read_table("out.parquet")
    assert kept.select(rows.schema.names).equals(rows.take(chosen))
    assert kept.schema.names == [*rows.schema.names, "pass_rate", "num_samples", "difficulty"]
    # A second selection replaces the columns and adds none.
    words = ["--data", "out.parquet", "--input", "samples.jsonl", "--output", "again.parquet", "--mode", "traces"]
    assert main(["select", *words, "select.filters=[correct]"]) == 0
    assert pq.read_table("again.parquet").schema.names == [*kept.schema.names, "completion"]


def test_metadata_and_folders_of_parquet(here: Path) -> None:
    """The features of Hugging Face stand in the metadata; ids of rows without one are of their own file."""
    Path("folder").mkdir()
    for name in ("train-0", "train-1"):
        table = pa.table({"question": [f"{name} {place}?" for place in range(3)], "answer": ["1", "2", "3"]})
        pq.write_table(table.replace_schema_metadata({"huggingface": "{}"}), f"folder/{name}.parquet")
    write_lines("samples.jsonl", [sampled(name, 0, "3", verdict="wrong") for name in ("train-1-2", "train-0-1")])
    assert main(["select", "--data", "folder", "--input", "samples.jsonl", "--output", "out.parquet"]) == 0
    table = pq.read_table("out.parquet")
    assert table.column("question").to_pylist() == ["train-0 1?", "train-1 2?"]
    assert table.schema.metadata[b"huggingface"] == b"{}"


def test_image_paths_are_told_where_they_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a file elsewhere whose images nobody finds."""
    Path("a.png").write_bytes(b"png")
    write_lines("rows.jsonl", [{"id": "a", "question": "<image>?", "image": "a.png", "answer": "3"}])
    write_lines("samples.jsonl", [sampled("a", 0, "3", verdict="correct")])
    words = ["--data", "rows.jsonl", "--input", "samples.jsonl"]
    assert main(["select", *words, "--output", "there/out.jsonl"]) == 0
    assert f"data.image_root={here}" in capsys.readouterr().out
    assert json.loads(Path("there/out.jsonl.report.json").read_text())["image_root"] == str(here)
    assert main(["select", *words, "--output", "out.jsonl"]) == 0
    assert "image_root" not in capsys.readouterr().out


def test_rows_by_their_columns_need_no_samples(here: Path) -> None:
    """ViRL39K's published pass rates, -1 where unknown. Nothing is added, because nothing was measured."""
    rates = [0.5, -1.0, 1.0, 0.25, None]
    rows = [{"question": f"{place}?", "answer": "1", "PassRate_7BBase": rate} for place, rate in enumerate(rates)]
    write_lines("rows.jsonl", rows)
    run("select.filters=[{column: {column: PassRate_7BBase, min: 0.1, max: 0.9}}]")
    assert lines("out.jsonl") == [rows[0], rows[3]]


def test_sample_verify_select_and_sft_fit_together(here: Path) -> None:
    """The chain of docs/curation.md. Catches keys that one command writes and the next does not read."""
    write_split("train.parquet", "train", 4)
    problems = read_problems("train.parquet").problems
    write_lines("samples.jsonl", [drawn(problem, number) for problem in problems for number in range(2)])
    judge = ["verify", "--input", "samples.jsonl", "--data", "train.parquet", "--output", "judged.jsonl"]
    assert main(judge) == 0
    judged = lines("judged.jsonl")
    assert [row["verdict"] for row in judged] == ["wrong", "correct"] * 4
    assert [{key: row[key] for key in before} for row, before in zip(judged, lines("samples.jsonl"), strict=True)] == (
        lines("samples.jsonl")
    )
    words = ["--data", "train.parquet", "--output", "traces.parquet", "--mode", "traces"]
    chain = "select.filters=[correct, not_truncated, {perplexity: {max: 2}}, {pick: second_longest}]"
    for source in ("judged.jsonl", "samples.jsonl"):  # judged before, or here
        assert main(["select", "--input", source, *words, chain]) == 0
        rows = open_rows(Config(), "traces.parquet", "sft.data", lambda bad: pytest.fail(str(bad)))
        assert rows.count == 4
        for place, problem in enumerate(problems):
            row = rows.read(place)
            assert (row.problem.id, row.problem.images) == (problem.id, problem.images)
            assert row.turns[-1].spans == ((f"so \\boxed{{{problem.answer}}}", True),)


def drawn(problem: Problem, number: int) -> Row:
    """A line of `sample`, by its own function: sample 1 is right, and its perplexity is sqrt(2)."""
    none = np.zeros(0, np.int32)
    prompt = Prompt(problem, none, np.zeros((3, 0), np.int32), none, 0)
    answer = problem.answer if number else "no"
    log_probs = np.array([0.0, -np.log(2)], np.float32)
    ids, segments = np.array([5, 6], np.int32), np.zeros(2, np.int8)
    text = f"so \\boxed{{{answer}}}"
    return _line(
        Request(prompt, number), Completion(ids, log_probs, segments, "stop", text, truncated_log_probs=log_probs)
    )


def test_verify_goes_on_with_lines_of_sample(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Malformed lines and unknown ids are named before anything is judged."""
    broken = ["{", {"id": "a"}, sampled("zz", 0, "3"), sampled("a", 0, "3") | {"completion": None}]
    Path("samples.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in broken))
    assert main(["verify", "--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "judged.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "4 malformed line(s), nothing was judged" in said
    assert "line 2: missing completion" in said and "line 3: no usable row has the id 'zz'" in said
    assert "line 4: completion is not text" in said and not Path("judged.jsonl").exists()


GOOD = sampled("a", 0, "3")
HOSTILE = [
    (b"{", "line 2: not JSON"),
    (b"[1]", "line 2: a JSON object is wanted, not list"),
    (b"[" * 100_000, "line 2: not JSON (RecursionError)"),
    (b"\xff\xfe{", "line 2: not JSON"),
    (b'{"id": "b", "sample": 0}', "line 2: completion is missing"),
    ({"id": True}, "line 2: id is neither text nor a whole number"),
    ({"id": "zz"}, "line 2: rows.jsonl has no usable row with the id 'zz'"),
    ({"sample": -1}, "line 2: sample is not a whole number of at least 0, came -1"),
    ({"sample": 1.0}, "line 2: sample is not a whole number"),
    ({"completion": 3}, "line 2: completion is no text of at most"),
    ({"completion": "x" * 1_000_001}, "line 2: completion is no text of at most 1000000 characters"),
    ({"completion": "\ud800"}, "line 2: completion holds half of a character"),
    ({"verdict": "right"}, "line 2: verdict is none of correct, wrong"),
    ({"verdict": ["correct"]}, "line 2: verdict is none of"),
    ({"finish_reason": "end"}, "line 2: finish_reason is none of stop, length"),
    ({"completion_ids": 3}, "line 2: completion_ids is not a list"),
    ({"log_probs": [-1.0, "x"]}, "line 2: log_probs is not a list of numbers"),
    ({"log_probs": [float("nan")]}, "line 2: log_probs have the mean nan"),
    ({"log_probs": [float("inf"), float("-inf")]}, "line 2: log_probs have no mean"),
    ({"log_probs": [10**400]}, "line 2: log_probs have no mean"),
    ({"id": "a"}, "line 2: sample 0 of this problem is in line 1 already"),
]


@pytest.mark.parametrize(("line", "message"), HOSTILE)
def test_a_line_that_is_no_sample_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], line: bytes | Row, message: str
) -> None:
    """Catches a traceback, a line that is passed over in silence, and a number of the wrong line."""
    text = line if isinstance(line, bytes) else json.dumps(sampled("b", 0, "3") | line).encode()
    Path("samples.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + text + b"\n")
    words = ["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "out.jsonl"]
    assert f"samples.jsonl, {message}" in refused(capsys, *words)


REFUSED = [
    ([], "wanted --data ROWS and --output FILE"),
    (["--data", "rows.jsonl", "--output", "o.jsonl"], "wanted --input FILE, the samples; column and per_source"),
    (["--data", "rows.jsonl", "--output", "o.jsonl", "select.filters=[correct]"], "for the filter correct"),
    (["--data", "rows.jsonl", "--output", "o.jsonl", "--mode", "traces", "select.filters=[correct]"], "only rows can"),
    (["--input", "none.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl"], "--input none.jsonl: no such file"),
    (["--input", "samples.jsonl", "--data", "none.jsonl", "--output", "o.jsonl"], "--data none.jsonl: wanted"),
    (["--input", "samples.jsonl", "--data", "owner/name", "--output", "o.jsonl"], "Rows of a hub id are downloaded"),
    (["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.parquet"], "ends in .jsonl"),
    (["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "rows.jsonl"], "is a file that is read"),
    (["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "samples.jsonl"], "is a file that is read"),
    (["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "mine.jsonl"], "was not written by `select`"),
    (
        ["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl", "--mode", "traces"],
        "want select.fil",
    ),
    (["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl", "select.filters=[corect]"], "did you"),
    (["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl", "select.filters=correct"], "a list"),
    (["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl", "select.filters=[3]"], "filters"),
    (
        [
            "--input",
            "samples.jsonl",
            "--data",
            "rows.jsonl",
            "--output",
            "o.jsonl",
            "select.filters=[{words: {min: 99}}]",
        ],
        "the filters left nothing; the last problem went at 'words: min 99'",
    ),
    (
        ["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl", "select.ratings=bad.yaml"],
        "came 'sums': 11",
    ),
    (
        ["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl", "select.ratings=few.json"],
        "there is none of 'maps'",
    ),
    (
        ["--input", "samples.jsonl", "--data", "one.jsonl", "--output", "o.jsonl", "select.difficulty=easy"],
        "no source has a difficulty to select by: wanted at least 3 sources",
    ),
    (
        ["--data", "rows.jsonl", "--output", "o.jsonl", "select.filters=[{column: {column: rate, min: 0}}]"],
        "has no column 'rate'",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_cannot_be_asked_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("mine.jsonl").write_text("mine")
    Path("bad.yaml").write_text("sums: 11\n")
    Path("few.json").write_text('{"sums": 1, "plots": 2}')
    write_lines("one.jsonl", [{"id": name, "question": "?", "answer": "3"} for name in "abcde"])
    assert message in refused(capsys, *words)


def test_bad_rows_are_left_out_and_counted_up_to_the_limit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row without an answer is usable: its samples are bad_gold. Catches a wrong count, and silence about both."""
    write_lines("rows.jsonl", [{"id": "a", "question": "a?"}, {"id": "b", "answer": "4"}, {"id": "e", "question": " "}])
    write_lines("samples.jsonl", [sampled("a", 0, "3")])
    run("--input", "samples.jsonl")
    said = capsys.readouterr().out
    assert "left out: 2 empty_question" in said and "the verifier could not say: 1 bad_gold" in said
    assert lines("out.jsonl")[0]["pass_rate"] == 0.0
    words = ["--input", "samples.jsonl", "--data", "rows.jsonl", "--output", "o.jsonl", "run.max_bad_rows=1"]
    assert "2 of 3 rows cannot be used; the first: rows.jsonl row 1" in refused(capsys, *words)


def test_the_same_seed_selects_the_same_bytes(here: Path) -> None:
    words = ["--input", "samples.jsonl", "--mode", "traces", "select.filters=[{pick: random}, {per_source: 1}]"]
    run(*words, "run.seed=3")
    first = Path("out.jsonl").read_bytes()
    run(*words, "run.seed=3")
    assert Path("out.jsonl").read_bytes() == first
    others = []
    for seed in range(8):
        run(*words, f"run.seed={seed}")
        others.append(Path("out.jsonl").read_bytes())
    assert len(set(others)) > 1


def test_filters_of_a_config_file(here: Path) -> None:
    Path("filters.yaml").write_text("select:\n  mode: traces\n  filters:\n    - correct\n    - pick: longest\n")
    run("filters.yaml", "--input", "samples.jsonl")
    assert [row["id"] for row in lines("out.jsonl")] == ["a", "b", "e"]
    assert load_defaults(["select.filters=[correct, {words: {max: 5}}]"]).select.filters == (
        "correct", {"words": {"max": 5}},
    )  # fmt: skip
