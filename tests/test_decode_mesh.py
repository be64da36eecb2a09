"""The decode loop on eight simulated devices draws what it draws on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from commands import TIMEOUT_S
from sampling_cases import MESHES, build_directory, make_config, mesh_completions

from rethinker_jax.config import MeshConfig
from rethinker_jax.system import load_system


def test_eight_devices_draw_what_one_does(tmp_path: Path) -> None:
    """Catches shardings that mix up slots or heads, and a loop that is compiled again for the state it returned."""
    build_directory(tmp_path)
    script = Path(__file__).parent / "sampling_cases.py"
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parent.parent)}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # half of the time, and other roundings
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    meshes = json.loads(done.stdout.splitlines()[-1])
    wanted = mesh_completions(load_system(make_config(tmp_path, MeshConfig(data=1, fsdp=1, tensor=1))))
    assert len(meshes) == len(MESHES)
    for found in meshes:
        assert found["ids"] == [one.token_ids.tolist() for one in wanted]
        assert found["compiled"] == 1
        for ours, theirs in zip(found["log_probs"], wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.log_probs, rtol=0, atol=5e-5)
