"""The reward section of a config: names of terms, mappings that are set name by name, sections inside the section."""

from pathlib import Path
from typing import Any

import pytest

from rethinker_jax.config import Config
from rethinker_jax.config_file import load_config, load_defaults, save_config
from rethinker_jax.config_rewards import RewardConfig
from rethinker_jax.errors import UserError
from rethinker_jax.main import _OVERRIDE

MINE = "my/rewards.py:score"
# (YAML, overrides, section of `vars(reward)`, value)
UNDERSTOOD: list[tuple[str, list[str], str, Any]] = [
    ("", [], "terms", {"accuracy": 1.0}),
    ("", ["reward.terms.accuracy=0.9"], "terms", {"accuracy": 0.9}),
    ("", ["reward.terms.format=0.1"], "terms", {"accuracy": 1.0, "format": 0.1}),  # added to the default
    ("", ["reward.terms={iou: 1}"], "terms", {"iou": 1.0}),  # in its place
    ("reward: {terms: {iou: 1}}", ["reward.terms.format=0.1"], "terms", {"iou": 1.0, "format": 0.1}),
    ("reward: {terms: {iou: 1}}", ["reward.terms.iou=0.5"], "terms", {"iou": 0.5}),
    ("", [f"reward.terms.{MINE}=2"], "terms", {"accuracy": 1.0, MINE: 2.0}),
    (f"reward: {{terms: {{'{MINE}': 2}}}}", [], "terms", {MINE: 2.0}),
    ("reward: {by_type: {bbox: {iou: 1}}}", [], "by_type", {"bbox": {"iou": 1.0}}),
    ("", ["reward.by_type.bbox.iou=1", "reward.by_type.bbox.map=2"], "by_type", {"bbox": {"iou": 1, "map": 2}}),
    ("", ["reward.by_type.bbox={iou: 1}", "reward.by_type.a.map=1"], "by_type", {"bbox": {"iou": 1}, "a": {"map": 1}}),
    ("", [f"reward.by_type.text.{MINE}=1"], "by_type", {"text": {MINE: 1.0}}),
    ("", [f"reward.terms.{MINE}=1", f"reward.kwargs.{MINE}.k=[1, a]"], "kwargs", {MINE: {"k": [1, "a"]}}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "key", "value"), UNDERSTOOD)
def test_understood(tmp_path: Path, text: str, overrides: list[str], key: str, value: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    config = load_config(path, overrides)
    assert vars(config.reward)[key] == value
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []) == config
    assert all(_OVERRIDE.fullmatch(override) for override in overrides)  # the command line takes it for one


def test_a_base_keeps_its_sections_inside_the_section(tmp_path: Path) -> None:
    """Catches a section inside the section that replaces its base's whole; a mapping does replace it."""
    (tmp_path / "base.yaml").write_text("reward: {terms: {iou: 1}, length: {max_tokens: 7, shape: linear}}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nreward: {terms: {map: 1}, length: {max_tokens: 8}}")
    reward = load_config(tmp_path / "top.yaml", ["reward.length.over=-2"]).reward
    assert (reward.length.max_tokens, reward.length.shape, reward.length.over) == (8, "linear", -2.0)
    assert reward.terms == {"map": 1.0}


REFUSED = [
    ("reward: {terms: {acuracy: 1}}", [], ["reward.terms.acuracy: no such term; did you mean accuracy?"]),
    ("", ["reward.by_type.bbox.iuo=1"], ["reward.by_type.bbox.iuo: no such term; did you mean iou?"]),
    ("", ["reward.terms.xyz=1"], ["no such term (there: accuracy, format", "path.py:function"]),
    ("", ["reward.terms.my.py=1"], ["reward.terms.my.py: no such term"]),
    ("", ["reward.terms.accuracy=x"], ["reward.terms.accuracy: wanted a number, came 'x'"]),
    ("", ["reward.terms=3"], ["reward.terms: wanted names with values such as {a: 1}, came 3"]),
    ("", ["reward.terms={}"], ["reward.terms is empty"]),
    ("", ["reward.terms.iou=.nan"], ["reward.terms.iou is nan"]),
    ("", ["reward.term.iou=1"], ["reward.term.iou: no such key; did you mean reward.terms?"]),
    ("reward:\n  terms:\n    iou: 1\n    iou: 2", [], ["line 2: reward.terms", "iou is given twice"]),
    ("reward:\n  length:\n    shap: linear", [], ["line 3: reward.length.shap: no such key", "reward.length.shape?"]),
    ("reward:\n  length:\n    shape: cosin", [], ["line 3: reward.length.shape", "came 'cosin'; did you mean cosine?"]),
    ("reward: {length: 3}", [], ["reward.length: no such key; did you mean reward.length."]),
    ("", ["reward.format.form=box"], ["reward.format.form: wanted", "did you mean boxed?"]),
    ("", ["reward.length.wrong_short=1"], ["reward.length.wrong_short is 1.0; a wrong answer must not earn"]),
    ("", ["reward.soft_overlong.max_tokens=9"], ["buffer_tokens 512 is above max_tokens 9"]),
    ("", ["reward.terms.judge=1"], ["reward.judge.url is ''", "reward.judge.model is empty"]),
    ("", ["reward.terms.judge=1", "reward.judge.prompt=x"], ["reward.judge.prompt lacks {response}"]),
    ("", ["reward.kwargs.a.py:f.k=1"], ["reward.kwargs.a.py:f: no such function among the terms"]),
    ("", ["verifier.reward=accuracy"], ["verifier.reward: no such key; did you mean the section reward"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "overrides", "parts"), REFUSED, ids=[text + " ".join(over) for text, over, _ in REFUSED]
)
def test_refused(tmp_path: Path, text: str, overrides: list[str], parts: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    for part in parts:
        assert part in str(error.value)


def test_defaults_are_not_changed_by_an_override() -> None:
    """Catches one default mapping that all configs share and an override writes to."""
    load_defaults(["reward.terms.format=0.1"])
    assert load_defaults([]).reward.terms == Config().reward.terms == RewardConfig().terms == {"accuracy": 1.0}
