"""Where a step's time goes: phases that add up, and the trace that `--profile` leaves."""

import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run_job, stop_at
from jax.profiler import ProfileData
from sft_rows import picture, talk, write

from rethinker_jax import peers, phases
from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.options import ProfileSteps, parse_profile
from rethinker_jax.phases import METRICS, Clock, Laps
from rethinker_jax.profiling import Profiler, newest_trace, program_seconds
from rethinker_jax.step_metrics import CLOCKS

CONFIG = """
base: package:example
run: {num_steps: 3, save_every: 1, rollouts_every: 1}
data: {train: train.parquet, test: test.parquet}
sampling: {max_new_tokens: 32, num_slots: 16}
buckets: {prompt_tokens: [64], row_tokens: [96], rows: [8], prefix_tokens: [256], targets: [512], vision: [[8, 4]]}
rollout: {prompts_per_step: 4, samples_per_prompt: 4}
training: {batch_size: 8}
rethink: {rule: "off"}
evaluation: {num_problems: 0, num_sampled_problems: 0, num_validation_problems: 2, batch_size: 4}
"""
SFT = """
run: {dir: tuned, save_every: 2}
data: {prompt_template: none}
buckets: {row_tokens: [64], vision: [[2, 4]]}
sft: {data: rows.jsonl, num_steps: 3, batch_size: 2, max_completion_tokens: 24}
"""
OF_A_STEP = {"prompts", "rollout", "verify", "log_probs", "replay", "pack", "update", "write", "checkpoint"}


def ticking(*times: float) -> Clock:
    moments: Iterator[float] = iter(times)
    return Clock(lambda: next(moments))


def test_phases_are_disjoint_and_add_up() -> None:
    """From 0 to 20: prompts 1 to 3 and 4 to 5, validation 6 to 16 with verdicts from 7 on inside, so the rest is
    20 - 2 - 1 - 10 = 7. Catches time that counts in two phases, and time that counts in none."""
    clock = ticking(0, 1, 3, 4, 5, 6, 7, 16, 20)
    began = clock.read()
    for _ in range(2):
        with clock.during("prompts"):
            pass
    with clock.during("validation"), clock.during("verify"):
        pass
    assert began.until(clock.read()) == {"prompts": 3, "validation": 10, "rest": 7}


def test_a_phase_that_raises_is_closed() -> None:
    """Catches a clock that believes to be in it for ever, by which nothing later would count."""
    clock = ticking(0, 1, 3, 5, 6, 9)
    laps = Laps(clock)
    with pytest.raises(UserError), clock.during("update"):
        raise UserError("the device is gone")
    with clock.during("replay"):
        pass
    assert laps.metrics() == {"seconds": 9, "seconds_device_steps": 2, "seconds_replay": 1, "seconds_rest": 6}


def test_a_lap_begins_where_the_last_one_ended() -> None:
    """Catches seconds of a step that count again in the next one, and what lies between two lines in neither."""
    clock = ticking(0, 1, 2, 3, 5, 6, 10)
    laps = Laps(clock)
    with clock.during("write"):
        pass
    assert laps.metrics() == {"seconds": 3, "seconds_writing": 1, "seconds_rest": 2}
    with clock.during("checkpoint"):
        pass
    assert laps.metrics() == {"seconds": 7, "seconds_checkpoint": 1, "seconds_rest": 6}


def test_a_phase_is_a_sign_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process that seems to stand still to the others, or to be somewhere else."""

    class Board:
        def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
        def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
            return []

    watched = peers.Peers(Board(), 0, 2, 30, 3600)
    monkeypatch.setattr(peers, "_peers", [watched])
    with phases.during("pack"):
        assert (watched.work, watched.place) == (1, "pack")


@pytest.mark.parametrize(("text", "steps"), [(None, None), ("", (2, 4)), ("3", (3, 3)), ("1-5", (1, 5))])
def test_steps_to_trace(text: str | None, steps: tuple[int, int] | None) -> None:
    assert parse_profile(text) == (None if steps is None else ProfileSteps(*steps))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--profile", "4-2"], "--profile 4-2: wanted a step or the first and last of several"),
        (["--profile=soon"], "--profile soon: wanted a step"),
        (["train", "--profile", "0"], "--profile 0: wanted a step"),
        (["sft", "--profile", "2-"], "--profile 2-: wanted a step"),
        (["--profile", "gone.yaml"], "gone.yaml"),  # a config, and not a word of the option
        (["--profile", "--mesh", "fsdp=0"], "fsdp=0"),
        (["sample", "--profile"], "sample: --profile: no such option"),
    ],
)
def test_wrong_words(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches steps that are never met and nothing said, and a config that is taken for them."""
    assert main(words) == 2
    said = capsys.readouterr().err
    assert part in said and said.startswith("error: ") and "Traceback" not in said


def events_of(directory: Path) -> tuple[dict[str, int], list[int]]:
    """How often each phase stands in the last trace below a directory, and the numbers of its steps."""
    data = ProfileData.from_file(str(newest_trace(directory)))
    events = list(itertools.chain.from_iterable(line.events for plane in data.planes for line in plane.lines))
    names = [event.name for event in events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "step"]
    return {name: names.count(name) for name in (*METRICS, "prompts ahead") if name in names}, sorted(steps)


def test_whatever_ends_the_steps_closes_the_trace(tmp_path: Path) -> None:
    """Catches a trace that is lost with the step that fails, a profiler that stays on, and spans that go on."""
    said: list[str] = []
    with pytest.raises(UserError), Profiler(ProfileSteps(2, 4), 10, 20, tmp_path, said.append) as profiler:
        for number in range(10, 20):
            with profiler.step(number), phases.during("replay"):
                if number == 12:
                    raise UserError("no")
    assert events_of(tmp_path / "profile") == ({"replay": 2}, [11, 12])
    assert said[0].startswith("profile of steps 11 to 12") and any("replay" in line for line in said)
    assert phases.CLOCK.span is phases.no_span
    with Profiler(ProfileSteps(1, 1), 0, 1, tmp_path, said.append) as profiler, profiler.step(0):
        pass
    assert events_of(tmp_path / "profile") == ({}, [0])


def test_steps_behind_the_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--profile 2-4: .* the run has 1 to go"):
        Profiler(ProfileSteps(), 9, 10, tmp_path, print)
    with Profiler(ProfileSteps(2, 9), 8, 10, tmp_path, print) as profiler:  # ends with the run
        for number in (8, 9):
            with profiler.step(number):
                pass
    assert events_of(tmp_path / "profile")[1] == [9]


def test_seconds_of_programs_are_those_in_which_one_of_their_operations_ran() -> None:
    """Operations of one program from 0 to 4 and 2 to 6 ns on two threads, and from 8 to 9: 7 ns of it, not 9. On TPUs,
    whose planes have a line of whole programs, that line and no other counts; two devices with 10 and 20 ns: 15."""
    text = """
      planes { name: "/host:CPU"
        stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }
        event_metadata { key: 1 value { id: 1 name: "add" } }
        lines { name: "a" events { metadata_id: 1 offset_ps: 0 duration_ps: 4000 stats { metadata_id: 1 str_value: "jit_f" } }
                          events { metadata_id: 1 offset_ps: 8000 duration_ps: 1000 stats { metadata_id: 1 str_value: "jit_f" } } }
        lines { name: "b" events { metadata_id: 1 offset_ps: 2000 duration_ps: 4000 stats { metadata_id: 1 str_value: "jit_f" } }
                          events { metadata_id: 1 offset_ps: 0 duration_ps: 90000 } } }
    """  # noqa: E501
    serialized = ProfileData.text_proto_to_serialized_xspace(text)
    found = program_seconds(ProfileData.from_serialized_xspace(serialized))
    assert found == {"jit_f": pytest.approx(7e-9)}
    device = """
      planes {{ name: "/device:TPU:{0}"
        event_metadata {{ key: 1 value {{ id: 1 name: "jit_g(123)" }} }}
        event_metadata {{ key: 2 value {{ id: 2 name: "fusion" }} }}
        lines {{ name: "XLA Modules" events {{ metadata_id: 1 offset_ps: 0 duration_ps: {1} }} }}
        lines {{ name: "XLA Ops" events {{ metadata_id: 2 offset_ps: 0 duration_ps: 5000 }} }} }}
    """
    serialized = ProfileData.text_proto_to_serialized_xspace(device.format(0, 10_000) + device.format(1, 20_000))
    assert program_seconds(ProfileData.from_serialized_xspace(serialized)) == {"jit_g": pytest.approx(15e-9)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    (folder / "small.yaml").write_text(CONFIG)
    write_split(folder / "train.parquet", "train", 12)
    write_split(folder / "test.parquet", "test", 2)
    return folder


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_traced_run_is_the_run_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_compilation: None
) -> None:
    """Steps 2 and 3 of three, validation behind both. Catches a trace of other steps or without their phases, a number
    that tracing changes, and seconds that a line's phases leave out or count twice."""
    monkeypatch.chdir(folder)
    words = ("small.yaml", "data.validation=test.parquet", "evaluation.validate_every=1")
    assert main([*words, "run.dir=plain"]) == 0
    assert main(["train", "--profile", "2-3", *words, "run.dir=traced"]) == 0
    said = capsys.readouterr().err
    assert "profile of steps 1 to 2: " in said and "of that, by program" in said and "jit_update_step" in said
    assert f"trace: {Path('traced/profile')}" in said

    found, steps = events_of(Path("traced/profile"))
    assert steps == [1, 2] and set(found) == OF_A_STEP | {"validation", "prompts ahead"}
    # Two a step: layout and drawing, optimizer steps. The prompts of the third step were made beside the second.
    counted = ("rollout", "pack", "update", "validation", "checkpoint", "prompts ahead")
    assert [found[name] for name in counted] == [4, 4, 4, 2, 2, 1]
    plain, traced = metrics_of(Path("plain")), metrics_of(Path("traced"))
    without = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in rows] for rows in (plain, traced)]
    assert without[0] == without[1]
    for row in plain + traced:
        assert sum(row.get(name, 0.0) for name in METRICS.values()) == pytest.approx(row["seconds"], abs=1e-6)
        assert all(row[METRICS[name]] > 0 for name in OF_A_STEP - {"checkpoint"}) and row["seconds_rest"] >= 0
        assert row["seconds_validation"] > 0
        assert ("seconds_checkpoint" in row) == (row["step"] > 0)  # of the checkpoint behind the line before
    assert main(["train", "--profile", *words, "run.dir=traced"]) == 0
    assert "this run is finished, no step is traced" in capsys.readouterr().err


def test_a_stop_while_tracing_leaves_the_trace(folder: Path) -> None:
    """SIGTERM in the second of three traced steps. Catches a file that is torn or missing, and a stop that waits for
    the third."""
    words = ("train", "small.yaml", "--profile", "1-3", "run.dir=stopped")
    log = folder / "stopped.log"
    assert stop_at("rethinker_jax.loop:learn", 2, signal.SIGTERM, *words, log=log) == 75, log.read_text()
    found, steps = events_of(folder / "stopped" / "profile")
    assert steps == [0, 1] and set(found) >= OF_A_STEP
    assert "profile of steps 0 to 1" in log.read_text()


def test_fine_tuning_is_traced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_compilation: None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SFT)
    Path("0.png").write_bytes(picture(0))
    write(Path("rows.jsonl"), [talk(number, number % 2 == 1) for number in range(1, 5)])
    assert main(["sft", "small.yaml", "--profile", "3"]) == 0
    assert "profile of step 2: " in capsys.readouterr().err
    found, steps = events_of(Path("tuned/profile"))
    assert steps == [2] and {"prompts", "update", "write", "checkpoint"} <= set(found)
    for row in metrics_of(Path("tuned")):
        assert sum(row.get(name, 0.0) for name in METRICS.values()) == pytest.approx(row["seconds"], abs=1e-6)


def test_each_process_leaves_its_own_trace(folder: Path) -> None:
    """Catches two processes of one machine that write the same file, and one that is traced alone."""
    words = ("-m", "rethinker_jax.main", "train", "small.yaml", "--mesh", "--profile", "2", "run.num_steps=2")
    codes, printed = run_job(folder, "job", [(*words, "run.dir=job")] * 2, 1)
    assert codes == [0, 0], printed
    for index in range(2):
        found, steps = events_of(folder / "job" / "profile" / f"process_{index}")
        assert steps == [1] and set(found) >= OF_A_STEP
    assert ["profile of step 1: " in text for text in printed] == [True, False]
