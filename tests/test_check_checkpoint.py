"""scripts/check_checkpoint.py on a directory with random weights."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from reference_ours import load

from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.prompts.build import PromptBuilder
from rethinker_jax.prompts.images import ImageSettings
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_checkpoint.py"
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed (pip install 'rethinker_jax[parity]')")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_model_directory(path)
    load(json.loads((path / "config.json").read_text()), path)
    return path


@needs_torch
@pytest.mark.parametrize(
    "dtype, tolerance, code", [("float32", "1e-4", 0), ("float32", "1e-9", 1), ("bfloat16", "0", 0)]
)
def test_table_and_exit_code(
    script: ModuleType, directory: Path, dtype: str, tolerance: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a comparison that always passes, and prompts, tokens or pixels that the two sides see differently."""
    found = script.main([str(directory), "--dtype", dtype, "--tolerance", tolerance, "--new-tokens", "4"])
    printed = capsys.readouterr().out
    assert found == code, printed
    rows = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["prompt", *script.make_problems()]
    assert ("Equal within" in printed) == (code == 0)
    assert "gives other" not in printed
    if dtype == "float32":
        assert printed.count("| equal |") == 4


def test_a_greedy_token_may_differ_only_where_it_is_a_toss_up(script: ModuleType, directory: Path) -> None:
    """Logits are 1e-5 apart. A lead of 1e-6 may go either way, one of 0.1 may not."""
    builder = PromptBuilder(
        ChatTokenizer(directory), ImageSettings.from_directory(directory), VisionGeometry(14, 2, 56), "none"
    )
    logits = np.linspace(-1, 1, 50, dtype=np.float32).reshape(5, 10)
    ours = script.Said(logits + np.float32(1e-5), [1, 2, 4], [])
    for lead, well in ((1e-6, True), (0.1, False)):
        theirs = script.Said(logits, [1, 2, 3], [1.0, 1.0, lead])
        assert script.compare_said("text", ours, theirs, 1e-3, builder)[1] == well
    wrong = script.Said(logits + np.float32(0.1) * np.eye(5, 10, dtype=np.float32), [1, 2, 3], [])
    assert not script.compare_said("text", wrong, script.Said(logits, [1, 2, 3], [1.0] * 3), 1e-3, builder)[1]


@pytest.mark.skipif(HAS_TORCH, reason="torch is installed")
def test_without_torch_it_says_what_to_install(
    script: ModuleType, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(directory)]) == 2
    assert "rethinker_jax[parity]" in capsys.readouterr().err


@needs_torch
def test_a_directory_without_a_model_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
