"""The example's tokenizer: a small byte-level BPE in Qwen's file format, trained on the example's own sentences.

Splitting, byte alphabet and the order of the special tokens are Qwen2's, so every path of the program that reads a
published checkpoint reads this one. Digits are split one by one before any merge: a digit is one token, always.
"""

import json
import os
import pathlib

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rethinker_jax.example import solutions, tasks
from rethinker_jax.example.render import COLOURS, SHAPES

MAX_MERGES = 170
NUM_BYTES = 256

# Qwen2.5's, in the published order; the first 14 are special, the last 8 plain added tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
END_TOKEN, PAD_TOKEN = "<|im_end|>", "<|endoftext|>"

# Contractions | a word with at most one character before it | one digit | punctuation | line ends | blanks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5-VL's conversation layout for text and images: a default system turn, and a vision triple for an image.
CHAT_TEMPLATE = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}"
    "{%- else -%}{{- raise_exception('a part of a message is neither text nor image') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + render(message.content) + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def _corpus() -> list[str]:
    """Everything the example's model reads or writes, in the pieces in which it is tokenised."""
    rng = np.random.default_rng(7)
    lines = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "describe", *solutions.TRIGGERS]
    lines += [f"{colour} {shape} {colour}" for colour in COLOURS for shape in SHAPES]
    for task in tasks.make_tasks(seed=7, count=100):
        lines += [task.problem.question.replace("<image>", ""), task.caption]
        for write in (solutions.clean, solutions.noisy, solutions.second_look):
            spans = write(task) if write is solutions.clean else write(task, rng)
            lines += [text for text, _ in spans]
    return lines


def train_tokenizer() -> Tokenizer:
    """The tokenizer, trained afresh; the same every time. A second or less."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BYTES + MAX_MERGES,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return tokenizer


def build_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Trains the tokenizer and writes its files into the directory; returns it.

    Writes tokenizer.json, tokenizer_config.json, vocab.json, merges.txt and chat_template.json, as published
    checkpoints have them; `transformers.AutoTokenizer.from_pretrained(directory)` reads them without torch.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token != PAD_TOKEN],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_TOKEN,
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": PAD_TOKEN,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return tokenizer


def write_json(path: pathlib.Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
