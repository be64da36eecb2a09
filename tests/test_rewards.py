"""The built-in reward terms against values worked out by hand, hacks and degenerate inputs among them."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from hypothesis import given as for_all
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rethinker_jax.config_rewards import (
    REWARD_TERMS,
    BoxesConfig,
    CitationConfig,
    FormatConfig,
    LanguageConfig,
    LengthConfig,
    OcrConfig,
    RepetitionConfig,
    RewardConfig,
    SoftOverlongConfig,
)
from rethinker_jax.errors import UserError
from rethinker_jax.rewards.grounding import answer_as_seen
from rethinker_jax.rewards.inputs import ImageSize, RewardInput, terms_of
from rethinker_jax.rewards.terms import JUDGE, TERMS, add_part, check_row, weigh
from rethinker_jax.rewards.words import common_subsequence, edit_distance, words
from rethinker_jax.types import Problem, Verdict
from rethinker_jax.verify.extract import extract
from rethinker_jax.verify.judge import judge

BOX = r"so \boxed{5}"
TAGS = "<think>a</think><answer>5</answer>"


def given(
    response: str = "",
    answer: str = "5",
    *,
    stopped: bool = True,
    forced: bool = False,
    num_tokens: int = 0,
    images: tuple[ImageSize, ...] = (),
    row: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RewardInput:
    """A response as the verifier judges it."""
    problem = Problem("row-1", "q", answer, row=row or {})
    return RewardInput(
        judge(response, answer),
        response,
        problem,
        stopped,
        forced,
        num_tokens,
        images,
        settings=RewardConfig(**settings),
    )


def answered(text: str, answer: str, **more: Any) -> RewardInput:
    return given(f"<answer>{text}</answer>", answer, **more)


def test_every_built_in_name_of_the_config_has_a_function() -> None:
    """Catches a term that the config accepts and nothing computes, and one that cannot be named."""
    assert {*TERMS, JUDGE} == set(REWARD_TERMS)


VERDICT_TERMS = [
    ("accuracy", given(BOX), 1.0),
    ("accuracy", given(r"\boxed{6}"), 0.0),
    ("accuracy", given(BOX, stopped=False), 1.0),
    ("accuracy", given(""), 0.0),
    ("vl_rethinker_code", given(BOX), 1.0),
    ("vl_rethinker_code", given("Wait, " + BOX), 1.1),
    ("vl_rethinker_code", given("Wait, " * 3 + BOX), 0.4),  # 1 - 0.2 x 3
    ("vl_rethinker_code", given("wait, alternatively wait a " + BOX), 0.4),
    ("vl_rethinker_code", given("Wait, " * 6 + BOX), -0.1),  # more than five: invalid
    ("vl_rethinker_code", given("Wait, " + BOX, stopped=False), -0.1),  # the code paid 1.1 here
    ("vl_rethinker_code", given("Wait, " + BOX, forced=True), 1.0),
    ("vl_rethinker_code", given(r"Wait, \boxed{6}"), 0.0),
    ("openvlthinker", given("<think>a</think> So 5. <answer>5</answer>"), 1.0),
    ("openvlthinker", given(TAGS), 0.5),  # right, but nothing between thought and answer
    ("openvlthinker", given("<think>a</think>\n\n<answer>5</answer>"), 0.5),
    ("openvlthinker", given("<answer>5</answer>"), 1.0),  # no thought, no rule
    ("openvlthinker", given("<think>a</think> x <answer>\n5\n</answer>"), 0.0),  # no DOTALL: the whole response counts
    ("openvlthinker", given(BOX), 0.0),  # a box alone is no answer
    ("openvlthinker", given(" 5 "), 1.0),  # the whole response is the answer
    ("openvlthinker", given("<answer>6</answer> x <answer>5</answer>"), 0.0),  # the first tag counts, not the last
    ("openvlthinker", given("<answer>5</answer> x <answer>6</answer>"), 1.0),  # as it stands: a way to hedge
    ("openvlthinker", given("<think>a</think> b </think><answer>5</answer>"), 0.5),  # the last </think>
    ("openvlthinker", given("x <answer>10/2</answer>"), 1.0),  # equal by the verifier
    ("openvlthinker", given("x <answer>yes</answer>", "Yes"), 1.0),
    ("openvlthinker", given(r"x <answer>5</answer> \boxed{6}"), 1.0),  # a box elsewhere is not looked at
]


@pytest.mark.parametrize(("term", "given", "value"), VERDICT_TERMS)
def test_terms_by_the_verdict(term: str, given: RewardInput, value: float) -> None:
    assert TERMS[term](given) == pytest.approx(value)


FORMS = [
    ("boxed", BOX, 1.0),
    ("boxed", r"\boxed{}", 0.0),
    ("boxed", r"\boxed{ $ }", 0.0),
    ("boxed", "<answer>5</answer>", 0.0),
    ("boxed", r"\boxed{5", 0.0),
    ("boxed", "", 0.0),
    ("think_answer", TAGS, 1.0),
    ("think_answer", " <think>a\nb</think>\n<answer>5\n</answer>\n", 1.0),
    ("think_answer", "<think>a</think> So 5. <answer>5</answer>", 0.0),
    ("think_answer", "<think></think><answer></answer>", 0.0),  # the published pattern pays for empty structure
    ("think_answer", "<think>a</think><answer>5</answer><answer>6</answer>", 0.0),  # and for two answers
    ("think_answer", "<think><think>a</think><answer>5</answer>", 0.0),
    ("think_answer", "x " + TAGS, 0.0),
    ("think_answer", TAGS + " x", 0.0),
    ("think_answer", "<answer>5</answer><think>a</think>", 0.0),
    ("think_answer", "<think>a<answer>5</answer></think>", 0.0),
    ("think_prose_answer", "<think>a</think> So 5. <answer>5</answer>", 1.0),
    ("think_prose_answer", TAGS, 0.0),
    ("think_boxed", r"<think>a</think> \boxed{5}", 1.0),
    ("think_boxed", r"<think>a \boxed{5}</think>", 0.0),  # the box is in the thought
    ("think_boxed", r"a</think> \boxed{5}", 0.0),
    ("think_answer_box", "<think>a</think><answer>[1, 2, 3, 4]</answer>", 1.0),
    ("think_answer_box", '<think>a</think><answer>[{"bbox_2d": [1, 2, 3, 4]}]</answer>\n', 1.0),
    ("think_answer_box", "<think>a</think><answer>[1, 2, 1, 4]</answer>", 0.0),  # a box without width
    ("think_answer_box", "<think>a</think> x <answer>[1, 2, 3, 4]</answer>", 0.0),
    ("think_answer_box", TAGS, 0.0),
]


@pytest.mark.parametrize(("form", "response", "value"), FORMS)
def test_format(form: Any, response: str, value: float) -> None:
    assert TERMS["format"](given(response, format=FormatConfig(form))) == value
    assert TERMS["format"](given(response, stopped=False, format=FormatConfig(form))) == 0.0


NUMBERS = [
    ("digit", "5", "5", 1.0),
    ("digit", "$5.0$", "5", 1.0),
    ("digit", "1,000.", "1000", 1.0),
    ("digit", "−3", "-3", 1.0),
    ("digit", "five", "5", 0.0),
    ("digit", "5 or 6", "5", 0.0),
    ("digit", "10/2", "5", 0.0),
    ("digit", "9007199254740993", "9007199254740992", 0.0),  # equal as floats
    ("digit", "1e999", "5", 0.0),
    ("digit", "9" * 100_000, "5", 0.0),
    ("digit", "e5", "5", 0.0),
    ("digit", "nan", "5", 0.0),
    ("regression", "8", "10", 0.8),  # 1 - 2/10
    ("regression", "12", "10", 0.8),
    ("regression", "-10", "10", 0.0),
    ("regression", "30", "10", 0.0),
    ("regression", "8", "-10", 0.0),  # 18/10, clipped
    ("regression", "0", "0", 1.0),
    ("regression", "0.0001", "0", 0.0),  # no division by zero
    ("regression", "inf", "10", 0.0),
    ("regression", "1e999", "10", 0.0),
    ("regression", "about 10", "10", 0.0),
    ("regression", "2.5e1", "25", 1.0),
]


@pytest.mark.parametrize(("term", "text", "gold", "value"), NUMBERS)
def test_terms_by_the_number(term: str, text: str, gold: str, value: float) -> None:
    assert TERMS[term](answered(text, gold)) == pytest.approx(value)


WORDS = [
    ("ocr", "the cat sat", "the cat sat", 1.0),
    ("ocr", "the  cat\nsat", "the cat sat", 1.0),
    ("ocr", "the cat", "the cat sat", 2 / 3),  # one of three words is missing
    ("ocr", "a cat sat", "the cat sat", 2 / 3),
    ("ocr", "cat the sat", "the cat sat", 1 / 3),  # two replaced
    ("ocr", "The cat sat", "the cat sat", 2 / 3),  # case counts when text is read
    ("ocr", "the cat sat " * 9, "the cat sat", 0.0),  # repeating does not help
    ("ocr", "x " * 9000, "the cat sat", 0.0),
    ("rouge", "the cat sat", "the cat sat", 1.0),
    ("rouge", "The cat, sat!", "the cat sat", 1.0),
    # unigrams 2 of 3 and 2: 2*2/5 = 0.8; bigrams "the cat" of 2 and 1: 2*1/3; subsequence 2: 0.8
    ("rouge", "the cat", "the cat sat", (0.8 + 2 / 3 + 0.8) / 3),
    # unigrams 3 of 3: 1; no bigram shared; longest subsequence 1 word ("sat", "cat" or "the"): 2*1/6
    ("rouge", "sat cat the", "the cat sat", (1 + 0 + 1 / 3) / 3),
    ("rouge", "cats", "cat", 0.0),  # whole words
    ("rouge", "cat", "cat", 1.0),  # no bigram in the gold: the mean of the other two
    # unigrams: 1 shared of 1 and 4: 2*1/5; subsequence the same
    ("rouge", "cat cat cat cat", "cat", 0.4),
    ("rouge", "!!!", "cat", 0.0),
    ("rouge", "猫在垫子", "猫在垫子", 1.0),
    ("rouge", "x " * 9000, "cat sat", 0.0),
]


@pytest.mark.parametrize(("term", "text", "gold", "value"), WORDS)
def test_terms_by_the_words(term: str, text: str, gold: str, value: float) -> None:
    assert TERMS[term](answered(text, gold)) == pytest.approx(value)


def test_terms_by_the_words_without_an_answer() -> None:
    """A response without box or tag is not searched for the right words."""
    for term in ("ocr", "rouge"):
        assert TERMS[term](given("the cat sat", "the cat sat")) == 0.0


def test_ocr_by_characters() -> None:
    # "kitten" → "sitting": 3 edits over the 7 characters of the gold
    assert TERMS["ocr"](answered("kitten", "sitting", ocr=OcrConfig("character"))) == pytest.approx(4 / 7)


def box_json(*boxes: tuple[Sequence[float], str]) -> str:
    return json.dumps([{"bbox_2d": box} | ({"label": label} if label else {}) for box, label in boxes])


A, B, C = [0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]
HALF_A = [0, 0, 10, 5]  # IoU with A: 50/100
DEGENERATE = [5, 5, 5, 9]
IOU = [
    ("[0, 0, 10, 10]", "[0, 0, 10, 10]", 1.0),
    ("[0, 0, 10, 5]", "[0, 0, 10, 10]", 0.5),
    ("[5, 0, 15, 10]", "[0, 0, 10, 10]", 1 / 3),  # 50 / 150; the +1 pixel convention gives another value
    ("[20, 20, 30, 30]", "[0, 0, 10, 10]", 0.0),
    ("[10, 10, 0, 0]", "[0, 0, 10, 10]", 0.0),  # corners swapped
    ("[5, 5, 5, 5]", "[0, 0, 10, 10]", 0.0),  # no area: no division by zero
    ("[0, 0, 10]", "[0, 0, 10, 10]", 0.0),
    ("[-99999, -99999, 99999, 99999]", "[0, 0, 10, 10]", 100 / 199998**2),  # the whole world covers little
    ("none", "[0, 0, 10, 10]", 0.0),
    (box_json((A, ""), (B, "")), box_json((B, ""), (A, "")), 1.0),  # in any order
    (box_json((A, ""), (A, "")), box_json((A, ""), (B, "")), 0.5),  # a box is paired once
    (box_json((A, ""), (B, ""), (C, "")), box_json((A, "")), 1 / 3),  # more boxes cost
    (box_json((HALF_A, ""), (B, "")), box_json((A, ""), (B, "")), 0.75),
    (box_json((A, "dog")), box_json((A, "cat")), 0.0),
    (box_json((A, "Cat")), box_json((A, "cat")), 1.0),
    (box_json((A, "")), box_json((A, "cat")), 1.0),  # a missing label is no other label
    (box_json((A, ""), (DEGENERATE, "")), box_json((A, "")), 0.0),
    (box_json(*[(A, "")] * 65), box_json((A, "")), 0.0),  # more boxes than are read
    ("None", "None", 1.0),
    ("[0, 0, 10, 10]", "None", 0.0),
    ("[0, 0, 10, 10]" * 5000, "[0, 0, 10, 10]", 0.0),
]


@pytest.mark.parametrize(("text", "gold", "value"), IOU)
def test_iou(text: str, gold: str, value: float) -> None:
    assert TERMS["iou"](answered(text, gold)) == pytest.approx(value)


# (response, gold, map, odLength)
MAP = [
    (box_json((A, "cat")), box_json((A, "cat")), 1.0, 1.0),
    (box_json((HALF_A, "cat")), box_json((A, "cat")), 0.1, 0.1),  # IoU 0.5 reaches one of the ten thresholds
    # two of two found, one too many: precision 2/3, recall 1; odLength times 2/3. COCO's order of listing gives 1 here.
    (box_json((A, "cat"), (B, "cat"), (C, "cat")), box_json((A, "cat"), (B, "cat")), 2 / 3, 4 / 9),
    (box_json((C, "cat"), (A, "cat"), (B, "cat")), box_json((A, "cat"), (B, "cat")), 2 / 3, 4 / 9),  # in any order
    (box_json((A, "cat")), box_json((A, "cat"), (B, "cat")), 0.5, 0.5),  # precision 1, recall 1/2; no length factor
    (box_json((A, "cat"), (B, "dog")), box_json((A, "cat")), 0.5, 0.25),  # a label of no gold: VLM-R1 drops it
    (box_json((A, "dog")), box_json((A, "cat")), 0.0, 0.0),
    (box_json((A, "")), box_json((A, "cat")), 0.0, 0.0),  # detection wants the label
    (box_json((A, "cat")), box_json((A, "")), 1.0, 1.0),  # a gold without labels has one class
    (box_json((A, "cat"), (B, "dog")), box_json((A, "cat"), (B, "dog")), 1.0, 1.0),
    (box_json(*[(A, "cat")] * 50), box_json((A, "cat")), 1 / 50, 1 / 2500),
    ("None", "None", 1.0, 1.0),
    ("[]", "None", 1.0, 1.0),
    (box_json((A, "cat")), "None", 0.0, 0.0),
    ("None", box_json((A, "cat")), 0.0, 0.0),
    ("a cat", box_json((A, "cat")), 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "gold", "precision", "length"), MAP)
def test_mean_average_precision_and_od_length(text: str, gold: str, precision: float, length: float) -> None:
    assert TERMS["map"](answered(text, gold)) == pytest.approx(precision)
    assert TERMS["od_length"](answered(text, gold)) == pytest.approx(length)


def test_boxes_are_converted_from_resized_to_original_pixels() -> None:
    """Catches IoU between two coordinate systems, width taken for height, and a factor upside down.

    The image of 200 x 100 was resized to 100 x 100, so the gold [100, 0, 200, 50] is [50, 0, 100, 50] to the model.
    """
    images = (ImageSize((200, 100), (100, 100)),)
    gold = "[100, 0, 200, 50]"
    assert TERMS["iou"](answered("[50, 0, 100, 50]", gold, images=images)) == pytest.approx(1.0)
    # [100, 0, 200, 50] means [200, 0, 400, 50] in original pixels: no overlap
    assert TERMS["iou"](answered(gold, gold, images=images)) == 0.0
    as_answer = BoxesConfig("as_answer")
    assert TERMS["iou"](answered(gold, gold, images=images, boxes=as_answer)) == pytest.approx(1.0)
    assert TERMS["iou"](answered(gold, gold, images=(ImageSize((0, 0), (0, 0)),))) == pytest.approx(1.0)
    # The verifier compares what is written: it gets the gold as the model would have to write it.
    problem = Problem("r", "q", gold, type="bbox")
    seen = answer_as_seen(problem, images, RewardConfig())
    assert judge(r"\boxed{[50, 0, 100, 50]}", seen, type="bbox").correct
    assert not judge(rf"\boxed{{{gold}}}", seen, type="bbox").correct
    assert answer_as_seen(problem, images, RewardConfig(boxes=as_answer)) == gold
    assert answer_as_seen(Problem("r", "q", "5"), images, RewardConfig()) == "5"


LENGTH = LengthConfig("cosine", 100, correct_short=1.0, correct_long=0.5, wrong_short=-1.0, wrong_long=-0.2, over=-2.0)
LINEAR = LengthConfig("linear", 100, correct_short=1.0, correct_long=0.5, wrong_short=-1.0, wrong_long=-0.2, over=-2.0)
SHAPED = [
    ("length", given(BOX, num_tokens=0, length=LENGTH), 1.0),
    ("length", given(BOX, num_tokens=50, length=LENGTH), 0.75),  # half way: cos(pi/2) = 0
    # a quarter: 0.5 + 0.25 * (1 + cos(pi/4)) = 0.5 + 0.25 * 1.70711
    ("length", given(BOX, num_tokens=25, length=LENGTH), 0.926777),
    ("length", given(BOX, num_tokens=25, length=LINEAR), 0.875),
    ("length", given("x", num_tokens=0, length=LENGTH), -1.0),  # the peer's code pays a wrong answer as a right one
    ("length", given("x", num_tokens=50, length=LENGTH), -0.6),
    ("length", given(BOX, num_tokens=100, length=LENGTH), -2.0),
    ("length", given(BOX, num_tokens=10**6, length=LENGTH), -2.0),
    ("length", given("x", num_tokens=5, length=LengthConfig(max_tokens=10, wrong_short=3, wrong_long=3)), 0.0),
    ("length", given("x", num_tokens=50, length=LengthConfig(max_tokens=10, over=3)), 0.0),
    ("length", given(BOX, num_tokens=5), -0.5),  # no room at all: over, and no division by zero
    # DAPO's eq. 13 with its numbers: free up to 16384, then linear to -1 at 20480
    ("soft_overlong", given(num_tokens=16384, soft_overlong=SoftOverlongConfig(20480, 4096)), 0.0),
    ("soft_overlong", given(num_tokens=17408, soft_overlong=SoftOverlongConfig(20480, 4096)), -0.25),
    ("soft_overlong", given(num_tokens=20480, soft_overlong=SoftOverlongConfig(20480, 4096)), -1.0),
    ("soft_overlong", given(num_tokens=99999, soft_overlong=SoftOverlongConfig(20480, 4096)), -1.0),
    ("soft_overlong", given(num_tokens=0, soft_overlong=SoftOverlongConfig(20480, 4096)), 0.0),
    # "a b a b a": bigrams ab ba ab ba: 2 distinct of 4
    ("repetition", given("a b A b\na", repetition=RepetitionConfig(2)), -0.5),
    ("repetition", given("a b c d", repetition=RepetitionConfig(2)), 0.0),
    ("repetition", given("a", repetition=RepetitionConfig(2)), 0.0),
    ("repetition", given("", repetition=RepetitionConfig(2)), 0.0),
    ("repetition", given("a " * 101, repetition=RepetitionConfig(2)), -0.99),  # 1 distinct of 100
    ("repetition", given("a" * 16 * 101, repetition=RepetitionConfig(2)), -0.99),  # without spaces, in pieces of 16
    ("repetition", given("的" * 101, repetition=RepetitionConfig(2)), -0.99),
    ("language", given("abc"), 1.0),
    ("language", given("ab 你好"), 0.5),
    ("language", given("ab 你好", language=LanguageConfig("han")), 0.5),
    ("language", given(r"\frac{1}{2} 你好", language=LanguageConfig("han")), 1.0),  # LaTeX is in no language
    ("language", given("привет", language=LanguageConfig("cyrillic")), 1.0),
    ("language", given("émile"), 1.0),
    ("language", given("12345 !!!"), 0.0),  # saying nothing earns nothing
    ("language", given(""), 0.0),
]


@pytest.mark.parametrize(("term", "given", "value"), SHAPED)
def test_shaping(term: str, given: RewardInput, value: float) -> None:
    assert TERMS[term](given) == pytest.approx(value, abs=1e-6)


CREDIT = CitationConfig(form="credit")
GOLD = {"citations": ["1", 3]}
CITED = [
    ("<citations>1, 3</citations>", {}, GOLD, 1.0),
    ("<citations>[3] and [1]</citations>", {}, GOLD, 0.8),  # "and" is a name too: 2*2/(2+3)
    ("<citations>1</citations>", {}, GOLD, 2 / 3),
    ("<citations>1, 1, 1</citations>", {}, GOLD, 2 / 3),  # counted once
    ("<citations>1 2 3 4</citations>", {}, GOLD, 2 / 3),
    ("<citations>7</citations>", {}, GOLD, 0.0),
    ("<citations></citations>", {}, GOLD, 0.0),
    ("1, 3", {}, GOLD, 0.0),
    ("<citations>1, 3</citations> <citations>7</citations>", {}, GOLD, 0.0),  # the last one counts
    ("<citations>1, 3", {}, GOLD, 0.0),
    (f"<citations>{' '.join(map(str, range(1000)))}</citations>", {}, GOLD, 0.0),  # every document there is
    ("<citations></citations>", {}, {"citations": []}, 1.0),
    ("<citations>1</citations>", {}, {"citations": []}, 0.0),
    ("<citations>1, 3</citations>", {"citation": CREDIT}, GOLD, 5.0),
    ("<citations>1, 7, 8</citations>", {"citation": CREDIT}, GOLD, -1.5),  # 5 * 1/2 - 2 * 2
    ("<citations></citations>", {"citation": CREDIT}, {"citations": []}, 5.0),
    ("<d>a-1</d>", {"citation": CitationConfig("docs", "d")}, {"docs": ("a-1",)}, 1.0),
]


@pytest.mark.parametrize(("response", "settings", "row", "value"), CITED)
def test_citations(response: str, settings: dict[str, Any], row: dict[str, Any], value: float) -> None:
    assert TERMS["citation_f1"](given(response, row=row, **settings)) == pytest.approx(value)


BAD_ROWS = [
    ("iou", "cat", {}, "boxes"),
    ("map", "[1, 1, 1, 1]", {}, "boxes"),
    ("digit", "cat", {}, "number in digits"),
    ("regression", "1/2", {}, "number in digits"),
    ("citation_f1", "5", {}, "'citations'"),
    ("citation_f1", "5", {"citations": "1, 3"}, "'citations'"),
]


@pytest.mark.parametrize(("term", "answer", "row", "part"), BAD_ROWS)
def test_a_gold_of_another_kind_is_named_and_never_silently_0(
    term: str, answer: str, row: dict[str, Any], part: str
) -> None:
    problem = Problem("row-1", "q", answer, row=row)
    assert part in check_row(problem, RewardConfig(terms={term: 1.0}))
    with pytest.raises(UserError, match="row-1"):
        TERMS[term](given(r"\boxed{1}", answer, row=row))


def test_a_good_row_is_not_refused() -> None:
    assert check_row(Problem("r", "q", "None"), RewardConfig(terms={"map": 1.0})) == ""
    assert check_row(Problem("r", "q", r"\boxed{7}"), RewardConfig(terms={"digit": 1.0})) == ""
    assert check_row(Problem("r", "q", "cat"), RewardConfig(by_type={"bbox": {"iou": 1.0}})) == ""
    assert check_row(Problem("r", "q", "cat", type="bbox"), RewardConfig(by_type={"bbox": {"iou": 1.0}})) != ""


HUGE = {
    "words": "wait, a <answer> " * 60_000,
    "open tags": "<answer>" * 125_000,
    "closed tags": "<think>a</think><answer>" * 40_000 + "</answer>",
    "one run": "a" * 1_000_000,
    "boxes": r"\boxed{5} " * 100_000,
    "open boxes": r"\boxed{" * 140_000,
    "in an answer": "<answer>" + "cat sat " * 125_000 + "</answer>",
    "citations": "<citations>" * 90_000 + "</citations>",
    "Chinese": "的一是" * 333_333,
    "digits": "<answer>" + "9" * 1_000_000 + "</answer>",
    "commands": r"\frac" * 200_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
def test_a_megabyte_costs_milliseconds(text: str) -> None:
    """Catches backtracking patterns and quadratic comparisons; those take minutes. CPU time, of a checked suite."""
    forms = ("boxed", "think_answer", "think_boxed", "think_prose_answer", "think_answer_box")
    problem = Problem("r", "q", "[0, 0, 9, 9]", row={"citations": ["1"]})
    number = Problem("r", "q", "5")
    found = extract(text)
    verdict = Verdict("wrong", 0.0, found.text and found.text[:20_001], found.rule)
    for term, function in TERMS.items():
        for form in forms if term == "format" else ("boxed",):
            row = number if term in ("digit", "regression", "ocr", "rouge") else problem
            one = RewardInput(verdict, text, row, settings=RewardConfig(format=FormatConfig(form)))
            started = time.process_time()
            assert -10.0 <= cast(float, function(one)) <= 10.0
            assert time.process_time() - started < 1.0, (term, form)


def table_edit_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def table_common_subsequence(left: str, right: str) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        above, row = row, [0]
        for j, b in enumerate(right, 1):
            row.append(above[j - 1] + 1 if a == b else max(above[j], row[-1]))
    return row[-1]


@hypothesis_settings(deadline=None, max_examples=200)
@for_all(st.text("abc", max_size=80), st.text("abcd", max_size=80))
def test_distances_are_those_of_the_table(left: str, right: str) -> None:
    """Catches a carry that is lost between bits: the plain table is the oracle. 80 letters span two machine words."""
    assert edit_distance(left, right) == table_edit_distance(left, right)
    assert common_subsequence(left, right) == table_common_subsequence(left, right)


def test_words() -> None:
    assert words("The CAT's 3rd—猫です") == ["the", "cat", "s", "3rd", "猫", "で", "す"]
    assert words("naïve _x_ ½") == ["naïve", "x", "½"]


RIGHT, WRONG = Verdict("correct", 1.0, "5", "number"), Verdict("wrong", 0.0, "6", "number")


def test_the_reward_is_the_weighted_sum_and_every_part_is_kept() -> None:
    """0.9 * 1 + 0.1 * 1 - 2 * 0.5 = 0. Catches parts that are kept after their weight, and an overall counted twice."""
    values = {"accuracy": 1.0, "format": 1.0, "f": {"overall": 0.5, "a": 3.0}}
    verdict = weigh(RIGHT, values, {"accuracy": 0.9, "format": 0.1, "f": -2.0}, {"judge": "timeout"})
    assert verdict.reward == pytest.approx(0.0)
    assert verdict.parts == {"accuracy": 1.0, "format": 1.0, "f": 0.5, "f/a": 3.0}
    assert verdict.missing == {"judge": "timeout"} and verdict.verdict == "correct"
    summed = weigh(RIGHT, {"f": {"a": 1.0, "b": 2.0}}, {"f": 0.5}, {})
    assert summed.reward == 1.5 and summed.parts == {"f": 3.0, "f/a": 1.0, "f/b": 2.0}
    later = add_part(summed, "consistency", 0.4, 0.5)
    assert later.reward == pytest.approx(1.7) and later.parts["consistency"] == 0.4


@pytest.mark.parametrize("name", ["bad_gold", "crash", "timeout"])
def test_a_verdict_about_nothing_earns_no_bonus(name: Any) -> None:
    """An answer that makes the verifier time out must not be paid for its box; its penalties stay."""
    verdict = Verdict(name, 0.0, "5", "x")
    values = {"format": 1.0, "repetition": -0.5, "f": -2.0}
    weighed = weigh(verdict, values, {"format": 0.1, "repetition": 1.0, "f": -1.0}, {})
    assert weighed.reward == -0.5
    assert weighed.parts == {"format": 0.0, "repetition": -0.5, "f": 0.0}  # -2 * -1 would be a bonus


def test_terms_are_chosen_by_the_column() -> None:
    settings = RewardConfig(by_type={"bbox": {"iou": 1.0}, "7": {"digit": 1.0}})
    by_type = [Problem("r", "q", "a", type="bbox"), Problem("r", "q", "a", row={"type": "bbox"})]
    assert [dict(terms_of(one, settings)) for one in by_type] == [{"iou": 1.0}] * 2
    assert terms_of(Problem("r", "q", "a"), settings) == {"accuracy": 1.0}
    by_level = RewardConfig(column="level", by_type=settings.by_type)
    assert terms_of(Problem("r", "q", "a", row={"level": 7}), by_level) == {"digit": 1.0}
    assert terms_of(Problem("r", "q", "a", type="bbox"), by_level) == {"accuracy": 1.0}
