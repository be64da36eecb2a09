"""Tables: what stands in them, and that untrusted text cannot break them."""

import csv
import io
import re

import pytest
from benchmark_cases import samples

from rethinker_jax.benchmarks.compare import Run, compare
from rethinker_jax.benchmarks.groups import group_records
from rethinker_jax.benchmarks.numbers import evaluation_numbers
from rethinker_jax.benchmarks.published import benchmark_key, published_numbers
from rethinker_jax.benchmarks.tables import (
    Table,
    categories_table,
    comparisons_table,
    flips_table,
    results_table,
    to_csv,
    to_latex,
    to_markdown,
)

HOSTILE = "a|b\n\\input{x} $5_{%}#&~^ <script> =1 [x](y) *b* `c`\r\u202e\ud800"


def result(signs, benchmark="mathvista", **protocol):
    records = [r for place, sign in enumerate(signs) for r in samples(f"q{place}", sign, categories={"level": sign})]
    return evaluation_numbers(records, benchmark=benchmark, protocol=protocol)


def test_published_numbers_as_printed():
    """Catches a column that slipped: numbers of both papers that are well known, in percent, with their tables."""
    found = {(n.model, n.benchmark, n.source): n.value for n in published_numbers()}
    ours = "VL-Rethinker, arXiv 2504.08837v3, Table 2"
    names = ("mathvista", "mathverse", "mathvision", "mmmu_pro", "mmmu", "emma", "mega_bench")
    values = {benchmark_key(b): found[m, b, s] for m, b, s in found if (m, s) == ("VL-Rethinker-7B", ours)}
    assert [values[benchmark_key(name)] for name in names] == [74.9, 54.2, 32.3, 41.7, 56.7, 29.7, 37.2]
    assert found["VL-Rethinker-72B", "mathvista", "VL-Rethinker, arXiv 2504.08837v3, Table 1"] == 80.4
    assert found["OpenVLThinker-7B", "hallusionbench", "OpenVLThinker, arXiv 2503.17352v3, Table 1"] == 69.1
    assert ("Llama4-Scout-109B", "mathverse", "VL-Rethinker, arXiv 2504.08837v3, Table 1") not in found
    assert len(found) == len(published_numbers())  # none is there twice
    for number in published_numbers():
        assert (
            0 < number.value < 100 and re.search(r"(Table|Fig\.) \d", number.source) and "as printed" in number.protocol
        )


def test_results_stand_beside_published_numbers():
    """Catches shares for percents, published rows of other benchmarks, and numbers without source and protocol."""
    results = [
        ("mine", result("+++-", name="vl_rethinker", temperature=0.0)),
        ("mine", result("+-", "mathverse", name="vl_rethinker", temperature=0.0)),
        ("other", result("--", name="vl_rethinker", temperature=0.0)),
    ]
    table = results_table(results, published_numbers())
    assert table.header == ("model", "mathvista", "mathverse", "source", "protocol")
    first, second = table.rows[:2]
    assert first[0] == "mine" and first[1].startswith("75.0 (") and first[2].startswith("50.0 (")
    assert first[3:] == ("this evaluation", "name=vl_rethinker, samples=1, temperature=0.0")
    assert second[2] == "–"
    rows = {(row[0], row[3]): row for row in table.rows}
    row = rows["VL-Rethinker-7B", "VL-Rethinker, arXiv 2504.08837v3, Table 2"]
    assert row[1:3] == ("74.9", "54.2") and "greedy" in row[4]
    assert results_table([("x", result("+", "rows"))], published_numbers()).rows[0][0] == "x"
    assert len(results_table([("x", result("+", "rows"))], published_numbers()).rows) == 1


def test_two_protocols_of_one_model_are_two_rows():
    """Catches the second number overwriting the first."""
    table = results_table([("m", result("+", n=1)), ("m", result("-", n=8))])
    assert [row[1][:3] for row in table.rows] == ["100", "0.0"]


def test_several_seeds_are_one_cell():
    """Catches a row a seed, a population's deviation, and one result that is there twice taken for two seeds.

    Of 4 items 3, 2 and 1 are right: 75, 50, 25, mean 50, deviation sqrt((25² + 0 + 25²) / 2) = 25.
    """
    seeds = [("m", result(signs) | {"made_by": {"seed": n}}) for n, signs in enumerate(("+++-", "++--", "+---"))]
    assert [row[1] for row in results_table(seeds).rows] == ["50.0 ± 25.0 (3 seeds)"]
    assert [row[1][:4] for row in results_table([seeds[0], seeds[0]]).rows] == ["75.0", "75.0"]
    other = ("m", result("+++-", temperature=1) | {"made_by": {"seed": 5}})
    assert [row[1][:4] for row in results_table([seeds[0], other]).rows] == ["75.0", "75.0"]


def test_mmmu_pro_is_the_mean_of_its_parts():
    """Catches the published MMMU-Pro without a number beside it, and a mean of one part. (75 + 50) / 2 = 62.5."""
    parts = [("m", result("+++-", "mmmu_pro_standard10")), ("m", result("+-", "mmmu_pro_vision"))]
    table = results_table(parts, published_numbers())
    assert table.header[1:4] == ("mmmu_pro_standard10", "mmmu_pro_vision", "mmmu_pro")
    assert table.rows[0][3] == "62.5 (mean of 2)"
    assert ("VL-Rethinker-7B", "41.7") in {(row[0], row[3]) for row in table.rows}
    assert results_table(parts[:1], published_numbers()).header[1:-2] == ("mmmu_pro_standard10",)


def test_categories_and_comparisons():
    """Catches an accuracy under the wrong category, and a difference in shares."""
    table = categories_table([("m", result("++-")), ("n", result("-"))], "level")
    assert table.header == ("level", "items", "m", "n")
    assert [row[:2] for row in table.rows] == [("+", "2"), ("-", "1")]
    assert table.rows[0][2].startswith("100.0 (") and table.rows[0][3] == "–"
    runs = []
    for name, signs in (("a", "+-"), (HOSTILE, "++")):
        records = [r for place, sign in enumerate(signs) for r in samples(f"q{place}", sign)]
        numbers = evaluation_numbers(records, benchmark="rows", protocol={})
        runs.append(Run(name, numbers, tuple(group_records(records))))
    found = compare(*runs)
    (row,) = comparisons_table([found]).rows
    assert row[2] == "2" and row[3].startswith("+50.0 (") and row[4:6] == ("0", "1")
    assert flips_table(found).rows == (("q1", "1", "0.00", "1.00", "2", "1"),)
    assert flips_table(found, 0).rows == ()


@pytest.fixture
def hostile():
    return Table(("model", HOSTILE), ((HOSTILE, "1.0"), ("=1+1", "-5.0"), ("x" * 1000, "–")))


def test_markdown_cannot_be_broken(hostile):
    """Catches a bar or a line break in a name that makes another cell or row, and live markup."""
    lines = to_markdown(hostile).splitlines()
    assert len(lines) == 5 and lines[1] == "| --- | --- |"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    assert not re.search(r"(?<!\\)[<`\[*]", "".join(lines))
    assert max(map(len, lines)) < 500


def test_latex_cannot_be_broken(hostile):
    """Catches a command, a comment or a column that comes from a name."""
    text = to_latex(hostile)
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0]
    known = r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater)\{\}|\\[{}$&#_%]|\\midrule|\\\\"
    rest = re.sub(known, "", body.replace(" & ", ""))
    assert not re.search(r"[\\{}$&#_%~^<>]", rest)
    assert body.count(r" \\" + "\n") == 4 and "input" in body


def test_csv_cannot_run_formulas(hostile):
    """Catches "=1+1" in a spreadsheet, and an apostrophe before a negative number."""
    rows = list(csv.reader(io.StringIO(to_csv(hostile))))
    assert [len(row) for row in rows] == [2] * 4
    assert rows[2] == ["'=1+1", "-5.0"]
    assert to_csv(hostile).encode()
