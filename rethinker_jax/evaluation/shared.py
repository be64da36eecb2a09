"""Judging in several processes: each judges its share of what is drawn, and they meet where all of it is waited for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rethinker_jax import peers
from rethinker_jax.benchmarks.protocols import Extraction
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.evaluation.judging import Judging
from rethinker_jax.processes import exchange, is_mine
from rethinker_jax.verify.pool import VerifierPool

# What the judge says of a record.
SAID = ("verdict", "extracted", "rule", "lenient", "forced_verdict", "forced_extracted")


class SharedJudging(Judging):
    """`Judging` with `submit_drawn`, for records that all processes of a job have, in one order.

    With one process it is the same as `submit`. With several, nothing is ready before all is waited for; `ready` with
    `wait` then gives, in all of them, what all have drawn, behind what was submitted in this process alone.
    """

    def __init__(self, pool: VerifierPool, extraction: Extraction):
        super().__init__(pool, extraction)
        self._drawn: list[Record] = []  # since all were waited for

    def submit_drawn(self, records: Sequence[Record]) -> None:
        if peers.count() == 1:
            self.submit(records)
            return
        first = len(self._drawn)
        self._drawn += records
        self.submit([record for place, record in enumerate(records, first) if is_mine(place)])

    def ready(self, *, wait: bool = False) -> list[Record]:
        if peers.count() == 1:
            return super().ready(wait=wait)
        if not wait:
            return []
        peers.at("verify")
        judged = {_name(record): record for record in super().ready(wait=True)}
        mine = [record for place, record in enumerate(self._drawn) if is_mine(place)]
        said: dict[tuple[str, int], dict[str, Any]] = {}
        for found in exchange([[*_name(one), *_said(judged.pop(_name(one)))] for one in mine]):
            said |= {(name, sample): dict(zip(SAID, values, strict=True)) for name, sample, *values in found}
        drawn, self._drawn = self._drawn, []
        return [*judged.values(), *(dataclasses.replace(record, **said[_name(record)]) for record in drawn)]


def _name(record: Record) -> tuple[str, int]:
    return record.id, record.sample


def _said(record: Record) -> list[str | None]:
    values = vars(record)
    return [values[key] for key in SAID]
