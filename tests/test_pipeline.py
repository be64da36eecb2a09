"""Recipes: refused or understood, planned and counted, run, cut, gone on with, and not run twice."""

import copy
import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from commands import REPOSITORY, num_lines, stop_at
from jax.sharding import Mesh

from rethinker_jax.config import Config
from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.example.dataset import write_split
from rethinker_jax.main import main
from rethinker_jax.models.qwen25vl import param_dims, param_shapes
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import AXES, TRAINING_RULES, param_shardings
from rethinker_jax.pipeline.budget import memory_of
from rethinker_jax.pipeline.keys import Contents, counted_settings
from rethinker_jax.pipeline.plan import keys_of, plan
from rethinker_jax.pipeline.recipe import read_recipe
from rethinker_jax.pipeline.stages import final_config, write_part
from rethinker_jax.prompts.dataset import _hub_rows, read_problems
from rethinker_jax.system import EXAMPLE_MODEL

RECIPES = sorted(
    path for path in (REPOSITORY / "configs").glob("*.yaml") if "stages" in yaml.safe_load(path.read_text())
)
NUM_PARAMETERS = 516_944  # of the example's model: vision 112,928, merger 55,632, decoder 348,384

Json = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with eight rows: ids r0 to r7, a column `level` from 0 to 7."""
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl", 8)
    return tmp_path


def write_rows(path: str, count: int, answer: str = "4") -> None:
    rows = [{"id": f"r{number}", "question": "2 + 2?", "answer": answer, "level": number} for number in range(count)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(text: str) -> Path:
    Path("recipe.yaml").write_text(text)
    return Path("recipe.yaml")


def stage(name: str, kind: str = "sft", **more: object) -> str:
    """One stage in YAML's flow form."""
    return "  - " + json.dumps({"name": name, "kind": kind} | more) + "\n"


ROWS: Json = {"data": "rows.jsonl"}
SET_SFT: Json = {"data": "example:sft-clean"}
FROM_PREVIOUS = "wanted base, previous, or an earlier stage that makes a model"
# (stages, parts of the message): each would otherwise show hours later, or never.
REFUSED: list[tuple[str, Sequence[str]]] = [
    (stage("a", "train"), ["stage 1.kind", "wanted one of distill, sample, select, sft, rl, evaluate", "'train'"]),
    (stage("a", **SET_SFT) + stage("a", **SET_SFT), ["stage a", "the name is there twice"]),
    (stage("a", **SET_SFT, starts_from="b") + stage("b", **SET_SFT), ["'b'", "comes later", FROM_PREVIOUS]),
    (stage("a", **SET_SFT, starts_from="a"), ["'a'", "is itself", FROM_PREVIOUS]),
    (stage("a", **SET_SFT, starts_from="nowhere"), ["'nowhere'", "is no stage", "there is none"]),
    (stage("a", "sample", **ROWS) + stage("b", **SET_SFT, starts_from="a"), ["kind sample, which makes no model"]),
    (stage("a", **SET_SFT) + stage("b", data={"from": "a"}), ["stage b", "'a'", "makes no data (kind sft)"]),
    (stage("a", "sample", **ROWS) + stage("b", data={"from": "a"}), ["leaves samples, not rows", "a select stage"]),
    (stage("a", "select", data={"from": "b"}) + stage("b", "sample", **ROWS), ["stage a", "'b'", "comes later"]),
    (stage("a", data={"form": "b"}), ["stage 1.data", "{from: STAGE} or {source: NAME}"]),
    (stage("a", data={"from": "b", "source": "c"}), ["wanted either from or source"]),
    (stage("a", data={"source": "no"}), ["no source 'no'", "(mine)"]),
    (stage("a", "sample"), ["stage a", "wanted data"]),
    (stage("a", **SET_SFT, n=3), ["a stage of kind sft has no n"]),
    (stage("a", "select", **ROWS, starts_from="base"), ["a stage of kind select has no starts_from"]),
    (stage("a", "evaluate", **ROWS), ["wanted benchmark"]),
    (stage("a", **SET_SFT, sett={}), ["stage 1.sett: no such key; did you mean set?"]),
    (stage("base", **SET_SFT), ["name the stage otherwise"]),
    (stage("a/b", **SET_SFT), ["stage 1.name"]),
    ("  - {name: a, kind: sft, name: b}\n", ["name is already given in line"]),
]


@pytest.mark.parametrize(("stages", "wanted"), REFUSED)
def test_recipes_that_cannot_be_used(here: Path, stages: str, wanted: Sequence[str]):
    """Catches a typo that is passed over, and a stage that would wait for one that comes after it."""
    with pytest.raises(UserError) as error:
        read_recipe(write_recipe(f"name: one\nsources: {{mine: rows.jsonl}}\nstages:\n{stages}"))
    assert all(part in str(error.value) for part in wanted), error.value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", "`name` and `stages`"), ("name: [", "wanted YAML"), ("name: a", "stages"), ("name: a\nstages: []", "stages")],
)
def test_files_that_are_no_recipe(here: Path, text: str, wanted: str):
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        read_recipe(write_recipe(text))
    assert wanted in str(error.value)


# (stage, overrides, part of the message): found before the first stage runs, whichever stage it is in.
UNFIT: list[tuple[str, Sequence[str], str]] = [
    (stage("z", **SET_SFT, set={"sft.num_stepz": 3}), (), "stage z: "),
    (stage("z", **SET_SFT, config="nothing.yaml"), (), "nothing.yaml: no such config file"),
    (stage("z", data="nothing.parquet"), (), "stage z: data: there is no nothing.parquet"),
    (stage("z"), (), "stage z: wanted data"),
    (stage("z", **SET_SFT, set={"data.prompt_template": "nosuch"}), (), "unknown prompt template 'nosuch'"),
    (stage("z", "select", **ROWS, set={"select.filters": ["corect"]}), (), "corect"),
    (stage("z", "select", **ROWS, set={"select.filters": ["correct"]}), (), "stage with samples, for the filter corr"),
    (stage("z", "select", **ROWS), ["select.mode=traces"], "select.mode traces wants data"),
    (stage("z", "evaluate", **ROWS, benchmark="mathvist"), (), "mathvist"),
    (stage("z", "evaluate", benchmark="rows"), (), "the benchmark rows wants data"),
    (stage("z", "evaluate", **ROWS, benchmark="rows", protocol="nosuch"), (), "unknown protocol 'nosuch'"),
    (stage("z", "sample", **ROWS, n=2), ["sampling.temperature=0"], "draws the same 2 times"),
    (stage("z", "distill", **ROWS), (), "distill.reason.model is empty"),
    (stage("z", "rl", **ROWS), (), "wanted at least rollout.prompts_per_step=16 rows, found 8"),
    (stage("z", **SET_SFT), ["model.lora.rank=4096"], "model.lora.rank=4096"),
    (stage("z", **SET_SFT, set={"sft.data": "rows.jsonl"}), (), "use data, or stages.z.data=PATH"),
    (stage("z", **SET_SFT, set={"run.dir": "elsewhere"}), (), "use dir=DIR"),
    (stage("z", **SET_SFT, set={"model.path": "elsewhere"}), (), "use starts_from, or model=DIR"),
    (stage("z", **SET_SFT), ["model=nowhere"], "nowhere"),
    (stage("z", **SET_SFT), ["sources.mein=x"], "no source mein; did you mean mine?"),
    (stage("z", **SET_SFT), ["stages.y.run.seed=1"], "no such stage"),
]


@pytest.mark.parametrize(("last", "overrides", "wanted"), UNFIT)
@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=("run", "dry run"))
def test_what_a_later_stage_lacks_is_said_before_the_first_one_runs(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    words: Sequence[str],
    last: str,
    overrides: Sequence[str],
    wanted: str,
):
    """Catches a pipeline that ends after hours for something that was wrong from the start."""
    first = stage("keep", "select", **ROWS, set={"select.filters": [{"column": {"column": "level", "min": 2}}]})
    write_recipe(f"name: one\nsources: {{mine: rows.jsonl}}\nstages:\n{first}{last}")
    assert main(["pipeline", "recipe.yaml", *words, *overrides]) == 2
    said = capsys.readouterr().err
    assert wanted in said and "Traceback" not in said
    assert not Path("runs").exists()


def level(least: int) -> Json:
    return {"select.filters": [{"column": {"column": "level", "min": least}}]}


# Three selections that need no model: `second` reads what `first` leaves, `other` does not.
CHAIN = (
    "name: chain\nsources: {mine: rows.jsonl}\nstages:\n"
    + stage("first", "select", data={"source": "mine"}, set=level(2))
    + stage("other", "select", data="rows.jsonl", set=level(1))
    + stage("second", "select", data={"from": "first"}, set=level(4))
)


def run_chain(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[str]:
    """Runs the chain; returns the stages that were run."""
    assert main(["pipeline", "recipe.yaml", *words]) == code
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[1].rstrip(":") for line in lines if line.startswith("stage ") and line.endswith(": select")]


def entries(directory: str = "runs/chain") -> dict[str, Json]:
    return {one["name"]: one for one in json.loads(Path(directory, "manifest.json").read_text())["stages"]}


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


def test_what_a_key_counts():
    """Catches a path or a mesh that makes a trained stage run again, and a rate that does not."""
    counted = counted_settings("rl", load_defaults(["optimizer.learning_rate=1e-3", "model.freeze=[vision]"]))
    assert counted == {"optimizer.learning_rate": 1e-3, "model.freeze": ["vision"]}
    free = ["run.save_every=3", "run.dir=x", "mesh.fsdp=8", "data.train=y", "sampling.num_slots=7", "sft.batch_size=3"]
    assert counted_settings("rl", load_defaults(free)) == {}
    assert counted_settings("sft", load_defaults(["sft.batch_size=3", "sampling.top_p=0.9", "run.num_steps=2"])) == {
        "sft.batch_size": 3,
        "run.num_steps": 2,
    }
    evaluated = counted_settings("sft", load_defaults(["sft.evaluate=true", "sampling.top_p=0.9"]))
    assert evaluated == {"sft.evaluate": True, "sampling.top_p": 0.9}
    assert counted_settings("select", load_defaults(["run.seed=1", "optimizer.b2=0.9"])) == {"run.seed": 1}
    # Of a mapping all of it: {a, b} and {a} with another default must differ.
    one, two = (load_defaults([f"reward.terms={terms}"]) for terms in ('{"accuracy": 1, "length": 1}', '{"length": 1}'))
    assert counted_settings("rl", one) != counted_settings("rl", two)


def test_a_key_follows_the_model_and_the_stages_before(here: Path):
    """Catches a cached stage whose base model, or whose stage before the last, is another."""
    write_recipe(
        "name: keys\nstages:\n"
        + stage("a", **SET_SFT, set={"sft.num_steps": 1})
        + stage("b", "sample", **ROWS)
        + stage("c", "select", data={"from": "b"}, set={"select.filters": ["correct"]})
        + stage("d", "sft", starts_from="base", data={"from": "c"})
    )

    def keys(*words: str) -> dict[str, str]:
        return keys_of(plan(read_recipe(Path("recipe.yaml"), words), None), EXAMPLE_MODEL, Contents(None))

    def changed(*words: str) -> set[str]:
        return {name for name, key in keys(*words).items() if key != first[name]}

    first = keys()
    assert changed() == set() and len(set(first.values())) == 5
    assert changed("stages.a.sft.num_steps=2") == {"a", "b", "c", "d"}  # d learns what the model of a wrote
    assert changed("stages.c.run.seed=2") == {"c", "d"}
    assert changed("stages.d.run.seed=2") == {"d"}
    assert changed("stages.b.sampling.num_slots=3", "run.dir=elsewhere") == set()
    other = here / "model"
    other.mkdir()
    for file in EXAMPLE_MODEL.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    contents = Contents(here / "hashes.json")
    assert contents.model(other) == first["base"]
    (other / "generation_config.json").write_text("{}")
    assert contents.model(other) != first["base"]


@pytest.mark.parametrize(
    ("sizes", "words", "trained"),
    [
        ((1, 1, 1), (), NUM_PARAMETERS),
        ((1, 1, 1), ("model.freeze=[vision, merger]",), 348_384),
        ((1, 4, 2), (), None),
    ],
)
def test_memory_is_that_of_the_shards(sizes: tuple[int, int, int], words: Sequence[str], trained: int | None):
    """Catches moments of frozen parts, and weights that are counted whole although the mesh cuts them."""
    qwen = read_config(EXAMPLE_MODEL)
    axes = dict(zip(AXES, sizes, strict=True))
    found = memory_of(load_defaults(words), qwen, axes, True, True)
    mesh = Mesh(np.full(sizes, jax.devices()[0]), AXES)
    shapes = param_shapes(qwen)
    places = param_shardings(param_dims(qwen), shapes, mesh, TRAINING_RULES)
    cut = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)), shapes, places)
    whole = sum(jax.tree.leaves(cut))
    assert found.state["weights"] == 4 * whole and (whole == NUM_PARAMETERS) == (sizes == (1, 1, 1))
    assert found.state["moments"] == 8 * (trained or whole)  # two of four bytes
    assert found.update == {"gradients": 4 * (trained or whole)}  # in float32 nothing is copied
    offloaded = memory_of(load_defaults([*words, "optimizer.offload=true"]), qwen, axes, True, False)
    assert "moments" not in offloaded.state and offloaded.host == found.state["moments"] and not offloaded.rollout
    assert found.rollout["sampling copy"] * sizes[2] >= 4 * NUM_PARAMETERS  # over tensor alone, and not all of it
    small = memory_of(load_defaults(["optimizer.moments=bfloat16", *words]), qwen, axes, True, True)
    assert small.state["moments"] == found.state["moments"] // 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_ship_can_be_run(here: Path, capsys: pytest.CaptureFixture[str], recipe: Path):
    """Catches a recipe that a changed key or filter left behind. Nothing is downloaded or written."""
    words = ["pipeline", str(recipe), "--dry-run", f"model={EXAMPLE_MODEL}", "--mesh", "data=1,fsdp=4"]
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    head = "".join(line for line in recipe.read_text().splitlines(keepends=True)[:20] if line.startswith("#"))
    assert all(word in head for word in ("command", "hardware", "time"))
    names = [one["name"] for one in yaml.safe_load(recipe.read_text())["stages"]]
    assert all(f"\n{name}: " in said for name in names)
    assert "data=1, fsdp=4, tensor=1: state" in said
    assert sorted(path.name for path in here.iterdir()) == ["rows.jsonl"]


def test_a_budget_counts_prompts_samples_and_updates(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a batch that is counted in prompts: 3 rollouts of 4 x 6 samples, in batches of 12, are 6 updates."""
    more = {"run.num_steps": 3, "rollout.prompts_per_step": 4, "rollout.samples_per_prompt": 6}
    write_recipe("name: one\nstages:\n" + stage("learn", "rl", **ROWS, set=more | {"training.batch_size": 12}))
    assert main(["pipeline", "recipe.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 x 4 prompts x 6 samples = 72 samples" in said
    assert "2 a rollout, 6 in all, of training.batch_size = 12 samples (2 prompts" in said
    assert "1.50 over 8 rows" in said  # 12 prompts of 8


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


def test_the_default_config_is_not_counted():
    """Catches keys that change when the program learns a new setting: of a default nothing stands in a key."""
    kinds = ("distill", "sample", "select", "sft", "rl", "evaluate")
    assert [counted_settings(kind, Config()) for kind in kinds] == [{}] * len(kinds)
