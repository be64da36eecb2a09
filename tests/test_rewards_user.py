"""Reward functions of your own: every accepted form gives its values, and every fault is one sentence, never a hang."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import TIMEOUT_S

from rethinker_jax.errors import UserError
from rethinker_jax.rewards.inputs import ImageSize, RewardInput
from rethinker_jax.rewards.user import UserFunctions, user_row
from rethinker_jax.types import FIRST, Problem, Verdict

RIGHT = Verdict("correct", 1.0, "5", "number:integer")


def write(path: Path, code: str) -> Path:
    path.write_text(textwrap.dedent(code))
    return path


def rows_of(*responses: str) -> list[dict[str, Any]]:
    return [
        user_row(RewardInput(RIGHT, response, Problem(f"row-{place}", "q", "5"), num_tokens=len(response)))
        for place, response in enumerate(responses)
    ]


def values_of(
    path: Path, function: str, rows: list[dict[str, Any]], deadline_s: float = 30.0, **kwargs: Any
) -> list[Any]:
    name = f"{path}:{function}"
    functions = UserFunctions([name], {name: kwargs}, deadline_s)
    try:
        return functions.values(name, rows)
    finally:
        functions.close()


FORMS = {
    "ours, a number": ("def f(row): return len(row['response']) + row['correct']", [3.0, 4.0]),
    "ours, parts": ("def f(row): return {'a': 1, 'b': 0.5}", [{"a": 1.0, "b": 0.5}] * 2),
    "ours, numpy": ("import numpy\ndef f(row): return numpy.float32(0.5)", [0.5, 0.5]),
    "batch": (
        """
        def f(reward_inputs: list, weight: float = 0.5) -> list:
            assert isinstance(reward_inputs, list)
            return [{"overall": weight * one["response_length"], "n": len(reward_inputs)} for one in reward_inputs]
        """,
        [{"overall": 1.0, "n": 2.0}, {"overall": 1.5, "n": 2.0}],
    ),
    "batch by its constant": (
        "REWARD_NAME, REWARD_TYPE = 'x', 'batch'\ndef f(inputs): return [{'overall': len(inputs)} for _ in inputs]",
        [{"overall": 2.0}] * 2,
    ),
    "sequential": (
        "REWARD_TYPE = 'sequential'\ndef f(reward_input): return {'overall': float(reward_input['ground_truth'])}",
        [{"overall": 5.0}] * 2,
    ),
    "one answer": ("def f(predict_str, ground_truth): return float(predict_str == 'a5') + 1", [1.0, 1.0]),
    "one answer, parts": ("def f(predict_str, ground_truth): return {'overall': 1.0}", [{"overall": 1.0}] * 2),
    "lists": ("def f(predicts, ground_truths, w=1): return [{'overall': w} for _ in predicts]", [{"overall": 1.0}] * 2),
    "a neighbour": ("import beside\ndef f(row): return beside.VALUE", [7.0, 7.0]),
    "what it prints is not read": ("def f(row): print('{\"values\": [9]}'); return 1.0", [1.0, 1.0]),
    "a callable object": (
        "class F:\n    def __init__(self, w): self.w = w\n    def __call__(self, row): return self.w\nf = F(0.5)",
        [0.5, 0.5],
    ),
    "a partial": ("import functools\ndef g(row, w): return w\nf = functools.partial(g, w=0.5)", [0.5, 0.5]),
    "a dataclass in the file": (
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: 'int'\ndef f(row): return P(2).x",
        [2.0, 2.0],
    ),
}


@pytest.mark.parametrize(("code", "values"), FORMS.values(), ids=FORMS.keys())
def test_every_form_is_called_as_it_wants(tmp_path: Path, code: str, values: list[Any]) -> None:
    """Catches a batch function that is given one row, and parts that lose their names. `math.py` is EasyR1's name."""
    write(tmp_path / "beside.py", "VALUE = 7")
    assert values_of(write(tmp_path / "math.py", code), "f", rows_of("ab", "abc")) == values


def test_a_function_as_easyr1_publishes_it(tmp_path: Path) -> None:
    """The batch contract with its keyword arguments, as `reward_function_kwargs` gives them there."""
    code = """
    import re

    def overlong(length, limit, buffer):
        return min(0.0, (limit - buffer - length) / buffer)

    def compute_score(reward_inputs, limit: int, buffer: int, factor: float):
        if not isinstance(reward_inputs, list):
            raise ValueError("use batch")
        scores = []
        for one in reward_inputs:
            found = re.findall(r"Answer: (\\S+)", one["response"])
            right = 1.0 if found and found[-1] == one["ground_truth"] else -1.0
            late = overlong(one["response_length"], limit, buffer)
            scores.append({"overall": right + factor * late, "accuracy": right, "overlong": late})
        return scores
    """
    path = write(tmp_path / "dapo.py", code)
    found = values_of(path, "compute_score", rows_of("Answer: 5", "Answer: 6"), limit=10, buffer=4, factor=0.5)
    # 9 characters: (10 - 4 - 9) / 4 = -0.75
    assert found == [
        {"overall": 0.625, "accuracy": 1.0, "overlong": -0.75},
        {"overall": -1.375, "accuracy": -1.0, "overlong": -0.75},
    ]


FAULTY_FILES = {
    "no function": ("def compute_scor(row): return 1", ["no function f"]),
    "a near name": ("def ff(row): return 1", ["no function f; did you mean ff?"]),
    "not a function": ("f = 3", ["no function f"]),
    "syntax": ("x = 1\ndef f(row) return 1", ["SyntaxError", "line 2", "def f(row) return 1"]),
    "import": ("import no_such_library", ["ModuleNotFoundError", "no_such_library", "line 1"]),
    "no parameter": ("def f(): return 1", ["asks for (nothing)", "row: dict"]),
    "two parameters": ("def f(a, b): return 1", ["asks for (a, b)", "compute_score(predict_str, ground_truth)"]),
    "a required one more": ("def f(reward_inputs, limit): return 1", ["(reward_inputs, limit)", "reward.kwargs"]),
    "it exits": ("import os\nos._exit(3)", ["its process ended", "loaded"]),
}


@pytest.mark.parametrize(("code", "parts"), FAULTY_FILES.values(), ids=FAULTY_FILES.keys())
def test_a_file_that_cannot_be_used_is_said_at_the_start(tmp_path: Path, code: str, parts: list[str]) -> None:
    path = write(tmp_path / "mine.py", code)
    with pytest.raises(UserError) as error:
        UserFunctions([f"{path}:f"], {}, 30.0)
    for part in ("reward function f", str(path), *parts):
        assert part in str(error.value)


def test_a_missing_file_is_said_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "rewards.py", "def f(row): return 1")
    with pytest.raises(UserError, match=r"no file .*reward\.py; did you mean .*rewards\.py"):
        UserFunctions([f"{tmp_path / 'reward.py'}:f"], {}, 30.0)


@pytest.mark.parametrize("wanted", ["nofile.py", "z.py", "nowhere/rewards.py"])
def test_no_unrelated_file_is_suggested(tmp_path: Path, wanted: str) -> None:
    """Catches the folder and `.py`, which any two files share, taken for a near name."""
    write(tmp_path / "t.py", "def f(row): return 1")
    with pytest.raises(UserError, match="there is no file") as error:
        UserFunctions([f"{tmp_path / wanted}:f"], {}, 30.0)
    assert "did you mean" not in str(error.value)


def test_keyword_arguments_that_it_does_not_take_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", "def f(row, weight=1): return 1")
    with pytest.raises(UserError, match=r"reward\.kwargs gives it wieght, but it takes row, weight"):
        UserFunctions([f"{path}:f"], {f"{path}:f": {"wieght": 2}}, 30.0)


# The fault is at the response "bad", which is of row-1.
FAULTY_CALLS = {
    "exception": (
        "def f(row): return 1 / (row['response'] != 'bad')",
        ["row-1", "ZeroDivisionError", "line 1", "1 / ("],
    ),
    "key": ("def f(row):\n    return row['nothing']", ["row-0", "KeyError: 'nothing'", "line 2"]),
    "batch": (
        "def f(reward_inputs): return [{'overall': 1 / (one['response'] != 'bad')} for one in reward_inputs]",
        ["row-1", "ZeroDivisionError"],
    ),
    "none": ("def f(row): return None", ["row-0", "None (NoneType)", "wanted a number"]),
    "text": ("def f(row): return '1'", ["row-0", "'1' (str)"]),
    "nan": ("def f(row): return float('nan') if row['response'] == 'bad' else 0", ["row-1", "nan"]),
    "infinity": ("def f(row): return -1e400", ["row-0", "-inf"]),
    "a huge whole number": ("def f(row): return 10**400", ["row-0", "finite"]),
    "nan in a part": ("def f(row): return {'a': 1, 'b': float('nan')}", ["the part 'b'", "nan"]),
    "empty": ("def f(row): return {}", ["row-0", "without parts"]),
    "no overall": ("def f(reward_inputs): return [{'a': 1}] * 3", ["row-0", '"overall"', "keys a"]),
    "a number in a batch": ("def f(reward_inputs): return [1.0] * 3", ["row-0", '"overall"', "1.0 (float)"]),
    "too few": ("def f(reward_inputs): return [{'overall': 1}]", ["each of the 3 rows", "1 values"]),
    "no list": ("def f(reward_inputs): return {'overall': 1}", ["each of the 3 rows", "dict"]),
    "death": ("import os\ndef f(row): os._exit(9)", ["row-0", "its process ended"]),
    "death by exit": ("import sys\ndef f(row): sys.exit('enough')", ["row-0", "its process ended", "enough"]),
    "stdin": ("def f(row): return input()", ["row-0", "EOFError", "line 1"]),
    "a debugger": ("def f(row):\n    breakpoint()\n    return 1", ["row-0", "BdbQuit"]),
    "recursion": ("def f(row): return f(row)", ["row-0", "RecursionError"]),
}


@pytest.mark.parametrize(("code", "parts"), FAULTY_CALLS.values(), ids=FAULTY_CALLS.keys())
def test_a_faulty_call_is_one_sentence_and_there_are_no_values_after_it(
    tmp_path: Path, code: str, parts: list[str]
) -> None:
    """Catches a fault that becomes 0, and one that names no row."""
    path = write(tmp_path / "mine.py", code)
    name = f"{path}:f"
    functions = UserFunctions([name], {}, 30.0)
    try:
        with pytest.raises(UserError) as error:
            functions.values(name, rows_of("good", "bad", "good"))
        for part in ("reward function f", str(path), *parts):
            assert part in str(error.value)
        with pytest.raises(UserError) as again:
            functions.values(name, rows_of("good"))
        assert str(again.value) == str(error.value)
    finally:
        functions.close()


@pytest.mark.parametrize(
    ("code", "where"),
    [
        ("import time\ndef f(row):\n    if row['response'] == 'bad': time.sleep(600)\n    return 1", "row 'row-1'"),
        ("def f(row):\n    while row['response'] == 'bad': pass\n    return 1", "row 'row-1'"),
        ("import time\ndef f(reward_inputs): time.sleep(600)", "rows 'row-0', 'row-1', 'row-2' and 1 more"),
    ],
)
def test_a_hang_ends_at_the_deadline(tmp_path: Path, code: str, where: str) -> None:
    path = write(tmp_path / "mine.py", code)
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        values_of(path, "f", rows_of("good", "bad", "good", "x"), deadline_s=1.0)
    assert where in str(error.value) and "no value after 1 s (reward.user_deadline_s)" in str(error.value)
    assert time.monotonic() - started < 300


def test_the_deadline_is_of_wall_clock_also_where_the_function_waits_for_the_core(tmp_path: Path) -> None:
    """Eight busy processes on one core: a deadline of CPU time would take eight times as long, one that is granted
    again while the process is runnable any multiple."""
    path = write(tmp_path / "mine.py", "def f(row):\n    while row['response'] == 'bad': pass\n    return 1")
    name = f"{path}:f"
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    others: list[subprocess.Popen[bytes]] = []
    functions = UserFunctions([name], {}, 2.0)
    try:
        functions.values(name, rows_of("good"))
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(7)]
        started = time.monotonic()
        with pytest.raises(UserError, match="no value after 2 s"):
            functions.values(name, rows_of("bad"))
        assert 1.9 < time.monotonic() - started < 12
    finally:
        functions.close()
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.wait()


def wait_for_end(pid: int, seconds: float = 60.0) -> None:
    """Waits until the process is gone or a zombie, whoever is to wait for it; kills one that stays, and fails."""
    end = time.monotonic() + seconds
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):  # it is gone
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                pytest.fail(f"process {pid} is still there")
            time.sleep(0.01)


def test_a_busy_function_ends_with_a_trainer_that_was_killed(tmp_path: Path) -> None:
    """Catches a process that spins for ever after `kill -9` of the trainer: it does not see the end of its stdin."""
    said = tmp_path / "pid"
    function = f"""
    import os, pathlib
    def f(row):
        pathlib.Path({str(said)!r}).write_text(str(os.getpid()))
        while True: pass
    """
    code = (
        "import json, sys\n"
        "from rethinker_jax.rewards.user import UserFunctions\n"
        "UserFunctions([sys.argv[1]], {}, 600.0).values(sys.argv[1], json.loads(sys.argv[2]))\n"
    )
    name = f"{write(tmp_path / 'mine.py', function)}:f"
    trainer = subprocess.Popen([sys.executable, "-c", code, name, json.dumps(rows_of("a"))])
    try:
        end = time.monotonic() + TIMEOUT_S
        while not (said.exists() and said.read_text()):
            assert time.monotonic() < end and trainer.poll() is None
            time.sleep(0.01)
    finally:
        trainer.kill()
        trainer.wait()
    wait_for_end(int(said.read_text()))


@pytest.mark.parametrize(
    ("ending", "deadline_s"), [("return pid", 60.0), ("os._exit(9)", 60.0), ("time.sleep(600)", 3.0)]
)
def test_what_a_function_started_ends_with_it(tmp_path: Path, ending: str, deadline_s: float) -> None:
    """Catches children that live on after the end of the run, the death of the function's process, or its deadline."""
    said = tmp_path / "pid"
    code = f"""
    import os, pathlib, subprocess, time
    def f(row):
        pid = subprocess.Popen(["sleep", "600"]).pid
        pathlib.Path({str(said)!r}).write_text(str(pid))
        {ending}
    """
    with contextlib.suppress(UserError):
        values_of(write(tmp_path / "mine.py", code), "f", rows_of("a"), deadline_s=deadline_s)
    wait_for_end(int(said.read_text()))


def test_a_killed_process_is_said(tmp_path: Path) -> None:
    """For want of memory, say. `f` gives its process id first."""
    path = write(tmp_path / "mine.py", "import os\ndef f(row): return os.getpid()")
    name = f"{path}:f"
    functions = UserFunctions([name], {}, 30.0)
    try:
        (pid,) = functions.values(name, rows_of("a"))
        assert isinstance(pid, float)
        os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(UserError, match="its process ended"):
            functions.values(name, rows_of("a"))
    finally:
        functions.close()


def test_many_long_rows_pass(tmp_path: Path) -> None:
    """8 MB in one call: catches a pipe that is full on both sides, and a queue that is copied for each piece."""
    path = write(
        tmp_path / "mine.py", "def f(reward_inputs): return [{'overall': len(reward_inputs)}] * len(reward_inputs)"
    )
    started = time.process_time()
    assert values_of(path, "f", rows_of(*["x" * 4000] * 1000)) == [{"overall": 1000.0}] * 1000
    assert time.process_time() - started < 20


def test_a_function_sees_the_whole_row() -> None:
    """What the documentation promises, as plain values; bytes of a column are left out."""
    row = {"level": 3, "scores": np.arange(2), "raw": b"\x00", "deep": {"a": (1, None)}, "when": Path("x")}
    problem = Problem("id", "q?", "5", choices=("5", "6"), type="number", source="s", row=row)
    given = RewardInput(
        RIGHT, "r", problem, stopped=False, forced=True, num_tokens=3, images=(ImageSize((4, 2), (28, 28)),),
        parts=((FIRST, "r"),),
    )  # fmt: skip
    assert user_row(given) == {
        "id": "id",
        "question": "q?",
        "answer": "5",
        "ground_truth": "5",
        "choices": ["5", "6"],
        "type": "number",
        "source": "s",
        "row": {"level": 3, "scores": [0, 1], "raw": None, "deep": {"a": [1, None]}, "when": "x"},
        "response": "r",
        "response_length": 3,
        "segments": [["first", "r"]],
        "stopped": False,
        "forced": True,
        "images": [{"original": (4, 2), "resized": (28, 28)}],
        "extracted": "5",
        "verdict": "correct",
        "correct": True,
        "rule": "number:integer",
    }
