"""What the sampler is asked, and what it says of the call: requests, budgets, counters, kept caches."""

import dataclasses

import numpy as np

from rethinker_jax.config import SamplingConfig
from rethinker_jax.sampling.caches import Caches
from rethinker_jax.sampling.slots import Prompts
from rethinker_jax.types import FIRST, Completion, Prompt

NOTHING = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Lengths in tokens. `first` and `second` bound the two responses; the widths bound what is inserted."""

    first: int
    second: int = 0
    max_first: int = 0  # a longer first response gets no trigger
    trigger_width: int = 0
    prefix_width: int = 0

    @property
    def total(self) -> int:
        """Most tokens of a completion, inserted ones included."""
        forced = self.max_first + self.trigger_width + self.second if self.trigger_width else 0
        return self.prefix_width + max(self.first, self.second if self.prefix_width else 0, forced)


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw.

    prefix_ids, prefix_segments: tokens that stand before the first drawn one (another pass wrote or inserted them).
    resume: the first response of that pass, if the prefix begins with its tokens: what they share is not fed again.
    trigger_ids: fed in place of the end token of the first response; empty = none.
    budget, seed: its own, in place of the call's; a budget is no larger than the call's.
    """

    prompt: Prompt
    sample: int
    trigger_ids: np.ndarray = dataclasses.field(default_factory=lambda: NOTHING)
    prefix_ids: np.ndarray = dataclasses.field(default_factory=lambda: NOTHING)
    prefix_segments: np.ndarray = dataclasses.field(default_factory=lambda: NOTHING)
    resume: Completion | None = None
    budget: int | None = None
    seed: int | None = None

    def check(self, budgets: Budgets) -> None:
        """Raises ValueError for what cannot be drawn within `budgets`."""
        name = f"problem {self.prompt.problem.id!r}, sample {self.sample}"
        if self.prompt.image_index[-1] >= 0:
            raise ValueError(f"{name}: the prompt ends in an image, and no text follows it")
        if len(self.prefix_ids) > budgets.prefix_width or len(self.trigger_ids) > budgets.trigger_width:
            raise ValueError(
                f"{name}: {len(self.prefix_ids)} tokens of prefix and {len(self.trigger_ids)} of trigger, over "
                f"prefix_width={budgets.prefix_width} and trigger_width={budgets.trigger_width}"
            )
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"{name}: a budget of {self.budget} tokens, wanted 1 or more")

    @property
    def name(self) -> tuple[int, int, int | None]:
        """What tells it from the other requests of a call."""
        return id(self.prompt), self.sample, self.seed

    @property
    def num_resumed(self) -> int:
        """Tokens of the prefix that `resume` wrote; the last token before a draw is always fed."""
        if self.resume is None:
            return 0
        most = max(0, min(len(self.prefix_ids), len(self.resume)) - 1)
        same = (self.prefix_ids[:most] == self.resume.token_ids[:most]) & (self.prefix_segments[:most] == FIRST)
        return most if same.all() else int(same.argmin())


@dataclasses.dataclass(frozen=True)
class Counters:
    """What one call did.

    busy_steps, slot_steps: slot steps that wrote a token, and all of them. The drain_ ones of both came after the last
    request was begun, when a slot that ends stays idle.
    images, prompts: images encoded, prompts prefilled. waves: in how many batches.
    read_tokens: of first responses that were read in one chunk, because their caches were not there.
    fed_tokens: inserted tokens that went through the loop one by one.
    cache_bytes: most bytes of caches on a device.
    prompt_fill, vision_fill: shares of the padded arrays that held a token or a patch.
    """

    busy_steps: int
    slot_steps: int
    images: int
    prompts: int
    prompt_fill: float
    vision_fill: float
    waves: int = 1
    drain_busy_steps: int = 0
    drain_slot_steps: int = 0
    read_tokens: int = 0
    fed_tokens: int = 0
    cache_bytes: int = 0


@dataclasses.dataclass
class Kept:
    """Caches of one call for the next: its prompts, and the first responses.

    Empty it asks `generate` to fill it, as far as there is room; a filled one is what `Request.resume` reads from.
    layout: (are the prompts shared, rows of a wave). place_of: `Request.name` → shard, and row there.
    bytes_per_device: of what it holds.
    """

    max_tokens: int  # longer first responses will not be resumed
    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    waves: list[Prompts] = dataclasses.field(default_factory=list)
    layout: tuple[bool, int] | None = None
    caches: Caches | None = None
    place_of: dict[tuple[int, int, int | None], tuple[int, int]] = dataclasses.field(default_factory=dict)
    bytes_per_device: int = 0

    @property
    def filled(self) -> bool:
        return bool(self.prompts)

    def drop(self) -> None:
        """Frees the caches; which prompts there were is remembered."""
        self.waves, self.caches, self.layout, self.bytes_per_device = [], None, None, 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of one call of the sampler. `name` is (seed, step)."""

    requests: tuple[Request, ...]
    settings: SamplingConfig
    budgets: Budgets
    name: tuple[int, int]
    second_temperature: float
