"""The records of a file, put together by item: what every number is made of, whatever order they came in."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from rethinker_jax.benchmarks.records import Record
from rethinker_jax.errors import UserError
from rethinker_jax.verify.judge import resolve_type


@dataclasses.dataclass(frozen=True)
class ItemSamples:
    """All samples of one item, by their numbers; at least one."""

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """The lowest sample, for what all samples share."""
        return self.records[0]

    @property
    def id(self) -> str:
        return self.first.id

    @property
    def num_samples(self) -> int:
        return len(self.records)

    @property
    def num_correct(self) -> int:
        return sum(record.correct for record in self.records)

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def is_multiple_choice(self) -> bool:
        return bool(self.first.choices) or resolve_type(self.first.type) == "mcq"


def group_records(records: Iterable[Record]) -> list[ItemSamples]:
    """Items by id, their samples by number.

    Raises UserError where a sample is there twice, or where two samples of an id are of different items.
    """
    by_id: dict[str, list[Record]] = {}
    for record in records:
        by_id.setdefault(record.id, []).append(record)
    items = []
    for id in sorted(by_id):
        samples = sorted(by_id[id], key=lambda record: record.sample)
        for before, after in itertools.pairwise(samples):
            if before.sample == after.sample:
                raise UserError(
                    f"item {id!r}: wanted every sample once, came sample {after.sample} twice. Two files were joined, "
                    f"or two items share an id; remove one of the two."
                )
            if item_of(before) != item_of(after):
                raise UserError(
                    f"item {id!r}: samples {before.sample} and {after.sample} are not of the same question, answer, "
                    f"choices, type, categories, cluster and scoring. Ids must be unique in a benchmark; put the "
                    f"samples of one run in one file."
                )
        items.append(ItemSamples(tuple(samples)))
    return items


def item_of(record: Record) -> tuple[object, ...]:
    """What a record says of its item, to see whether two are of the same one."""
    return (
        record.question,
        record.answer,
        record.alternatives,
        record.choices,
        record.type,
        dict(record.categories),
        record.cluster,
        record.scored,
    )


def flat(items: Sequence[ItemSamples]) -> list[Record]:
    """All records, by id and sample."""
    return [record for item in items for record in item.records]
