"""scripts/bench_update.py: what it counts, what it asks, and one small run. TRL takes no part."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType

import pytest

from rethinker_jax.errors import UserError
from rethinker_jax.models.qwen_config import QwenConfig, VisionConfig
from rethinker_jax.prompts.build import PromptBuilder
from rethinker_jax.prompts.images import ImageSettings
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def script() -> Generator[ModuleType]:
    yield from imported("bench_update")


@pytest.fixture(scope="module")
def floor() -> Generator[ModuleType]:
    yield from imported("bench_floor")


def imported(name: str) -> Generator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))  # they import each other
        yield importlib.import_module(name)


def smallest_config() -> QwenConfig:
    vision = VisionConfig(
        depth=2, d_model=4, heads=2, d_ff=5, out_dim=4, in_channels=3, patch_size=14, merge_size=2,
        temporal_patch_size=2, window_size=112, full_attention_blocks=(1,), tokens_per_second=2, rope_theta=1e4,
    )  # fmt: skip
    return QwenConfig(
        vocab=10, d_model=4, d_ff=6, layers=1, heads=2, kv_heads=1, head_dim=2, norm_eps=1e-6, rope_theta=1e6,
        mrope_section=(1, 0, 0), tied=True, dtype="float32", image_token=1, video_token=2, vision_start_token=3,
        vision_end_token=4, vision=vision,
    )  # fmt: skip


# One image of 256 patches, forward:
#   patches 2·256·1176·4 = 2408448; per block qkv 2·256·4·12 + output 2·256·4·4 + mlp 3·2·256·4·5 = 63488, of 2 blocks;
#   attention 4·4 · (256·256 pairs of the full block + 256·64 of the other) = 1310720; merger 2·64·(16·16 + 16·4) =
#   40960; together 3887104. And backward: 2·2408448 + 3·(3887104 - 2408448) = 9252864.
# One token: 2·(4·4 + 2·4·2 + 4·4 + 3·4·6) = 240; a pair of tokens: 4·4 = 16; logits of one token: 2·4·10 = 80.
# Two prompts of 5 tokens, 3 samples of 3 tokens, of which 2 are fed: 6·2 = 12 fed tokens, which attend to
# 6·(6 + 7) = 78; a prompt's own pairs are 15.
@pytest.mark.parametrize(
    ("shared", "rollout", "update"),
    [
        # images 2; tokens 10 + 12; pairs 30 + 78; logits 2 + 12
        (True, 2 * 3887104 + 22 * 240 + 108 * 16 + 14 * 80, 2 * 9252864 + 3 * (22 * 240 + 108 * 16 + 14 * 80)),
        # images 6; tokens 30 + 12; pairs 90 + 78; logits 6 + 12
        (False, 6 * 3887104 + 42 * 240 + 168 * 16 + 18 * 80, 6 * 9252864 + 3 * (42 * 240 + 168 * 16 + 18 * 80)),
    ],
)
def test_work_of_a_step(floor: ModuleType, shared: bool, rollout: int, update: int) -> None:
    """Catches a last token that is fed, masked pairs that are counted, and prompts shared in one phase only."""
    work = floor.step_work(smallest_config(), prompts=2, samples=3, prompt_tokens=5, new_tokens=3, shared=shared)
    assert {phase: one.flops for phase, one in work.items()} == {"rollout": rollout, "update": update}


def test_rates_are_of_every_shape(floor: ModuleType) -> None:
    """Catches a product whose rate was not measured, so that the floor has no time for it, and a rate no core has."""
    products = [
        floor.Product(4, 8, 16, 3),
        floor.Product(5000, 8, 16, 1),
        floor.Product(4, 8, 16, 1),
    ]
    rates = floor.measure_rates(products, seconds=0.001)
    assert set(rates) == {(4, 8, 16), (floor.MAX_MEASURED_ROWS, 8, 16)}
    assert all(1e5 < rate < 1e13 for rate in rates.values())


def test_prompts(script: ModuleType, tmp_path: Path) -> None:
    """Catches prompts that are not as long as reported, and questions or pictures that several prompts share."""
    script.build_directory(tmp_path, "tiny")
    tokenizer = ChatTokenizer(tmp_path)
    geometry = VisionGeometry(14, 2, 112)
    builder = PromptBuilder(tokenizer, ImageSettings.from_directory(tmp_path, 0, 0), geometry, "none")
    prompts = [builder.build(problem) for problem in script.make_problems(tokenizer, 3)]
    assert [len(prompt) for prompt in prompts] == [116] * 3
    assert [prompt.images[0].grid for prompt in prompts] == [(1, 16, 16)] * 3
    assert {int((prompt.image_index >= 0).sum()) for prompt in prompts} == {64}
    assert len({prompt.images[0].patches.tobytes() for prompt in prompts}) == 3
    assert len({prompt.token_ids.tobytes() for prompt in prompts}) == 3


def test_arguments(script: ModuleType) -> None:
    options = script.parse(["--preset", "m5", "--trl-micro-batch", "16", "0", "--set", "run.seed=1"])
    assert (options.prompts, options.samples, options.new_tokens, options.repeats) == (8, 8, 128, 3)
    assert (options.preset, options.trl_micro_batch, options.set) == ("m5", [16, 0], ["run.seed=1"])
    assert options.compare is None and options.trl_python == sys.executable
    assert script.parse([]).trl_micro_batch == [0, 8]
    assert script.parse(["--prompts", "2", "--samples", "3"]).trl_micro_batch == [0]  # 8 does not divide 6


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompts", "0"),
        ("--samples", "1"),  # no advantage without a sibling
        ("--repeats", "0"),
        ("--trl-micro-batch", "7"),  # of 64 rows
        ("--preset", "m5000"),
        ("--compare", "verl"),
    ],
)
def test_refused_arguments(script: ModuleType, arguments: tuple[str, ...]) -> None:
    """Catches a run of minutes that ends in a traceback."""
    with pytest.raises(SystemExit) as ended:
        script.parse(arguments)
    assert ended.value.code == 2


def test_config_is_that_of_the_shape(script: ModuleType, tmp_path: Path) -> None:
    """Catches overrides that are not read, and steps that are cut into several optimizer steps."""
    options = script.parse(["--prompts", "2", "--samples", "3", "--set", "optimizer.learning_rate=1e-3"])
    config = script.make_config(tmp_path, options)
    assert (config.training.batch_size, config.rollout.samples_per_prompt) == (6, 3)
    assert config.optimizer.learning_rate == 1e-3


def test_peer_that_is_not_there(script: ModuleType, tmp_path: Path) -> None:
    """Catches an environment without TRL that is noticed only after our side was measured."""
    with pytest.raises(UserError, match="does not run"):
        script.check_peer(str(tmp_path / "nothing"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho torchvision trl\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match="lacks torchvision, trl"):
        script.check_peer(str(python))


def test_fastest_setting_of_the_peer_counts(script: ModuleType) -> None:
    """Catches a ratio against the slower setting, and one that leaves the data in where it says that it does not."""
    phases = {"data": 1.0, "processor": 2.0, "generate": 5.0}
    slow, fast = (
        {"cpu_s": seconds, "micro_batch": micro, "phases": phases, "runs": []}
        for seconds, micro in ((9.0, 64), (8.0, 8))
    )
    found = script.compare({"cpu_s": 2.0}, [slow, fast])
    assert (found["ratio"], found["ratio_without_data"]) == (4.0, 2.5)  # 8 / 2, (8 - 1 - 2) / 2
    assert found["trl"] == fast and [one["micro_batch"] for one in found["trl_others"]] == [64]


def test_prints_one_line() -> None:
    """Catches a script that the training loop left behind, rows without an advantage, and images encoded per sample."""
    shape = ("--preset", "tiny", "--prompts", "2", "--samples", "3", "--new-tokens", "4", "--repeats", "2")
    command = [sys.executable, str(SCRIPTS / "bench_update.py"), *shape]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of its time is compiling
    out = subprocess.run(command, env=quick, capture_output=True, text=True, check=True).stdout
    assert out.count("\n") == 1
    found = json.loads(out)
    ours = found["ours"]
    assert len(ours["runs"]) == 2 and ours["tokens_per_cpu_s"] == pytest.approx(24 / ours["cpu_s"], rel=1e-2)
    for run in ours["runs"]:
        assert sum(run["phases"].values()) == pytest.approx(run["cpu_s"], abs=1e-3)
    assert (ours["logged"]["images_encoded"], ours["logged"]["prompts_prefilled"]) == (2, 2)
    assert ours["logged"]["gradient_norm"] > 0 and ours["logged"]["zero_advantage_share"] == 0
    floor = found["floor"]
    assert 0 < floor["shared"]["seconds_of_step"] < floor["repeated"]["seconds_of_step"]
    assert found["ours_over_floor"] > 1
