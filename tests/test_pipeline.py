"""Recipes: refused or understood, planned and counted."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from commands import REPOSITORY
from jax.sharding import Mesh
from recipes import ROWS, SET_SFT, go_to, stage, write_recipe

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.config_file import load_defaults
from rethinker_jax.errors import UserError
from rethinker_jax.main import main
from rethinker_jax.models.qwen25vl import param_dims, param_shapes
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.sharding import AXES, TRAINING_RULES, param_shardings
from rethinker_jax.pipeline.budget import memory_of
from rethinker_jax.pipeline.keys import Contents, counted_settings
from rethinker_jax.pipeline.plan import keys_of, plan
from rethinker_jax.pipeline.recipe import read_recipe
from rethinker_jax.system import EXAMPLE_MODEL

RECIPES = sorted(
    path for path in (REPOSITORY / "configs").glob("*.yaml") if "stages" in yaml.safe_load(path.read_text())
)
NUM_PARAMETERS = 516_944  # of the example's model: vision 112,928, merger 55,632, decoder 348,384


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return go_to(tmp_path, monkeypatch)


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
    (stage("sources", **SET_SFT), ["stage sources: the pipeline keeps something else under this name"]),
    (stage("hashes.json", **SET_SFT), ["stage hashes.json: the pipeline keeps something else"]),
    (stage("a.old1", **SET_SFT), ["stage a.old1: the pipeline keeps something else"]),
    (stage("a", **SET_SFT, checkpoint="best"), ["a stage of kind sft has no checkpoint"]),
    (stage("a", "rl", **ROWS, checkpoint="beste"), ["stage 1.checkpoint", "'last' or 'best'"]),
    ("  - " + "[" * 5000 + "]" * 5000 + "\n", ["too deep"]),
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
    (stage("z", "rl", **ROWS, checkpoint="best"), ["rollout.prompts_per_step=8"], "checkpoint: best wants what"),
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


def test_what_a_key_counts():
    """Catches a path or a mesh that makes a trained stage run again, and a rate that does not."""
    counted = counted_settings("rl", load_defaults(["optimizer.learning_rate=1e-3", "model.freeze=[vision]"]))
    assert counted == {"optimizer.learning_rate": 1e-3, "model.freeze": ["vision"]}
    free = ["model.remat=full", "training.micro_batch_tokens=512", "model.attention=plain", "verifier.num_workers=3"]
    assert counted_settings("rl", load_defaults(free)) == {}
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


def test_the_default_config_is_not_counted():
    """Catches keys that change when the program learns a new setting: of a default nothing stands in a key."""
    kinds = ("distill", "sample", "select", "sft", "rl", "evaluate")
    assert [counted_settings(kind, Config()) for kind in kinds] == [{}] * len(kinds)


@pytest.mark.parametrize(
    ("sizes", "words", "trained"),
    [
        ((1, 1, 1, 1), (), NUM_PARAMETERS),
        ((1, 1, 1, 1), ("model.freeze=[vision, merger]",), 348_384),
        ((1, 4, 1, 2), (), None),
        ((1, 2, 2, 2), (), None),
    ],
)
def test_memory_is_that_of_the_shards(sizes: tuple[int, int, int, int], words: Sequence[str], trained: int | None):
    """Catches moments of frozen parts, and weights that are counted whole although the mesh cuts them."""
    qwen = read_config(EXAMPLE_MODEL)
    axes = MeshConfig(*sizes)
    found = memory_of(load_defaults(words), qwen, axes, "rl")
    mesh = Mesh(np.full(sizes, jax.devices()[0]), AXES)
    shapes = param_shapes(qwen)
    places = param_shardings(param_dims(qwen), shapes, mesh, TRAINING_RULES)
    cut = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)), shapes, places)
    whole = sum(jax.tree.leaves(cut))
    assert found.state["weights"] == 4 * whole and (whole == NUM_PARAMETERS) == (sizes == (1, 1, 1, 1))
    assert found.state["moments"] == 8 * (trained or whole)  # two of four bytes
    assert found.update == {"gradients": 4 * (trained or whole)}  # in float32 nothing is copied
    offloaded = memory_of(load_defaults([*words, "optimizer.offload=true"]), qwen, axes, "sft")
    assert "moments" not in offloaded.state and offloaded.host == found.state["moments"] and not offloaded.rollout
    assert found.rollout["sampling copy"] * sizes[3] >= 4 * NUM_PARAMETERS  # over tensor alone, and not all of it
    small = memory_of(load_defaults(["optimizer.moments=bfloat16", *words]), qwen, axes, "rl")
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
    assert "fsdp=4: state" in said
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


def test_a_budget_leaves_out_the_rows_that_are_held_out(here: Path, capsys: pytest.CaptureFixture[str]):
    """Catches steps of rows that are never learned: of 8 ceil(0.3 x 8) = 3 are measured, 5 in batches of 2 are 3."""
    more = {"sft.validation_fraction": 0.3, "sft.num_epochs": 1, "sft.batch_size": 2}
    write_recipe("name: one\nstages:\n" + stage("tune", **ROWS, set=more))
    assert main(["pipeline", "recipe.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 of 8 rows, to measure on" in said and "3 of 2 rows" in said
