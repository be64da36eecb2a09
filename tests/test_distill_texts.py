"""Texts of `distill`: traces made of replies, prompts, and the file that keeps what was replied."""

import concurrent.futures
import time
from pathlib import Path

import pytest

from rethinker_jax.chat_server import ChatFailure
from rethinker_jax.config_curation import ReasonConfig
from rethinker_jax.distill.asks import Ask
from rethinker_jax.distill.replies import Reply, ReplyFile, key_of, read_choice
from rethinker_jax.distill.served import _keep_what_came
from rethinker_jax.distill.texts import description, joined, reason_prompt, trace, unboxed
from rethinker_jax.errors import UserError

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
    started = time.process_time()
    deep = r"\boxed{" * 50_000 + "<answer>" * 50_000
    assert unboxed(deep) == deep and trace(deep, "openvlthinker")[1] == "no_answer"
    assert time.process_time() - started < 20  # linear


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
