"""The order in which rows are met, and in which the rows of a rollout are cut into optimizer steps."""

import dataclasses

import numpy as np
import pytest

from rethinker_jax.config import Config, DataConfig, TrainingConfig
from rethinker_jax.errors import UserError
from rethinker_jax.experience import cut_order
from rethinker_jax.replay import Experience
from rethinker_jax.run_data import data_order
from rethinker_jax.types import Problem

RATES = [0.5, 1.0, 0.0, 0.25, 0.75, 0.125]


def problems(column: str, values: list[object]) -> list[Problem]:
    return [Problem(str(place), "q", "1", row={column: value}) for place, value in enumerate(values)]


def test_a_curriculum_meets_easy_rows_first_in_every_epoch() -> None:
    """Catches an order from hard to easy, stages that mix, and an epoch that goes on where the last one ended."""
    config = Config(data=DataConfig(curriculum="easy_first", curriculum_stages=3))
    order = data_order(config, problems("pass_rate", list(RATES)))
    for epoch in range(2):
        met = [order[epoch * 6 + place] for place in range(6)]
        assert [set(met[:2]), set(met[2:4]), set(met[4:])] == [{1, 4}, {0, 3}, {2, 5}]
    plain = data_order(Config(), problems("pass_rate", list(RATES)))
    assert sorted(plain[place] for place in range(6)) == list(range(6))


@pytest.mark.parametrize("value", [None, "soon", float("nan")])
def test_a_row_without_a_place_in_the_curriculum_is_named(value: object) -> None:
    """Catches a row that silently counts as hard."""
    config = Config(data=DataConfig(train="rows.parquet", curriculum="easy_first", curriculum_column="rate"))
    with pytest.raises(UserError, match=r"rows.parquet: row '1': .* the column 'rate': wanted a finite number"):
        data_order(config, problems("rate", [0.5, value]))


def test_rows_are_shuffled_before_they_are_cut_only_if_asked() -> None:
    """Catches groups that are torn apart by default, and an order that is the same in every step."""
    none = np.zeros(1)
    rows = [Experience(place // 8, none, none, none, none, 0.0, 0) for place in range(64)]
    config = Config()
    assert list(cut_order(config, rows, 3)) == rows
    config = dataclasses.replace(config, training=TrainingConfig(cut="sample"))
    first, again, other = (list(cut_order(config, rows, step)) for step in (3, 3, 4))
    assert list(map(id, first)) == list(map(id, again)) != list(map(id, other))
    assert sorted(map(id, first)) == sorted(map(id, rows))
    assert len({row.problem for row in first[:8]}) > 2
