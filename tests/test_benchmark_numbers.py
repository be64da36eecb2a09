"""The result of an evaluation as a whole, and the file of judged generations that it is made of."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from benchmark_cases import record, samples

from rethinker_jax.benchmarks.groups import group_records
from rethinker_jax.benchmarks.intervals import wilson
from rethinker_jax.benchmarks.numbers import evaluation_numbers, numbers_text
from rethinker_jax.benchmarks.record_files import encode_record, generations_path, read_records, write_records
from rethinker_jax.errors import UserError

CONTRACT = (
    "benchmark", "num_problems", "num_samples", "protocol", "accuracy", "pass@k", "no_answer_share", "truncated_share",
    "per_category",
)  # fmt: skip


def numbers(records, **others):
    return evaluation_numbers(records, benchmark="rows", protocol={"n": 1}, **others)


def varied():
    """Four samples of 12 items of every kind: options, clusters, chains, second looks, failures, one not scored."""
    records = []
    marks = ["++++", "+---", "----", "++0-", "0000", "+!--", "-+-+", "+++-", "--+-", "++--", "00+0", "++++"]
    for number, signs in enumerate(marks):
        choices = ("1", "2", "3", "4") if number % 3 == 0 else ()
        records += samples(
            f"item-{number}", signs, choices=choices, cluster=f"c{number // 3}" if number < 6 else "",
            categories={"level": str(number % 3), "source": "x" if number < 4 else "y"},
        )  # fmt: skip
    records[3] = dataclasses.replace(records[3], forced="1 wait 2", forced_verdict="wrong", forced_num_tokens=8)
    records[5] = dataclasses.replace(records[5], finish_reason="length", completion="Wait, yet again " * 40)
    records += samples("chain-a", "+-++", categories={"chain": "k", "role": "final", "level": "0", "source": "x"})
    records += samples("chain-b", "++-+", categories={"chain": "k", "role": "step", "level": "0", "source": "x"})
    return records + samples("open-1", "----", scored=False)


def test_one_greedy_sample_an_item():
    """Catches a share of samples that no longer is Wilson's, a missing key of the contract, and pass@1 ≠ accuracy."""
    records = samples("a", "+") + samples("b", "-") + samples("c", "0", finish_reason="length") + samples("d", "+")
    found = numbers(records)
    assert all(key in found for key in CONTRACT)
    assert (found["benchmark"], found["num_problems"], found["num_samples"]) == ("rows", 4, 1)
    close = wilson(2, 4)
    assert found["accuracy"] == {"value": 0.5, "low": close.low, "high": close.high}
    assert found["intervals"]["method"] == "wilson"
    assert found["pass@k"] == {"1": 0.5} and found["avg@1"] == 0.5
    assert found["pass@k_intervals"]["1"] == found["accuracy"]
    assert (found["no_answer_share"], found["truncated_share"]) == (0.25, 0.25)
    assert "maj@k" not in found and "second_look" not in found and "chains" not in found


def test_several_samples():
    """Catches pass@k over samples instead of items. a: 2 of 4, b: 0 of 4 (two agree on "2"), c: 4 of 4."""
    found = numbers(samples("a", "++--") + samples("b", "-00-") + samples("c", "++++"))
    assert found["accuracy"]["value"] == found["avg@4"] == pytest.approx(0.5)
    # pass@2 of a is 1 - C(2,2)/C(4,2) = 5/6
    assert found["pass@k"] == pytest.approx({"1": 0.5, "2": (5 / 6 + 0 + 1) / 3, "4": 2 / 3})
    assert found["maj@k"]["4"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["maj@k"]["1"] == pytest.approx(0.5)
    assert found["answers_grouped_by"] == "text"
    assert found["solve_shares"] == pytest.approx({"solve_all": 1 / 3, "solve_none": 1 / 3})
    assert found["difficulty"] == {"0": 1, "(0, 3/8)": 0, "[3/8, 6/8)": 1, "[6/8, 1)": 0, "1": 1}
    assert found["agreement"] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_difficulty_bins_at_their_borders():
    """Catches 3/8 and 6/8 on the wrong side."""
    found = numbers([r for n in range(9) for r in samples(f"q{n}", "+" * n + "-" * (8 - n))])
    assert list(found["difficulty"].values()) == [1, 2, 3, 2, 1]  # 0 | 1 2 | 3 4 5 | 6 7 | 8


def test_the_macro_headline():
    """Catches a plain mean: task x has 3 of 3, task y 0 of 1, so macro is 1/2 and the mean over items 3/4."""
    records = [record(f"x{i}", categories={"task": "x"}, cluster="x") for i in range(3)]
    records.append(record("y", 0, "wrong", categories={"task": "y"}, cluster="y"))
    found = numbers(records, headline="macro", macro_over="task")
    assert found["accuracy"]["value"] == 0.5 and found["accuracy_over_items"]["value"] == 0.75
    assert found["pass@k"]["1"] == 0.5
    assert found["accuracy"] == numbers(records, headline="macro")["accuracy"]  # the only dimension there is
    # Two tasks: drawn are x x, x y, y x, y y.
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == (0, 1)
    with pytest.raises(UserError, match="lacks"):
        numbers(records, headline="macro", macro_over="level")


def test_categories():
    """Catches a dimension whose values are lost, and items without it counted in."""
    records = (
        samples("a", "+", categories={"level": "1", "subject": "s"})
        + samples("b", "-", categories={"level": "2"})
        + samples("c", "+", categories={"level": "1"})
    )
    found = numbers(records)["per_category"]
    assert {value: (one["num_problems"], one["accuracy"]["value"]) for value, one in found["level"].items()} == {
        "1": (2, 1.0),
        "2": (1, 0.0),
    }
    assert list(found["subject"]) == ["s"]


def test_items_that_are_not_scored_are_apart():
    """Catches open tasks counted as wrong."""
    found = numbers(samples("a", "+") + samples("open", "-", scored=False))
    assert (found["num_problems"], found["accuracy"]["value"]) == (1, 1.0)
    assert found["unscored"]["num_problems"] == 1
    with pytest.raises(UserError, match="scored"):
        numbers(samples("open", "-", scored=False))


def test_failures_of_the_judge_are_counted():
    """Catches a timeout that is "wrong" in silence. a right, b timeout: accuracy 1/2, of those judged 1."""
    found = numbers(samples("a", "+") + samples("b", "!"))
    assert found["verdicts"]["timeout"] == 1
    assert (found["accuracy"]["value"], found["judged_accuracy"]) == (0.5, 1.0)


def test_strict_and_lenient_side_by_side():
    """Catches a gap of the wrong sign: two right in the box, one more outside of it."""
    records = [record("a"), record("b"), record("c", 0, "no_answer", lenient="correct"), record("d", 0, "wrong")]
    found = numbers(records)
    assert (found["accuracy"]["value"], found["lenient_accuracy"]["value"], found["lenient_gap"]) == (0.5, 0.75, 0.25)


def test_options_are_also_counted_apart():
    """Catches a pass@k that guessing among four options has lifted."""
    options = ("1", "2", "3", "4")
    found = numbers(samples("a", "+---", choices=options) + samples("b", "++++", type="mcq") + samples("c", "----"))
    assert found["free_form"]["pass@k"]["4"] == 0.0
    assert found["multiple_choice"]["num_problems"] == 2
    assert found["multiple_choice"]["chance"] is None  # of b the options are not known
    assert numbers(samples("a", "+", choices=options))["chance"] == 0.25


def test_any_order_gives_the_same_bytes():
    """Catches sums, draws or candidates that depend on the order in which generations were finished."""
    records = varied()
    expected = numbers_text(numbers(records))
    for seed in range(3):
        random.Random(seed).shuffle(records)
        assert numbers_text(numbers(records)) == expected
    assert "NaN" not in expected and json.loads(expected)["chains"]["num_chains"] == 1
    assert json.loads(expected)["second_look"]["right_to_wrong"] == 1


@pytest.mark.parametrize(
    "records, message",
    [
        ([record("a"), record("a")], "sample 0 twice"),
        ([record("a"), record("a", 1, answer="7")], "samples 0 and 1"),
    ],
)
def test_two_items_under_one_id_are_refused(records, message):
    """Catches two files joined by hand, whose items would be averaged."""
    with pytest.raises(UserError, match=message):
        group_records(records)


def test_records_survive_the_file(tmp_path):
    """Catches tuples that come back as lists, and halves of characters that no UTF-8 file can hold."""
    full = record(
        "full", 1, "wrong", None, choices=("a", "b"), alternatives=("c",), forced="x", forced_num_tokens=7,
        forced_verdict="no_answer", forced_extracted="y", scored=False, cluster="k", categories={"a": "b"},
    )  # fmt: skip
    records = [*varied(), full, record("\ud800 é\n\u2028", completion="a\nb\\boxed{\ud83d}", extracted="\ud83d")]
    path = generations_path(tmp_path / "result.json")
    write_records(path, records)
    assert path.name == "result.generations.jsonl"
    assert read_records(path) == records
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


def test_a_torn_last_line(tmp_path):
    """Catches a torn line that is dropped unasked, and a whole file that cannot be read for its last line end."""
    path = tmp_path / "x.jsonl"
    first, second = encode_record(record("a")), encode_record(record("b"))
    path.write_text(first + second[:50])
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_records(path)
    path.write_text(first + second.rstrip("\n"))
    assert len(read_records(path)) == 2


@pytest.mark.parametrize(
    ("result", "generations"),
    [("out.json", "out"), ("out", "out"), ("out.7b", "out.7b"), ("out.72b.json", "out.72b")],
)
def test_files_beside_a_result(result, generations):
    """Catches `a.7b` and `a.72b` in one file of generations, `a`."""
    assert generations_path(Path("d") / result) == Path("d") / f"{generations}.generations.jsonl"


def broken(**changes):
    row = json.loads(encode_record(record("b"))) | changes
    return json.dumps({key: value for key, value in row.items() if value is not ...}, default=str)


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1]", "a JSON object is wanted, not list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (broken(colour="red"), "'colour' is not a key"),
        (broken(sample=-1), "sample is not what it should be, came -1"),
        (broken(sample=True), "sample"),
        (broken(verdict="maybe"), "verdict"),
        (broken(verdict=None), "verdict"),
        (broken(finish_reason=["stop"]), "finish_reason"),
        (broken(choices=["a", 1]), "choices"),
        (broken(categories={"a": 1}), "categories"),
        (broken(scored="yes"), "scored"),
        (broken(extracted=3), "extracted"),
        (encode_record(record("a")).strip(), "sample 0 of item 'a' is in line 1"),
        ("{}", "answer is missing; categories is missing"),
    ],
)
def test_lines_that_are_no_records_are_named(tmp_path, line, message):
    """Catches a value that passes by its truth or its length, and an error without its line."""
    path = tmp_path / "x.jsonl"
    path.write_text(encode_record(record("a")) + "\n" + line + "\n" + encode_record(record("c")))
    with pytest.raises(UserError, match=r"x\.jsonl, line 3: ") as error:
        read_records(path)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot write"):
        write_records(tmp_path / "none" / "x.jsonl", [])
