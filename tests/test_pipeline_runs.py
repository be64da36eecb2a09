"""Recipes: run, cut, gone on with, and not run twice."""

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from commands import num_lines, stop_at
from recipes import CHAIN, ROWS, Json, entries, go_to, run_chain, stage, write_recipe, write_rows

from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import write_split
from rethinker_jax.export import export
from rethinker_jax.main import main
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.pipeline.keys import Contents
from rethinker_jax.pipeline.plan import plan
from rethinker_jax.pipeline.recipe import read_recipe
from rethinker_jax.pipeline.stages import final_config, write_part
from rethinker_jax.prompts.dataset import Part, _hub_rows, read_problems
from rethinker_jax.system import EXAMPLE_MODEL


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return go_to(tmp_path, monkeypatch)


def test_only_what_changed_and_what_depends_on_it_runs_again(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a stage run twice, and a result that is kept although what it depends on is another."""
    write_recipe(CHAIN)
    assert run_chain(capsys) == ["first", "other", "second"]
    before = Path("runs/chain/manifest.json").read_bytes()
    assert run_chain(capsys) == []
    assert Path("runs/chain/manifest.json").read_bytes() == before
    found = entries()
    assert [(one["name"], one["status"], one["output_rows"]) for one in found.values()] == [
        ("first", "done", 6), ("other", "done", 7), ("second", "done", 4),
    ]  # fmt: skip
    wanted = {"name", "kind", "status", "starts_from", "output", "inputs", "commit", "wall_s"}
    wanted |= {"key", "parent", "settings", "versions", "command"}
    assert all(wanted <= set(one) for one in found.values())
    (data,) = found["second"]["inputs"]["data"]
    assert (data["stage"], data["rows"], data["sha256"]) == ("first", 6, found["first"]["output_sha256"])

    assert run_chain(capsys, 'stages.first.select.filters=[{"column": {"column": "level", "min": 3}}]') == [
        "first",
        "second",
    ]
    assert Path("runs/chain/first.old1/rows.jsonl").is_file()  # set aside, with what the manifest said of it
    aside = json.loads(Path("runs/chain/first.old1/manifest_entry.json").read_text())
    assert aside == found["first"]
    assert entries()["second"]["output_rows"] == 4

    os.utime("rows.jsonl")  # the same content
    changed = ['stages.first.select.filters=[{"column": {"column": "level", "min": 3}}]']
    assert run_chain(capsys, *changed) == []
    write_rows("rows.jsonl", 9)
    assert run_chain(capsys, *changed) == ["first", "other", "second"]
    write_rows("more.jsonl", 10)
    assert run_chain(capsys, *changed, "sources.mine=more.jsonl") == ["first", "second"]


def test_an_output_that_was_changed_by_hand_is_made_anew(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a stage that learns from a file that no stage made."""
    write_recipe(CHAIN)
    run_chain(capsys)
    left = Path("runs/chain/first/rows.jsonl")
    text = left.read_text()
    left.write_text(text.replace("r2", "x2"))
    assert run_chain(capsys) == ["first"]  # what `second` read is there again as it was
    assert left.read_text() == text and "x2" in Path("runs/chain/first.old1/rows.jsonl").read_text()
    left.unlink()
    assert run_chain(capsys) == ["first"]
    assert left.read_text() == text


def test_a_failed_stage_is_recorded_and_gone_on_with(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a failure that leaves no trace, one that looks done, and an exit code that says all is well."""
    write_recipe(CHAIN)
    nothing = 'stages.second.select.filters=[{"column": {"column": "level", "min": 99}}]'
    run_chain(capsys, nothing, code=2)
    found = entries()
    assert [one["status"] for one in found.values()] == ["done", "done", "failed"]
    assert "left nothing" in found["second"]["error"]
    assert run_chain(capsys) == ["second"]
    assert entries()["second"]["status"] == "done" and "error" not in entries()["second"]
    Path("runs/chain/manifest.json").write_text("{")
    assert main(["pipeline", "recipe.yaml"]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_what_the_manifest_does_not_know_is_no_result(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a model of other rows, found in the place of the stage's own, that is taken for it."""
    write_recipe(
        "name: one\nstages:\n" + stage("tune", data="rows.jsonl", set={"sft.num_steps": 1, "sft.batch_size": 1})
    )
    write_completions("rows.jsonl", "one")
    assert main(["pipeline", "recipe.yaml"]) == 0
    Path("runs/one/manifest.json").unlink()
    write_completions("rows.jsonl", "two")
    assert main(["pipeline", "recipe.yaml"]) == 0
    assert "the manifest does not know it" in capsys.readouterr().out
    now, before = Path("runs/one/tune/samples.jsonl"), Path("runs/one/tune.old1/samples.jsonl")
    assert "two" in now.read_text() and "one" in before.read_text()


def write_completions(path: str, word: str) -> None:
    rows = [{"id": f"r{number}", "question": "2 + 2?", "completion": word} for number in range(4)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_recipe_may_have_any_name_of_a_file(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a character beyond U+FFFF that becomes two halves on its way through a config."""
    Path("rows.jsonl").rename('r\u00f6ws \U0001f600 "x" \\u00e4.jsonl')
    write_recipe(
        CHAIN.replace("rows.jsonl", 'r\u00f6ws \U0001f600 \\"x\\" \\\\u00e4.jsonl', 1)
        .replace("{mine: ", '{mine: "', 1)
        .replace(".jsonl}", '.jsonl"}', 1)
    )
    words = ('stages.other.data=r\u00f6ws \U0001f600 "x" \\u00e4.jsonl', "dir=runs/\U0001f600")
    assert run_chain(capsys, *words) == ["first", "other", "second"]
    assert run_chain(capsys, *words) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("wall_s", "x"), ("settings", None), ("inputs", {}), ("inputs", {"data": [1]}), ("parent", "x"), ("key", 5),
     ("name", None), ("status", [])],
)  # fmt: skip
def test_a_manifest_that_was_changed_by_hand(here: Path, capsys: pytest.CaptureFixture[str], key: str, value: object):
    """Catches a traceback, and a stage that is set aside for a slip of the pen."""
    write_recipe(CHAIN)
    run_chain(capsys)
    path = Path("runs/chain/manifest.json")
    good = path.read_text()
    found = json.loads(good)
    found["stages"][1][key] = value
    path.write_text(json.dumps(found))
    assert main(["pipeline", "recipe.yaml"]) == 2
    said = capsys.readouterr().err
    assert "manifest.json" in said and "entry 2" in said and "Traceback" not in said
    path.write_text(good)
    assert run_chain(capsys) == []


def test_a_report_that_is_gone_is_written_again(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a traceback in the stage that asks the report where pictures lie."""
    write_recipe(CHAIN)
    run_chain(capsys)
    report = Path("runs/chain/first/rows.jsonl.report.json")
    report.unlink()
    assert run_chain(capsys) == ["first"]
    report.write_text("{")
    assert main(["pipeline", "recipe.yaml"]) == 2
    assert "wanted what `select` wrote" in capsys.readouterr().err


def test_samples_that_were_torn_by_hand_have_another_hash(here: Path):
    """Catches a traceback, and a torn file that counts as the one that the stage left."""
    lines = ['{"id": "a", "ms": 1}\n', '{"id": "b", "ms": 2}\n']
    hashes = set()
    for number, text in enumerate(["".join(lines), "".join(lines)[:-5], lines[0] + "[1]\n", lines[0] + "\xff\n"]):
        path = Path(f"samples{number}.jsonl")
        path.write_text(text, encoding="latin-1")
        hashes.add(Contents(None).samples(path))
    Path("later.jsonl").write_text("".join(lines).replace("1", "7"))
    assert len(hashes) == 4 and Contents(None).samples(Path("later.jsonl")) in hashes


def test_an_empty_data_set_of_the_hub_is_not_kept(here: Path):
    """Catches a file without rows that is never downloaded again."""
    with pytest.raises(UserError, match="at least one row"):
        write_part(Part("owner/name", [], [], None), Path("sources/x.parquet"))
    assert not Path("sources/x.parquet").exists()


def test_a_cut_stage_goes_on_wherever_it_lies(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches hours of training set aside because the pipeline, its base or its rows were moved."""
    write_completions("rows.jsonl", "four")
    shutil.copytree(EXAMPLE_MODEL, "base")
    more = {"sft.num_steps": 3, "sft.batch_size": 2, "sft.validation": "rows.jsonl", "run.save_every": 1}
    recipe = "name: moved\nstages:\n" + stage("tune", **ROWS, set=more)
    write_recipe(recipe)
    words = ("pipeline", "recipe.yaml", "model=base")
    assert stop_at("rethinker_jax.sft.loop:learn", 2, signal.SIGTERM, *words, log=here / "log") == 75
    Path("runs/moved").rename("runs/there")
    Path("base").rename("elsewhere")
    os.utime("elsewhere/config.json")
    Path("rows.jsonl").rename("others.jsonl")
    write_recipe(recipe.replace("rows.jsonl", "others.jsonl"))
    words = ("pipeline", "recipe.yaml", "model=elsewhere", "dir=runs/there", "model.remat=full")
    assert main([*words]) == 0, capsys.readouterr().err
    assert "begins anew" not in capsys.readouterr().out and not list(Path("runs/there").glob("*.old*"))
    steps = [json.loads(line)["step"] for line in Path("runs/there/tune/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


SMALL = """
base: package:example
run: {num_steps: 3, save_every: 1, rollouts_every: 1}
data: {test: test.parquet}
rollout: {prompts_per_step: 4, samples_per_prompt: 4}
training: {batch_size: 8}
replay: {capacity: 32}
evaluation: {num_problems: 0, num_sampled_problems: 0}
"""
ROUND = (
    "name: round\nsources: {mine: train.parquet}\nstages:\n"
    + stage("described", "distill", data="few.parquet", config="small.yaml", set={
        "distill.reason.model": "example", "distill.reason.n": 1, "distill.reason.max_tokens": 16,
        "distill.caption.max_tokens": 8, "data.max_prompt_tokens": 1024,
    })
    + stage("drawn", "sample", data={"source": "mine"}, config="small.yaml", n=4)
    + stage("traces", "select", data={"from": "drawn"}, set={
        "select.mode": "traces", "select.filters": ["correct", {"pick": "shortest"}],
    })
    + stage("solved", "select", data={"from": "drawn"}, set={"select.filters": [{"pass_rate": {"min": 0.1}}]})
    + stage("tune", starts_from="base", data={"from": "traces"}, config="small.yaml", set={
        "sft.num_steps": 3, "sft.batch_size": 4, "optimizer.learning_rate": 1e-3,
    })
    + stage("learn", "rl", data={"from": "solved"}, config="small.yaml")
    + stage("judged", "evaluate", data="test.parquet", benchmark="rows", n=2, config="small.yaml")
)  # fmt: skip


def without_clocks(folder: Path) -> list[Json]:
    found = copy.deepcopy(json.loads((folder / "runs/round/manifest.json").read_text())["stages"])
    return [{key: value for key, value in one.items() if key != "wall_s"} for one in found]


def test_a_round_killed_and_stopped_ends_as_the_straight_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a stage that is not gone on with, starts from another model, or leaves something else after a kill."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
        write_split(folder / "train.parquet", "train", 24)
        write_split(folder / "test.parquet", "test", 8)
        write_split(folder / "few.parquet", "validation", 4)
        (folder / "small.yaml").write_text(SMALL)
        (folder / "recipe.yaml").write_text(ROUND)
    monkeypatch.chdir(straight)
    assert main(["pipeline", "recipe.yaml"]) == 0
    stages = {one["name"]: one for one in without_clocks(straight)}
    assert [(one["kind"], one["status"], one["starts_from"]) for one in stages.values()] == [
        ("distill", "done", "base"), ("sample", "done", "base"), ("select", "done", ""), ("select", "done", ""),
        ("sft", "done", "base"), ("rl", "done", "tune"), ("evaluate", "done", "learn"),
    ]  # fmt: skip
    assert (stages["described"]["output_rows"], stages["drawn"]["output_rows"]) == (4, 24 * 4)
    assert all(
        "verdict" in json.loads(line) for line in (straight / stages["drawn"]["output"]).read_text().splitlines()
    )
    assert stages["learn"]["inputs"]["model"] == stages["tune"]["output"]
    assert stages["learn"]["parent"] == {"name": "tune", "key": stages["tune"]["key"]}
    assert "traces/traces.parquet" in (straight / "runs/round/tune/config.yaml").read_text()
    assert pq.read_table(straight / stages["traces"]["output"]).num_rows == stages["tune"]["inputs"]["data"][0]["rows"]
    assert read_config(straight / stages["learn"]["output"]) == read_config(EXAMPLE_MODEL)

    runs = broken / "runs" / "round"
    command, log = ("pipeline", "recipe.yaml"), broken / "log"
    drawn, learned = runs / "drawn" / "drawn.jsonl", runs / "learn" / "metrics.jsonl"
    assert stop_at("rethinker_jax.sample:_line", 10, signal.SIGKILL, *command, log=log) == -signal.SIGKILL
    assert [one["status"] for one in without_clocks(broken)] == ["done", "running"] and num_lines(drawn) == 9
    assert stop_at("rethinker_jax.loop:learn", 1, signal.SIGTERM, *command, log=log) == 75 and num_lines(learned) == 1
    assert [one["status"] for one in without_clocks(broken)] == ["done"] * 5 + ["stopped"]
    monkeypatch.chdir(broken)
    assert main(["pipeline", "recipe.yaml"]) == 0
    assert not list(runs.glob("*.old*"))
    assert without_clocks(broken) == without_clocks(straight)

    before = (runs / "manifest.json").read_bytes()
    assert main(["pipeline", "recipe.yaml"]) == 0
    assert (runs / "manifest.json").read_bytes() == before


def test_downloaded_rows_are_those_of_the_hub(here: Path):
    """Catches pictures that are lost or decoded on the way, and rows in another order."""
    write_split("train.parquet", "train", 3)
    rows = pq.read_table("train.parquet").to_pylist()
    write_part(_hub_rows("owner/name", datasets.Dataset.from_list(rows)), Path("sources/owner--name.parquet"))
    assert pq.read_table("sources/owner--name.parquet").to_pylist() == rows
    assert [path.name for path in Path("sources").iterdir()] == ["owner--name.parquet"]


def test_rows_of_a_stage_are_read_with_their_pictures(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches pictures that are looked for beside the rows that `select` wrote, and not where they are."""
    write_split("train.parquet", "train", 12)
    Path("pictures").mkdir()
    rows = []
    for row in pq.read_table("train.parquet").to_pylist():
        for picture in row["images"]:
            Path("pictures", picture["path"]).write_bytes(picture["bytes"])
        rows.append(row | {"images": [f"pictures/{picture['path']}" for picture in row["images"]], "level": len(rows)})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_recipe(CHAIN)
    run_chain(capsys)
    asked = read_recipe(Path("recipe.yaml"))
    first, _, second = plan(asked, None)
    assert final_config(first).data.image_root == "" and final_config(second).data.image_root == str(here)
    found = read_problems(str(second.output), image_root=str(here))
    assert len(found.problems) == 8 and not found.bad_rows and any(problem.images for problem in found.problems)


def test_the_checkpoint_that_becomes_the_model(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches the last checkpoint in the best one's place, and a run that is made again to choose another."""
    write_split("train.parquet", "train", 8)
    write_split("test.parquet", "test", 4)
    Path("small.yaml").write_text(SMALL)
    more = {
        "run.num_steps": 2, "run.keep_checkpoints": 2, "data.validation": "test.parquet",
        "evaluation.validate_every": 1, "sampling.max_new_tokens": 8, "optimizer.learning_rate": 1e-3,
    }  # fmt: skip
    made = {"data": "train.parquet", "config": "small.yaml", "set": more}
    write_recipe("name: chosen\nstages:\n" + stage("learn", "rl", **made))
    assert main(["pipeline", "recipe.yaml"]) == 0
    learn = Path("runs/chosen/learn")
    metrics = learn / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all("validation_reward" in row for row in rows)
    for row, reward in zip(rows, (0.5, 0.25), strict=True):  # the first step is the best
        row["validation_reward"] = reward
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = {name: Contents(None).model(export(learn / "checkpoints" / name, Path(name))) for name in ("1", "2")}
    assert entries("runs/chosen")["learn"]["output_sha256"] == weights["2"] != weights["1"]

    write_recipe("name: chosen\nstages:\n" + stage("learn", "rl", **made, checkpoint="best"))
    capsys.readouterr()
    assert main(["pipeline", "recipe.yaml"]) == 0
    assert "its model is chosen anew" in capsys.readouterr().out
    found = entries("runs/chosen")["learn"]
    assert found["output_sha256"] == weights["1"] and found["settings"]["checkpoint"] == "best"
    assert not Path("runs/chosen/learn.old1").exists() and Path("runs/chosen/learn/model.old1").is_dir()
    assert main(["pipeline", "recipe.yaml"]) == 0
    assert "stage learn: done before" in capsys.readouterr().out
