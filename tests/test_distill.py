"""`distill`: replies of a fake server, or of the example model, become traces; what is kept, and what asked again."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_server import SECRET, Answer, Row, Server, good, is_caption, said
from PIL import Image

from rethinker_jax.chat_server import MAX_RETRY_AFTER_S, _retry_after
from rethinker_jax.config_curation import CAPTION_PROMPT
from rethinker_jax.distill.replies import MAX_REPLY_CHARS
from rethinker_jax.distill.served import data_url
from rethinker_jax.main import main
from rethinker_jax.prompts.images import BadImage


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three rows: one image, none, and two images with tags, one of which is that of the first row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Path("red.png").write_bytes(png((255, 0, 0)))
    Path("blue.png").write_bytes(png((0, 0, 255), 64))
    rows = [
        {"id": "c", "question": "<image>How many?", "answer": "7", "image": "red.png"},
        {"id": "a", "question": "3 + {caption} 4?", "answer": "7"},
        {"id": "b", "question": "Is <image> like <image>?", "answer": "8", "image": ["blue.png", "red.png"]},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def lines(name: str = "out.jsonl") -> list[Row]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def report() -> Row:
    return json.loads(Path("out.jsonl.report.json").read_text())


def test_the_whole_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches lines out of order, an image described twice, samples with one seed, and questions with image tags."""
    monkeypatch.setenv("MY_KEY", SECRET)
    keys = ["distill.caption.key_variable=MY_KEY", "distill.reason.key_variable=MY_KEY"]
    with Server(good) as server:
        assert main(server.options(*keys)) == 0
        seen = list(server.seen)
        assert main(server.options(*keys)) == 0
        assert len(server.seen) == len(seen)  # the second run asks nothing
    captions = [body for body, _ in seen if is_caption(body)]
    assert len(captions) == 2  # red.png is in two rows
    sent = [body["messages"][0]["content"] for body in captions]
    assert all(content[1] == {"type": "text", "text": CAPTION_PROMPT} for content in sent)
    urls = {content[0]["image_url"]["url"] for content in sent}
    prefix = "data:image/png;base64,"
    assert {base64.b64decode(url.removeprefix(prefix)) for url in urls} == {
        Path("red.png").read_bytes(), Path("blue.png").read_bytes(),
    }  # fmt: skip
    assert {headers["Authorization"] for _, headers in seen} == {f"Bearer {SECRET}"}
    reasons = [body for body, _ in seen if not is_caption(body)]
    assert len(reasons) == 6 and len({body["seed"] for body in reasons}) == 6
    prompts = {body["messages"][0]["content"] for body in reasons}
    red, blue = (f"A picture of {len(prefix) + 4 * -(-len(Path(name).read_bytes()) // 3)} bytes."
                 for name in ("red.png", "blue.png"))  # fmt: skip
    assert len(prompts) == 3 and all("<image>" not in prompt for prompt in prompts)
    assert any(f"Image 1: {blue}\n\nImage 2: {red}" in p and "Is [Image 1] like [Image 2]?" in p for p in prompts)
    assert any(prompt.startswith("3 + {caption} 4?") for prompt in prompts)  # no image: no description either
    found = lines()
    assert [(line["id"], line["sample"]) for line in found] == [(name, n) for name in "cab" for n in (0, 1)]
    trace = "<think>\nI see seven.\n</think>\n\nIt is seven.\n\n7\n\n<answer>7</answer>"
    assert all(line["completion"] == trace and line["finish_reason"] == "stop" for line in found)
    assert [line["caption"] for line in found[::2]] == [red, None, f"Image 1: {blue}\n\nImage 2: {red}"]
    assert "log_probs" not in found[0] and SECRET not in "".join(path.read_text() for path in here.glob("out.*"))


def test_the_commands_after_it(here: Path) -> None:
    """verify → select make rows of the original problems, with their images. Catches lines that these refuse."""
    with Server(good) as server:
        assert main(server.options()) == 0
    assert main(["verify", "--input", "out.jsonl", "--data", "rows.jsonl", "--output", "judged.jsonl"]) == 0
    # Golds: c 7, a 7, b 8; every reply says 7.
    assert [line["verdict"] for line in lines("judged.jsonl")] == ["correct"] * 4 + ["wrong"] * 2
    chosen = "select.filters=[correct, not_truncated, {format: think_prose_answer}, {pick: shortest}]"
    select = ["select", "--input", "judged.jsonl", "--data", "rows.jsonl", "--output", "traces.jsonl", "--mode"]
    assert main([*select, "traces", chosen]) == 0
    traces = lines("traces.jsonl")
    assert [(row["id"], row.get("image"), row["question"]) for row in traces] == [
        ("c", "red.png", "<image>How many?"),
        ("a", None, "3 + {caption} 4?"),
    ]
    assert all(row["completion"].endswith("<answer>7</answer>") for row in traces)


ASKED_AGAIN = [
    ([], 0, 0),
    (["distill.style=as_is"], 0, 0),
    (["distill.num_threads=1", "distill.timeout_s=11"], 0, 0),
    (["distill.reason.temperature=0.7"], 0, 6),
    (["distill.reason.n=3"], 0, 3),
    (["distill.reason.prompt=Q {question} C {caption}"], 0, 4),  # of the rows with images
    (["distill.caption.prompt=Short"], 2, 4),  # other descriptions
    (["distill.caption.seed=1"], 2, 0),  # the server describes as before, so nothing else changes
    (["distill.reason_body.top_k=5"], 0, 6),
]


@pytest.mark.parametrize(("more", "captions", "replies"), ASKED_AGAIN, ids=[str(one[0]) for one in ASKED_AGAIN])
def test_what_is_asked_again(here: Path, more: list[str], captions: int, replies: int) -> None:
    """Catches a kept reply that is taken for the answer to another question, and one that is bought twice."""
    with Server(good) as server:
        assert main(server.options()) == 0
        server.seen.clear()
        assert main(server.options(*more)) == 0
        asked = [is_caption(body) for body, _ in server.seen]
    assert (asked.count(True), asked.count(False)) == (captions, replies)


def test_killed_and_started_again(here: Path) -> None:
    """kill -9 after four replies: the second start asks for the two that are missing. Catches work that is lost."""
    stuck, num_given = threading.Event(), 0
    lock = threading.Lock()

    def reply(body: Row) -> Answer:
        nonlocal num_given
        if not is_caption(body):
            with lock:
                num_given += 1
                late = num_given > 4
            if late and not stuck.is_set():
                stuck.wait(600)
        return good(body)

    with Server(reply) as server:
        options = server.options("distill.num_threads=1", "distill.timeout_s=600")
        process = subprocess.Popen([sys.executable, "-m", "rethinker_jax.main", *options], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 600
        kept = Path("out.replies.jsonl")
        while not (kept.exists() and kept.read_bytes().count(b"\n") == 4) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not Path("out.jsonl").exists() and kept.read_bytes().count(b"\n") == 4
        with kept.open("ab") as file:
            file.write(b'{"key": "half a li')  # as a kill in the middle of a write leaves it
        stuck.set()
        server.seen.clear()
        assert main(options) == 0
        assert [is_caption(body) for body, _ in server.seen] == [False] * 2
    assert len(lines()) == 6 and kept.read_bytes().count(b"\n") == 6


REFUSED = [
    (401, {}, "key_variable"),
    (403, {}, "key_variable"),
    (404, {}, "distill.caption.url"),
    (400, {}, "too long, says"),
    (307, {"Location": "OTHER"}, "redirect"),
    (302, {"Location": "OTHER"}, "redirect"),
]


@pytest.mark.parametrize(("status", "headers", "hint"), REFUSED, ids=[str(one[0]) for one in REFUSED])
def test_a_refusal_stops_with_one_message(
    here: Path,
    status: int,
    headers: dict[str, str],
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a key in a message, or sent to where a redirect leads, and a request that is tried without end."""
    monkeypatch.setenv("MY_KEY", SECRET)
    with Server(good) as other:
        headers = {name: value.replace("OTHER", f"{other.url}/chat/completions") for name, value in headers.items()}
        text = f"too long, says {SECRET}\x1b[31m the server".encode()
        with Server(lambda body: (status, headers, text)) as server:
            assert main(server.options("distill.caption.key_variable=MY_KEY", "distill.num_threads=1")) == 2
            assert len(server.seen) <= 2  # the two images; none is tried again
        assert not other.seen
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{server.url}/chat/completions" in message and f"status {status}" in message
    assert hint.lower() in message.lower() and SECRET not in message and "\x1b" not in message
    assert not Path("out.jsonl").exists()


HOSTILE = {
    "huge": b"x" * (5 << 20),
    "no utf-8": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}',
    "html": b"<html><body>502 Bad Gateway</body></html>",
    "bomb": b'{"choices": [' + b"[" * 400_000,
    "numbers": b'{"choices": [{"message": {"content": ' + b"9" * 100_000 + b"}}]}",
    "no choice": b'{"choices": []}',
    "choice": b'{"choices": ["text"]}',
    "message": b'{"choices": [{"message": "text"}]}',
    "null": b'{"choices": [{"message": {"content": null}}]}',
    "list": b'{"choices": [{"message": {"content": ["text"]}}]}',
    "reasoning": b'{"choices": [{"message": {"content": "text", "reasoning": {"a": 1}}}]}',
    "long": b'{"choices": [{"message": {"content": "' + b"y" * (MAX_REPLY_CHARS + 1) + b'"}}]}',
    "nothing": b"",
}
REASON_OF = {"huge": "too_long", "long": "too_long", "null": "empty"}  # all others are unreadable


def test_hostile_replies_are_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a crash, a reply of gigabytes, and a bad reply that takes the good ones with it."""
    rows = [{"id": name, "question": f"Do {name}."} for name in [*HOSTILE, "well"]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reply(body: Row) -> Answer:
        name = body["messages"][0]["content"].partition(".")[0].removeprefix("Do ")
        return (200, {}, HOSTILE[name]) if name in HOSTILE else good(body)

    with Server(reply) as server:
        assert main(server.options("distill.max_failures=1000", "distill.reason.n=1")) == 0
    assert [line["id"] for line in lines()] == ["well"]
    expected = [REASON_OF.get(name, "unreadable") for name in HOSTILE]
    failures = report()["distill.reason"]["failures"]
    assert failures == {reason: expected.count(reason) for reason in set(expected)}
    assert "asks for them again" in capsys.readouterr().err


def test_failures_in_a_row_stop_and_what_came_is_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = threading.Event()

    def reply(body: Row) -> Answer:
        return (500, {}, b"") if broken.is_set() and not is_caption(body) else good(body)

    with Server(reply) as server:
        broken.set()
        stopping = ["distill.max_failures=3", "distill.num_threads=1", "distill.retries=0"]
        assert main(server.options(*stopping)) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "distill.max_failures" in message and "http_500 3" in message and server.url in message
        assert "row '" in message and not Path("out.jsonl").exists()
        broken.clear()
        server.seen.clear()
        assert main(server.options()) == 0
        assert not any(is_caption(body) for body, _ in server.seen) and len(lines()) == 6  # descriptions were kept


def test_a_busy_server_is_waited_for(here: Path) -> None:
    """Catches Retry-After that is not read: the backoff alone would try again after 10 ms."""
    Path("rows.jsonl").write_text('{"id": "a", "question": "x"}\n')
    answers = iter([(429, {"Retry-After": "1"}, b""), said("\\boxed{1}")])
    with Server(lambda body: next(answers)) as server:
        started = time.monotonic()
        assert main(server.options("distill.reason.n=1")) == 0
        assert time.monotonic() - started >= 1.0
    assert lines()[0]["completion"] == "1\n\n<answer>1</answer>"


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [("", 0), ("2", 2), (" 7 ", 7), ("-1", 0), ("9" * 400, MAX_RETRY_AFTER_S), ("soon", 0), ("1.5", 0), ("٣", 0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 2999 07:28:00 GMT", MAX_RETRY_AFTER_S),
     ("Wed, 99 Oct 2999 07:28:00 GMT", 0)],
)  # fmt: skip
def test_retry_after(value: str, wait_s: float) -> None:
    """Catches a server that makes us wait for a year, and a value that ends the thread."""
    assert _retry_after(value) == wait_s


BAD_OPTIONS = [
    (["distill.reason.model="], "distill.reason.model is empty"),
    (["distill.reason.url=http://me:secret@host/v1"], "a name or a password"),
    (["distill.reason.url=file:///etc/passwd"], "wanted one such as http"),
    (["distill.reason.url=http://host:port/v1"], "no address"),
    (["distill.reason.url=http://host/v1/chat/completions"], "before /chat/completions"),
    (["distill.reason_body.n=4"], "reason_body sets n"),
    (["distill.reason.prompt=Just think"], "{question} and {caption}"),
    (["distill.caption.prompt=<image> What is it?"], "without <image>"),
    (["distill.caption.key_variable=NOT_THERE"], "NOT_THERE is not set"),
    (["distill.caption.url="], "not a directory"),
    (["--output", "out.txt"], "ends in .jsonl"),
    (["--output", "rows.jsonl"], "is the file that is read"),
    (["--output", "mine.jsonl"], "was not written by `distill`"),
]


@pytest.mark.parametrize(("more", "wanted"), BAD_OPTIONS, ids=[one[0][-1] for one in BAD_OPTIONS])
def test_bad_options(here: Path, more: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is said before anything is asked, and nothing is written or lost."""
    Path("mine.jsonl").write_text("mine\n")
    with Server(good) as server:
        assert main(server.options(*more)) == 2
        assert not server.seen
    assert wanted in capsys.readouterr().err.splitlines()[-1]
    assert Path("mine.jsonl").read_text() == "mine\n" and not Path("out.jsonl").exists()


def test_an_image_that_cannot_be_read_costs_its_row(here: Path) -> None:
    """Catches a broken file sent to the server, whose refusal would end the run."""
    Path("red.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with Server(good) as server:
        assert main(server.options()) == 0
        assert sum(is_caption(body) for body, _ in server.seen) == 1  # blue.png
    assert [line["id"] for line in lines()] == ["a", "a"]
    assert report()["rows_without_caption"] == 2 and report()["distill.caption"]["failures"] == {"bad_image": 1}


def test_images_as_data_urls(tmp_path: Path) -> None:
    """Formats that servers know go as they are; others, and pictures that EXIF turns, as upright PNG."""

    def encoded(format: str, **more: Any) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (4, 2), (9, 9, 9)).save(file, format, **more)
        return file.getvalue()

    def decoded(url: str) -> tuple[str, bytes]:
        kind, _, data = url.partition(";base64,")
        return kind, base64.b64decode(data)

    for format in ("PNG", "JPEG", "WEBP"):
        assert decoded(data_url(encoded(format))) == (f"data:image/{format.lower()}", encoded(format))
    (tmp_path / "a.bmp").write_bytes(encoded("BMP"))
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side: 4 x 2 becomes 2 x 4
    for image, size in ((str(tmp_path / "a.bmp"), (4, 2)), (encoded("JPEG", exif=turned), (2, 4))):
        kind, data = decoded(data_url(image))
        assert kind == "data:image/png" and Image.open(io.BytesIO(data)).size == size
    with pytest.raises(BadImage):
        data_url(b"#!/bin/sh")


def test_servers_need_no_jax() -> None:
    """Catches an import that would seize an accelerator for a command that waits for others."""
    code = "import sys, rethinker_jax.distill.command; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("quick_compilation")
def test_the_example_model_in_both_roles(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our sampler in place of servers: the same lines, with tokens and log-probs where the text is the model's own."""
    options = [
        "distill", "--data", "rows.jsonl", "--output", "out.jsonl", "distill.caption.model=example",
        "distill.reason.model=example", "distill.reason.n=2", "distill.caption.max_tokens=4",
        "distill.reason.max_tokens=8", "distill.style=as_is", "sampling.num_slots=4", "distill.reason.temperature=2",
    ]  # fmt: skip
    assert main(options) == 0
    found = lines()
    assert [(line["id"], line["sample"]) for line in found] == [(name, n) for name in "cab" for n in (0, 1)]
    for line in found:
        assert len(line["completion_ids"]) == len(line["log_probs"]) <= 8
        assert line["finish_reason"] == "stop" or len(line["completion_ids"]) == 8
        assert bool(line["caption"]) == (line["id"] != "a")
    assert all(one["completion_ids"] != two["completion_ids"] for one, two in zip(found[::2], found[1::2], strict=True))
    kept = [Path(name).read_bytes() for name in ("out.captions.jsonl", "out.replies.jsonl")]
    capsys.readouterr()
    Path("out.jsonl").unlink()
    assert main(options) == 0
    assert "attention" not in capsys.readouterr().err  # no model was loaded
    # One reply lost: it alone is drawn again, and its text is what it was.
    Path("out.replies.jsonl").write_bytes(kept[1].partition(b"\n")[2])
    assert main(options) == 0
    assert "6 replies, 1 of them" in capsys.readouterr().err and Path("out.captions.jsonl").read_bytes() == kept[0]
    assert [line["completion_ids"] for line in lines()] == [line["completion_ids"] for line in found]
    assert Path("out.replies.jsonl").read_bytes().startswith(kept[1].partition(b"\n")[2])
