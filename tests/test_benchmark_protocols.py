"""Protocols: the text that the model is shown, to the byte, and the settings of published numbers."""

import dataclasses
import re
from pathlib import Path

import pytest

from rethinker_jax.benchmarks.catalog import BENCHMARKS, ROWS
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.benchmarks.protocols import PROTOCOLS, find_protocol, keeps, problem_of
from rethinker_jax.config import Config
from rethinker_jax.config_file import load_defaults, save_config
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.asks import choose_protocol, overrides_of
from rethinker_jax.evaluation.runs import find_run, trained_as
from rethinker_jax.options import EVALUATE_NAMES
from rethinker_jax.prompts.template import content_parts, prompt_template
from rethinker_jax.types import Problem

OPTIONS = Item(Problem("1", "Find AC.", "C", (b"1",), ("3", "4", "5"), "mcq"))
FREE = Item(Problem("2", "See <image>. Find x.", "7", (b"1",)))
YES_NO = Item(Problem("3", "Equal?", "yes", (b"1",), (), "yesno"))
VISION_ONLY = Item(Problem("4", "", "A", (b"1",), ("x", "y"), "mcq"))
OWN = Item(Problem("5", "Find AC.", "C", (b"1",), ("3", "4", "5"), "mcq"), "Hint: own.\nQuestion: Find AC.")


@pytest.mark.parametrize(
    ("protocol", "item", "text"),
    [
        ("vl_rethinker", OPTIONS, "Find AC.\nChoices:\n(A) 3\n(B) 4\n(C) 5"),
        ("vl_rethinker", OWN, "Find AC.\nChoices:\n(A) 3\n(B) 4\n(C) 5"),  # not MathVista's hint
        ("vl_rethinker", FREE, "See <image>. Find x."),
        ("vl_rethinker", VISION_ONLY, "Please answer the question shown in the image."),  # nor its options
        (
            "openvlthinker",
            OPTIONS,
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, E, at the end.\n"
            "Question: Find AC.\nChoices:\n(A) 3\n(B) 4\n(C) 5",
        ),
        (
            "openvlthinker",
            FREE,
            "Hint: Please answer the question requiring an answer.\nQuestion: See <image 1>. Find x.",
        ),
        (
            "openvlthinker",
            YES_NO,
            "Hint: Please answer the question requiring an answer of yes or no.\nQuestion: Equal?",
        ),
        (
            "openvlthinker",
            VISION_ONLY,
            "Hint: Please answer the question shown in the image. Provide the correct option letter, e.g., A, B, C, D, "
            "E, at the end.\nChoices:\n(A) x\n(B) y",
        ),
        ("openvlthinker", OWN, "Hint: own.\nQuestion: Find AC."),
        ("openvlthinker_qwen", OWN, "Hint: own.\nQuestion: Find AC.\n\nYour final answer MUST BE put in \\boxed{}"),
    ],
)
def test_what_the_model_is_shown(protocol: str, item: Item, text: str) -> None:
    """Catches a hint where the paper has none, options twice or never, and the question of a vision-only item."""
    shown = problem_of(item, find_protocol(protocol))
    assert shown.question == text
    assert (shown.answer, shown.choices, shown.type) == (item.problem.answer, item.problem.choices, item.problem.type)


def test_suffixes_follow_directly() -> None:
    """Catches a blank line before a suffix that has its own line break."""
    for name, start in (("maye", "\nSolve the above mathematics problem, "), ("limit_of_rlvr", " You FIRST think ")):
        protocol = find_protocol(name)
        question = problem_of(YES_NO, protocol).question
        assert question.startswith("Equal?" + start) and question.endswith("\\boxed{}.")
        (text,) = [one for one in content_parts(question, 0, prompt_template(protocol.template)) if one]
        assert text == question


@pytest.mark.parametrize("name", list(PROTOCOLS))
@pytest.mark.parametrize(
    "item",
    [
        OPTIONS, FREE, YES_NO, VISION_ONLY, OWN,
        Item(Problem("6", "<image><image>\nAs in <image>?", "A", (b"1", b"2", b"3"), ("a", "b"), "mcq")),
        Item(Problem("7", "Which is <image>?", "A", (b"1", b"2", b"3"), ("<image>", "<image>"), "mcq")),
        Item(Problem("8", "Which is <image>?", "A", (b"1", b"2"), ("<image>",), "mcq"), "Hint.\nQuestion: Which?"),
    ],
)  # fmt: skip
def test_every_prompt_can_be_built(name: str, item: Item) -> None:
    """Catches tags that are not one an image, which the prompt builder refuses."""
    protocol = find_protocol(name)
    question = problem_of(item, protocol).question
    parts = content_parts(question, len(item.problem.images), prompt_template(protocol.template))
    assert parts.count(None) == len(item.problem.images)
    if protocol.images == "first":
        assert parts[: len(item.problem.images)] == [None] * len(item.problem.images)


def test_images_first_are_named_in_their_order() -> None:
    """Catches names that count only the tags inside the text, and so name a picture that stands before."""
    item = Item(Problem("6", "<image><image>\nAs in <image>?", "7", (b"1", b"2", b"3")))
    protocol = dataclasses.replace(find_protocol("vl_rethinker"), images="first")
    assert problem_of(item, protocol).question == "As in <image 3>?"


@pytest.mark.parametrize(
    ("name", "temperature", "top_p", "top_k", "max_new_tokens", "n"),
    [
        ("vl_rethinker", 0.0, 1.0, 0, 2048, 1),
        ("vl_rethinker_8192", 0.0, 1.0, 0, 8192, 1),
        ("vl_rethinker_sampled", 0.6, 0.95, 40, 2048, 8),
        ("openvlthinker", 0.01, 0.001, 1, 2048, 1),
        ("openvlthinker_qwen", 0.01, 0.001, 1, 2048, 1),
        ("maye", 0.01, 0.001, 0, 2048, 1),
        ("maye_sampled", 0.6, 1.0, 0, 2048, 1),
        ("maye_pass8", 1.0, 1.0, 0, 2048, 8),
        ("limit_of_rlvr", 0.6, 0.95, 0, 16384, 1024),
    ],
)
def test_settings(name: str, temperature: float, top_p: float, top_k: int, max_new_tokens: int, n: int) -> None:
    """Catches a protocol that samples where the published number is greedy, or cuts off earlier."""
    protocol = find_protocol(name)
    found = load_defaults(overrides_of(protocol, Config().data)).sampling
    assert (found.temperature, found.top_p, found.top_k) == (temperature, top_p, top_k)
    assert (found.max_new_tokens, protocol.decoding.n) == (max_new_tokens, n)


def test_rows_of_ones_own_are_asked_as_in_training(tmp_path: Path) -> None:
    """Catches a model of small pictures and bare questions that is asked in VL-Rethinker's way."""
    assert [choose_protocol("", n, "rows").name for n in (None, 1, 8)] == ["own", "own", "own_sampled"]
    assert [choose_protocol("", n, "mmmu").name for n in (1, 8)] == ["vl_rethinker", "vl_rethinker_sampled"]
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    save_config(load_defaults(["data.prompt_template=rethink", "data.max_pixels=99999"]), tmp_path / "config.yaml")
    assert find_run(tmp_path / "checkpoints" / "7") == (tmp_path, 7) and find_run(tmp_path) == (tmp_path, None)
    for model, template, max_pixels in (
        ("example", "none", 0), (str(tmp_path), "rethink", 99_999), (str(tmp_path / "elsewhere"), "default", 0),
    ):  # fmt: skip
        data = load_defaults(overrides_of(find_protocol("own"), trained_as(model))).data
        assert (data.prompt_template, data.max_pixels) == (template, max_pixels)
        other = load_defaults(overrides_of(find_protocol("vl_rethinker"), trained_as(model))).data
        assert (other.prompt_template, other.max_pixels) == ("default", 1_003_520)


def test_the_help_names_them_all() -> None:
    """Catches a benchmark or a protocol that a user would have to guess."""
    told = set(re.findall(r"\w+", EVALUATE_NAMES))
    assert {*BENCHMARKS, ROWS, *PROTOCOLS} <= told


def test_pixels_and_extraction() -> None:
    """Catches the training bounds applied to protocols that keep the processor's own."""
    paper = find_protocol("vl_rethinker")
    assert (paper.min_pixels, paper.max_pixels, paper.extraction) == (200_704, 1_003_520, "boxed")
    assert (paper.template, find_protocol("vl_rethinker_rethink").template) == ("default", "rethink")
    thinker = find_protocol("openvlthinker")
    assert (thinker.min_pixels, thinker.max_pixels, thinker.extraction) == (0, 0, "answer_tag")


def test_multiple_choice_is_removed_where_guessing_passes() -> None:
    """Catches pass@1024 of a five-option question counted as reasoning."""
    kept = [
        item.problem.id for item in (OPTIONS, FREE, YES_NO, VISION_ONLY) if keeps(item, find_protocol("limit_of_rlvr"))
    ]
    assert kept == ["2", "3"]
    assert all(keeps(item, find_protocol("vl_rethinker")) for item in (OPTIONS, FREE))


def test_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'openvlthinker'"):
        find_protocol("openvl-thinker")
