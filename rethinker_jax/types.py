"""The nouns of the program, in the order in which they come about. Plain numpy; nothing here imports jax.

    problem → prompt → completion → verdict → rollout

A *problem* is a row of a dataset, a *prompt* is what the model sees of it, a *completion* is what the model wrote,
a *verdict* is what the verifier said of that, and a *rollout* is all of them together with reward and advantage.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

VerdictName = Literal["correct", "wrong", "no_answer", "bad_gold", "timeout", "crash"]
FinishReason = Literal["stop", "length", "stop_string"]

# Segments of a completion: who wrote which token, and when.
FIRST, TRIGGER, SECOND = 0, 1, 2
SEGMENT_NAMES = ("first", "trigger", "second_look")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a dataset.

    `images` holds image files (PNG, JPEG, ...) as bytes, or paths that were checked to lie under the image root.
    `row` is the whole row as it was read, for rewards that need other columns.
    """

    id: str
    question: str
    answer: str
    images: tuple[bytes | str, ...] = dataclasses.field(default=(), repr=False)
    choices: tuple[str, ...] = ()
    type: str = "auto"
    source: str = ""
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def stable_hash(self) -> int:
        """31-bit hash of the id: the problem's name in the random stream; the same in every process and run."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big") & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class ImagePatches:
    """An image: `patches` float32 [num_patches, patch_dim] by merge blocks, `grid` = (t, h, w) in patches.

    `original_size` and `size` are (width, height) in pixels of the upright image and of what it was resized to; (0, 0)
    where nobody said.
    """

    patches: Any  # a numpy array, or one that is made when its rows are asked for
    grid: tuple[int, int, int]
    original_size: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model sees of a problem.

    token_ids     int32 [seq], every image already expanded to its image-pad tokens.
    positions     int32 [3, seq], m-RoPE positions (time, height, width).
    image_index   int32 [seq]: for an image token, its place among this prompt's merged image tokens (row-major, image
                  after image); -1 elsewhere.
    next_position the m-RoPE position, on all three axes, of the first completion token.
    text          the chat text with one pad an image, for people to read.
    """

    problem: Problem
    token_ids: np.ndarray
    positions: np.ndarray
    image_index: np.ndarray
    next_position: int
    images: tuple[ImagePatches, ...] = ()
    text: str = ""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt, the drawn end token included.

    token_ids int32 [length]; log_probs float32 [length], natural log, full softmax at temperature 1;
    segments int8 [length], FIRST, TRIGGER or SECOND. Tokens of TRIGGER were inserted, not drawn.
    `text` leaves out the end token; `parts` is the same text by segment, as (segment, text) pairs.
    truncated_log_probs float32 [length]: under what was drawn from, with temperature, top-k, top-p and min-p; 0 where a
    token was inserted or chosen greedily. None where nobody recorded them.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    segments: np.ndarray
    finish_reason: FinishReason
    text: str = ""
    parts: tuple[tuple[int, str], ...] = ()
    truncated_log_probs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def sampled_mask(self) -> np.ndarray:
        """bool [length]: did the policy write this token."""
        return self.segments != TRIGGER

    @property
    def forced(self) -> bool:
        return bool((self.segments == TRIGGER).any())


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the verifier said of one response. `rule` names what decided, `ms` the time it took in the worker.

    `parts` holds the value of every reward term before its weight, `missing` why a term has none (judge → timeout).
    """

    verdict: VerdictName
    reward: float
    extracted: str | None
    rule: str
    ms: float = 0.0
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def correct(self) -> bool:
        return self.verdict == "correct"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sample of one prompt: what was written and what the verifier said of it.

    `first` is the first response alone. Where a second look was forced, `forced` is the whole sequence (first response,
    trigger, second look), and `kept` says whether it takes the first response's place in training.
    """

    prompt: Prompt
    sample: int
    first: Completion
    first_verdict: Verdict
    forced: Completion | None = None
    forced_verdict: Verdict | None = None
    kept: bool = False
    advantage: float = 0.0

    @property
    def completion(self) -> Completion:
        """What is trained on."""
        return self.forced if self.kept and self.forced is not None else self.first

    @property
    def verdict(self) -> Verdict:
        return self.forced_verdict if self.kept and self.forced_verdict is not None else self.first_verdict

    @property
    def reward(self) -> float:
        return self.verdict.reward
