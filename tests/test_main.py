"""The command line as a person meets it: in a process of its own, by its text and exit code."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rethinker_jax import main as main_module
from rethinker_jax.commands import COMMANDS, Command, Request
from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.config_file import load_config, load_defaults
from rethinker_jax.config_keys import ALL_KEYS
from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.main import main
from rethinker_jax.mesh_spec import parse_mesh

REPOSITORY = Path(__file__).parent.parent


def run_main(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rethinker_jax.main", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def imported(process: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip() for line in lines}


def message(process: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(line for line in process.stderr.splitlines() if not line.startswith("import time:"))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_complete_and_imports_no_jax(name: str):
    """A help that waits seconds for jax, or a verifier's parent that seizes the TPU."""
    process = run_main(*[name][: bool(name)], "--help")
    assert process.returncode == 0, process.stderr
    modules = imported(process)
    assert "rethinker_jax.main" in modules or "rethinker_jax.commands" in modules  # the list is there at all
    assert not modules & {"jax", "transformers", "datasets", "torch"}
    assert process.stdout.startswith("usage: python -m rethinker_jax.main")
    if name:
        command = COMMANDS[name]
        for key in ALL_KEYS:
            assert (f"  {key}=" in process.stdout) == (key.split(".")[0] in command.sections), key
    else:
        for other in COMMANDS:
            assert f"\n  {other} " in process.stdout
        assert "exit codes" in process.stdout and "--mesh SPEC" in process.stdout


def test_options_of_the_contract_are_in_the_help(capsys: pytest.CaptureFixture[str]):
    expected = {
        "sample": "--model --data --output --n --seed --prompt-template --image --question",
        "score": "--model --data --output --prompt-template",
        "verify": "--input --output",
        "evaluate": "--model --benchmark --data --n --seed --output --protocol --shard --regrade --merge --compare",
        "export": "--output",
        "plan": "--topology --json --suggest --quick",
    }
    for name, options in expected.items():
        with pytest.raises(SystemExit) as ended:
            main([name, "-h"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        for option in options.split():
            assert f"{option} " in text


def test_wrong_key_in_its_own_process():
    """Exit code 2, one message, no traceback, and nothing before it that costs time."""
    process = run_main("run.sed=1")
    assert process.returncode == 2
    assert message(process).startswith("error: 1 problem in the configuration:")
    assert "did you mean run.seed?" in message(process) and "Traceback" not in process.stderr
    assert "jax" not in imported(process)


def test_version():
    assert run_main("--version").stdout.strip() == "0.1.0"


# (arguments, part of the message on standard error)
BAD_LINES = [
    (["trian"], "trian: no such command or config file; did you mean train?"),
    (["frobnicate"], "(commands: train, sft,"),
    (["--mesh", "smaple"], "did you mean sample?"),
    (["plan"], "plan: wanted --topology NAME"),
    (["nowhere.yaml"], "nowhere.yaml: no such config file"),
    (["package:exampel"], "did you mean example?"),
    (["train", "a.yaml", "b.yaml"], "wanted one CONFIG.yaml, came a.yaml and b.yaml"),
    (["run.seed"], "run.seed: wanted a value, as in run.seed=VALUE"),
    (["run.seed=x", "--mesh"], "run.seed: wanted a whole number"),
    (["--mesh", "fdsp=4"], "fdsp: no such axis; did you mean fsdp?"),
    (["--mesh=data=x"], "data: wanted a whole number, came 'x'"),
    (["--mesh", "data=x"], "data=x: wanted section.key=value; sizes of mesh axes are whole numbers"),
    (["--mesh", "data=2,data=4"], "data is given twice"),
    (["--mesh", "data=-1,fsdp=-1"], "are both -1"),
    (["--mesh", "data=0"], "mesh.data is 0"),
    (["--mesh", "context=0"], "mesh.context is 0"),
    (["mesh.context=0"], "mesh.context is 0"),
    (["--mesh", "auto,fsdp=2"], "auto finds the sizes of all axes; wanted it alone"),
    (["--mesh", "context=2,auto"], "auto finds the sizes of all axes; wanted it alone"),
    (["context=2"], "context=2: wanted section.key=value; sizes of mesh axes"),
    (["train", "--sed", "3"], "train: --sed: no such option"),
    (["--modle", "x"], "--modle: no such option"),
    (["sample", "--modle", "x", "--data", "y"], "--modle: no such option; did you mean --model?"),
    (["sample", "--data"], "argument --data: expected one argument"),
    (["sample", "--n", "two"], "argument --n: invalid int value: 'two'"),
    (["sample", "--model", "m"], "wanted either --data ROWS or --question TEXT"),
    (["sample", "--data", "d", "--question", "q"], "wanted either --data ROWS or --question TEXT"),
    (["sample", "--data", "d", "--image", "i.png"], "--image belongs to --question"),
    (["sample", "--question", "q", "--image", "/no/i.png"], "--image /no/i.png: no such file"),
    (["sample", "--data", "d", "--n", "0"], "--n 0: wanted 1 or more"),
    (["sample", "--data", "d", "sampling.temprature=1"], "did you mean sampling.temperature?"),
    (["score", "--model", "m"], "score: wanted --data ROWS"),
    (["verify"], "verify: wanted --input FILE"),
    (["verify", "--input", "/no/file.jsonl"], "--input /no/file.jsonl: no such file"),
    (["verify", "--mesh", "--input", "x"], "verify: --mesh: no such option"),
    (["export"], "export: wanted a run directory or a checkpoint, came nothing"),
    (["export", "/no/run", "--output", "o"], "export: /no/run: no such directory"),
    (["export", "."], "export: wanted --output DIR"),
    (["report", "a", "b"], "report: wanted a run directory, or the result of an evaluation, came a b"),
    (["pipeline"], "pipeline: wanted the YAML file of a recipe"),
    (["pipeline", "/no/recipe.yaml"], "/no/recipe.yaml: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "part"), BAD_LINES, ids=[" ".join(arguments) for arguments, _ in BAD_LINES])
def test_bad_command_lines(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and part in err and out == ""


class Seen(Exception):
    """Carries a parsed request out of `main`."""

    def __init__(self, request: Request):
        self.request = request


def parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch, name: str = "train") -> Request:
    """The request that the command would get."""

    def keep(request: Request) -> None:
        raise Seen(request)

    monkeypatch.setitem(main_module.COMMANDS, name, dataclasses.replace(COMMANDS[name], run=keep))
    with pytest.raises(Seen) as seen:
        main(arguments)
    return seen.value.request


FSDP = MeshConfig(data=1, fsdp=-1, tensor=1)
# (arguments, words, overrides, mesh): with `--mesh` taking the next word whatever it is, most of these would go wrong.
LINES = [
    ([], (), (), None),
    (["train"], (), (), None),
    (["--mesh"], (), (), FSDP),
    (["a.yaml"], ("a.yaml",), (), None),
    (["--mesh", "a.yaml"], ("a.yaml",), (), FSDP),
    (["a.yaml", "--mesh"], ("a.yaml",), (), FSDP),
    (["--mesh", "train", "a.yaml"], ("a.yaml",), (), FSDP),
    (["--mesh", "package:example"], ("package:example",), (), FSDP),
    (["--mesh", "run.seed=1"], (), ("run.seed=1",), FSDP),
    (["run.seed=1", "train", "--mesh", "data=2", "a.yaml", "run.num_steps=3"],
     ("a.yaml",), ("run.seed=1", "run.num_steps=3"), MeshConfig(data=2, fsdp=1, tensor=1)),
    (["train", "run.dir=a b=c", "a.yaml"], ("a.yaml",), ("run.dir=a b=c",), None),
    (["--mesh", "data=2,fsdp=-1,tensor=2", "a.yaml"], ("a.yaml",), (), MeshConfig(data=2, fsdp=-1, tensor=2)),
    (["--mesh=fsdp=4"], (), (), MeshConfig(data=1, fsdp=4, tensor=1)),
    (["--mesh", "auto", "a.yaml"], ("a.yaml",), (), MeshConfig(search=True)),
    (["mesh.fsdp=-1", "dir/x=1.yaml"], ("dir/x=1.yaml",), ("mesh.fsdp=-1",), None),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words", "overrides", "mesh"), LINES, ids=[" ".join(line[0]) for line in LINES])
def test_command_lines(arguments, words, overrides, mesh, monkeypatch: pytest.MonkeyPatch):
    request = parse(arguments, monkeypatch)
    assert (request.words, request.overrides, request.mesh) == (words, overrides, mesh)


def test_option_values_are_not_overrides(monkeypatch: pytest.MonkeyPatch):
    """A question may look like an override."""
    line = [
        "sample",
        "--question",
        "run.seed=1",
        "--image",
        "a.png",
        "sampling.top_k=2",
        "--image",
        "b.png",
        "--n",
        "3",
    ]
    request = parse(line, monkeypatch, "sample")
    assert request.overrides == ("sampling.top_k=2",)
    options = request.options
    assert (options.question, options.image, options.n, options.seed) == ("run.seed=1", ["a.png", "b.png"], 3, None)


def test_mesh_goes_before_config_and_overrides(monkeypatch: pytest.MonkeyPatch):
    request = parse(["mesh.data=4", "--mesh", "tensor=2"], monkeypatch)
    config = request.config(lambda overrides: load_config(None, overrides))
    assert config.mesh == MeshConfig(data=1, fsdp=1, tensor=2)
    for words, mesh in {
        ("mesh.data=4", "--mesh", "auto"): MeshConfig(search=True),
        ("mesh.search=true", "--mesh", "fsdp=2"): MeshConfig(fsdp=2),  # names what auto would find
        ("mesh.search=true",): MeshConfig(search=True),
    }.items():
        request = parse(list(words), monkeypatch)
        assert request.config(lambda overrides: load_config(None, overrides)).mesh == mesh


def test_without_a_file_train_takes_the_example_and_sample_the_defaults(monkeypatch: pytest.MonkeyPatch):
    """`sample` of somebody's model must not inherit the settings of a toy run."""
    assert parse(["sample"], monkeypatch, "sample").config(load_defaults) == Config()
    assert parse([], monkeypatch).config(lambda overrides: load_config(None, overrides)) != Config()


@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        ("", FSDP),
        ("data=2", MeshConfig(2, 1)),
        ("tensor=-1,data=3", MeshConfig(data=3, fsdp=1, tensor=-1)),
        ("auto", MeshConfig(search=True)),
        ("fsdp=2,context=4", MeshConfig(1, 2, 4, 1)),
    ],
)
def test_parse_mesh(spec: str, mesh: MeshConfig):
    assert parse_mesh(spec) == mesh


def ending(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(request: Request) -> None:
        raise error

    monkeypatch.setitem(main_module.COMMANDS, "report", Command("x.", "", "", fail))
    return main(["report", "x"])


def wrapped_disk_full() -> ValueError:
    """As checkpoint libraries raise it: their own type, the system's words inside."""
    return ValueError(f"RESOURCE_EXHAUSTED: write failed: {os.strerror(errno.ENOSPC)} [source locations...]")


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UserError("row 3: no answer"), 2, "error: row 3: no answer"),
        (Stopped("saved at step 7", 75), 75, "saved at step 7"),
        (Stopped("interrupted at step 7", 130), 130, "interrupted at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: the disk is full"),
        (wrapped_disk_full(), 2, "error: the disk is full"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nlong"),
            2,
            "99 bytes. Take more devices",
        ),
    ],
    ids=["user", "preempted", "stopped", "interrupted", "disk", "wrapped disk", "device memory"],
)
def test_exit_codes(error, code, part, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert ending(error, monkeypatch) == code
    assert part in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    """Swallowing it as bad input would hide our own mistakes; python turns it into exit code 1."""
    for error in (ValueError("x"), KeyError("x"), OSError(errno.EACCES, "denied")):
        with pytest.raises(type(error)):
            ending(error, monkeypatch)


def test_verify_imports_no_jax(tmp_path: Path):
    """The whole command, not only its help: a verifier that imports jax may seize the TPU."""
    rows = [
        {"id": "a", "response": "so \\boxed{7}", "answer": "7"},
        {"id": "b", "response": "\\boxed{8}", "answer": "7"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = run_main("verify", "--input", str(source), "--output", str(output))
    assert process.returncode == 0, process.stderr[-2000:]
    verdicts = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["reward"]) for row in verdicts] == [("a", 1.0), ("b", 0.0)]
    assert "jax" not in imported(process)
