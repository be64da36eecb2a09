"""How published numbers were taken: wording, images, decoding and extraction, by name.

A protocol turns an item into the problem that the model is shown, and says with which settings it is sampled. Numbers
of two protocols are not comparable, so reports carry the name.
"""

import dataclasses
import difflib
import itertools
import re
from typing import Literal

from rethinker_jax.benchmarks.items import Item
from rethinker_jax.benchmarks.wording import with_choices
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.template import IMAGE_TAG
from rethinker_jax.types import Problem

# question: the question with its options below it. hint: the benchmark's own wording where it has one, else
# OpenVLThinker's hint by the kind of the question.
Wording = Literal["question", "hint"]
# tags: where the question names them, in front where it names none. first: all in front, named in words.
Images = Literal["tags", "first"]
Keep = Literal["all", "free_form"]
# boxed: the last box, as the training reward. answer_tag: the last <answer>, without which a response is wrong.
# boxed_or_line: the last box, or what follows "Answer:"; any of them may be right.
Extraction = Literal["boxed", "answer_tag", "boxed_or_line"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Temperature 0 is greedy, top_k 0 off; `n` samples of every item."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 2048
    n: int = 1


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How one kind of published number is taken.

    template                 name in `prompts.template.PROMPT_TEMPLATES`.
    suffix                   text that follows the question with nothing between.
    min_pixels, max_pixels   bounds of an image's area after resizing; 0 = the model directory's own.
    """

    name: str
    source: str
    decoding: Decoding
    wording: Wording = "question"
    images: Images = "tags"
    template: str = "none"
    suffix: str = ""
    min_pixels: int = 0
    max_pixels: int = 0
    keep: Keep = "all"
    extraction: Extraction = "boxed"


# What stands in for a question that the picture holds. OpenVLThinker, evaluation/, prompt of vision-only items; what
# VL-Rethinker showed there is not published.
QUESTION_IN_IMAGE = "Please answer the question shown in the image."

# OpenVLThinker (arXiv 2503.17352), evaluation/, prompt builders by kind of question.
HINT_OPTIONS = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, E, at the end.\n"
    "Question: "
)
HINT_FREE_FORM = "Hint: Please answer the question requiring an answer.\nQuestion: "
HINT_YES_NO = "Hint: Please answer the question requiring an answer of yes or no.\nQuestion: "
# The options follow.
HINT_VISION_ONLY = (
    f"Hint: {QUESTION_IN_IMAGE} Provide the correct option letter, e.g., A, B, C, D, E, at the end."
)  # fmt: skip

# VL-Rethinker (arXiv 2504.08837), scripts/eval_vlm_new.sh and openrlhf/trainer/evaluator.py: greedy where n is 1, else
# val_temperature 0.6 with top_p 0.95 and top_k 40; `max_out_tokens` 2048 is what is sampled.
_VL_RETHINKER = Protocol(
    name="vl_rethinker",
    source="VL-Rethinker, released evaluation code",
    decoding=Decoding(temperature=0.0, max_new_tokens=2048),
    template="default",  # `--system_prompt default`, the evaluation's own default
    min_pixels=256
    * 28
    * 28,  # MIN_PIXELS and MAX_PIXELS of data_processor.py, and the released preprocessor_config.json
    max_pixels=1280 * 28 * 28,
)
# OpenVLThinker, evaluation/: "as suggested by Qwen" do_sample, T 0.01, top_p 0.001, top_k 1, 2,048 tokens, batch 1; the
# base model's processor with its own bounds; answer in the last <answer>.
_OPENVLTHINKER = Protocol(
    name="openvlthinker",
    source="OpenVLThinker, evaluation scripts",
    decoding=Decoding(temperature=0.01, top_p=0.001, top_k=1, max_new_tokens=2048),
    wording="hint",
    images="first",
    extraction="answer_tag",
)
# MAYE (arXiv 2504.02587), section "evaluation scheme": three settings on validation and test, 2,048 tokens. The suffix
# of its prompt is from the released recipe.
_MAYE = Protocol(
    name="maye",
    source="MAYE, pass@1 at T 0.01",
    decoding=Decoding(temperature=0.01, top_p=0.001, max_new_tokens=2048),
    suffix="\nSolve the above mathematics problem, write out the solution process according to the question, and use "
    "the same LaTeX format as the question in the solution process. Please display the final answer in the format "
    "\\boxed{}.",
)
# Yue et al. (arXiv 2504.13837): T 0.6, top_p 0.95, at most 16,384 tokens, n from 128 to 1,024, no examples; multiple
# choice is removed because guessing passes it. The prompt is EasyR1's (examples/format_prompt/math.jinja), with which
# the visual model was trained; the paper does not print the one of its evaluation.
_LIMIT_OF_RLVR = Protocol(
    name="limit_of_rlvr",
    source="arXiv 2504.13837, visual reasoning",
    decoding=Decoding(temperature=0.6, top_p=0.95, max_new_tokens=16_384, n=1024),
    suffix=" You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}.",
    keep="free_form",
)
# For rows of one's own: template and pixel bounds are those that the model was trained with, where that is known.
_OWN = Protocol(name="own", source="as the model was trained", decoding=Decoding(temperature=0.0), template="default")
_ALL = (
    _OWN,
    dataclasses.replace(_OWN, name="own_sampled", decoding=Decoding(0.6, top_p=0.95, top_k=40, n=8)),
    _VL_RETHINKER,
    # `generate_max_len` 8192 of the script bounds only the context of the engine; numbers said to be of 8,192 tokens.
    dataclasses.replace(
        _VL_RETHINKER, name="vl_rethinker_8192", decoding=Decoding(temperature=0.0, max_new_tokens=8192)
    ),
    # The inference prompt of the model card of the 72B model, and of stage 2.
    dataclasses.replace(_VL_RETHINKER, name="vl_rethinker_rethink", template="rethink"),
    # n is not fixed by the code; 8 as in training.
    dataclasses.replace(
        _VL_RETHINKER, name="vl_rethinker_sampled", decoding=Decoding(0.6, top_p=0.95, top_k=40, n=8)
    ),
    _OPENVLTHINKER,
    # evaluation/, script of the Qwen2.5-VL baseline: the suffix, and a box or what follows "Answer:".
    dataclasses.replace(
        _OPENVLTHINKER, name="openvlthinker_qwen", suffix="\n\nYour final answer MUST BE put in \\boxed{}",
        extraction="boxed_or_line",
    ),
    _MAYE,
    dataclasses.replace(_MAYE, name="maye_sampled", source="MAYE, pass@1 at T 0.6", decoding=Decoding(0.6)),
    dataclasses.replace(_MAYE, name="maye_pass8", source="MAYE, pass@8 at T 1", decoding=Decoding(1.0, n=8)),
    _LIMIT_OF_RLVR,
)  # fmt: skip
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def find_protocol(name: str) -> Protocol:
    """Raises UserError for an unknown name, with the nearest one."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), PROTOCOLS, n=1, cutoff=0.4)
        raise UserError(
            f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return PROTOCOLS[name]


def keeps(item: Item, protocol: Protocol) -> bool:
    """Is the item part of what the protocol measures?"""
    return protocol.keep == "all" or not (item.problem.choices or item.problem.type == "mcq")


def problem_of(item: Item, protocol: Protocol) -> Problem:
    """The item's problem with the text that the model is shown, to be built with `protocol.template`.

    Gold, choices and type stay: they are for judging.
    """
    text = _hinted(item) if protocol.wording == "hint" else _plain(item.problem)
    # A benchmark's own wording names no images, and may leave out options that do.
    if protocol.images == "first" or text.count(IMAGE_TAG) != len(item.problem.images):
        text = _name_images(text)
    return dataclasses.replace(item.problem, question=text + protocol.suffix)


def _plain(problem: Problem) -> str:
    """Question and options; where the picture holds them, a sentence that says so."""
    return with_choices(problem.question, problem.choices) if problem.question.strip() else QUESTION_IN_IMAGE


def _hinted(item: Item) -> str:
    problem = item.problem
    if item.query:
        return item.query
    if not problem.question.strip():
        return with_choices(HINT_VISION_ONLY, problem.choices) if problem.choices else f"Hint: {QUESTION_IN_IMAGE}"
    if problem.choices:
        return with_choices(HINT_OPTIONS + problem.question, problem.choices)
    return (HINT_YES_NO if problem.type == "yesno" else HINT_FREE_FORM) + problem.question


def _name_images(text: str) -> str:
    """Tags that open the text go, the others become `<image k>`, which is text: all images stand in front, in order."""
    rest = text
    while rest.startswith(IMAGE_TAG):
        rest = rest.removeprefix(IMAGE_TAG)
    first = (len(text) - len(rest)) // len(IMAGE_TAG) + 1
    numbers = itertools.count(first)
    return re.sub(re.escape(IMAGE_TAG), lambda _: f"<image {next(numbers)}>", rest.lstrip("\n") if first > 1 else rest)
