"""What is learned of a row: a prompt, then turns, some of them learned; and their token ids in the chat template."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.types import Problem

Role = Literal["user", "assistant", "tool"]
Span = tuple[str, bool]  # text, and whether it is learned
START, END = "<|im_start|>", "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn behind the first question. Spans are encoded one by one; the turn's end is learned if any of them is.

    Only an assistant's turn may hold learned spans.
    """

    role: Role
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class SftRow:
    """A problem (the first question, with all images) and the turns that follow it, the first an assistant's.

    system    the system message that takes the place of the template's own; None = the template's own.
    verbatim  the question is put as it stands, without `data.prompt_template`.
    """

    problem: Problem
    turns: tuple[Turn, ...]
    system: str | None = None
    verbatim: bool = False


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """What the model directory's chat template puts around turns: ids of its own system turn and of its marks."""

    system_text: str  # of the template's own system turn, marks included
    system_ids: np.ndarray
    start: int
    end: int


def chat_frame(tokenizer: ChatTokenizer) -> ChatFrame:
    """The frame of Qwen's template, on which rows of several turns or with a system message rely. Raises UserError."""
    question = "@@question@@"
    text = tokenizer.render(Problem(id="", question=question, answer=""), "none")
    header, footer = re.escape(f"{START}user\n{question}{END}\n{START}assistant\n"), re.escape(f"{END}\n")
    found = re.fullmatch(f"(?P<system>(?:{re.escape(START)}system\n.*{footer})?){header}", text, re.DOTALL)
    marks = [tokenizer.encode(mark, special=True) for mark in (START, END)]
    if found is None or any(len(ids) != 1 for ids in marks) or int(marks[1][0]) not in tokenizer.end_token_ids:
        raise UserError(
            f"the chat template in {tokenizer.directory} does not write turns as {START}role ... {END}, or its end "
            "token does not end a turn: rows with several turns or a system message want the template of a Qwen2.5-VL "
            "model"
        )
    system = found["system"]
    ids = tokenizer.encode(system, special=True)
    return ChatFrame(system, ids, int(marks[0][0]), int(marks[1][0]))


def system_turn(tokenizer: ChatTokenizer, frame: ChatFrame, text: str) -> np.ndarray:
    """int32 ids of a system turn. What looks like a special token in `text` is plain text."""
    pieces = [[frame.start], tokenizer.encode(f"system\n{text}"), [frame.end], tokenizer.encode("\n")]
    return np.concatenate(pieces).astype(np.int32)


def completion_tokens(
    tokenizer: ChatTokenizer, turns: Sequence[Turn], frame: ChatFrame | None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [length], learned bool [length]) of the turns behind a prompt that ends where the assistant begins.

    Learned are the spans that say so and the end token of a turn that has some. The template's line break behind
    an end token is there between turns and not behind the last, where sampling would have stopped. `frame` may be None
    for a single turn, which then ends with the tokenizer's first end token.
    """
    end = tokenizer.end_token_ids[0] if frame is None else frame.end
    ids: list[int] = []
    learned: list[bool] = []

    def add(tokens: Sequence[int] | np.ndarray, is_learned: bool) -> None:
        ids.extend(int(token) for token in tokens)
        learned.extend([is_learned] * len(tokens))

    for place, turn in enumerate(turns):
        if place:
            if frame is None:
                raise ValueError("several turns want a frame")
            add(tokenizer.encode("\n"), False)
            add([frame.start], False)
            # The role's line and a user's text are one piece to the tokenizer; the assistant's line ends the prompt.
            head = f"{turn.role}\n"
            add(tokenizer.encode(head if turn.role == "assistant" else head + turn.spans[0][0]), False)
        if turn.role == "assistant":
            for text, is_learned in turn.spans:
                add(tokenizer.encode(text), is_learned)
        add([end], any(is_learned for _, is_learned in turn.spans))
    return np.array(ids, np.int32), np.array(learned, bool)
