"""The filters: each a name with options, from groups to fewer groups. Pure; docs/curation.md has the table.

`of_samples` says that a filter looks at samples or at what was measured by them, so that it has nothing to do where
there are none.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

from rethinker_jax.benchmarks.reflection import has_substring, has_word
from rethinker_jax.config_rewards import FormatForm
from rethinker_jax.curation.difficulty import Label
from rethinker_jax.curation.markers import ANSWER_LOST, EMPTY, MARKERS, NO_TAGS, UNCHANGED, cut_reasoning
from rethinker_jax.curation.records import Group, Sample, draw
from rethinker_jax.errors import UserError
from rethinker_jax.rewards.formats import FORMS

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a filter leaves, and what else there is to count."""

    groups: list[Group]
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _samples_where(groups: Sequence[Group], wanted: Callable[[Group, Sample], bool]) -> list[Group]:
    """The groups with the samples that are wanted; a group without any goes."""
    found = []
    for group in groups:
        kept = tuple(sample for sample in group.samples if wanted(group, sample))
        if kept:
            found.append(dataclasses.replace(group, samples=kept))
    return found


def _said(value: Any, filter: str, wants: str, group: Group, sample: Sample) -> Any:
    """A value that the input must have for this filter."""
    if value is None:
        raise UserError(
            f"the filter {filter} wants {wants} of every sample; sample {sample.number} of the problem {group.id!r} "
            f"has none. Give lines as `sample` writes them, or leave the filter out."
        )
    return value


@dataclasses.dataclass(frozen=True)
class Correct:
    """Samples that are right: by the verdict, or as OpenVLThinker's released generator decides."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "correct"
    of_samples: ClassVar[bool] = True
    rule: Literal["verdict", "openvlthinker_v1_2"] = "verdict"

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        if self.rule == "verdict":
            return Kept(_samples_where(groups, lambda group, sample: sample.correct))
        return Kept(_samples_where(groups, lambda group, sample: bool(sample.same_answer)))


@dataclasses.dataclass(frozen=True)
class Words:
    """Samples whose number of words, by white space, is in these bounds."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "words"
    of_samples: ClassVar[bool] = True
    max: Positive | None = None
    min: NonNegative = 0

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        most = math.inf if self.max is None else self.max
        return Kept(_samples_where(groups, lambda group, sample: self.min <= sample.num_words <= most))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Samples whose number of tokens, a drawn end token included, is in these bounds."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "tokens"
    of_samples: ClassVar[bool] = True
    max: Positive | None = None
    min: NonNegative = 0

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        most = math.inf if self.max is None else self.max

        def wanted(group: Group, sample: Sample) -> bool:
            return self.min <= _said(sample.num_tokens, "tokens", "the number of tokens", group, sample) <= most

        return Kept(_samples_where(groups, wanted))


@dataclasses.dataclass(frozen=True)
class NotTruncated:
    """Samples that ended by themselves, not by running out of tokens."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "not_truncated"
    of_samples: ClassVar[bool] = True

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        def wanted(group: Group, sample: Sample) -> bool:
            return _said(sample.finish_reason, "not_truncated", "the finish_reason", group, sample) != "length"

        return Kept(_samples_where(groups, wanted))


@dataclasses.dataclass(frozen=True)
class Format:
    """Samples that are put together as `reward.format.form` describes."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "format"
    of_samples: ClassVar[bool] = True
    form: FormatForm

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        return Kept(_samples_where(groups, lambda group, sample: FORMS[self.form](sample.completion)))


@dataclasses.dataclass(frozen=True)
class Reflection:
    """Samples with, or without, one of MAYE's 15 words of a second look."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "reflection"
    of_samples: ClassVar[bool] = True
    keep: Literal["with", "without"]
    by: Literal["words", "substring"] = "words"

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        reflects = has_word if self.by == "words" else has_substring
        wanted = self.keep == "with"
        return Kept(_samples_where(groups, lambda group, sample: reflects(sample.completion) == wanted))


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Samples whose perplexity under the model that wrote them, exp(-mean log-prob), is in these bounds."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "perplexity"
    of_samples: ClassVar[bool] = True
    max: Annotated[float, Field(ge=1.0)] | None = None
    min: Annotated[float, Field(ge=1.0)] = 1.0

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        least, most = math.log(self.min), math.inf if self.max is None else math.log(self.max)

        def wanted(group: Group, sample: Sample) -> bool:
            mean = _said(sample.mean_log_prob, "perplexity", "log_probs", group, sample)
            return least <= max(-mean, 0.0) <= most  # as logarithms: the power may be beyond any float

        return Kept(_samples_where(groups, wanted))


@dataclasses.dataclass(frozen=True)
class Cut:
    """Reasoning up to its first marker of a second look; the answer stays. Drops what cannot be cut so.

    What was known of the whole text's tokens is known no more. Samples without a marker stay as they are.
    """

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "cut"
    of_samples: ClassVar[bool] = True
    at: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = MARKERS
    without_tags: Literal["drop", "keep"] = "drop"

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        counts = Counter({"cut": 0, UNCHANGED: 0, NO_TAGS: 0, EMPTY: 0, ANSWER_LOST: 0})
        found = []
        for group in groups:
            kept = []
            for sample in group.samples:
                text, how = cut_reasoning(sample.completion, self.at)
                counts[how or "cut"] += 1
                if how == UNCHANGED or (how == NO_TAGS and self.without_tags == "keep"):
                    kept.append(sample)
                elif not how:
                    kept.append(dataclasses.replace(sample, completion=text, num_tokens=None, mean_log_prob=None))
            if kept:
                found.append(dataclasses.replace(group, samples=tuple(kept)))
        return Kept(found, counts)


@dataclasses.dataclass(frozen=True)
class Pick:
    """One sample of each problem, by its number of words; of equally long ones the lower number is the shorter.

    second_longest  the only one, or the longest of those that are left without the longest, as OpenVLThinker's released
                    generator has it; its paper takes the shortest.
    median          of an even number the shorter of the two in the middle.
    random          by the run's seed, the problem and the sample alone: the others' coming and going changes nothing.
    """

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "pick"
    of_samples: ClassVar[bool] = True
    policy: Literal["shortest", "longest", "second_longest", "median", "random", "all"]

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        return Kept([dataclasses.replace(group, samples=self._picked(group, seed)) for group in groups])

    def _picked(self, group: Group, seed: int) -> tuple[Sample, ...]:
        by_length = sorted(group.samples, key=lambda sample: (sample.num_words, sample.number))
        match self.policy:
            case "shortest":
                return (by_length[0],)
            case "longest":
                return (by_length[-1],)
            case "second_longest":
                return (by_length[max(len(by_length) - 2, 0)],)
            case "median":
                return (by_length[(len(by_length) - 1) // 2],)
            case "random":
                return (min(by_length, key=lambda sample: draw(seed, group.id, sample.number)),)
            case "all":
                return group.samples


@dataclasses.dataclass(frozen=True)
class PassRate:
    """Problems whose pass rate, over all their samples whatever was dropped before, is in these bounds."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "pass_rate"
    of_samples: ClassVar[bool] = True
    min: Share = 0.0
    max: Share = 1.0

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        return Kept([group for group in groups if self.min <= (group.pass_rate or 0.0) <= self.max])


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """Problems whose source has one of these labels."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "difficulty"
    of_samples: ClassVar[bool] = True
    keep: Annotated[tuple[Label, ...], Field(min_length=1)]

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        return Kept([group for group in groups if group.difficulty in self.keep])


@dataclasses.dataclass(frozen=True)
class PerSource:
    """At most so many problems of each source; which ones is drawn by the run's seed and the problem alone."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "per_source"
    of_samples: ClassVar[bool] = False
    max: Positive

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        of_source: dict[str, list[Group]] = {}
        for group in groups:
            of_source.setdefault(group.source, []).append(group)
        kept = set()
        for found in of_source.values():
            kept |= {group.row for group in sorted(found, key=lambda group: draw(seed, group.id))[: self.max]}
        return Kept([group for group in groups if group.row in kept])


@dataclasses.dataclass(frozen=True)
class Column:
    """Problems by a column of their row: a number in these bounds, or one of these values."""

    __pydantic_config__ = _STRICT
    name: ClassVar[str] = "column"
    of_samples: ClassVar[bool] = False
    column: Annotated[str, Field(min_length=1)]
    min: float | None = None
    max: float | None = None
    values: tuple[str | int | float | bool, ...] = ()

    def apply(self, groups: Sequence[Group], seed: int) -> Kept:
        numbers = self.min is not None or self.max is not None
        least, most = (-math.inf if self.min is None else self.min), (math.inf if self.max is None else self.max)
        kept, without = [], 0
        for group in groups:
            value = group.columns[self.column]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is None or (numbers and not is_number):
                without += 1
            elif (not numbers or least <= value <= most) and (not self.values or value in self.values):
                kept.append(group)
        return Kept(kept, {"without_value": without})


Filter = (
    Correct
    | Words
    | Tokens
    | NotTruncated
    | Format
    | Reflection
    | Perplexity
    | Cut
    | Pick
    | PassRate
    | Difficulty
    | PerSource
    | Column
)
FILTERS: Mapping[str, type[Filter]] = {kind.name: kind for kind in get_args(Filter)}
