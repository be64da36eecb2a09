"""What comes from outside is read, never run: models, rows and completions are data, on a terminal too."""

import ast
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from rethinker_jax.config_file import ConfigLoader
from rethinker_jax.console import RunProgress, print_summary
from rethinker_jax.errors import UserError
from rethinker_jax.main import main
from rethinker_jax.output_files import line_writer
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.system import EXAMPLE_MODEL
from rethinker_jax.terminal import printable
from rethinker_jax.types import Problem

REPOSITORY = Path(__file__).parent.parent
RUN_CODE = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pty", "telnetlib",
}  # fmt: skip
# Functions of a user's own are loaded from the file that the config names, in a process of their own.
LOADS_CODE = {"rethinker_jax/rewards/worker.py"}
YAML_LOADS = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def dangers(source: str, where: str = "") -> list[str]:
    """What a file does that could run what it reads, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, one) for one in modules if one.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in _dangers_of_call(node, where)]
    return [f"{where}:{line}: {what}" for line, what in found]


def _dangers_of_call(call: ast.Call, where: str) -> list[str]:
    called = ast.unparse(call.func)
    last = called.rpartition(".")[2]
    given = {one.arg: ast.unparse(one.value) for one in call.keywords}
    found = []
    if called in RUN_CODE or called in SHELLS:
        found.append(called)
    if given.get("shell", "False") != "False":
        found.append(f"{called}(shell=...)")
    if called.startswith("yaml.") and last in YAML_LOADS and given.get("Loader") != "ConfigLoader":
        found.append(f"{called} without our loader")
    if given.get("allow_pickle", "False") != "False":
        found.append(f"{called}(allow_pickle=...)")
    if given.get("trust_remote_code", "False") != "False":
        found.append(f"{called}(trust_remote_code=...)")
    if last == "from_pretrained" and where.startswith("rethinker_jax/") and "trust_remote_code" not in given:
        found.append(f"{called} without trust_remote_code=False, which asks the user")
    if called == "torch.load" and given.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    loads = last in ("import_module", "spec_from_file_location", "exec_module", "run_path")
    if loads and where.startswith("rethinker_jax/") and where not in LOADS_CODE:
        found.append(called)
    return found


@pytest.mark.parametrize("folder", ["rethinker_jax", "scripts"])
def test_nothing_that_is_read_can_run(folder: str) -> None:
    """Catches the shortcut that some later change takes; the rule is the house's, not a linter's."""
    paths = sorted((REPOSITORY / folder).rglob("*.py"))
    assert len(paths) > 10
    found = [one for path in paths for one in dangers(path.read_text("utf-8"), str(path.relative_to(REPOSITORY)))]
    assert found == []
    assert issubclass(ConfigLoader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "import pickle",
        "from pickle import loads", "import marshal", "import shelve", "import dill as d", "os.system(text)",
        "subprocess.run(text, shell=True)", "subprocess.Popen(text, shell=flag)", "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)", "yaml.load(text)", "np.load(path, allow_pickle=True)", "torch.load(path)",
        "AutoTokenizer.from_pretrained(path)", "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=True)", "importlib.import_module(name)", "runpy.run_path(path)",
    ],
)  # fmt: skip
def test_the_rule_sees_each_of_them(source: str) -> None:
    assert len(dangers(source, "rethinker_jax/x.py")) == 1


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "re.compile(text)", "ast.literal_eval(text)", "yaml.safe_load(text)", "np.load(path)",
     "yaml.load(text, Loader=ConfigLoader)", "subprocess.run([a, b])", "torch.load(path, weights_only=True)"],
)  # fmt: skip
def test_the_rule_lets_the_harmless_pass(source: str) -> None:
    assert dangers(source, "rethinker_jax/x.py") == []


def test_code_in_a_model_directory_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published way to ship code beside weights. Catches code that runs, and a question at the terminal."""
    directory = tmp_path / "model"
    shutil.copytree(EXAMPLE_MODEL, directory)
    marker = tmp_path / "ran"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")
    mapped = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil"}
    for name in ("tokenizer_config.json", "config.json", "preprocessor_config.json"):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": mapped}))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Evil"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    try:
        ChatTokenizer(directory)
    except UserError as error:
        assert "tokenizer" in str(error)
    assert not marker.exists()


def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    """Catches a template that reaches Python's objects, and one that is a traceback."""
    directory = tmp_path / "model"
    shutil.copytree(EXAMPLE_MODEL, directory)
    (directory / "chat_template.jinja").write_text("{{ ().__class__.__base__.__subclasses__() }}")
    with pytest.raises(UserError, match="chat template"):
        ChatTokenizer(directory).render(Problem(id="a", question="q", answer="1"), "none")


ESCAPES = "a\x1b[2J\x1b]0;title\x07\x9b31m\u202eb\rc\x00\ud83dd\te\n"
SPELLED = r"a\x1b[2J\x1b]0;title\x07\x9b31m\u202eb\rc\x00\ud83dd" + "\te\n"


def test_escape_sequences_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error message, a line of a run, the table at its end, and completions that are printed."""
    assert printable(ESCAPES) == SPELLED and printable("ü 漢 😀 \n\t") == "ü 漢 😀 \n\t"
    assert str(UserError(ESCAPES)) == SPELLED
    shown = io.StringIO()
    with RunProgress(1, console=Console(file=shown), title="x") as progress:
        progress.note(f"note {ESCAPES}")
    summary = {"alarms": {ESCAPES: {"steps": 1, "first": 0, "last": 0}}, "rows_left_out": {ESCAPES: 1}}
    print_summary(summary, {"report": ESCAPES}, Console(file=shown))
    assert shown.getvalue().count(r"\x1b[2J") == 4 and "\x1b" not in shown.getvalue()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "\x1b[2J\x9b\u202e.yaml"]) == 2
    said = capsys.readouterr().err
    assert r"\x1b[2J" in said and not set("\x1b\x07\x9b\u202e\x00") & set(said)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for file, wanted in ((Terminal(), r"\u009b"), (io.StringIO(), "\x9b")):
        line_writer(file)({"completion": "\x9b31m"})
        assert wanted in file.getvalue()


def test_rows_that_no_file_could_hold(tmp_path: Path) -> None:
    """JSON may write half of a character, parquet bytes that are no UTF-8. Catches a traceback in mid-run, when the row
    is to be written again; a whole character that is written as two halves is no fault."""
    rows = [r'{"question": "\ud83d", "answer": "1"}', r'{"question": "\ud83d\ude00?", "answer": "1"}',
            r'{"question": "q", "answer": "1", "more": {"\uDC00": 1}}']  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    found = read_problems(str(tmp_path / "rows.jsonl"))
    assert [one.question for one in found.problems] == ["\U0001f600?"] and found.bad_kinds == {"bad_json": 2}
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\x02\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"question": text, "answer": ["1"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"cannot read .*rows\.parquet as parquet"):
        read_problems(str(tmp_path / "rows.parquet"))


def test_what_is_said_of_a_row_is_printable(tmp_path: Path) -> None:
    """Catches an image path that is an escape sequence, in the sentence that says there is no such file."""
    row = {"question": "q", "answer": "1", "image": "\x1b[2J.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"image": None}))
    (bad,) = read_problems(str(tmp_path / "rows.jsonl")).bad_rows
    assert bad.kind == "image_missing" and r"\x1b[2J.png" in bad.why and "\x1b" not in bad.why
