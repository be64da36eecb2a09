"""A run whose numbers go wrong: seen, said, and stopped before its last good checkpoint is gone."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rethinker_jax.config_file import load_config
from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import write_split
from rethinker_jax.health import Watch, alarm_words, alarms_in, left_out_words, rows_left_out
from rethinker_jax.main import main
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.step_metrics import reward_metrics
from rethinker_jax.types import Verdict

SMALL = """
base: package:example
run: {dir: out, num_steps: 2, save_every: 1, rollouts_every: 10, keep_checkpoints: 3}
data: {train: train.parquet, test: test.parquet}
rollout: {prompts_per_step: 4, samples_per_prompt: 4}
training: {batch_size: 16}
evaluation: {num_problems: 0, num_sampled_problems: 0}
"""
GOOD = {
    "skipped_update": 0.0, "skipped_updates": 0, "entropy": 0.3, "truncated_share": 0.0, "timeout_share": 0.0,
    "crash_share": 0.0, "zero_advantage_share": 0.5, "kl": 0.01, "judge_failure_share": 0.0,
}  # fmt: skip


def watch_of(*overrides: str, path: Path = Path("nowhere"), first_step: int = 0) -> Watch:
    return Watch(load_config(None, list(overrides)), path, first_step)


def seen(watch: Watch, *changes: dict[str, Any]) -> list[tuple[str, ...]]:
    """The alarms that ring in each of some steps that are good but for `changes`."""
    return [tuple(watch.look(step, GOOD | change)[0]) for step, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("name", "overrides", "bad", "fine"),
    [
        ("not_finite", [], {"skipped_update": 0.5, "skipped_updates": 1}, {"skipped_updates": 3}),
        ("entropy", ["health.entropy_steps=1"], {"entropy": 0.01}, {"entropy": 0.011}),
        ("truncation", ["health.truncation_steps=1"], {"truncated_share": 0.5}, {"truncated_share": 0.49}),
        # Neither share alone reaches the half; together they do.
        (
            "verifier",
            ["health.verifier_steps=1"],
            {"timeout_share": 0.25, "crash_share": 0.25},
            {"timeout_share": 0.25, "crash_share": 0.2},
        ),
        ("judge", ["health.judge_steps=1"], {"judge_failure_share": 0.5}, {"judge_failure_share": 0.25}),
        (
            "zero_advantage",
            ["health.zero_advantage_steps=1"],
            {"zero_advantage_share": 1.0},
            {"zero_advantage_share": 15 / 16},
        ),
        ("kl", ["health.kl_steps=1"], {"kl": 1.0}, {"kl": 0.99}),
    ],
)
def test_each_alarm_rings_at_its_bound_and_can_be_ignored(
    name: str, overrides: list[str], bad: dict[str, Any], fine: dict[str, Any]
) -> None:
    """Catches a bound on the wrong side, a metric of another name, and a policy that is not followed."""
    assert seen(watch_of(*overrides), {}, fine, bad, {}) == [(), (), (f"alarm/{name}",), ()]
    assert seen(watch_of(*overrides, f"health.{name}=ignore"), bad) == [()]
    for policy in ("warn", "stop"):
        watch = watch_of(*overrides, f"health.{name}={policy}", "training.max_skipped_updates=0")
        _, said = watch.look(7, GOOD | bad)
        assert len(said) == 1 and said[0].startswith(f"WARNING, step 7: {name}: ")
        assert [alarm.name for alarm in watch.stops] == ([name] if policy == "stop" else [])
        assert watch.is_suspect == (policy == "stop")


def test_bad_steps_must_come_running() -> None:
    """Three bad steps, one good, three bad: four are asked for. A step that measured nothing ends no series."""
    low, none = {"entropy": 0.0}, {"entropy": None}
    assert seen(watch_of("health.entropy_steps=4"), *[low] * 3, {}, *[low] * 3) == [()] * 7
    rings = seen(watch_of("health.entropy_steps=4"), low, low, none, {"entropy": math.nan}, low, low, none, {})
    assert rings == [(), (), (), (), (), ("alarm/entropy",), ("alarm/entropy",), ()]


def test_it_is_said_when_it_begins_and_when_it_ends() -> None:
    """Catches a line at every step of a long run, and silence at the end."""
    watch = watch_of("health.kl_steps=2")
    said = [watch.look(step, GOOD | {"kl": kl})[1] for step, kl in enumerate([2.0, 3.0, 4.0, 0.0, 0.0])]
    assert [len(one) for one in said] == [0, 1, 0, 1, 0]
    assert said[1][0].startswith("WARNING, step 1: kl: the KL to the reference is 3 nats") and "2 steps" in said[1][0]
    assert said[3] == ["step 3: kl: over"]


def test_updates_left_out_are_spared_up_to_the_limit() -> None:
    """Ten may be left out: the eleventh stops, be it in one series or not, and a good step after it does not."""
    watch = watch_of()
    for step, total in enumerate([1, 9, 10]):
        watch.look(step, GOOD | {"skipped_update": 0.5, "skipped_updates": total})
        assert not watch.stops and watch.is_suspect
    watch.look(3, GOOD | {"skipped_updates": 10})
    assert not watch.is_suspect
    watch.look(4, GOOD | {"skipped_update": 0.5, "skipped_updates": 11})
    with pytest.raises(UserError, match=r"step 4: not_finite: .*checkpoint c/3 is kept.*learning_rate.*=warn lets"):
        watch.refuse(Path("c"), 3)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        watch.refuse(Path("c"), None)
    warned = watch_of("health.not_finite=warn")
    warned.look(0, GOOD | {"skipped_update": 1.0, "skipped_updates": 99})
    warned.refuse(Path("c"), 3)


def test_a_run_that_goes_on_counts_what_lies_before_its_checkpoint(tmp_path: Path) -> None:
    """Steps 1 and 2 were bad, step 3 lies behind the checkpoint and will be done again: the next bad one is the third,
    under the bound and the policy of today."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "kl": kl}) + "\n" for n, kl in enumerate([0.0, 5.0, 5.0, 0.0])))
    watch = watch_of("health.kl_steps=3", "health.kl=stop", path=path, first_step=3)
    assert watch.is_suspect and not watch.stops
    assert watch.look(3, {"kl": 5.0})[0] == {"alarm/kl": 1.0} and watch.stops
    above = watch_of("health.kl_steps=3", "health.kl_ceiling=6", path=path, first_step=3)
    assert above.look(3, {"kl": 7.0})[0] == {}


def test_what_the_summary_says(tmp_path: Path) -> None:
    rows = [{"step": 4}, {"step": 5, "alarm/kl": 1.0}, {"step": 6}, {"step": 7, "alarm/kl": 1.0, "alarm/judge": 1.0}]
    found = alarms_in([*rows, {"step": 8, "alarm/kl": None}])
    assert found == {"kl": {"steps": 2, "first": 5, "last": 7}, "judge": {"steps": 1, "first": 7, "last": 7}}
    assert alarm_words(found) == "kl in 2 steps (5 to 7), judge in 1 step (7)" and alarm_words({}) == ""
    # A row that is met twice, at reading and in mid-run, is one row.
    kinds = [("a", "too_long"), ("b", "bad_image"), ("a", "bad_image"), ("c", "bad_image")]
    text = "".join(json.dumps({"step": 0, "id": row, "kind": kind, "why": ""}) + "\n" for row, kind in kinds)
    (tmp_path / "bad_rows.jsonl").write_text(text)
    counts = rows_left_out(tmp_path / "bad_rows.jsonl")
    assert counts == {"bad_image": 2, "too_long": 1} and left_out_words(counts) == "3: 2 bad_image, 1 too_long"
    assert rows_left_out(tmp_path / "none") == {} and left_out_words({}) == ""


def test_the_judges_failures_are_a_share_of_those_it_was_asked_for() -> None:
    """Catches a share of all responses: two were never sent to the judge."""
    plain = Verdict("correct", 1.0, "1", "number", parts={"accuracy": 1.0})
    judged = dataclasses.replace(plain, parts={"judge": 1.0})
    failed = dataclasses.replace(plain, missing={"judge": "down"})
    found = reward_metrics([judged, failed, failed, failed, plain, plain])
    assert found["judge_failures"] == 3 and found["judge_failure_share"] == 0.75
    assert "judge_failure_share" not in reward_metrics([plain])


# ---- through the train command ----


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows and small.yaml, in which commands are given."""
    monkeypatch.chdir(tmp_path)
    write_split(tmp_path / "train.parquet", "train", 12)
    write_split(tmp_path / "test.parquet", "test", 4)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def checkpoints() -> list[int]:
    return sorted(int(path.name) for path in Path("out/checkpoints").glob("[0-9]*"))


def steps_written() -> list[int]:
    return [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]


def stopped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a run says that must end with 2, without the bar."""
    assert main(["small.yaml", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    return said[said.index("error: ") :]


def test_a_policy_that_bursts_is_stopped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first update is finite and leaves weights of 1e29: after it nothing is. Step 1 is spared and not saved, step
    2 stops. Catches a run that goes on, and bad weights that push the checkpoint before out."""
    words = ["run.num_steps=4", "run.keep_checkpoints=1", "training.max_skipped_updates=1"]
    words += ["optimizer.learning_rate=1e30"]
    said = stopped(capsys, *words)
    assert re.match(r"error: step 2: not_finite: loss or gradient of 1 of .*checkpoints/1 is kept", said)
    assert checkpoints() == [1] and steps_written() == [0, 1, 2]
    assert main(["small.yaml", *words, "health.not_finite=warn", "run.num_steps=3"]) == 0
    out = capsys.readouterr()
    assert "WARNING, step 1: not_finite" in out.err and "alarms: not_finite in 2 steps (1 to 2)" in out.out
    assert json.loads(Path("out/summary.json").read_text())["alarms"]["not_finite"]["steps"] == 2


def test_an_alarm_over_several_steps_survives_a_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tokens of room cut every response. Two steps are done; as the third in a row, step 2 must stop every time it
    is done again. Catches a count that begins anew with the process, and a checkpoint of the step that stopped."""
    words = ["sampling.max_new_tokens=2", "health.truncation_steps=3"]
    assert main(["small.yaml", *words]) == 0
    assert "alarms" not in capsys.readouterr().out
    on = [*words, "run.num_steps=4", "health.truncation=stop"]
    said = stopped(capsys, *on)
    assert said.startswith("error: step 2: truncation: the share of first responses that ran out of budget is 1,")
    assert "3 steps running" in said and "checkpoints/2 is kept" in said and "sampling.max_new_tokens" in said
    assert checkpoints() == [1, 2] and Path("out/rollouts/step_000002.jsonl").is_file()
    assert stopped(capsys, *on) == said
    assert main(["small.yaml", *words, "run.num_steps=4"]) == 0
    assert "alarms: truncation in 2 steps (2 to 3)" in capsys.readouterr().out
    assert checkpoints() == [2, 3, 4] and steps_written() == [0, 1, 2, 3]
    page = Path("out/report.html").read_text()
    assert "truncation in 2 steps (2 to 3)" in page and ">alarm/truncation<" not in page


def test_a_verifier_that_fails_on_everything_stops_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No verdict comes within a deadline of nothing. Catches a run that learns from rewards that nobody gave."""
    # Few, because each costs a process.
    few = ["rollout.prompts_per_step=1", "rollout.samples_per_prompt=2", "training.batch_size=2"]
    said = stopped(capsys, *few, "verifier.deadline_s=1e-9", "health.verifier_steps=1")
    assert said.startswith("error: step 0: verifier: the share of verdicts that timed out or crashed is 1,")
    assert "there is no checkpoint yet" in said and checkpoints() == []
    with_time = load_config(Path("small.yaml"), [*few, "verifier.deadline_s=60"])
    RunDirectory(Path("out"), "rl").check_config(with_time)  # what the message advises is allowed to this run


SFT = """
base: package:example
run: {dir: out, save_every: 1}
sft: {data: "example:sft-clean", num_steps: 4, batch_size: 2, validation_rows: 2}
optimizer: {learning_rate: 1.0e+30, warmup_steps: 1}
training: {max_skipped_updates: 1}
"""


def test_fine_tuning_that_bursts_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a fine-tuning that goes on to its end without one finite update, and saves it."""
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(SFT)
    assert main(["sft", "sft.yaml"]) == 2
    said = capsys.readouterr().err
    assert "step 2: not_finite" in said and "checkpoints/1 is kept" in said
