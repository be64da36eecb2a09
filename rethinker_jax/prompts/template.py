"""Problem → chat text → token ids.

The chat template of the model directory is rendered with placeholders where the problem's text goes, so that nothing a
problem says can become a special token: special tokens are taken from the scaffolding only, and everything between two
of them is encoded as plain text in one piece, as the tokenizer itself would.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rethinker_jax.errors import UserError
from rethinker_jax.json_values import read_object, whole_list
from rethinker_jax.types import Problem

IMAGE_TAG = "<image>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Text that follows the question, and where it comes from. "" = the bare question.

    between: what stands between the two. trimmed: white space around the question goes.
    """

    text: str
    source: str
    between: str = "\n\n"
    trimmed: bool = False


PROMPT_TEMPLATES = {
    "none": PromptTemplate("", "the question alone, in the chat template"),
    "default": PromptTemplate(
        "Please reason step by step, and put your final answer within \\boxed{}.",
        "VL-Rethinker (arXiv 2504.08837), stage 1 and evaluation",
    ),
    # The blank before the line break is part of the published string.
    "rethink": PromptTemplate(
        "Guidelines: \nPlease think step by step, and **regularly perform self-questioning, self-verification, "
        "self-correction to check your ongoing reasoning**, using connectives such as "
        '"Wait a moment", "Wait, does it seem right?", etc. Remember to put your final answer within \\boxed{}.',
        "VL-Rethinker (arXiv 2504.08837), stage 2; appendix B of version 3, the rethinking instruction prompt",
    ),
    "openvlthinker_rl": PromptTemplate(
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer.",
        "OpenVLThinker, its released format prompt of GRPO; evaluation and SFT take none",
        between=" ",
        trimmed=True,
    ),
}


def prompt_template(name: str) -> PromptTemplate:
    """The template of this name. Raises UserError for an unknown one."""
    if name not in PROMPT_TEMPLATES:
        near = difflib.get_close_matches(name, PROMPT_TEMPLATES, n=1, cutoff=0.3)
        raise UserError(
            f"unknown prompt template {name!r} (data.prompt_template, --prompt-template); known are "
            f"{', '.join(PROMPT_TEMPLATES)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return PROMPT_TEMPLATES[name]


def content_parts(question: str, num_images: int, template: PromptTemplate) -> list[str | None]:
    """What the user's turn holds, in order: text, kept to the byte, and None for an image.

    An image stands where the question has an `<image>` tag; without tags all stand in front of it. Raises ValueError
    when there are tags, but not one per image.
    """
    question = question.strip() if template.trimmed else question
    text = f"{question}{template.between}{template.text}" if template.text else question
    pieces = text.split(IMAGE_TAG)
    if len(pieces) > 1 and len(pieces) - 1 != num_images:
        raise ValueError(f"the question has {len(pieces) - 1} {IMAGE_TAG} tags for {num_images} images")
    if len(pieces) == 1:
        return [*[None] * num_images, text]
    parts: list[str | None] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [None, piece]
    return [part for part in parts if part != ""]


class ChatTokenizer:
    """Tokenizer and chat template of one model directory.

    image_token_id    the id that stands for one merged image token.
    end_token_ids     ids that end a completion: those of generation_config.json and the tokenizer's own.
    pad_id            id to fill up with; its embedding never matters.
    """

    image_token_id: int
    end_token_ids: tuple[int, ...]
    pad_id: int

    def __init__(self, model_dir: str | Path):
        """Raises UserError where the directory has no fast tokenizer, no chat template or no vision tokens."""
        self.directory = Path(model_dir)
        self._tokenizer = _load_tokenizer(self.directory)
        self._backend = self._tokenizer.backend_tokenizer
        # From here on special tokens in text are plain text; those of the scaffolding are looked up by `_special`.
        self._backend.encode_special_tokens = True
        self._known_ids = frozenset(self._backend.get_vocab(with_added_tokens=True).values())
        added = self._tokenizer.added_tokens_decoder
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._split_special = re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len)[::-1])) + ")")
        self._chat_template = _load_chat_template(self.directory, self._tokenizer.chat_template)
        missing = [token for token in (IMAGE_PAD, "<|vision_start|>", "<|vision_end|>") if token not in self._special]
        if missing:
            raise UserError(
                f"the tokenizer in {self.directory} has no special token {', '.join(missing)}: wanted the tokenizer of "
                f"a Qwen2.5-VL model"
            )
        self._scaffolding: dict[tuple[bool, ...], list[str]] = {}
        self.image_token_id = self._special[IMAGE_PAD]
        self._check_image_token()
        self.end_token_ids = self._read_end_token_ids()
        pad = self._tokenizer.pad_token_id
        self.pad_id = self.end_token_ids[0] if pad is None else int(pad)

    def __len__(self) -> int:
        """One more than the largest id that has a token."""
        return max(self._known_ids) + 1

    def render(self, problem: Problem, template_name: str) -> str:
        """The chat text, one image pad per image, for people to read. It may hold what looks like special tokens."""
        pieces = self._render_pieces(problem, prompt_template(template_name))
        return "".join(text for text, _ in pieces)

    def encode_problem(self, problem: Problem, template_name: str, image_tokens: Sequence[int]) -> np.ndarray:
        """int32 [seq]: the chat text with image i expanded to `image_tokens[i]` image pads.

        Raises ValueError when tags and images disagree, UserError for an unknown template.
        """
        if len(image_tokens) != len(problem.images):
            raise ValueError(f"{len(image_tokens)} image sizes for {len(problem.images)} images")
        counts = iter(image_tokens)
        ids: list[int] = []
        run = ""
        for text, is_scaffolding in self._render_pieces(problem, prompt_template(template_name)):
            for piece in self._split_special.split(text) if is_scaffolding else [text]:
                if not (is_scaffolding and piece in self._special):
                    run += piece
                    continue
                ids += self._plain_ids(run)
                run = ""
                ids += [self._special[piece]] * (next(counts) if piece == IMAGE_PAD else 1)
        return np.array(ids + self._plain_ids(run), np.int32)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """int32 [length]. Special tokens written out in `text` are plain text unless `special`."""
        ids: list[int] = []
        for piece in self._split_special.split(text) if special else [text]:
            ids += [self._special[piece]] if special and piece in self._special else self._plain_ids(piece)
        return np.array(ids, np.int32)

    def decode(self, token_ids: Iterable[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of the ids; broken UTF-8 becomes U+FFFD, ids without a token vanish."""
        return self._backend.decode([int(index) for index in token_ids], skip_special_tokens=skip_special)

    def never_sampled_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids below `vocab_size` that no sampler may draw: vision and pad tokens of images, ids that have no token.

        A drawn image pad would ask for an image that is not there. Raises UserError if the model has too few rows.
        """
        if vocab_size < len(self):
            raise UserError(
                f"the model has {vocab_size} rows of embeddings, but the tokenizer in {self.directory} has ids up to "
                f"{len(self) - 1}: they do not belong together"
            )
        vision = {self._special[token] for token in VISION_TOKENS if token in self._special}
        return tuple(sorted(vision | (set(range(vocab_size)) - self._known_ids)))

    def _plain_ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids if text else []

    def _render_pieces(self, problem: Problem, template: PromptTemplate) -> list[tuple[str, bool]]:
        """The chat text as (text, is_scaffolding) pieces."""
        parts = content_parts(problem.question, len(problem.images), template)
        texts = [part for part in parts if part is not None]
        kinds = tuple(part is None for part in parts)
        if kinds not in self._scaffolding:
            self._scaffolding[kinds] = self._render_scaffolding(kinds)
        first, *rest = self._scaffolding[kinds]
        pieces = [(first, True)]
        for text, scaffolding in zip(texts, rest, strict=True):
            pieces += [(text, False), (scaffolding, True)]
        return pieces

    def _render_scaffolding(self, is_image: tuple[bool, ...]) -> list[str]:
        """The chat text around the user's texts: one piece before each, one after the last."""
        import jinja2  # comes with transformers

        placeholders = [f"@@user-text-{index}@@" for index in range(is_image.count(False))]
        left = iter(placeholders)
        content = [{"type": "image"} if image else {"type": "text", "text": next(left)} for image in is_image]
        try:
            rendered = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content if any(is_image) else placeholders[0]}],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template in {self.directory} fails on a user's turn: {error}") from error
        pieces = []
        for placeholder in placeholders:
            before, found, rendered = rendered.partition(placeholder)
            if not found or placeholder in rendered:
                raise UserError(f"the chat template in {self.directory} does not print each text once, in order")
            pieces.append(before)
        pieces.append(rendered)
        pads = sum(piece.count(IMAGE_PAD) for piece in pieces)
        if pads != is_image.count(True):
            raise UserError(
                f"the chat template in {self.directory} prints {pads} {IMAGE_PAD} for {is_image.count(True)} images: "
                f"wanted the template of a Qwen2.5-VL model"
            )
        return pieces

    def _check_image_token(self) -> None:
        named = _read_json(self.directory / "config.json").get("image_token_id", self.image_token_id)
        if named != self.image_token_id:
            raise UserError(
                f"{self.directory}: config.json says image_token_id {named}, but the tokenizer's {IMAGE_PAD} is "
                f"{self.image_token_id}: they do not belong together"
            )

    def _read_end_token_ids(self) -> tuple[int, ...]:
        path = self.directory / "generation_config.json"
        listed = _read_json(path).get("eos_token_id")
        if listed is None or isinstance(listed, int):
            listed = [] if listed is None else [listed]
        try:
            named = whole_list({"eos_token_id": listed}, "eos_token_id", ())
        except ValueError as error:
            raise UserError(f"{path}: a value cannot be used: {error}. Compare it with the published file.") from error
        own = self._tokenizer.eos_token_id
        ends = tuple(dict.fromkeys([*([] if own is None else [own]), *named]))
        if not ends:
            raise UserError(
                f"{self.directory}: no end token; wanted eos_token_id in generation_config.json or a tokenizer with one"
            )
        return ends


def _load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of the directory. Raises UserError."""
    if not directory.is_dir():
        raise UserError(f"wanted a model directory, but {directory} is not a directory")
    from transformers import AutoTokenizer  # takes a second to import, and not every command needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"cannot load a tokenizer from {directory} ({type(error).__name__}: {error}): wanted tokenizer.json and "
            f"tokenizer_config.json of a Qwen2.5-VL model"
        ) from error
    if tokenizer is None or not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {directory} has no tokenizer.json, which is needed")
    return tokenizer


def _load_chat_template(directory: Path, of_tokenizer: str | dict[str, str] | None) -> str:
    """The template that prints images: the processor's file goes before the tokenizer's, as in transformers."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    of_processor = _read_json(directory / "chat_template.json").get("chat_template")
    template = of_processor or of_tokenizer
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError(
            f"no chat template in {directory}: wanted chat_template.jinja or .json, or tokenizer_config.json's"
        )
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file. Raises UserError for anything else."""
    return read_object(path) if path.is_file() else {}
