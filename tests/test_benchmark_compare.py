"""Two evaluations item by item, the sets they solve, and the layouts of other harnesses."""

import csv
import io
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from benchmark_cases import record, samples

from rethinker_jax.benchmarks.boundary import solvable_sets
from rethinker_jax.benchmarks.compare import Run, compare, compare_all, read_run, sign_test
from rethinker_jax.benchmarks.exports import (
    lm_eval_results,
    lm_eval_samples,
    vlmevalkit_accuracy,
    vlmevalkit_predictions,
)
from rethinker_jax.benchmarks.groups import group_records
from rethinker_jax.benchmarks.intervals import wilson
from rethinker_jax.benchmarks.numbers import evaluation_numbers, numbers_text
from rethinker_jax.benchmarks.record_files import generations_path, write_records
from rethinker_jax.errors import UserError


def numbers(records, benchmark="rows", **protocol):
    return evaluation_numbers(records, benchmark=benchmark, protocol=protocol)


def run(name, records, **others):
    return Run(name, numbers(records, **others), tuple(group_records(records)))


def marked(signs):
    return [r for place, sign in enumerate(signs) for r in samples(f"q{place:03}", sign)]


def test_the_difference_is_paired():
    """Catches a difference of unpaired means, a sign turned round, and flips that are missing or too many.

    a: + + - - 0, b: + - + + +: b is better on 3, a on 1, difference (4 - 2) / 5.
    """
    found = compare(run("a", marked("++--0")), run("b", marked("+-+++")))
    assert (found.num_paired, found.a_better, found.b_better, found.equal) == (5, 1, 3, 1)
    assert found.difference.value == pytest.approx(0.4)
    assert found.p_value == 10 / 16  # 2 · (C(4,0) + C(4,1)) / 2^4
    assert [(f.id, f.answer_a, f.answer_b) for f in found.flips] == [
        ("q001", "1", "2"), ("q002", "2", "1"), ("q003", "2", "1"), ("q004", None, "1"),
    ]  # fmt: skip
    solved = found.solvable
    assert (solved.both, solved.only_a, solved.only_b) == (("q000",), ("q001",), ("q002", "q003", "q004"))


def test_equal_items_narrow_the_interval():
    """Catches an interval from two independent samples: of 200 items only 10 differ, all in favour of b."""
    signs = "+" * 100 + "-" * 100
    found = compare(run("a", marked(signs)), run("b", marked("+" * 110 + "-" * 90)))
    # The difference has the variance 0.05 · 0.95 / 200, a standard error of 0.0154; unpaired it would be 0.05.
    assert 0.015 < found.difference.low < 0.05 < found.difference.high < 0.085
    assert found.p_value == 2 / 2**10


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (3, 7), (7, 3), (5, 5), (700, 640)])
def test_sign_test_is_exact(wins, losses):
    """Catches a one-sided value, a normal approximation and an overflow."""
    num = wins + losses
    tail = sum(math.comb(num, i) for i in range(min(wins, losses) + 1))
    assert sign_test(wins, losses) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**num))), rel=1e-12)


def test_items_that_do_not_pair_are_reported():
    """Catches an item of one file alone that counts as wrong in the other, and a changed gold that counts as a flip."""
    a = [*marked("++"), record("only-a"), record("changed", answer="1")]
    b = [*marked("+-"), record("only-b"), record("changed", 0, "wrong", answer="7")]
    found = compare(run("a", a, max_tokens=2048, prompt="x"), run("b", b, max_tokens=8192, prompt="x"))
    assert (found.num_paired, found.only_in_a, found.only_in_b) == (2, ("only-a",), ("only-b",))
    assert found.changed == ("changed",)
    assert found.protocol == {"max_tokens": (2048, 8192)}


def test_comparisons_need_two_evaluations_of_one_benchmark():
    """Catches a comparison of MathVista with MathVerse by ids that happen to be equal."""
    one = run("a", marked("+"))
    with pytest.raises(UserError, match="two or more"):
        compare_all([one])
    with pytest.raises(UserError, match="one benchmark"):
        compare(one, run("b", marked("+"), benchmark="other"))
    with pytest.raises(UserError, match="no item in common"):
        compare(one, run("b", [record("else")]))
    assert [(c.a, c.b) for c in compare_all([one, run("b", marked("-")), run("c", marked("+"))])] == [
        ("a", "b"), ("a", "c"), ("b", "c"),
    ]  # fmt: skip


def test_runs_are_read_with_their_generations(tmp_path):
    """Catches items that are not scored in the comparison, and a result file that is something else."""
    records = marked("+-") + samples("open", "+", scored=False)
    path = tmp_path / "seven.json"
    path.write_text(numbers_text(numbers(records)))
    write_records(generations_path(path), reversed(records))
    found = read_run(path)
    assert found.name == "seven" and [item.id for item in found.items] == ["q000", "q001"]
    whole = json.loads(path.read_text())
    write_records(generations_path(path), records[1:])
    with pytest.raises(UserError, match=r"over 2 scored items, and .* holds 1"):
        read_run(path)
    interval = {"value": math.nan, "low": 0, "high": 1}
    for key, value in [
        ("benchmark", 1), ("protocol", None), ("accuracy", interval), ("accuracy", 0.5), ("lenient_accuracy", {}),
        ("num_samples", "1"), ("pass@k", {"1": None}), ("per_category", {"level": {"1": 0.5}}),
    ]:  # fmt: skip
        path.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(UserError, match=f"{key} is not"):
            read_run(path)
    for text, message in [("{", "not JSON"), ("[]", "not list"), ("[" * 100_000, "not JSON")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_run(path)


def test_solvable_sets_take_equally_many_samples():
    """Catches four samples against two: "solved" then means another thing on either side."""
    a, b = (
        group_records(samples("x", "---+") + samples("y", "-+--")),
        group_records(samples("x", "+-") + samples("y", "--")),
    )
    found = solvable_sets(a, b)
    assert (found.num_samples, found.both, found.only_a, found.only_b, found.neither) == (2, (), ("y",), ("x",), ())
    assert solvable_sets(a, b, 1).neither == ("y",)
    with pytest.raises(UserError, match="wanted 4 samples"):
        solvable_sets(a, b, 4)


def test_boxes_pair_whatever_the_size_of_the_picture():
    """Catches items that are lost to a comparison because one model saw the picture at twice the size."""
    small, large, other = (
        samples("x", sign, type="bbox", answer=answer, question=question)
        for sign, answer, question in (
            ("+", "[1, 2, 3, 4]", "Where?"), ("-", '[{"bbox_2d": [2, 4, 6, 8]}]', "Where?"), ("+", "[1]", "What?"),
        )
    )  # fmt: skip
    found = compare(run("a", small), run("b", large))
    assert (found.num_paired, found.changed, found.difference.value) == (1, (), -1.0)
    with pytest.raises(UserError, match="no item in common"):
        compare(run("a", small), run("b", other))


def exported():
    options = ("1\tone", "2")
    return [
        *samples("b", "+-", choices=options, categories={"level": "2"}),
        *samples("a", "00", completion="no\nend", categories={"level": "1"}),
        *samples("open", "--", scored=False),
    ]


def test_lm_eval_layout():
    """Catches lines a sample instead of an item, a metric without its filter, and a score of the first sample alone."""
    lines = [json.loads(line) for line in lm_eval_samples(exported()).splitlines()]
    assert [(line["doc_id"], line["doc"]["id"], line["exact_match"]) for line in lines] == [
        (0, "a", 0.0),
        (1, "b", 0.5),
    ]
    assert lines[0]["resps"] == [["no\nend", "no\nend"]] and lines[0]["filtered_resps"] == ["", ""]
    assert {"target", "arguments", "doc_hash", "prompt_hash", "target_hash", "filter"} <= lines[0].keys()
    records = marked("+-")
    found = lm_eval_results(numbers(records, n=1), "our-model")
    scores = found["results"]["rows"]
    assert scores["exact_match,strict-box"] == 0.5 and scores["alias"] == "rows"
    ends = wilson(1, 2)
    assert scores["exact_match_stderr,strict-box"] == pytest.approx((ends.high - ends.low) / 2 / 1.959964, rel=1e-6)
    assert found["n-samples"] == {"rows": {"original": 2, "effective": 2}}
    json.dumps(found, allow_nan=False)


def test_vlmevalkit_layout():
    """Catches a tab or a line break of model text that breaks a row, and options that slip a column."""
    rows = list(csv.DictReader(io.StringIO(vlmevalkit_predictions(exported())), delimiter="\t"))
    assert [(row["index"], row["id"], row["sample"], row["hit"]) for row in rows] == [
        ("0", "a", "0", "0"), ("0", "a", "1", "0"), ("1", "b", "0", "1"), ("1", "b", "1", "0"),
    ]  # fmt: skip
    assert (rows[2]["A"], rows[2]["B"], rows[0]["A"]) == ("1\tone", "2", "")
    assert rows[0]["prediction"] == "no\nend" and rows[0]["category"] == rows[0]["level"] == "1"
    assert vlmevalkit_predictions([record("\ud800")]).encode()
    overall, level = vlmevalkit_accuracy(numbers(exported()))
    assert overall == {"split": "all", "Overall": 25.0}
    assert level == {"split": "level", "1": 0.0, "2": 50.0}


def test_a_comparison_does_not_depend_on_the_order():
    """Catches pairs by place instead of by id."""
    rng = np.random.default_rng(0)
    signs = ["".join(rng.choice(["+", "-", "0"], 40)) for _ in range(2)]
    a, b = (marked(one) for one in signs)
    mixed = [b[place] for place in rng.permutation(len(b))]
    assert compare(run("a", a), run("b", b)) == compare(run("a", a[::-1]), run("b", mixed))
