"""Keys of the sections `select` and `distill`: making rows to learn from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rethinker_jax.config_numbers import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat

CAPTION_PROMPT = (
    "Please provide a detailed description of this image that could help another AI model understand it completely. "
    "Be specific and comprehensive while maintaining natural language flow."
)
REASON_PROMPT = """\
Here is a problem about an image that you cannot see. A description of the image stands in its place.

Description:
{caption}

Problem:
{question}

Think it through step by step as someone who looks at the image itself: speak of what the image shows, and never of a
description. Then write a short solution, and put the final answer within \\boxed{}."""
TEXT_PROMPT = """\
{question}

Think it through step by step. Then write a short solution, and put the final answer within \\boxed{}."""


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Rows and traces worth learning from, by their samples (`main select`); the filters are in docs/curation.md."""

    filters: tuple[str | Mapping[str, Any], ...] = ()  # as [correct, {words: {max: 500}}, {pick: shortest}], in order
    mode: Literal["rows", "traces"] = "rows"  # what is written: problems for RL, or completions for sft
    difficulty: Literal["", "easy", "medium", "hard"] = ""  # of the sources that are kept; "" = all
    ratings: str = ""  # a JSON or YAML file {source: 0 to 10}; "" = difficulty by error rates alone


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """Who describes the images."""

    model: str = ""  # a Hugging Face directory or `example`; with a url, the model's name on the server
    url: str = ""  # OpenAI-compatible, up to and without /chat/completions; "" = our sampler
    key_variable: str = ""  # the environment variable that holds the key; "" = none is sent
    prompt: str = CAPTION_PROMPT
    temperature: NonNegativeFloat = 0.0
    top_p: Fraction = 1.0
    max_tokens: Positive = 1024
    seed: NonNegative = 0


@dataclasses.dataclass(frozen=True)
class ReasonConfig:
    """Who reasons about the descriptions."""

    model: str = ""  # a Hugging Face directory or `example`; with a url, the model's name on the server
    url: str = ""  # OpenAI-compatible, up to and without /chat/completions; "" = our sampler
    key_variable: str = ""  # the environment variable that holds the key; "" = none is sent
    prompt: str = REASON_PROMPT  # with {question} and {caption}
    text_prompt: str = TEXT_PROMPT  # with {question}, of rows without an image
    n: Positive = 4  # candidates per problem
    temperature: NonNegativeFloat = 0.6
    top_p: Fraction = 0.95
    max_tokens: Positive = 8192
    seed: NonNegative = 0


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Traces of a text model about images that another model described (`main distill`); docs/distill.md."""

    caption: CaptionConfig = CaptionConfig()
    reason: ReasonConfig = ReasonConfig()
    # More keys of the requests to a server, such as top_k; null leaves one of ours out.
    caption_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    style: Literal["openvlthinker", "as_is"] = "openvlthinker"  # of the traces; docs/distill.md
    num_threads: Positive = 16  # requests to a server at once
    timeout_s: PositiveFloat = 600.0
    retries: NonNegative = 5
    backoff_s: NonNegativeFloat = 1.0  # before the first retry, then twice as long each time
    max_failures: Positive = 20  # in a row, then the command stops
