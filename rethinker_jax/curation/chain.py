"""A list of filters: read from a config, run one after the other, each reported with what went in and what came out."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rethinker_jax.config_keys import nearest
from rethinker_jax.curation.filters import (
    FILTERS,
    Column,
    Correct,
    Cut,
    Filter,
    Format,
    PassRate,
    Perplexity,
    Pick,
    Reflection,
    Tokens,
    Words,
)
from rethinker_jax.curation.records import Group
from rethinker_jax.errors import UserError

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Flow:
    """Problems and samples before and after a filter."""

    problems_in: int
    problems_out: int
    samples_in: int
    samples_out: int

    @property
    def pass_rate(self) -> float | None:
        """The share that passed: of the samples, or of the problems where there are no samples."""
        if self.samples_in:
            return self.samples_out / self.samples_in
        return self.problems_out / self.problems_in if self.problems_in else None


@dataclasses.dataclass(frozen=True)
class Step:
    """What one filter did, in all and by source. `counts` is what this filter counts besides."""

    filter: Filter
    flow: Flow
    per_source: Mapping[str, Flow]
    counts: Mapping[str, int]


def read_filters(entries: Sequence[Any], where: str = "select.filters") -> tuple[Filter, ...]:
    """The filters of a list such as `[correct, {words: {max: 500}}, {pick: shortest}]`.

    An entry is a name, or a name with its options; a single value is that of the first option. Raises UserError with
    everything that is wrong, filters that stand where they cannot work included.
    """
    filters, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            filters.append(_read_filter(entry))
        except ValueError as error:
            problems.append(f"{where}, filter {number}: {error}")
    if not problems:
        problems = [f"{where}: {problem}" for problem in _order_problems(filters)]
    if problems:
        raise UserError("\n  ".join(["the filters cannot be used:", *problems]))
    return tuple(filters)


def _read_filter(entry: Any) -> Filter:
    """Raises ValueError."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"wanted a name, or one name with its options, such as {{words: {{max: 500}}}}; came {entry}")
    name, options = next(iter(entry.items()))
    if name not in FILTERS:
        known = nearest(str(name), FILTERS) or f" (there: {', '.join(FILTERS)})"
        raise ValueError(f"{name!r}: no such filter{known}")
    kind = FILTERS[name]
    keys = [field.name for field in dataclasses.fields(kind)]
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        if not keys:
            raise ValueError(f"{name} has no options, came {options!r:.80}")
        options = {keys[0]: options}
    hint = f" (its options: {', '.join(keys)})" if keys else " (it has no options)"
    unknown = [key for key in options if key not in keys]
    if unknown:
        raise ValueError(f"{name}: {unknown[0]!r}: no such option{nearest(str(unknown[0]), keys) or hint}")
    listed = {key: [value] if _wants_list(kind, key, value) else value for key, value in options.items()}
    try:
        # Strict JSON refuses "5" for a number and 1 for a truth value, but takes a list for a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(listed), strict=True)
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, one['loc'])) or name}: {one['msg']}, came {one['input']!r:.60}"
            for one in error.errors()
        ]
        raise ValueError(f"{name}: {'; '.join(told)}") from error


def _wants_list(kind: type[Filter], key: str, value: Any) -> bool:
    """Is this one value for an option that takes several."""
    return typing.get_origin(typing.get_type_hints(kind)[key]) is tuple and not isinstance(value, list | tuple)


def _order_problems(filters: Sequence[Filter]) -> list[str]:
    """What a filter before takes from one after it, and options that say nothing or contradict each other."""
    problems = []
    was_cut = False
    for one in filters:
        if was_cut and isinstance(one, Perplexity | Tokens):
            problems.append(f"{one.name} stands after cut, which leaves texts whose tokens nobody knows; put it before")
        was_cut = was_cut or isinstance(one, Cut)
        least, most = _bounds(one)
        if least is not None and most is not None and least > most:
            problems.append(f"{describe(one)}: min is above max, so nothing would be left")
        if isinstance(one, Words | Tokens | Perplexity | PassRate) and one == type(one)():
            problems.append(f"{one.name}: wanted min or max")
        if isinstance(one, Column) and one == Column(one.column):
            problems.append(f"{describe(one)}: wanted min, max or values")
    return problems


def _bounds(one: Filter) -> tuple[float | None, float | None]:
    options = options_of(one)
    return options.get("min"), options.get("max")


def options_of(one: Filter) -> Json:
    return dataclasses.asdict(one)


def describe(one: Filter) -> str:
    """The filter with the options that are not the default, as `words: max 500`."""
    defaults = {field.name: field.default for field in dataclasses.fields(one)}
    said = [f"{key} {_plain(value)}" for key, value in options_of(one).items() if value != defaults[key]]
    return f"{one.name}: {', '.join(said)}" if said else one.name


def _plain(value: Any) -> str:
    return " | ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def columns_of(filters: Sequence[Filter]) -> tuple[str, ...]:
    """The columns of the rows that the filters read."""
    return tuple(dict.fromkeys(one.column for one in filters if isinstance(one, Column)))


def reads_texts(filters: Sequence[Filter]) -> bool:
    """Whether a filter looks at completions, so that they must be kept."""
    return wants_openvlthinker(filters) or any(
        isinstance(one, Words | Format | Reflection | Cut | Pick) for one in filters
    )


def wants_openvlthinker(filters: Sequence[Filter]) -> bool:
    return any(isinstance(one, Correct) and one.rule == "openvlthinker_v1_2" for one in filters)


def run_chain(groups: Sequence[Group], filters: Sequence[Filter], seed: int) -> tuple[list[Group], tuple[Step, ...]]:
    """What all filters together leave, in the order of the rows, and a step for each of them."""
    groups = list(groups)
    steps = []
    for one in filters:
        kept = one.apply(groups, seed)
        steps.append(_step(one, groups, kept.groups, kept.counts))
        groups = kept.groups
    return groups, tuple(steps)


def _step(one: Filter, before: Sequence[Group], after: Sequence[Group], counts: Mapping[str, int]) -> Step:
    had, has = _sizes(before), _sizes(after)
    per_source = {}
    for source in sorted(had):
        problems, samples = has.get(source, (0, 0))
        per_source[source] = Flow(had[source][0], problems, had[source][1], samples)
    flows = per_source.values()
    flow = Flow(
        sum(each.problems_in for each in flows),
        sum(each.problems_out for each in flows),
        sum(each.samples_in for each in flows),
        sum(each.samples_out for each in flows),
    )
    return Step(one, flow, per_source, dict(counts))


def _sizes(groups: Sequence[Group]) -> dict[str, tuple[int, int]]:
    """Source → problems, samples."""
    found: dict[str, tuple[int, int]] = {}
    for group in groups:
        problems, samples = found.get(group.source, (0, 0))
        found[group.source] = (problems + 1, samples + len(group.samples))
    return found
