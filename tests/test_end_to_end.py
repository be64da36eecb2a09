"""The whole program as its users run it: commands on the example's model, a few steps each."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import REPOSITORY, TIMEOUT_S, num_lines, start, stop_at

from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.weights import load_params
from rethinker_jax.step_metrics import CLOCKS
from rethinker_jax.system import EXAMPLE_MODEL

SMALL = """
base: package:example
run: {num_steps: 4, save_every: 1, rollouts_every: 1, keep_checkpoints: 3}
data: {train: TRAIN, test: TEST}
rollout: {prompts_per_step: 4, samples_per_prompt: 4}
training: {batch_size: 8}
replay: {capacity: 32}
rethink: {fraction: 0.75}
reward: {consistency: {weight: 0.5, ema_every: 2}}
evaluation: {num_problems: 8, num_sampled_problems: 4, samples_per_problem: 2, batch_size: 8}
"""
RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "rollouts", "checkpoints", "tensorboard")


def run(*words: str | Path, log: Path, **environment: str) -> str:
    """Runs a command that must succeed; returns what it printed."""
    before = log.stat().st_size if log.exists() else 0
    code = start(*words, log=log, **environment).wait(TIMEOUT_S)
    printed = log.read_bytes()[before:].decode()
    assert code == 0, printed
    return printed


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics, line by line, without what the clock says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def checkpoint_of(run_dir: Path, step: int) -> tuple[Any, dict[str, Any]]:
    """All arrays of a checkpoint (weights, optimizer, replay) as numpy, and its JSON without the clocks."""
    manager = ocp.CheckpointManager(run_dir / "checkpoints")
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(), arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )
    found: Any = manager.restore(step, args=args)
    manager.close()
    meta = {key: value for key, value in found.meta.items() if key not in ("wall_s", "cpu_s", "manifest")}
    return jax.tree.map(np.asarray, {"state": found.state, "arrays": found.arrays}), meta


def texts_of(run_dir: Path, step: int) -> list[list[str]]:
    lines = (run_dir / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [
        ["|".join(part["text"] for part in sample["segments"]) for sample in json.loads(line)["samples"]]
        for line in lines
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and small.yaml."""
    folder = tmp_path_factory.mktemp("user")
    write_split(folder / "train.parquet", "train", 24)
    write_split(folder / "test.parquet", "test", 8)
    text = SMALL.replace("TRAIN", str(folder / "train.parquet")).replace("TEST", str(folder / "test.parquet"))
    (folder / "small.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def straight(place: Path) -> Path:
    """Four steps in one go."""
    run("train", "small.yaml", "run.dir=straight", log=place / "straight.log", JAX_LOG_COMPILES="1")
    return place / "straight"


def test_a_run_leaves_what_it_promises(straight: Path):
    """Catches a file or key that scripts rely on and that is not there, and a step written twice or not at all."""
    for name in RUN_FILES:
        assert (straight / name).exists(), name
    assert [row["step"] for row in metrics_of(straight)] == [0, 1, 2, 3]
    assert sorted(path.name for path in (straight / "checkpoints").glob("[0-9]*")) == ["2", "3", "4"]
    assert len(texts_of(straight, 0)) == 4 and {len(group) for group in texts_of(straight, 0)} == {4}
    summary = json.loads((straight / "summary.json").read_text())
    assert {"before", "after", "zero_advantage_share", "effective_share", "wall_s", "cpu_s", "seed", "commit"} <= set(
        summary
    )
    assert {"versions", "device"} <= set(summary) and summary["num_steps"] == 4
    for when in ("before", "after"):
        assert {"greedy", "pass@1", "pass@2", "rethink_ratio"} <= set(summary[when])
        assert num_lines(straight / "evaluations" / f"{when}.jsonl") == 4
    images = {path.name for path in (straight / "rollouts" / "images").iterdir()}
    named = {name for step in range(4) for name in _image_names(straight / "rollouts" / f"step_{step:06d}.jsonl")}
    assert named and named <= images
    assert any(row["forced_share"] > 0 for row in metrics_of(straight))  # else Forced Rethinking was not in the run
    assert any((straight / "tensorboard").iterdir())


def test_a_run_tells_which_rows_it_trained_on(straight: Path):
    """Catches rows of another step, replayed rows taken for fresh ones, and advantages that no sample had."""
    for step, metrics in enumerate(metrics_of(straight)):
        updates = json.loads((straight / "rollouts" / f"trained_{step:06d}.json").read_text())
        assert [one["update"] for one in updates] == [2 * step, 2 * step + 1]  # 16 samples, batches of 8
        replayed = [row for one in updates for row in one["rows"] if row["replayed"]]
        assert len(replayed) / 16 == pytest.approx(metrics["replay_share"])
        assert all(row["age"] > 0 or one["update"] % 2 for one in updates for row in one["rows"] if row["replayed"])
        drawn = [
            sample["advantage"]
            for line in (straight / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
            for sample in json.loads(line)["samples"]
        ]
        fresh = [row["advantage"] for one in updates for row in one["rows"] if not row["replayed"]]
        assert fresh and set(fresh) <= {0.0, *drawn}


def _image_names(path: Path) -> list[str]:
    return [name for line in path.read_text().splitlines() for name in json.loads(line)["images"]]


def test_a_finished_run_prints_its_table_and_does_nothing(straight: Path, place: Path):
    """Catches a second start that compiles, evaluates or trains again."""
    weights = sorted((path, path.stat().st_mtime_ns) for path in (straight / "checkpoints").rglob("*"))
    printed = run("train", "small.yaml", "run.dir=straight", log=place / "again.log", JAX_LOG_COMPILES="1")
    assert "before and after" in printed and "accuracy, greedy" in printed and "report.html" in printed
    assert "Compiling" in (place / "straight.log").read_text()  # what is looked for is what jax says
    assert "Compiling" not in printed and "evaluation" not in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in (straight / "checkpoints").rglob("*")) == weights


def test_killed_and_stopped_runs_end_as_the_straight_one(straight: Path, place: Path):
    """Catches anything that is not in the checkpoint: data order, replay, moments, random state, metrics."""
    broken, log = place / "broken", place / "broken.log"
    words = ("train", "small.yaml", "run.dir=broken")
    lines = broken / "metrics.jsonl"

    learn = "rethinker_jax.loop:learn"  # the update of a step

    assert stop_at(learn, 3, signal.SIGKILL, *words, log=log) == -signal.SIGKILL
    with lines.open("a") as file:  # as if it had been killed in the middle of a line, and of a checkpoint
        file.write('{"step": 2, "rew')
    (broken / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    resumed = max(int(path.name) for path in (broken / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    assert resumed in (1, 2), "the step before was saved, and perhaps this one"

    # Nothing is due to be saved, so the checkpoint that is there in the end was made because it was asked to stop.
    code = stop_at(learn, 1, signal.SIGTERM, *words, "run.save_every=100", log=log)
    assert code == 75, log.read_text()
    stopped = num_lines(lines)
    assert stopped == resumed + 1 < 4
    assert (broken / "checkpoints" / str(stopped)).is_dir()
    assert "goes on from" in log.read_text() and "Traceback" not in log.read_text()

    assert stop_at(learn, 1, signal.SIGINT, *words, log=log) == 130
    run(*words, log=log)
    assert metrics_of(broken) == metrics_of(straight)
    for step in range(4):
        assert texts_of(broken, step) == texts_of(straight, step)
    (ours, our_meta), (theirs, their_meta) = checkpoint_of(broken, 4), checkpoint_of(straight, 4)
    assert our_meta == their_meta
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (ours["arrays"]["length"] > 0).sum() > 4  # the replay buffer is in it
    assert not list((broken / "checkpoints").glob("*tmp*"))
    for when in ("before", "after"):
        name = f"evaluations/{when}.jsonl"
        assert (broken / name).read_text() == (straight / name).read_text()


def test_a_stop_before_the_first_step_is_heard_at_once(place: Path):
    """Catches a Ctrl-C or a preemption that waits for an evaluation, or dies of the signal."""
    log, early = place / "early.log", place / "early"
    evaluate = "rethinker_jax.loop:evaluate"
    assert stop_at(evaluate, 1, signal.SIGTERM, "train", "small.yaml", "run.dir=early", log=log) == 75, log.read_text()
    assert "evaluation before" in log.read_text() and "Traceback" not in log.read_text()
    assert not (early / "evaluations").exists() and num_lines(early / "metrics.jsonl") == 0


def test_export_gives_the_weights_of_the_checkpoint(straight: Path, place: Path, capsys: pytest.CaptureFixture[str]):
    """Catches the warm start, or the newest checkpoint, exported in the place of the one asked for."""
    sources = {4: straight, 3: straight / "checkpoints" / "3"}
    for step, source in sources.items():
        output = place / f"exported{step}"
        assert main(["export", str(source), "--output", str(output)]) == 0, capsys.readouterr().err
        exported = load_params(output, read_config(output), jnp.float32)[1]
        saved = checkpoint_of(straight, step)[0]["state"]["params"]
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, exported), saved)
    assert (place / "exported3" / "model.safetensors").read_bytes() != (
        place / "exported4" / "model.safetensors"
    ).read_bytes()
    assert main(["export", str(straight / "checkpoints" / "3"), "--output", str(place / "exported4")]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    again = load_params(place / "exported4", read_config(place / "exported4"), jnp.float32)[1]
    saved = checkpoint_of(straight, 4)[0]["state"]["params"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, again), saved)


def test_sampling_resumes_and_scoring_agrees(place: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a line drawn twice or lost, noise that depends on the batch, and log-probs of another distribution."""
    output = place / "sampled.jsonl"
    words = ["sample", "--model", "example", "--data", str(place / "test.parquet"), "--prompt-template", "none"]
    words += ["--n", "2", "--seed", "5", "sampling.max_new_tokens=24"]
    assert main([*words, "--output", str(output)]) == 0, capsys.readouterr().err
    lines = output.read_bytes().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert [(row["id"], row["sample"]) for row in rows] == [(f"{id_}", n) for id_ in _ids(place) for n in (0, 1)]
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert any(one["completion_ids"] != two["completion_ids"] for one, two in zip(rows[::2], rows[1::2], strict=True))

    # Problem 0 is whole, problem 1 half there, and the last line is torn.
    output.write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[4][:40])
    assert main([*words, "--output", str(output)]) == 0, capsys.readouterr().err
    again = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert [(row["id"], row["sample"], row["completion_ids"]) for row in again] == [
        (row["id"], row["sample"], row["completion_ids"]) for row in rows
    ]
    before = output.read_bytes()
    words[words.index("5")] = "6"
    assert main([*words, "--output", str(output)]) == 2  # another request never joins the lines of the first
    assert "seed" in capsys.readouterr().err and output.read_bytes() == before

    table = {row["id"]: row for row in pq.read_table(place / "test.parquet").to_pylist()}
    given = [
        table[row["id"]] | {"id": f"{row['id']}-{row['sample']}", "completion_ids": row["completion_ids"]}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(given), place / "given.parquet")
    words = ["score", "--model", "example", "--data", str(place / "given.parquet"), "--prompt-template", "none"]
    assert main([*words, "--output", str(place / "scored.jsonl")]) == 0, capsys.readouterr().err
    scored = [json.loads(line) for line in (place / "scored.jsonl").read_text().splitlines()]
    assert [row["token_ids"] for row in scored] == [row["completion_ids"] for row in rows]
    for ours, theirs in zip(scored, rows, strict=True):
        np.testing.assert_allclose(ours["log_probs"], theirs["log_probs"], atol=1e-4)


def _ids(place: Path) -> list[str]:
    return pq.read_table(place / "test.parquet", columns=["id"])["id"].to_pylist()


def test_greedy_sampling_is_the_same_for_every_seed_and_for_one_shot(place: Path, capsys: pytest.CaptureFixture[str]):
    """Catches noise at temperature 0, and a one-shot question that is put to the model in other words."""
    words = ["sample", "--model", "example", "--prompt-template", "none", "sampling.temperature=0"]
    words += ["sampling.max_new_tokens=24"]
    outputs = []
    for seed in ("1", "2"):
        outputs.append(place / f"greedy{seed}.jsonl")
        data = ["--data", str(place / "test.parquet"), "--output", str(outputs[-1]), "--seed", seed]
        assert main([*words, *data]) == 0, capsys.readouterr().err
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    greedy = {row["id"]: row for row in map(json.loads, outputs[0].read_text().splitlines())}
    row = next(row for row in pq.read_table(place / "test.parquet").to_pylist() if len(row["images"]) == 1)
    (place / "one.png").write_bytes(row["images"][0]["bytes"])
    assert main([*words, "--image", str(place / "one.png"), "--question", row["question"]]) == 0
    shot = json.loads(capsys.readouterr().out)
    assert (shot["completion"], shot["finish_reason"]) == tuple(
        greedy[row["id"]][key] for key in ("completion", "finish_reason")
    )


@pytest.fixture(scope="module")
def completions(place: Path) -> Path:
    """Rows with completions that the model does not give by itself."""
    rows = pq.read_table(place / "train.parquet").to_pylist()
    rows = [row | {"completion": f"Surely: {row['answer']}."} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), place / "completions.parquet")
    return place / "completions.parquet"


def test_fine_tuning_learns_stops_and_resumes(place: Path, completions: Path):
    """Catches a loss on the wrong tokens, and a resumed run that ends elsewhere than the straight one."""
    log = place / "sft.log"
    words = ["sft", "small.yaml", f"sft.data={completions}", "sft.num_steps=12", "sft.batch_size=4"]
    words += ["optimizer.learning_rate=1e-3", "optimizer.warmup_steps=1"]
    run(*words, "run.dir=tuned", log=log)
    nll = [row["nll"] for row in metrics_of(place / "tuned")]
    assert len(nll) == 12 and np.mean(nll[-3:]) < 0.7 * nll[0], nll
    summary = json.loads((place / "tuned" / "summary.json").read_text())
    assert summary["num_steps"] == 12 and summary["nll"] < nll[0]
    assert {"name", "wall_s", "commit", "versions"} <= set(summary)
    assert "model:" in run(*words, "run.dir=tuned", log=log)  # done before
    assert main(["report", str(place / "tuned")]) == 0
    assert "12 steps" in (place / "tuned" / "report.html").read_text()

    words += ["run.dir=halved", "run.save_every=100"]
    lines = place / "halved" / "metrics.jsonl"
    assert stop_at("rethinker_jax.sft.loop:learn", 3, signal.SIGTERM, *words, log=log) == 75, log.read_text()
    assert num_lines(lines) == 3 and not (place / "halved" / "model").exists()
    run(*words, log=log)
    assert metrics_of(place / "halved") == metrics_of(place / "tuned")
    weights = [(place / name / "model" / "model.safetensors").read_bytes() for name in ("tuned", "halved")]
    assert weights[0] == weights[1] != (EXAMPLE_MODEL / "model.safetensors").read_bytes()


def test_the_warm_start_can_be_rebuilt(place: Path):
    """Keeps the documented command alive: it gives a model directory that loads."""
    folder = place / "rebuilt"
    folder.mkdir()
    script = [sys.executable, str(REPOSITORY / "scripts" / "build_example.py"), "--output", str(folder / "model")]
    overrides = ["sft.num_steps=1", "sft.batch_size=4", "optimizer.warmup_steps=0"]
    # One program for all stages: compiling is most of what this costs.
    overrides += ["optimizer.learning_rate=1e-3", "optimizer.final_fraction=0.1", "buckets.row_tokens=[96]"]
    overrides += ["buckets.rows=[16]", "buckets.prefix_tokens=[224]", "buckets.targets=[512]"]
    process = subprocess.run(
        [*script, *overrides], cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True,
        text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    model = folder / "model"
    params = load_params(model, read_config(model), jnp.float32)[1]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        assert (model / name).read_bytes() == (EXAMPLE_MODEL / name).read_bytes()
    assert (model / "model.safetensors").stat().st_size < 3e6


def test_eight_devices_draw_and_learn_what_one_does(straight: Path, place: Path):
    """Catches noise that depends on the mesh, and a gradient that is summed instead of averaged over it."""
    words = ["train", "small.yaml", "--mesh", "run.dir=meshed", "run.num_steps=1"]
    words += ["evaluation.num_problems=0", "evaluation.num_sampled_problems=0"]
    run(*words, log=place / "meshed.log", JAX_NUM_CPU_DEVICES="8")
    assert json.loads((place / "meshed" / "summary.json").read_text())["device"].startswith("8 ")
    assert texts_of(place / "meshed", 0) == texts_of(straight, 0)
    ours, theirs = metrics_of(place / "meshed")[0], metrics_of(straight)[0]
    assert set(ours) == set(theirs)
    # Eight devices want prompts and vision rows in eights, and packed rows of their own; the others hold padding.
    for name in ("prompt_padding_share", "vision_padding_share", "row_padding_share"):
        assert ours.pop(name) >= theirs.pop(name)
    assert ours.pop("shared_prompt_saving") <= theirs.pop("shared_prompt_saving")  # groups may be halved for them
    assert ours.pop("cache_gib") < theirs.pop("cache_gib")  # of one device
    for name, value in theirs.items():
        np.testing.assert_allclose(np.float64(ours[name]), np.float64(value), rtol=2e-3, atol=2e-5, err_msg=name)


def test_it_learns(place: Path):
    """Catches a wrong sign of the advantage, a mask on the wrong tokens, an update that never reaches the sampler."""
    write_split(place / "many.parquet", "train", 400)
    words = ["train", "package:example", "run.dir=learned", f"data.train={place / 'many.parquet'}", "run.num_steps=14"]
    words += ["evaluation.num_problems=0", "evaluation.num_sampled_problems=0", "optimizer.learning_rate=3e-4"]
    words += ["optimizer.warmup_steps=2", "run.save_every=100"]
    run(*words, log=place / "learned.log")
    accuracy = [row["accuracy"] for row in metrics_of(place / "learned")]
    assert np.mean(accuracy[-5:]) >= np.mean(accuracy[:3]) + 0.10, accuracy
