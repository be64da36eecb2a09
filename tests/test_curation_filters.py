"""The filters of `select`, one by one and as a chain: expected values are worked out by hand."""

import math
from typing import Any

import pytest

from rethinker_jax.curation.chain import describe, read_filters, run_chain
from rethinker_jax.curation.markers import cut_reasoning
from rethinker_jax.curation.openvlthinker import clean_answer, same_text, stated_answer
from rethinker_jax.curation.records import Group, Sample
from rethinker_jax.errors import UserError


def words(num: int) -> str:
    return " ".join(["word"] * num)


def sample(number: int, completion: str = "x", **fields: Any) -> Sample:
    return Sample(number, completion, fields.pop("verdict", "correct"), **fields)


def group(row: int, *samples: Sample, source: str = "s", **fields: Any) -> Group:
    right = sum(one.correct for one in samples)
    return Group(row, f"p{row}", source, samples, len(samples), right, **fields)


def left(groups: list[Group], *entries: Any, seed: int = 0) -> dict[int, list[int]]:
    """Row → numbers of the samples that the filters leave."""
    found, _ = run_chain(groups, read_filters(entries), seed)
    return {one.row: [each.number for each in one.samples] for one in found}


def test_correct_keeps_right_samples_and_drops_problems_without() -> None:
    """Catches a problem that stays although nothing of it is right, and a failure of the verifier taken for right."""
    groups = [
        group(0, sample(0), sample(1, verdict="wrong"), sample(2)),
        group(1, sample(0, verdict="timeout"), sample(1, verdict="bad_gold"), sample(2, verdict="no_answer")),
    ]
    assert left(groups, "correct") == {0: [0, 2]}


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"max": 3}, [0, 1]), ({"min": 3}, [1, 2]), ({"min": 3, "max": 3}, [1]), (3, [0, 1])],
)
def test_words_bounds_count_themselves(options: Any, kept: list[int]) -> None:
    """2, 3 and 5 words. Catches < for <=, and characters for words: by white space, however much of it."""
    groups = [group(0, sample(0, "a  b"), sample(1, "a\n\nb c"), sample(2, words(5)))]
    assert left(groups, {"words": options})[0] == kept


def test_tokens_and_truncation() -> None:
    groups = [
        group(0, sample(0, num_tokens=9, finish_reason="stop"), sample(1, num_tokens=10, finish_reason="length")),
        group(1, sample(0, num_tokens=11, finish_reason="stop_string")),
    ]
    assert left(groups, {"tokens": {"max": 10}}) == {0: [0, 1]}
    assert left(groups, "not_truncated") == {0: [0], 1: [0]}


@pytest.mark.parametrize("entry", ["not_truncated", {"tokens": {"max": 3}}, {"perplexity": {"max": 3}}])
def test_a_value_that_the_input_lacks_is_an_error(entry: Any) -> None:
    """Catches a sample that passes, or goes, because nobody knows its value."""
    with pytest.raises(UserError, match="sample 4 of the problem 'p7' has none"):
        left([group(7, sample(4))], entry)


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    """exp(ln 2) = 2, exp(ln 4) = 4; a mean of -1e9 overflows exp. Catches log2, and the sign."""
    means = [-math.log(2), -math.log(4), -1e9]
    groups = [group(0, *(sample(number, mean_log_prob=mean) for number, mean in enumerate(means)))]
    assert left(groups, {"perplexity": {"max": 3}})[0] == [0]
    assert left(groups, {"perplexity": {"min": 3}})[0] == [1, 2]
    assert left(groups, {"perplexity": 4.0001})[0] == [0, 1]


def test_reflection_by_whole_words_or_as_published() -> None:
    """Catches "awaits" as a second look by words, and its being missed by the published count of substrings."""
    groups = [group(0, sample(0, "Wait, no."), sample(1, "It awaits."), sample(2, "Plain."))]
    assert left(groups, {"reflection": {"keep": "with"}})[0] == [0]
    assert left(groups, {"reflection": "without"})[0] == [1, 2]
    assert left(groups, {"reflection": {"keep": "with", "by": "substring"}})[0] == [0, 1]


def test_format_is_that_of_the_reward() -> None:
    groups = [group(0, sample(0, r"so \boxed{3}"), sample(1, "<think>a</think>b<answer>3</answer>"))]
    assert left(groups, {"format": "boxed"})[0] == [0]
    assert left(groups, {"format": {"form": "think_prose_answer"}})[0] == [1]


# Words of the samples 0, 1, 2, ... → the sample that is picked. second_longest: sort, drop the last, take the last.
PICKS = [
    ("shortest", [3, 1, 2], 1),
    ("shortest", [2, 2], 0),
    ("longest", [3, 1, 2], 0),
    ("longest", [2, 2], 1),
    ("second_longest", [3, 1, 2], 2),
    ("second_longest", [5], 0),
    ("second_longest", [4, 9], 0),  # of two the shorter, not "the longest" as the code's own comment says
    ("second_longest", [7, 7, 1], 0),  # sorted: 1 (2), 7 (0), 7 (1); the last goes
    ("median", [3, 1, 2], 2),
    ("median", [4, 1, 2, 3], 2),  # sorted 1 2 3 4: the lower of 2 and 3
]


@pytest.mark.parametrize(("policy", "lengths", "picked"), PICKS)
def test_pick(policy: str, lengths: list[int], picked: int) -> None:
    """Catches an index off by one and characters for words: the shorter texts have the longer words."""
    samples = [sample(number, " ".join(["y" * (10 - length)] * length)) for number, length in enumerate(lengths)]
    assert left([group(0, *samples)], {"pick": policy})[0] == [picked]


def test_pick_all_and_random() -> None:
    """Random is a function of seed, problem and sample: it stays when another sample goes, and differs by problem."""
    groups = [group(row, *(sample(number, words(number + 1)) for number in range(8))) for row in range(40)]
    assert left(groups, {"pick": "all"})[3] == list(range(8))
    first, again = (left(groups, {"pick": "random"}, seed=1) for _ in range(2))
    assert first == again and first != left(groups, {"pick": "random"}, seed=2)
    assert len({found[0] for found in first.values()}) == 8  # 40 draws of 8: one is missing in 4 of 100 seeds
    for one in groups:
        others = [each for each in one.samples if each.number != (first[one.row][0] + 1) % 8]
        assert left([group(one.row, *others)], {"pick": "random"}, seed=1)[one.row] == first[one.row]


def test_pass_rate_is_of_all_samples_whatever_went_before() -> None:
    """2 of 4 are right. Catches a rate of those that are left, which is 1 after `correct`."""
    half = group(0, *(sample(number, verdict="correct" if number < 2 else "wrong") for number in range(4)))
    full, none = group(1, sample(0), sample(1)), group(2, sample(0, verdict="wrong"))
    groups = [half, full, none]
    assert list(left(groups, "correct", {"pass_rate": {"min": 0.2, "max": 0.8}})) == [0]
    assert list(left(groups, {"pass_rate": {"min": 0.5}})) == [0, 1]  # bounds count themselves
    assert list(left(groups, {"pass_rate": {"max": 0}})) == [2]


def test_per_source_is_balance_by_seed_and_id() -> None:
    """Catches the first rows of each source, an order other than that of the rows, and rows of a small source lost."""
    groups = [group(row, sample(0), source="big" if row % 5 else "small") for row in range(30)]
    kept = list(left(groups, {"per_source": 6}))
    assert kept == sorted(kept) and len(kept) == 12
    assert [row for row in kept if row % 5 == 0] == [0, 5, 10, 15, 20, 25]
    big = [row for row in kept if row % 5]
    assert big != [row for row in range(30) if row % 5][:6]
    assert big == [row for row in left(list(reversed(groups)), {"per_source": {"max": 6}}) if row % 5][::-1]
    assert kept != list(left(groups, {"per_source": 6}, seed=1))


def test_column_by_numbers_and_by_values() -> None:
    """-1 is ViRL39K's "unknown"; catches it, null and text as a number within bounds."""
    values = [0.5, -1.0, None, "0.5", 1, True]
    groups = [group(row, sample(0), columns={"rate": value}) for row, value in enumerate(values)]
    assert list(left(groups, {"column": {"column": "rate", "min": 0, "max": 1}})) == [0, 4]
    assert list(left(groups, {"column": {"column": "rate", "values": "0.5"}})) == [3]
    _, (step,) = run_chain(groups, read_filters([{"column": {"column": "rate", "min": 0}}]), 0)
    assert step.counts == {"without_value": 3}  # null, text, true


THOUGHT = "<think>\nA is 3. But wait, is it? Wait, yes.\n</think>\n\nSo 3.\n\n<answer>3</answer>"
CUTS = [
    # at the first marker in the text, not in the list; the break before the tag stays
    (THOUGHT, "<think>\nA is 3.\n</think>\n\nSo 3.\n\n<answer>3</answer>", ""),
    (THOUGHT.replace("But wait", "But the question"), "<think>\nA is 3.\n</think>\n\nSo 3.\n\n<answer>3</answer>", ""),
    ("A. Wait, B.</think><answer>3</answer>", "A.</think><answer>3</answer>", ""),  # templates may open the tag
    # behind the tag it is the solution, not the reasoning; other case is another marker
    ("<think>A</think>Wait, so <answer>3</answer>", None, "unchanged"),
    ("<think>A, wait, B</think><answer>3</answer>", None, "unchanged"),
    ("plain text, no marker", None, "unchanged"),
    (r"A. Wait, B. \boxed{3}", None, "no_tags"),
    ("<think> Wait, B</think><answer>3</answer>", None, "empty"),
    (r"<think>A. Wait, \boxed{3}</think>done", None, "answer_lost"),
    (r"<think>\boxed{2}. Wait, \boxed{3}</think>done", None, "answer_lost"),  # the answer would become 2
]


@pytest.mark.parametrize(("text", "wanted", "how"), CUTS)
def test_cut(text: str, wanted: str | None, how: str) -> None:
    """Catches a cut at the last marker, one outside the reasoning, and an answer that is lost or changed."""
    assert cut_reasoning(text) == (text if wanted is None else wanted, how)


def test_cut_drops_and_counts_what_it_cannot_cut() -> None:
    texts = [text for text, _, _ in CUTS]
    groups = [group(row, sample(0, text, mean_log_prob=-1.0, num_tokens=5)) for row, text in enumerate(texts)]
    kept, (step,) = run_chain(groups, read_filters(["cut"]), 0)
    assert [one.row for one in kept] == [0, 1, 2, 3, 4, 5]
    assert step.counts == {"cut": 3, "unchanged": 3, "no_tags": 1, "empty": 1, "answer_lost": 2}
    assert (kept[0].samples[0].num_tokens, kept[3].samples[0].num_tokens) == (None, 5)
    assert list(left(groups, {"cut": {"without_tags": "keep"}})) == [0, 1, 2, 3, 4, 5, 6]
    assert run_chain(groups[:1], read_filters([{"cut": "A is"}]), 0)[1][0].counts["empty"] == 1


# What the released generator makes of answers; the quirks are the point.
CLEANED = [
    ("Yes, it is.", "yes"),
    ("Eyes, ears", "yes"),  # a substring anywhere
    ("Volcano, lava", "no"),
    ("no. 7", "no"),
    ("No.", "no"),  # one full stop goes first
    ("7..", "7."),
    ("B (the cat)", "b"),
    ("(B) the cat", "(b) the cat"),  # nothing stands before the bracket
    ("f(x", "f(x"),  # a bracket that does not close
    ("3 or 4", "3"),
    ("x is 3 is 4", "4"),  # behind the last " is "
    ("x = 5 ≈ 5.1", "5.1"),
    ("x=5", "x=5"),  # spaces belong to the sign
    ("the area is 12 cm", "12"),
    ("5 kilograms", "5 kilo"),  # "gram" is looked for before "kilogram"
    ("5 kilometers", "5 kilo"),
    ("3 days or 4", "3"),
    ("Monday", "mon"),
    ("12 degrees", "12"),
    ("90°", "90°"),
]


@pytest.mark.parametrize(("answer", "cleaned"), CLEANED)
def test_clean_answer(answer: str, cleaned: str) -> None:
    assert clean_answer(answer) == cleaned


def test_stated_answer() -> None:
    """Behind the last opening tag; without an opening tag everything; without a closing one nothing."""
    assert stated_answer("<answer>1</answer> <answer>\n2 \n</answer> end") == "2"
    assert stated_answer("7 </answer>") == "7"
    assert stated_answer("<answer>7") is None
    assert stated_answer("a </answer> <answer>7") == "7"


def test_same_text() -> None:
    """Catches a range that goes on to the grader, and "-3" or "1-2" (short) that do not."""
    assert same_text("cat", "Cat") is True
    assert same_text("1990-95", "1990-96") is False
    assert same_text("1-3", "1-2") is None
    assert same_text("3.0", "3") is None


def test_correct_by_openvlthinker_reads_its_own_answer() -> None:
    """Catches the verifier's verdict taken for the generator's."""
    groups = [group(0, sample(0, same_answer=False), sample(1, verdict="wrong", same_answer=True))]
    assert left(groups, {"correct": {"rule": "openvlthinker_v1_2"}})[0] == [1]


def test_a_chain_counts_what_goes_in_and_out_by_source() -> None:
    """
    source a: p0 has samples right, right, wrong; p1 wrong, wrong. source b: p2 right (long).
    correct:   3 problems, 6 samples -> p0 (2), p2 (1); a 5 -> 2 samples
    words <= 2: p2 goes; 2 problems, 3 samples -> 1, 2
    shortest:  2 samples -> 1
    """
    groups = [
        group(0, sample(0, words(2)), sample(1, words(1)), sample(2, words(1), verdict="wrong"), source="a"),
        group(1, sample(0, verdict="wrong"), sample(1, verdict="wrong"), source="a"),
        group(2, sample(0, words(9)), source="b"),
    ]
    kept, steps = run_chain(groups, read_filters(["correct", {"words": {"max": 2}}, {"pick": "shortest"}]), 0)
    assert [(one.row, [each.number for each in one.samples]) for one in kept] == [(0, [1])]
    flows = [(s.flow.problems_in, s.flow.problems_out, s.flow.samples_in, s.flow.samples_out) for s in steps]
    assert flows == [(3, 2, 6, 3), (2, 1, 3, 2), (1, 1, 2, 1)]
    assert [describe(s.filter) for s in steps] == ["correct", "words: max 2", "pick: policy shortest"]
    assert (steps[0].per_source["a"].pass_rate, steps[0].per_source["b"].pass_rate) == (2 / 5, 1.0)
    assert (steps[1].per_source["b"].problems_in, steps[1].per_source["b"].problems_out) == (1, 0)
    assert set(steps[2].per_source) == {"a"}
    assert len(groups[0].samples) == 3  # the records that went in are as they were


REFUSED = [
    (["corect"], "filter 1: 'corect': no such filter; did you mean correct?"),
    (["correct", {"words": {"most": 3}}], "filter 2: words: 'most': no such option"),
    ([{"words": {"max": "500"}}], "words: max:"),
    ([{"words": {"max": True}}], "words: max:"),
    ([{"words": {"max": 0}}], "words: max:"),
    (["words"], "words: wanted min or max"),
    ([{"pass_rate": {"min": 0.8, "max": 0.2}}], "min is above max"),
    ([{"pass_rate": {"min": 20}}], "pass_rate: min:"),
    ([{"pass_rate": {"min": float("nan")}}], "pass_rate: min:"),
    ([{"pick": "third"}], "pick: policy:"),
    (["pick"], "pick: policy:"),
    ([{"cut": {"at": []}}], "cut: at:"),
    ([{"cut": {"at": [""]}}], "cut: at"),
    ([{"not_truncated": 3}], "not_truncated has no options"),
    ([{"correct": {}, "cut": {}}], "wanted a name, or one name with its options"),
    ([3], "wanted a name, or one name with its options"),
    (["cut", {"perplexity": 9}], "perplexity stands after cut"),
    ([{"column": "rate"}], "wanted min, max or values"),
]


@pytest.mark.parametrize(("entries", "message"), REFUSED)
def test_filters_that_cannot_be_used_are_refused_by_place_and_name(entries: list[Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_filters(entries)
    assert message in str(error.value)


def test_all_problems_of_a_list_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        read_filters(["corect", {"pick": "third"}])
    assert "filter 1" in str(error.value) and "filter 2" in str(error.value)


def test_filters_are_described_by_what_is_not_the_default() -> None:
    (one,) = read_filters([{"cut": {"at": ["Hm,", "No,"], "without_tags": "drop"}}])
    assert describe(one) == "cut: at Hm, | No,"
