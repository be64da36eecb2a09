"""A row to learn from → the prompt, the target tokens and what of them is learned."""

import dataclasses
import functools

import numpy as np

from rethinker_jax.prompts.build import BadPrompt, PromptBuilder
from rethinker_jax.sft.conversation import ChatFrame, SftRow, chat_frame, completion_tokens, system_turn
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class Encoded:
    """`num_tokens` are those of the completion before it was cut to fit."""

    row: TrainRow
    num_tokens: int

    @property
    def is_cut(self) -> bool:
        return self.num_tokens > len(self.row.completion_ids)


class RowEncoder:
    """Encodes rows for one model. Rows taken verbatim have no prompt template, whatever `data.prompt_template` says."""

    def __init__(self, builder: PromptBuilder, max_completion_tokens: int):
        self.tokenizer = builder.tokenizer
        self.max_completion_tokens = max_completion_tokens
        self._with_template = builder
        self._verbatim = builder
        if builder.template_name != "none":
            self._verbatim = PromptBuilder(
                builder.tokenizer, builder.image_settings, builder.geometry, "none",
                max_prompt_tokens=builder.max_prompt_tokens, cache_size=1024,
                decode_late=builder.decode_late,
            )  # fmt: skip

    @functools.cached_property
    def frame(self) -> ChatFrame:
        """Made when a row first needs it: rows of one turn can be learned under any template. Raises UserError."""
        return chat_frame(self.tokenizer)

    def encode(self, row: SftRow) -> Encoded:
        """The row with its completion cut at `max_completion_tokens`. Raises BadPrompt, and UserError as `frame`."""
        frame = self.frame if row.system is not None or len(row.turns) > 1 else None
        ids, learned = completion_tokens(self.tokenizer, row.turns, frame)
        kept = slice(self.max_completion_tokens)
        none = np.zeros(len(ids[kept]), bool)
        zeros = np.zeros(len(ids[kept]), np.float32)
        return Encoded(TrainRow(self.prompt(row), ids[kept], none, learned[kept], zeros, fresh=False), len(ids))

    def prompt(self, row: SftRow) -> Prompt:
        builder = self._verbatim if row.verbatim else self._with_template
        if row.system is None:
            return builder.build(row.problem)
        return self._with_system(builder, row, row.system)

    def _with_system(self, builder: PromptBuilder, row: SftRow, text: str) -> Prompt:
        """The prompt with another system turn: it stands before all images, so what follows only moves along."""
        own, other = self.frame.system_ids, system_turn(self.tokenizer, self.frame, text)
        shift = len(other) - len(own)
        length = builder.check(row.problem) + shift
        if 0 < builder.max_prompt_tokens < length:
            raise BadPrompt(
                "too_long",
                f"problem {row.problem.id!r}: {length} tokens with its system message are more than "
                f"data.max_prompt_tokens={builder.max_prompt_tokens}",
            )
        prompt = builder.build(row.problem)
        if not np.array_equal(prompt.token_ids[: len(own)], own):
            raise ValueError("the prompt does not begin with the template's own system turn")
        head = np.broadcast_to(np.arange(len(other), dtype=np.int32), (3, len(other)))
        return dataclasses.replace(
            prompt,
            token_ids=np.concatenate([other, prompt.token_ids[len(own) :]]),
            positions=np.concatenate([head, prompt.positions[:, len(own) :] + shift], axis=1).astype(np.int32),
            image_index=np.concatenate([np.full(len(other), -1, np.int32), prompt.image_index[len(own) :]]),
            next_position=prompt.next_position + shift,
            text=f"<|im_start|>system\n{text}<|im_end|>\n{prompt.text[len(self.frame.system_text) :]}",
        )
