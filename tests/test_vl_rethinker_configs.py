"""The configs of VL-Rethinker: presets of the package by paper and commit, and runs of the published sizes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rethinker_jax.config import Config
from rethinker_jax.config_file import PACKAGE_CONFIGS, find_config, load_config

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = ("paper_v3", "code_19b42c2", "code_head")
ALGORITHM = {"rollout", "reward", "advantage", "replay", "rethink", "loss", "optimizer", "training"}


def preset(name: str) -> Config:
    return load_config(find_config(f"package:vl_rethinker_{name}"), [])


def value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return vars(vars(config)[section])[name]


# Key → its value in the paper, in the code of 20 April and in its head.
DIFFERENCES: dict[str, tuple[Any, Any, Any]] = {
    "reward.terms": ({"accuracy": 1.0}, {"accuracy": 1.0}, {"vl_rethinker_code": 1.0}),
    "replay.form": ("top_up", "top_up", "deque"),
    "replay.capacity": (8192, 4096, 4096),
    "replay.replacement": (False, True, True),
    "rethink.truncate": (0.0, 0.5, 0.5),
    "rethink.keep": ("correct", "all", "correct"),
    "rethink.baseline": ("first", "final", "final"),
    "rethink.nll_rows": ("correct_forced", "positive_waits", "positive_waits"),
    "loss.clip_high": (0.2, 0.35, 0.35),
    "loss.aggregation": ("sequence_mean", "token_mean", "token_mean"),
    "training.cut": ("group", "sample", "sample"),
    "advantage.estimator": ("group_mean", "group_mean", "group_mean"),
    "replay.mode": ("ssr", "ssr", "ssr"),
    "rethink.rule": ("paper", "paper", "paper"),
    "optimizer.learning_rate": (1e-6, 1e-6, 1e-6),
    "training.batch_size": (512, 512, 512),
    "rollout.prompts_per_step": (1024, 1024, 1024),
}


@pytest.mark.parametrize("key", DIFFERENCES)
def test_presets_differ_where_paper_and_code_do(key: str) -> None:
    """Catches a preset that is a copy of its neighbour, and a value that went to another one."""
    assert tuple(value(preset(name), key) for name in PRESETS) == DIFFERENCES[key]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_base_of_a_run(name: str, tmp_path: Path) -> None:
    """Catches keys of a model, of data or of a machine in a preset, which would overrule those of a file below it, and
    a buffer that Algorithm 1 would clear in the code's runs, which never do."""
    found = yaml.safe_load((PACKAGE_CONFIGS / f"vl_rethinker_{name}.yaml").read_text())
    assert set(found) == ALGORITHM
    run = tmp_path / "run.yaml"
    run.write_text(f"base: package:vl_rethinker_{name}\nmodel: {{path: DIR}}\nreplay: {{alpha: 2}}\n")
    config = load_config(run, [])
    assert (config.model.path, config.replay.alpha, config.training.batch_size) == ("DIR", 2.0, 512)
    cleared = config.replay.form == "top_up" and config.replay.clear_every < 10**6
    assert cleared == (name == "paper_v3")


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_says_where_it_is_from(name: str) -> None:
    """Catches a number without a source."""
    lines = (PACKAGE_CONFIGS / f"vl_rethinker_{name}.yaml").read_text().splitlines()
    values = [line for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert len(values) > 30 and [line for line in values if " # " not in line] == []


# Size → steps of three epochs over the selected queries, ⌊3 · queries / 1,024⌋: 16,000 → 46.9, 20,000 → 58.6.
SIZES = {"7b": 47, "32b": 58, "72b": 58}


@pytest.mark.parametrize("size", SIZES)
def test_the_stages_of_a_size(size: str) -> None:
    """Catches a size that inherits another's model, a stage 1 with forced second looks or a supervised loss, and a
    stage 2 that differs from that of the pipeline."""
    first, second = (load_config(CONFIGS / f"vl_rethinker_{size}{stage}.yaml", []) for stage in ("", "_stage2"))
    name = size.upper()
    assert (first.model.path, second.model.path) == (f"Qwen2.5-VL-{name}-Instruct", f"VL-Reasoner-{name}")
    assert (first.run.num_steps, first.rethink.rule, first.loss.nll_coefficient) == (SIZES[size], "off", 0.0)
    assert (first.data.prompt_template, second.data.prompt_template) == ("default", "rethink")
    for config in (first, second):
        assert (config.rollout.prompts_per_step, config.training.batch_size) == (1024, 512)
        assert (config.data.min_pixels, config.data.max_pixels) == (256 * 28 * 28, 1280 * 28 * 28)
        assert (config.sampling.max_new_tokens, config.replay.mode, config.replay.clear_every) == (2048, "ssr", 16)
        # Prompt, first response, trigger and second look of one row fit into a micro-batch.
        assert config.training.micro_batch_tokens >= 2048 + 1024 + 64 + 1024
    stages = yaml.safe_load((CONFIGS / "vl_rethinker_7b_pipeline.yaml").read_text())["stages"]
    [settings] = [stage["set"] for stage in stages if stage["name"] == "rethinking"]
    for key, wanted in settings.items():
        if key != "run.num_steps":
            assert value(second, key) == wanted, key
