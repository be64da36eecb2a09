"""Reflection ratios, forced second looks, formats and chains of sub-questions, all on counts done by hand."""

import pytest
from benchmark_cases import record, samples

from rethinker_jax.benchmarks.consistency_scores import chain_scores
from rethinker_jax.benchmarks.formats import format_rates, mean_tokens, verdict_counts
from rethinker_jax.benchmarks.groups import group_records
from rethinker_jax.benchmarks.reflection import (
    MAYE_WORDS,
    has_substring,
    has_word,
    maye_ratios,
    reflection_numbers,
    word_counts,
)
from rethinker_jax.benchmarks.second_look import second_look
from rethinker_jax.errors import UserError


@pytest.mark.parametrize(
    "text, substring, word",
    [
        ("Wait, that is wrong.", True, True),
        ("We await the result of yeti.", True, False),
        ("Let me Re-Check this", True, True),
        ("rechecking", True, False),
        ("try  again", False, False),  # two spaces: MAYE's code looks for one
        ("All is well.", False, False),
    ],
)
def test_words_as_maye_counts_and_as_words(text, substring, word):
    """Catches a "bug-compatible" count that is not: MAYE finds "wait" in "await"; and one that is case-sensitive."""
    assert (has_substring(text), has_word(text)) == (substring, word)


def test_the_fifteen_words():
    """Catches a list that lost or gained a word: the ratios would no longer compare."""
    assert len(set(MAYE_WORDS)) == 15
    assert all(has_substring(word) and has_word(word) for word in MAYE_WORDS)


def test_the_five_ratios():
    """Catches exchanged numerators and a mean of ratios. Of 10: 6 right, 3 reflect, of these 2 right."""
    texts = ["wait"] * 2 + ["fine"] * 4 + ["wait"] + ["fine"] * 3
    records = [record("q", i, "correct" if i < 6 else "wrong", completion=text) for i, text in enumerate(texts)]
    assert maye_ratios(records, has_substring) == {
        "reflection_ratio": 3 / 10,
        "reflection_ratio_in_correct_answers": 2 / 6,
        "reflection_ratio_in_incorrect_answers": 1 / 4,
        "correct_ratio_in_reflection_texts": 2 / 3,
        "correct_ratio_in_no_reflection_texts": 4 / 7,
    }
    assert set(maye_ratios([], has_word).values()) == {0.0}


def test_word_counts_and_the_other_ratios():
    """Catches occurrences counted once a text. "wait," and "alternatively" are VL-Rethinker's, plain "wait" is not."""
    records = [
        record("a", completion="Wait, wait a bit. Yet no."),
        record("b", completion="I wait"),
        record("c", completion="Alternatively, ..."),
        record("d", completion="Done"),
    ]
    counts = word_counts(records)
    assert (counts["wait"], counts["yet"], sum(counts.values())) == (3, 1, 4)
    numbers = reflection_numbers(records)
    assert numbers["rethinking_ratio"] == 2 / 4  # a, c
    assert numbers["rethink_ratio"] == 3 / 4  # a, b, c


def forced(id, before, after, **others):
    return record(
        id,
        0,
        before,
        "3",
        forced="... wait ...",
        forced_verdict=after,
        forced_extracted="3",
        forced_num_tokens=9,
        **others,
    )


def test_second_looks_by_hand():
    """Catches an accuracy over the forced samples alone, transitions turned round, and failures dropped.

    Five items: right→right, right→wrong, wrong→right, wrong→no answer, and one right that was not looked at again.
    """
    records = [
        forced("a", "correct", "correct"),
        forced("b", "correct", "wrong"),
        forced("c", "wrong", "correct"),
        forced("d", "wrong", "no_answer"),
        record("e"),
    ]
    found = second_look(group_records(records))
    assert found is not None and found.num_forced == 4
    transitions = (found.right_to_right, found.right_to_wrong, found.wrong_to_right, found.wrong_to_wrong)
    assert transitions == (1, 1, 1, 1)
    assert (found.before.value, found.after.value, found.oracle.value) == (0.6, 0.6, 0.8)  # abe, ace, abce
    assert found.gain.value == pytest.approx(0.0) and found.gain.low < 0 < found.gain.high
    assert (found.changed_answers, found.more_tokens) == (0, 4)


def test_no_second_look():
    assert second_look(group_records([record()])) is None


def test_formats_by_hand():
    r"""Catches \boxed{} taken for an answer, one box counted as several, and a limit on tokens taken for an end."""
    records = [
        record("a", completion="so \\boxed{1}"),
        record("b", completion="\\boxed{1} then, after more thought, \\boxed{2}"),
        record("c", 0, "no_answer", completion="\\boxed{ }", finish_reason="length", num_tokens=9),
        record("d", completion="<answer>5</answer>"),
        record("e", 0, "timeout", completion="round and " * 200 + "\\boxed{2"),
    ]
    rates = format_rates(records)
    assert rates["box"] == 2 / 5 and rates["several_boxes"] == 1 / 5 and rates["empty_box"] == 1 / 5
    assert rates["answer_tag"] == 1 / 5 and rates["end_token"] == 4 / 5 and rates["looping"] == 1 / 5
    assert rates["repeated_ngrams"] == pytest.approx(1 / 5, abs=0.01)  # e alone, nearly all of it
    counts = verdict_counts(records)
    assert counts == {"correct": 3, "wrong": 0, "no_answer": 1, "bad_gold": 0, "timeout": 1, "crash": 0}
    assert mean_tokens(records) == {"all": 29 / 5, "correct": 5, "not_correct": 7}


def chain(name, final, *steps):
    found = samples(f"{name}-final", final, categories={"chain": name, "role": "final"})
    for number, step in enumerate(steps):
        found += samples(f"{name}-{number}", step, categories={"chain": name, "role": "step"})
    return found


def test_forward_and_backward_consistency():
    """Catches the two conditions exchanged, and one right step taken for all.

    Final right: w, x; all steps right: w, y, z; both: w. C_f = 1/3, C_b = 1/2.
    """
    records = chain("w", "+", "+", "+") + chain("x", "+", "+", "-") + chain("y", "-", "+", "+") + chain("z", "-", "+")
    found = chain_scores(group_records([*records, record("alone")]))
    assert found is not None and found.num_chains == 4
    assert (found.final.value, found.steps.value, found.both.value) == (0.5, 0.75, 0.25)
    assert found.forward is not None and found.forward.value == pytest.approx(1 / 3)
    assert found.backward is not None and found.backward.value == 0.5


def test_chains_pair_samples_by_number():
    """Catches shares multiplied: final +-, step -+ are never right together."""
    found = chain_scores(group_records(chain("w", "+-", "-+")))
    assert found is not None and found.both.value == 0
    assert found.forward is not None and found.forward.value == 0
    none = chain_scores(group_records(chain("w", "+", "-")))
    assert none is not None and none.forward is None


def test_incomplete_chains_are_counted_apart():
    """Catches a chain that lost its steps and counts as consistent, and a result lost to one unusable row."""
    steps_only = samples("s", "+", categories={"chain": "s", "role": "step"})
    found = chain_scores(group_records(chain("w", "-", "+") + chain("x", "+") + steps_only))
    assert found is not None and (found.num_chains, found.num_incomplete, found.final.value) == (1, 2, 0)
    assert chain_scores(group_records(chain("x", "+"))) is None


@pytest.mark.parametrize(
    "records",
    [
        chain("w", "++", "+"),
        chain("w", "+", "+") + samples("o", "+", categories={"chain": "w"}),
        chain("w", "+", "+") + samples("o", "+", categories={"chain": "w", "role": "final"}),
    ],
)
def test_broken_chains_are_refused(records):
    """Catches other numbers of samples, an item without a role and two final questions that are passed over."""
    with pytest.raises(UserError, match="chain 'w'"):
        chain_scores(group_records(records))
