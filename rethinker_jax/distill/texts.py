r"""Texts of the two steps: descriptions, the prompt of the reasoner, and the trace that is made of its reply."""

import re
from collections.abc import Sequence
from typing import Literal

from rethinker_jax.config_curation import ReasonConfig
from rethinker_jax.distill.replies import Reply, whole_text
from rethinker_jax.prompts.template import IMAGE_TAG
from rethinker_jax.verify.extract import BOXED, BOXED_LIST, extract

Outcome = Literal["boxed", "answer_tag", "no_answer", "unfinished", "as_is"]

_PLACE = re.compile(r"\{(question|caption)\}")
# A box's opening, an escaped brace or backslash (which closes nothing), or a brace; as verify/extract.py reads them.
_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\[\\{}](?!boxed|fbox)|[{}]")
_COMMAND = re.compile(r"\\[a-zA-Z]+\Z")
MAX_COMMAND = 40  # characters
OPEN, CLOSE = "<think>", "</think>"


def description(replies: Sequence[Reply]) -> str:
    """What the reasoner reads of the images of a problem: the descriptions, numbered where there are several.

    Thoughts of a captioner that thinks are left out. "" where an image has no description.
    """
    texts = [untagged(reply.text.rpartition(CLOSE)[2].strip()) for reply in replies]
    if not all(texts):
        return ""
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"Image {number}: {text}" for number, text in enumerate(texts, 1))


def reason_prompt(config: ReasonConfig, question: str, caption: str | None, num_images: int) -> str:
    """The prompt with question and description, each put in once and never read for places.

    An image tag of the question goes where there is one image, and becomes [Image 1], [Image 2], ... where there are
    several, as the descriptions are numbered.
    """
    pieces = question.split(IMAGE_TAG)
    if num_images > 1 and len(pieces) == num_images + 1:
        question = pieces[0] + "".join(f"[Image {number}]{text}" for number, text in enumerate(pieces[1:], 1))
    else:
        question = "".join(pieces)
    values = {"question": question.strip(), "caption": caption or ""}
    template = config.text_prompt if caption is None else config.prompt
    return whole_text(_PLACE.sub(lambda place: values[place[1]], template))


def untagged(text: str) -> str:
    """The text without image tags, for which a prompt of text alone would want images."""
    return text.replace(IMAGE_TAG, "[image]")


def joined(reply: Reply) -> str:
    """Reasoning and text of a reply as one text.

    A text that holds its thought itself stays as it is. Reasoning without any text was cut short, and stays open.
    """
    if not reply.reasoning.strip() or OPEN in reply.text or CLOSE in reply.text:
        return reply.text
    thought = f"{OPEN}\n{reply.reasoning.strip()}\n"
    return f"{thought}{CLOSE}\n\n{reply.text.strip()}" if reply.text.strip() else thought


def trace(text: str, style: str) -> tuple[str, Outcome]:
    r"""The trace made of a reply's text, and what became of its answer.

    as_is         the text.
    openvlthinker `<think>\n...\n</think>\n\nsolution\n\n<answer>X</answer>`. What can be seen is the text after the
                  last `</think>`. If it states `<answer>...</answer>`, nothing is added; else X is its final box, as
                  the verifier reads it, and the tags go to the end. Then every complete box of the whole text becomes
                  its content, so that no box of the thought is taken for the answer, and a missing `<think>` is put in
                  front. A text without an answer, or with a thought that does not end, stays as it is.
    """
    if style == "as_is":
        return text, "as_is"
    thought, close, seen = text.rpartition(CLOSE)
    if not close and OPEN in text:
        return text, "unfinished"
    found = extract(seen)
    if _states_answer(seen):
        outcome, answer = "answer_tag", ""
    elif found.rule in (BOXED, BOXED_LIST) and found.text is not None:
        outcome, answer = "boxed", f"\n\n<answer>{unboxed(found.text).strip()}</answer>"
    else:
        return text, "no_answer"
    if close and OPEN not in thought:
        text = f"{OPEN}\n{text.lstrip()}"
    return unboxed(text).rstrip() + answer, outcome


def unboxed(text: str) -> str:
    r"""The text with `X` for every `\boxed{X}` whose braces balance. Linear in its length."""
    stack: list[tuple[int, int, bool]] = []  # (start and end of the token, is a box)
    left_out: list[tuple[int, int, str]] = []  # start, end, and what stands there instead
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word == "}":
            if not stack:
                continue
            start, end, is_box = stack.pop()
            if is_box:
                # A space, where \alpha\boxed{b} would become another command.
                joins = text[end : end + 1].isalpha() and _COMMAND.search(text[max(start - MAX_COMMAND, 0) : start])
                left_out += [(start, end, " " if joins else ""), (*token.span(), "")]
        elif word.endswith("{") and word != r"\{":
            stack.append((*token.span(), word != "{"))
    kept, place = [], 0
    for start, end, instead in sorted(left_out):
        kept += [text[place:start], instead]
        place = end
    return "".join(kept) + text[place:]


def _states_answer(text: str) -> bool:
    close = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, max(close, 0))
    return begin >= 0 and bool(text[begin + len("<answer>") : close].strip())
