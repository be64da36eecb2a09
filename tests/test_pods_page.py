"""docs/pods.md: its commands in a dry run, its config, and its arithmetic."""

import re
import shlex
import subprocess
from pathlib import Path

import yaml

from rethinker_jax.config_file import load_config
from rethinker_jax.mesh_spec import parse_mesh

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/pods.md").read_text(encoding="utf-8")
SCRIPTS = ("tpu/pod.sh", "tpu/jobset.sh", "scripts/slurm.sh", "scripts/gpu_nodes.sh")
# A file that is there, in the place of the one that the reader writes.
CONFIG = "configs/example_pipeline.yaml"


def config_of_the_page() -> str:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    return re.sub("^   ", "", block, flags=re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of every call of a launcher: lines of code, without comments, pipes and redirections; and `...`."""
    lines = re.findall(r"^ {4,}(\S.*)$", PAGE, re.MULTILINE) + re.findall(r"`([^`\n]+)`", PAGE)
    found = []
    for line in lines:
        script = next((script for script in SCRIPTS if f"{script} " in line), None)
        if script is not None:
            code = re.split(r" > | && | \| ", line[line.index(script) :])[0]
            found.append(shlex.split(code, comments=True))
    return found


def dry(words: list[str]) -> list[str]:
    script, rest = words[0], [CONFIG if word == "configs/geometry.yaml" else word for word in words[1:]]
    if script == "tpu/jobset.sh":
        return ["bash", script, "--env", "tpu/jobset.env.example", *rest]
    settings = ["--env", "tpu/pod.env.example"] if script == "tpu/pod.sh" else []
    return ["bash", script, *settings, *([] if "--dry-run" in rest else ["--dry-run"]), *rest]


def test_every_command_of_the_page_is_one():
    """Of each launcher, and of all the commands of pod.sh: one that was renamed would be found by the reader."""
    called = commands()
    assert {words[0] for words in called} == set(SCRIPTS)
    said = {word for words in called if words[0] == "tpu/pod.sh" for word in words}
    assert {"create", "setup", "run", "status", "logs", "watch", "fetch", "delete"} <= said
    for words in called:
        done = subprocess.run(dry(words), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout


def test_the_config_of_the_page_is_one(tmp_path: Path):
    path = tmp_path / "geometry.yaml"
    path.write_text(config_of_the_page(), encoding="utf-8")
    config = load_config(path, ())
    assert (config.model.path, config.model.freeze) == ("/mnt/bucket/models/7B", ("vision",))
    for spec in re.findall(r"--mesh ((?:[a-z]+=\d+,?)+)", PAGE):
        parse_mesh(spec.rstrip(","))


def test_hours_and_cost_follow_from_the_plan():
    """Numbers that were changed in one place only: seconds of the plan, of the config, and what is made of them."""
    config = yaml.safe_load(config_of_the_page())
    responses = config["rollout"]["prompts_per_step"] * config["rollout"]["samples_per_prompt"]
    updates = responses / config["training"]["batch_size"]
    (update,) = re.findall(r"seconds of update +([\d.]+) ", PAGE)
    rollout = sum(float(number) for number in re.findall(r"seconds of (?:new layout|prefill|decode) +([\d.]+) ", PAGE))
    hours = config["run"]["num_steps"] * (rollout + updates * float(update)) / 3600
    (said,) = re.findall(r"slack = ([\d.]+) h × slack", PAGE)
    assert abs(hours - float(said)) < 0.06
    taken, cost = re.findall(r"this is \(([\d.]+) \+ 1\) h × 4 chips × 4 dollars = (\d+) dollars", PAGE)[0]
    assert abs(2 * float(said) - float(taken)) < 0.11
    assert abs((float(taken) + 1) * 4 * 4 - int(cost)) < 1
