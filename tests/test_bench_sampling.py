"""scripts/bench_sampling.py on its smallest model."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from rethinker_jax.models.qwen25vl import param_shapes

SCRIPTS = Path(__file__).parent.parent / "scripts"
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed (pip install 'rethinker_jax[parity]')")
SMALL = (
    "--preset",
    "tiny",
    "--prompts",
    "2",
    "--samples",
    "3",
    "--new-tokens",
    "4",
    "--repeats",
    "2",
    "--check-tokens",
    "4",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_sampling", SCRIPTS / "bench_sampling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_presets_have_the_size_they_say(script: ModuleType, tmp_path: Path) -> None:
    """Catches a preset that was changed while its name and its number of parameters were not."""
    for preset, size in {"tiny": 0.25e6, "m5": 5e6, "m50": 49.3e6}.items():
        stated = json.loads(script.PRESETS.read_text())[preset]["parameters"]
        shapes = param_shapes(script.build_directory(tmp_path, preset))
        assert stated == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        assert stated == pytest.approx(size, rel=0.01)


def test_long_tail(script: ModuleType) -> None:
    """Mean 400 after the cut; catches a law that is not long-tailed (its median would be near its mean) or not cut."""
    budgets = np.array(script.tail_budgets(512))
    assert budgets.mean() == pytest.approx(script.TAIL_MEAN, rel=0.01)
    assert budgets.min() >= 1 and budgets.max() == script.TAIL_MAX
    assert np.median(budgets) < 0.8 * script.TAIL_MEAN  # of the uncut law: exp(-1/2) = 0.61 of the mean


def test_prompts_hold_one_image_each(script: ModuleType, tmp_path: Path) -> None:
    """Catches a shape that is not what is reported: 20 + 1 + 64 + 1 + 30 tokens, and pictures that are shared."""
    config = script.build_directory(tmp_path, "tiny")
    prompts = script.make_prompts(config, script.ChatTokenizer(tmp_path), 3)
    assert [len(prompt) for prompt in prompts] == [116] * 3
    assert {int((prompt.image_index >= 0).sum()) for prompt in prompts} == {64}
    assert len({prompt.images[0].patches.tobytes() for prompt in prompts}) == 3
    # text, 8 x 8 image tokens that take 8 positions, text: the next one is 116 - 64 + 8
    assert {prompt.next_position for prompt in prompts} == {60}


@pytest.mark.parametrize("compare", ["", pytest.param("hf", marks=needs_torch)])
def test_prints_one_line(compare: str) -> None:
    """Catches tokens that were not drawn but counted, prompts prefilled once a sample, and sides that draw apart."""
    command = [sys.executable, str(SCRIPTS / "bench_sampling.py"), *SMALL, *(["--compare", compare] if compare else [])]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.count("\n") == 1
    found = json.loads(out)
    ours = found["ours"]
    assert (ours["tokens"], ours["images"], ours["prompts"], ours["slot_use"]) == (2 * 3 * 4, 2, 2, 1.0)
    assert len(ours["runs"]) == 2 and ours["tokens_per_cpu_s"] == pytest.approx(24 / ours["cpu_s"], rel=1e-3)
    if compare:
        counts = {mode: (one["images"], one["prompts"]) for mode, one in found["hf"].items() if mode != "versions"}
        assert counts == {"repeat": (6, 6), "num_return_sequences": (2, 6), "prefix": (2, 2)}
        assert set(found["ratios"]) == set(counts)
        sums = {found["greedy"][side]["crc32"] for side in ("ours", "repeat", "prefix")}
        assert len(sums) == 1
