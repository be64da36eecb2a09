"""Reading configs: refused with everything that is wrong, or understood, and written back the same."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rethinker_jax import config_file
from rethinker_jax.config import Config, MeshConfig, RethinkConfig, RunConfig, SamplingConfig
from rethinker_jax.config_check import check
from rethinker_jax.config_file import (
    PACKAGE_CONFIGS,
    config_hash,
    config_name,
    find_config,
    load_config,
    load_defaults,
    override_of,
    save_config,
)
from rethinker_jax.config_keys import ALL_KEYS, KEY_TYPES, MAPPINGS, describe_config
from rethinker_jax.errors import UserError

REPOSITORY = Path(__file__).parent.parent
# Recipes of `pipeline` are lists of stages, read by another reader and tested there.
CONFIG_FILES = [
    path
    for folder in (PACKAGE_CONFIGS, REPOSITORY / "configs")
    for path in sorted(folder.rglob("*.yaml"))
    if "stages" not in (yaml.safe_load(path.read_text()) or {})
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path / "c.yaml", text), overrides)
    return str(error.value)


# (YAML, override, parts of the message): each would pass unseen, or as a traceback, in a reader that is less strict.
REFUSED = [
    ("run: {num_stepz: 3}", "", ["c.yaml line 1", "run.num_stepz", "did you mean run.num_steps?"]),
    ("rollout: {temperature: 1.0}", "", ["did you mean sampling.temperature or rethink.temperature?"]),
    ("optimizer: {lr: 1e-4}", "", ["did you mean optimizer.learning_rate?"]),
    ("optimizer: {zzz: 1e-4}", "", ["optimizer has learning_rate, schedule"]),
    ("samplng: {top_k: 3}", "", ["samplng: no such section; did you mean sampling?"]),
    ("num_steps: 3", "", ["num_steps: no such section; did you mean run.num_steps or sft.num_steps?"]),
    ("run:\n  seed: 1\n  seed: 2", "", ["line 3: run.seed is already given in line 2"]),
    ("run: {seed: 1}\nrun: {seed: 2}", "", ["line 2: run is already given in line 1"]),
    ('run: {seed: "5"}', "", ["run.seed: wanted a whole number, came '5'"]),
    ("run: {seed: true}", "", ["run.seed: wanted a whole number, came True"]),
    ("run: {seed: 1.5}", "", ["run.seed: wanted a whole number, came 1.5"]),
    ("run: {seed: }", "", ["run.seed: wanted a whole number, came None"]),
    ("run: {num_steps: -1}", "", ["run.num_steps: wanted greater than or equal to 0, came -1"]),
    ("data: {shuffle: 1}", "", ["data.shuffle: wanted true or false, came 1"]),
    ("data: {shuffle: yes}", "", ["data.shuffle: wanted true or false, came 'yes'"]),
    ("run: {dir: 3}", "", ["run.dir: wanted text, came 3"]),
    ("replay: {mode: srs}", "", ["wanted 'ssr', 'filter', 'dynamic' or 'none', came 'srs'; did you mean ssr?"]),
    ("sampling: {top_p: 1.5}", "", ["sampling.top_p: wanted less than or equal to 1, came 1.5"]),
    ("optimizer: {learning_rate: .nan}", "", ["optimizer.learning_rate", "came nan"]),
    ("loss: {entropy_coefficient: .inf}", "", ["loss.entropy_coefficient is inf; wanted a finite number"]),
    ("rethink: {triggers: Wait}", "", ["rethink.triggers: wanted a list such as [a, b], came 'Wait'"]),
    ("rethink: {triggers: [a, b, c, 4]}", "", ["rethink.triggers (item 4 of the list): wanted text, came 4"]),
    ("run: {dir: {a: 1}}", "", ["run.dir: wanted text, came {'a': 1}"]),
    ("run: 3", "", ["run: wanted keys with values, came '3'"]),
    ("- a\n- b", "", ["wanted sections such as `run:`"]),
    ("run: [", "", ["not readable as YAML", "line 1"]),
    ("run: {seed: !!python/object/apply:os.system ['true']}", "", ["not readable as YAML"]),
    ("run: &a {seed: 1}\nmesh: *a", "", ["aliases are not read here"]),
    ("base: nowhere.yaml", "", ["nowhere.yaml: no such config file"]),
    ("base: package:exampel", "", ["package:exampel: no such config in the package; did you mean example?"]),
    ("base: [a, b]", "", ["base: wanted one file name"]),
    ("", "run.seed", ["override 'run.seed': wanted section.key=value"]),
    ("", "seed=1", ["override 'seed=1': wanted section.key=value"]),
    ("", "run.sed=1", ["override 'run.sed=1': run.sed: no such key; did you mean run.seed?"]),
    ("", "rnu.seed=1", ["rnu: no such section; did you mean run?"]),
    ("", "run.seed=x", ["override 'run.seed=x': run.seed: wanted a whole number, came 'x'"]),
    ("", "run.seed=", ["run.seed: wanted a whole number, came None"]),
    ("", "rethink.odds=[0.5", ["override 'rethink.odds=[0.5': not readable as YAML"]),
]


@pytest.mark.parametrize(("text", "override", "parts"), REFUSED, ids=[text + over for text, over, _ in REFUSED])
def test_refused_with_place_wanted_came_and_hint(tmp_path: Path, text: str, override: str, parts: list[str]):
    message = refusal(tmp_path, text, *[override][: bool(override)])
    for part in parts:
        assert part in message


# (YAML, override, key, value)
UNDERSTOOD = [
    ("optimizer: {learning_rate: 1e-6}", "", "optimizer.learning_rate", 1e-6),  # YAML 1.1 reads this as text
    ("optimizer: {learning_rate: 1}", "", "optimizer.learning_rate", 1.0),
    ("rethink: {rule: off}", "", "rethink.rule", "off"),  # YAML 1.1 reads this as False
    ("replay: {mode: none}", "", "replay.mode", "none"),
    ("run: {dir: 2024-01-01}", "", "run.dir", "2024-01-01"),  # YAML 1.1 reads this as a date
    ("run: {dir: 1:30}", "", "run.dir", "1:30"),  # and this as 90
    ("run: {seed: 010}", "", "run.seed", 10),  # and this as 8
    ("run:", "", "run.seed", 0),
    ("", "", "run.seed", 0),
    ("# only a comment", "", "run.seed", 0),
    ("model: {freeze: [vision, merger]}", "", "model.freeze", ("vision", "merger")),
    ("run: {seed: 1}", "run.seed=2", "run.seed", 2),
    ("", "rethink.rule=off", "rethink.rule", "off"),
    ("", "run.dir=2024", "run.dir", "2024"),
    ("", "run.dir=", "run.dir", ""),
    ("", "run.dir='a b'", "run.dir", "a b"),
    ("", "run.dir=a=b: c", "run.dir", "a=b: c"),
    ("", "sampling.stop_strings=['</a>', \"\\n\"]", "sampling.stop_strings", ("</a>", "\n")),
    ("", "data.shuffle=false", "data.shuffle", False),
    ("", "optimizer.learning_rate=3e-5", "optimizer.learning_rate", 3e-5),
]


@pytest.mark.parametrize(("text", "override", "key", "value"), UNDERSTOOD, ids=[a + b for a, b, *_ in UNDERSTOOD])
def test_understood(tmp_path: Path, text: str, override: str, key: str, value: object):
    config = load_config(write(tmp_path / "c.yaml", text), [*[override][: bool(override)]])
    section, name = key.split(".")
    found = vars(vars(config)[section])[name]
    assert found == value and type(found) is type(value)


def test_later_override_holds(tmp_path: Path):
    """Scripts append overrides; taking the first would ignore them in silence."""
    assert load_config(write(tmp_path / "c.yaml", ""), ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_all_problems_at_once(tmp_path: Path):
    """A reader that stops at the first problem makes a person run it four times."""
    message = refusal(tmp_path, "run: {num_stepz: 1, seed: x}\nsampling: {top_p: 2}", "rnu.seed=1", "replay.mode=x")
    assert message.startswith("5 problems")
    for part in ("run.num_stepz", "run.seed", "sampling.top_p", "rnu.seed", "replay.mode"):
        assert part in message


def test_base_is_merged_by_key_and_relative_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shallow include would lose run.num_steps; a path relative to the working directory would not be found."""
    (tmp_path / "deep").mkdir()
    write(tmp_path / "root.yaml", "run: {seed: 1, num_steps: 7}\nmodel: {freeze: [vision, merger]}")
    write(tmp_path / "deep" / "middle.yaml", "base: ../root.yaml\nrun: {seed: 2, save_every: 3}")
    path = write(tmp_path / "deep" / "top.yaml", "base: middle.yaml\nrun: {seed: 4}\nmodel: {freeze: [decoder]}")
    monkeypatch.chdir("/")
    config = load_config(path, [])
    assert (config.run.seed, config.run.num_steps, config.run.save_every) == (4, 7, 3)
    assert config.model.freeze == ("decoder",)  # lists are replaced, not joined


def test_error_in_a_base_names_the_base(tmp_path: Path):
    write(tmp_path / "root.yaml", "\nrun: {seed: x}")
    assert "root.yaml line 2: run.seed" in refusal(tmp_path, "base: root.yaml")


def test_base_cycle(tmp_path: Path):
    """Without the check this is endless."""
    write(tmp_path / "b.yaml", "base: c.yaml")
    assert "goes round in a circle: c.yaml -> b.yaml -> c.yaml" in refusal(tmp_path, "base: b.yaml")


def test_base_of_the_package(tmp_path: Path):
    config = load_config(write(tmp_path / "c.yaml", "base: package:example\nrun: {seed: 77}"), [])
    assert config == load_config(None, ["run.seed=77"])


def test_unreadable_files(tmp_path: Path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, part in (
        (tmp_path / "binary.yaml", "UTF-8"),
        (tmp_path, "cannot be read"),
        (Path("/no/a.yaml"), "no such"),
    ):
        with pytest.raises(UserError, match=part):
            load_config(path, [])
    write(tmp_path / "tiny.yaml", "")
    with pytest.raises(UserError, match=r"did you mean .*tiny\.yaml"):
        load_config(tmp_path / "tinny.yaml", [])


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_config_loads_and_round_trips(path: Path, tmp_path: Path):
    config = load_config(path, [])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []) == config


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_config_opens_with_command_hardware_and_time(path: Path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True)[:20] if line.startswith("#"))
    assert "command" in head and "hardware" in head and "time" in head


def test_example_is_the_default():
    assert CONFIG_FILES
    assert load_config(None, []) == load_config(find_config("package:example"), [])
    assert config_name(None) == "example" and config_name(Path("a/b.c.yaml")) == "b.c"


# Words that some YAML reader takes for something else are likely to come up.
TRICKY = st.sampled_from(
    ["", "off", "1e5", "1:30", "~", "null", "true", "0x1", "- a", "a: b", "# c", "\n\nWait", " x ", ".5"]
)
TEXT = TRICKY | st.text(st.characters(codec="utf-8"), max_size=20)
NUMBER = st.floats(0.0, 1e6, allow_nan=False)


@settings(deadline=None, max_examples=150)
@given(directory=TEXT, triggers=st.lists(TEXT, max_size=4), odds=NUMBER, seed=st.integers(0, 2**40), temperature=NUMBER)
def test_any_config_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    directory: str,
    triggers: list[str],
    odds: float,
    seed: int,
    temperature: float,
):
    """Catches text that comes back as a number, floats that lose digits, tuples that come back as lists."""
    config = Config(
        run=RunConfig(dir=directory, seed=seed),
        sampling=SamplingConfig(temperature=temperature),
        rethink=RethinkConfig(rule="off", triggers=tuple(triggers), odds=(odds,) * len(triggers)),
    )
    path = tmp_path_factory.mktemp("c") / "saved.yaml"
    save_config(config, path)
    assert load_config(path, []) == config
    # Another YAML reader must not take text for a truth value or a number either.
    plain = yaml.safe_load(path.read_text("utf-8"))
    assert plain["run"]["dir"] == directory and plain["rethink"]["rule"] == "off"


def test_save_leaves_no_other_file(tmp_path: Path):
    save_config(Config(), tmp_path / "new" / "config.yaml")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]


def test_hash_differs_with_every_value():
    assert config_hash(Config()) == config_hash(load_defaults([])) != config_hash(load_defaults(["run.seed=1"]))
    assert config_hash(load_defaults(["sampling.top_p=0.9"])) != config_hash(load_defaults(["sampling.min_p=0.9"]))


# (overrides, part of the message)
INCONSISTENT = [
    (["rethink.odds=[1.0]"], "rethink.odds has 1 entries and rethink.triggers 4"),
    (["mesh.data=-1"], "mesh.data and mesh.fsdp are both -1"),
    (["mesh.tensor=0"], "mesh.tensor is 0"),
    (["mesh.data=-2"], "mesh.data is -2"),
    (["sampling.top_p=0"], "sampling.top_p is 0"),
    (["sampling.stop_strings=['']"], "sampling.stop_strings holds an empty string"),
    (["data.min_pixels=10", "data.max_pixels=9"], "data.min_pixels 10 is above data.max_pixels 9"),
    (["optimizer.moments=bfloat16", "optimizer.b2=0.999"], "in which the second moment could never fall"),
    (["optimizer.rates={adapters: 2}"], "optimizer.rates has adapters, but model.lora.rank is 0"),
    (["optimizer.rates={decoder: 2}", "model.lora.rank=4"], "optimizer.rates has decoder, but model.lora.rank is 4"),
    (["optimizer.rates={vision: 0.1}", "model.freeze=[vision]"], "vision, which model.freeze leaves as it is"),
    (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt is 1"),
    (["rollout.prompts_per_step=9"], "= 72 rows cannot be cut into batches of training.batch_size 64"),
    (["training.batch_size=12", "rollout.prompts_per_step=3"], "12 is not a multiple of rollout.samples_per_prompt 8"),
    (["rethink.rule=random", "rethink.fraction=0"], "rethink.rule is random with rethink.fraction 0"),
    (["rethink.rule=paper", "rethink.odds=[0, 0, 0, 0]"], "sum to 0"),
    (["rethink.rule=paper", "rethink.triggers=[]", "rethink.odds=[]"], "rethink.triggers is empty"),
    (["optimizer.b2=1"], "optimizer.b2 is 1"),
    (["loss.clip_low=1"], "loss.clip_low is 1"),
]


@pytest.mark.parametrize(
    ("overrides", "part"), INCONSISTENT, ids=[" ".join(overrides) for overrides, _ in INCONSISTENT]
)
def test_keys_that_contradict_each_other(overrides: list[str], part: str):
    with pytest.raises(UserError) as error:
        load_defaults(overrides)
    assert part in str(error.value)


def test_contradictions_are_not_seen_where_there_are_none():
    """A rule that is too strict would refuse these."""
    assert check(Config()) == []
    assert check(Config(mesh=MeshConfig(data=2, fsdp=4, tensor=1))) == []
    load_defaults(["training.batch_size=12", "rollout.prompts_per_step=3", "replay.mode=none"])
    load_defaults(["rethink.fraction=0", "sampling.temperature=0", "training.micro_batch_tokens=16"])


def test_description_has_every_key_with_its_comment():
    """Catches a key without a line in the help, and comments that slip to the neighbouring key."""
    keys = describe_config()
    assert tuple(key.name for key in keys) == ALL_KEYS
    by_name = {key.name: key for key in keys}
    assert by_name["replay.capacity"].default == 4096
    assert by_name["replay.capacity"].comment == "rows; the oldest leave first"
    assert by_name["replay.capacity"].type == "Positive"

    def num_keys(section: object) -> int:
        return sum(num_keys(one) if dataclasses.is_dataclass(one) else 1 for one in vars(section).values())

    assert len(keys) == num_keys(Config())


def test_a_name_of_a_mapping_in_a_section_inside_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a KeyError, and a name put beside the others that forgets them. The key is made up."""
    types = KEY_TYPES["distill"] | {"caption.body": Mapping[str, int]}
    monkeypatch.setitem(KEY_TYPES, "distill", types)
    monkeypatch.setitem(MAPPINGS, "distill", (*MAPPINGS["distill"], "caption.body"))
    defaults = config_file._DEFAULTS["distill"]
    monkeypatch.setitem(
        config_file._DEFAULTS, "distill", defaults | {"caption": defaults["caption"] | {"body": {"a": 1}}}
    )
    section: dict[str, Any] = {"caption": {"seed": 3}}
    for key, value in (("caption.body.b", 2), ("caption.body.c", 3), ("caption.body.a", 4)):
        config_file._place(section, config_file.Setting("distill", key, value, ""))
    assert section == {"caption": {"seed": 3, "body": {"a": 4, "b": 2, "c": 3}}}
    config_file._place(section, config_file.Setting("distill", "caption_body.x", 5, ""))
    assert section["caption_body"] == {"x": 5}


@pytest.mark.parametrize(
    "value",
    ["\U0001f600", "a\U0010ffffb\\u0041\\", 'x "y" \u00e4\x85\u2028\t', "1e5", "null", "\\ud83d\\ude00", "", " a "],
)
def test_an_override_gives_a_key_any_text(value: str) -> None:
    """Catches a character beyond U+FFFF that JSON writes as two halves, and YAML reads as two characters."""
    given = load_defaults(
        [override_of("run.dir", value), override_of("select.filters", [{"words": {"max": 5}}, value])]
    )
    assert given.run.dir == value and given.select.filters == ({"words": {"max": 5}}, value)


def test_a_file_too_deep_to_read(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("run: " + "[" * 5000)
    with pytest.raises(UserError, match="too deep"):
        load_config(path, [])
    with pytest.raises(UserError, match="too deep"):
        load_defaults(["select.filters=" + "[" * 5000])
