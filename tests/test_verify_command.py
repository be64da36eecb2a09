"""`verify_file`: lines in, lines out, in order, complete or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import STOPS_ITSELF, TIMEOUT_S

from rethinker_jax.config import VerifierConfig
from rethinker_jax.errors import UserError
from rethinker_jax.verify.command import BATCH, partial_path, verify_file

CONFIG = VerifierConfig(num_workers=1)


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    """2,000 lines span several batches in flight; the last one is judged against its own row."""
    rows: list[object] = [{"id": i, "response": rf"\boxed{{{i}}}", "answer": str(i - i % 2)} for i in range(2000)]
    rows.append({"id": "q", "response": r"\boxed{B}", "answer": "2 cm", "choices": ["1 cm", "2 cm"], "type": "mcq"})
    rows.append({"id": "n", "response": "no box", "answer": 7})
    output = tmp_path / "out.jsonl"
    assert verify_file(write_lines(tmp_path / "in.jsonl", rows), output, CONFIG) == 2002
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in written] == [*range(2000), "q", "n"]
    assert [row["reward"] for row in written[:4]] == [1.0, 0.0, 1.0, 0.0]
    assert set(written[0]) == {"id", "verdict", "reward", "extracted", "rule", "ms"}
    assert written[-2]["verdict"] == "correct"
    assert (written[-1]["verdict"], written[-1]["extracted"]) == ("no_answer", None)


def test_without_an_output_the_lines_go_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"id": "a", "response": r"\boxed{5}", "answer": "5"}])
    assert verify_file(source, None, CONFIG) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "correct"


def test_malformed_lines_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    """Catches a run that stops half-way through, a message without line numbers, and NaN as the gold text "nan"."""
    source = tmp_path / "in.jsonl"
    good = json.dumps({"id": "a", "response": "x", "answer": "5"})
    bad = ["{", "[1]", '{"id": "b", "response": "x"}', '{"id": "c", "response": 3, "answer": "5"}']
    bad.append('{"id": "c", "response": "x", "answer": "5", "choices": "AB"}')
    bad += [f'{{"id": "d", "response": "x", "answer": {value}}}' for value in ("NaN", "-Infinity", "1e999")]
    source.write_text("\n".join([good, *bad[:2], "", *bad[2:], good]) + "\n")
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError) as error:
        verify_file(source, output, CONFIG)
    message = str(error.value)
    assert "8 malformed" in message and "missing answer" in message
    assert all(f"line {number}:" in message for number in (2, 3, 5, 6, 7))
    assert all(
        f"line {number}: answer is {value}," in message for number, value in ((8, "nan"), (9, "-inf"), (10, "inf"))
    )
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_input_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        verify_file(tmp_path / "nowhere.jsonl", None, CONFIG)


def test_an_output_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    """Catches an output that is a folder, lies under a file, or would replace the input."""
    source = write_lines(tmp_path / "in.jsonl", [{"id": "a", "response": "x", "answer": "5"}])
    for output in (tmp_path, source / "out.jsonl", source):
        with pytest.raises(UserError, match="--output"):
            verify_file(source, output, CONFIG)
    assert list(tmp_path.iterdir()) == [source]
    assert verify_file(source, tmp_path / "new" / "out.jsonl", CONFIG) == 1
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_halves_of_characters_and_line_separators_come_through(tmp_path: Path) -> None:
    """JSON may hold half a surrogate pair, which UTF-8 cannot; U+2028 ends a line for some readers. Catches a traceback
    in the middle of the run, and an output with more lines than the input."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    answers = ["\ud800", "a\u2028b", "\u202e5", "\x00"]
    write_lines(source, [{"id": answer, "response": rf"\boxed{{{answer}}}", "answer": "5"} for answer in answers])
    assert verify_file(source, output, CONFIG) == 4
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["id"], row["extracted"]) for row in rows] == [(answer, answer) for answer in answers]


def many_lines(path: Path, num_lines: int) -> Path:
    return write_lines(
        path,
        [{"id": i, "response": rf"so \boxed{{x^2+{i}}}", "answer": f"{i + i % 2}+x^2"} for i in range(num_lines)],
    )


def run_until_partial(source: Path, output: Path, sent: signal.Signals) -> tuple[subprocess.Popen[str], Path]:
    """Runs the command, which gets the signal in its fourth batch, when three are on the disk."""
    words = ["verify", "--input", str(source), "--output", str(output)]
    stop = [str(STOPS_ITSELF), "rethinker_jax.verify.command:_line", str(3 * BATCH + 1), sent.name]
    process = subprocess.Popen([sys.executable, *stop, *words], stderr=subprocess.PIPE, text=True)
    process.wait(timeout=TIMEOUT_S)
    return process, next(output.parent.glob("*.partial"))


def without_ms(path: Path) -> str:
    return re.sub(r'"ms": [0-9.]+', "", path.read_text())


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches lines that are lost, doubled or judged again (their `ms` would change), and a torn line that stays."""
    source, output, straight = (
        many_lines(tmp_path / "in.jsonl", 2000),
        tmp_path / "out.jsonl",
        tmp_path / "straight.jsonl",
    )
    process, partial = run_until_partial(source, output, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not output.exists()
    process.communicate()
    kept = partial.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    num_kept = kept.count(b"\n")
    assert num_kept == 3 * BATCH
    partial.write_bytes(kept + b'{"id": 1999, "verd')
    assert verify_file(source, output, CONFIG) == 2000
    assert f"{num_kept} of 2000 lines are in" in capsys.readouterr().err
    assert output.read_bytes().startswith(kept)
    verify_file(source, straight, CONFIG)
    assert without_ms(output) == without_ms(straight)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "straight.jsonl"}


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """Catches a traceback, a lost partial file, and an exit code that a script would take for success."""
    process, partial = run_until_partial(many_lines(tmp_path / "in.jsonl", 2000), tmp_path / "out.jsonl", sent)
    _, said = process.communicate()
    assert process.returncode == code, said
    last = said.splitlines()[-1]
    kept = partial.read_text().count("\n")
    assert last.startswith(f"stopped after {kept} of 2000 lines") and str(partial) in last and "same command" in last
    assert kept == 3 * BATCH and not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_gone_on_from_is_a_message(tmp_path: Path) -> None:
    """Catches verdicts of another input, of other limits, or of somebody's editor that end up in the output, and two
    processes that write into one file."""
    source, output = many_lines(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl"
    verify_file(source, output, CONFIG)
    lines = output.read_text().splitlines(keepends=True)
    output.unlink()

    other = many_lines(tmp_path / "other.jsonl", 201)
    partial = partial_path(output, hashlib.sha256(source.read_bytes()).hexdigest(), CONFIG)
    partial.write_text("".join(lines[:100]))
    for config, path in ((CONFIG, other), (VerifierConfig(cpu_limit_s=3.0), source)):
        with pytest.raises(UserError, match="another input"):
            verify_file(path, output, config)
    for wrong in (lines[2], "{}\n", "[]\n", "x\n"):
        partial.write_text(lines[0] + wrong)
        with pytest.raises(UserError, match=r"line 2 of .*delete it"):
            verify_file(source, output, CONFIG)
        assert partial.exists() and not output.exists()
    partial.write_text("".join(lines[:100]))
    with partial.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            verify_file(source, output, CONFIG)
    assert verify_file(source, output, CONFIG) == 200
    assert output.read_text().startswith("".join(lines[:100]))


def test_a_terminal_gets_a_bar_and_the_file_every_line(tmp_path: Path) -> None:
    """Catches a bar that swallows or colours what goes to standard output."""
    source, output = many_lines(tmp_path / "in.jsonl", 1500), tmp_path / "out.jsonl"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rethinker_jax.main", "verify", "--input", str(source)]
    with output.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while block := os.read(ours, 65536):
            shown += block
    os.close(ours)
    assert process.wait(timeout=TIMEOUT_S) == 0
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == list(range(1500))
    assert b"/1500" in shown and b"\x1b[" in shown and b"1500 lines: 750 correct, 750 wrong" in shown


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """60 MB of responses; a parent that keeps them, or all verdicts, is 60 MB larger than for a tenth of them."""
    code = (
        "import sys, pathlib\n"
        "from rethinker_jax.main import main\n"
        "assert main(['verify', '--input', sys.argv[1], '--output', sys.argv[1] + '.out']) == 0\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM')))\n"
    )
    peaks = []
    for num_lines in (300, 3000):
        rows: list[object] = [
            {"id": i, "response": "so it is " * 2200 + rf"\boxed{{{i}}}", "answer": str(i)} for i in range(num_lines)
        ]
        source = write_lines(tmp_path / f"{num_lines}.jsonl", rows)
        said = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
        peaks.append(int(said.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12, f"peak memory in MB: {peaks}"
