"""Means are divided once, and metrics.jsonl survives what can happen to it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # ty: ignore  # protobuf makes its classes at run time

from rethinker_jax.errors import UserError
from rethinker_jax.metrics import Metrics, MetricsLog, read_metrics


def test_parts_of_different_sizes_are_weighted():
    """The mean of means would be (1 + 4) / 2 = 2.5; the mean of the values 1, 1, 1, 4 is 1.75."""
    metrics = Metrics()
    metrics.add("reward", 3.0, 3)
    metrics.add_all({"reward": (np.float32(4.0), np.int32(1)), "length": (10, 4)})
    assert metrics.means() == {"reward": 1.75, "length": 2.5}


def test_arrays_and_nothing_counted():
    metrics = Metrics()
    metrics.add_values("correct", np.array([[True, False], [True, True]]))
    metrics.add_values("forced", np.array([]))
    means = metrics.means()
    assert means["correct"] == 0.75 and math.isnan(means["forced"])


def test_small_parts_do_not_drown():
    """Adding 1.0 to 2**24 in float32 leaves it unchanged."""
    metrics = Metrics()
    for total in (np.float32(2**24), *[np.float32(1)] * 8):
        metrics.add("tokens", total, 0.5)
    assert metrics.means()["tokens"] == (2**24 + 8) / 4.5


def test_infinite_sums_stay_infinite():
    """math.fsum would raise in the middle of a run."""
    metrics = Metrics()
    metrics.add("loss", math.inf)
    metrics.add("loss", -math.inf)
    assert math.isnan(metrics.means()["loss"])


def test_one_line_a_step_with_null_for_nan(tmp_path: Path):
    with MetricsLog(tmp_path) as log:
        log.write(0, {"loss": math.nan, "reward": np.float32(0.5), "n": np.int64(3), "ok": np.bool_(True), "s": "x"})
        log.write(1, {"loss": -math.inf, "odds": [0.5, math.nan], "none": None})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # json.loads would take a bare NaN; a browser would not.
    assert json.loads(first, parse_constant=pytest.fail) == {
        "step": 0, "loss": None, "reward": 0.5, "n": 3, "ok": True, "s": "x",
    }  # fmt: skip
    assert json.loads(second, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "odds": [0.5, None], "none": None,
    }  # fmt: skip


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path):
    """Without truncation step 2 would be there twice after a resume from the checkpoint before it."""
    with MetricsLog(tmp_path) as log:
        for step in range(4):
            log.write(step, {"reward": step / 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    with MetricsLog(tmp_path, first_step=2) as log:
        log.write(2, {"reward": 9.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 0, "reward": 0.0},
        {"step": 1, "reward": 1 / 3},
        {"step": 2, "reward": 9.0},
    ]


def test_a_fresh_start_forgets_old_lines(tmp_path: Path):
    with MetricsLog(tmp_path) as log:
        log.write(0, {"reward": 1.0})
    with MetricsLog(tmp_path):
        pass
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["not json", "[1]", '{"reward": 1}', '{"step": "1"}'])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, line: str):
    """Dropping it in silence would leave a hole in the curves."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(tmp_path, first_step=3)


def events(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of the scalar events. A record: length u64, checksum u32, the bytes, checksum u32."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_gets_the_finite_numbers(tmp_path: Path):
    with MetricsLog(tmp_path) as log:
        log.write(7, {"reward": 0.5, "loss": math.nan, "name": "x", "ok": True})
    assert events(tmp_path / "tensorboard") == [("reward", 7, 0.5)]
