"""`distill`: replies of a fake server, or of the example model, become traces; what is kept, and what asked again."""

import base64
import concurrent.futures
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rethinker_jax.chat_server import MAX_RETRY_AFTER_S, ChatFailure, _retry_after
from rethinker_jax.config_curation import CAPTION_PROMPT, ReasonConfig
from rethinker_jax.distill.asks import Ask
from rethinker_jax.distill.replies import MAX_REPLY_CHARS, Reply, ReplyFile, key_of, read_choice
from rethinker_jax.distill.served import _keep_what_came, data_url
from rethinker_jax.distill.texts import description, joined, reason_prompt, trace, unboxed
from rethinker_jax.errors import UserError
from rethinker_jax.main import main
from rethinker_jax.prompts.images import BadImage

Row = dict[str, Any]
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
SECRET = "sk-not-to-be-seen-123"


class Server:
    """A chat server whose replies are those of `reply`; `seen` holds bodies and headers in the order they came."""

    def __init__(self, reply: Callable[[Row], Answer]):
        self.seen: list[tuple[Row, dict[str, str]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((body, dict(self.headers)))
                status, headers, data = reply(body)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has given up
                    self.close_connection = True

            def do_GET(self) -> None:  # what a redirect of a POST becomes
                outer.seen.append(({}, dict(self.headers)))
                self.send_error(405)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing on the terminal."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def options(self, *more: str, url: str = "") -> list[str]:
        url = url or self.url
        return [
            "distill", "--data", "rows.jsonl", "--output", "out.jsonl", "distill.caption.model=seer",
            f"distill.caption.url={url}", "distill.reason.model=thinker", f"distill.reason.url={url}",
            "distill.reason.n=2", "distill.retries=1", "distill.backoff_s=0.01", "distill.timeout_s=10",
            "distill.num_threads=3", *more,
        ]  # fmt: skip


def said(content: str | None, finish_reason: str = "stop", **more: Any) -> Answer:
    choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def is_caption(body: Row) -> bool:
    return body["model"] == "seer"


def good(body: Row) -> Answer:
    """Descriptions by the first bytes of the image; a right answer, with its reasoning told apart."""
    if is_caption(body):
        image, prompt = body["messages"][0]["content"]
        begin = "A picture" if prompt["text"] == CAPTION_PROMPT else "It"
        return said(f"{begin} of {len(image['image_url']['url'])} bytes.")
    return said("It is seven.\n\n\\boxed{7}", reasoning_content="I see seven.")


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
        options = server.options("distill.num_threads=1")
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
        assert 1.0 <= time.monotonic() - started < 5
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


TRACES = [  # reply, trace, what became of its answer
    (r"<think>a</think>b \boxed{5}", "<think>a</think>b 5\n\n<answer>5</answer>", "boxed"),
    (r"<think>\boxed{4}</think>It is $\boxed{5}$.", "<think>4</think>It is $5$.\n\n<answer>5</answer>", "boxed"),
    (r"a</think>b \boxed{5}", "<think>\na</think>b 5\n\n<answer>5</answer>", "boxed"),  # the prompt opened the thought
    (r"\boxed{\frac{1}{2}} ", "\\frac{1}{2}\n\n<answer>\\frac{1}{2}</answer>", "boxed"),
    (r"\boxed{2} or \boxed{-2}", "2 or -2\n\n<answer>2, -2</answer>", "boxed"),  # one list, as the verifier reads it
    (r"<think>\boxed{4}</think><answer>5</answer>", "<think>4</think><answer>5</answer>", "answer_tag"),
    (r"<think>\boxed{4}</think><answer>\boxed{5}</answer>", "<think>4</think><answer>5</answer>", "answer_tag"),
    (r"<think>\boxed{4}</think>no box", r"<think>\boxed{4}</think>no box", "no_answer"),
    (r"<think>a</think>\boxed{}", r"<think>a</think>\boxed{}", "no_answer"),
    (r"<think>a</think>\boxed{5", r"<think>a</think>\boxed{5", "no_answer"),
    ("<think>a</think><answer> </answer>", "<think>a</think><answer> </answer>", "no_answer"),
    (r"<think>cut \boxed{4}", r"<think>cut \boxed{4}", "unfinished"),
    ("", "", "no_answer"),
]


@pytest.mark.parametrize(("text", "expected", "outcome"), TRACES)
def test_the_style_of_traces(text: str, expected: str, outcome: str) -> None:
    """Catches a box of the thought that is taken for the answer, by us or later by the verifier."""
    assert trace(text, "openvlthinker") == (expected, outcome)
    assert trace(text, "as_is") == (text, "as_is")


def test_boxes_are_opened() -> None:
    assert unboxed(r"\boxed{a\boxed{b}} \{ \fbox {c} } \boxed{d") == r"ab \{ c } \boxed{d"
    assert unboxed(r"\alpha\boxed{b}") == r"\alpha b"  # not the command \alphab
    started = time.monotonic()
    deep = r"\boxed{" * 50_000 + "<answer>" * 50_000
    assert unboxed(deep) == deep and trace(deep, "openvlthinker")[1] == "no_answer"
    assert time.monotonic() - started < 5  # linear


def test_reasoning_that_was_told_apart() -> None:
    assert joined(Reply("a", " b\n")) == "<think>\nb\n</think>\n\na"
    assert joined(Reply("", "cut")) == "<think>\ncut\n"  # not a thought that ended
    assert joined(Reply("<think>x</think>a", "x")) == "<think>x</think>a"
    assert joined(Reply("a")) == "a"


def test_a_choice_is_read() -> None:
    def of(content: object, ended: object = "stop", **more: object) -> Reply:
        return read_choice({"message": {"content": content, **more}, "finish_reason": ended})

    assert of("a", reasoning="b") == of("a", reasoning_content="b") == Reply("a", "b", "stop")
    assert of(None, "length", reasoning_content="b") == Reply("", "b", "length")
    assert of("a", "content_filter").finish_reason is None and of("a", ["x"]).finish_reason is None
    assert of("\ud83d and \U0001f600").text == "\ufffd and \U0001f600"  # half a character is none
    for content in (None, "", " \n", 7, [{"type": "text"}]):
        with pytest.raises(ChatFailure):
            of(content)


def test_texts_for_the_reasoner() -> None:
    """Catches places filled inside what a model or a row wrote, and image tags that want images."""
    config = ReasonConfig(prompt="{question}|{caption}", text_prompt="only {question}")
    assert (
        reason_prompt(config, "a {caption} <image>?", "b {question} [image]", 1) == "a {caption} ?|b {question} [image]"
    )
    assert reason_prompt(config, "<image><image>x", "y", 2) == "[Image 1][Image 2]x|y"
    assert reason_prompt(config, " x ", None, 0) == "only x"
    assert description([Reply("<think>hm</think> a <image> ")]) == "a [image]"
    assert description([Reply("a"), Reply("b")]) == "Image 1: a\n\nImage 2: b"
    assert description([Reply("a"), Reply("<think>all of it</think>")]) == ""


def test_a_file_of_other_lines_is_refused(tmp_path: Path) -> None:
    """Catches rows of a problem file, or its only line, that are cut away as what a kill tore off."""
    path = tmp_path / "kept.jsonl"
    for text in (
        '{"id": "a"}\n{"half',
        '{"id": "a"}',
        '{"key": 1}\n',
        '{"key": "a", "text": "b"}\n',
        "[" * 99999 + "\n",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=r"kept.jsonl, line 1: "):
            ReplyFile(path)
        assert path.read_text() == text
    with pytest.raises(UserError, match="cannot be kept"):
        ReplyFile(tmp_path)


def test_kept_replies_come_back(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    replies = {key_of(n): Reply(f"text {n} \u00e9\n", "b", "length", {"completion_ids": [n]}) for n in range(3)}
    with ReplyFile(path) as file:
        for key, reply in replies.items():
            file.add(key, reply, {"of": "row"})
            assert file.get(key) == reply
    with path.open("ab") as torn:
        torn.write(b'{"key": "x", "te')
    with ReplyFile(path) as file:
        assert {key: file.get(key) for key in replies} == replies and "x" not in file and file.get("x") is None
        file.add("x", Reply("y"), {})
        assert file.get("x") == Reply("y") and file.get(key_of(0)) == replies[key_of(0)]


def test_replies_that_come_while_the_run_stops_are_kept(tmp_path: Path) -> None:
    """They were paid for. Catches also a failure among them that takes the place of the message."""
    futures: list[concurrent.futures.Future[Reply]] = [concurrent.futures.Future() for _ in range(4)]
    futures[0].set_result(Reply("came"))
    futures[1].set_exception(ChatFailure("http_500", again=True))
    futures[2].set_exception(UserError("stop"))
    asked = {future: Ask(key_of(number), "a", "row 'a'", "x") for number, future in enumerate(futures)}
    with ReplyFile(tmp_path / "kept.jsonl") as file:
        _keep_what_came(asked, file)
        assert [file.get(key_of(number)) for number in range(4)] == [Reply("came"), None, None, None]


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
