"""The term `judge`: a model behind an OpenAI-compatible HTTP server gives a response a number from 0 to 1.

Threads of `chat_server` send the requests, so that neither the verifier nor the sampler waits. Equal requests are sent
once. The response stands between two marker lines whose number is a hash of it, which a response cannot forge, and
special tokens in it are broken up; still, a judge that reads untrusted text can be talked to. A request that fails
gives no value and is counted by its reason; after `max_failures` in a row the run stops.
"""

import collections
import concurrent.futures
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rethinker_jax.chat_server import ChatFailure, ChatPool, ChatServer, read_key
from rethinker_jax.config_rewards import JudgeConfig
from rethinker_jax.types import Problem

CACHE_SIZE = 100_000
MAX_REPLY_BYTES = 1 << 20
_PLACE = re.compile(r"\{(question|answer|response)\}")
_NUMBER = re.compile(r"(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)", re.ASCII)
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_WORDS = {"yes": 1.0, "no": 0.0}

JudgeFailure = ChatFailure  # no value from the judge; of a reply without one, `unreadable`
JudgeValue = concurrent.futures.Future[float]


class JudgeModel:
    """A context manager over the threads that ask the judge. `failures` counts requests without a value by reason."""

    def __init__(self, config: JudgeConfig):
        """Raises UserError where the environment variable that is to hold the key is not set."""
        self.config = config
        key = read_key("reward.judge", config.key_variable)
        server = ChatServer(
            "reward.judge", "reward.judge", config.url, key, config.timeout_s, config.retries, config.backoff_s,
            MAX_REPLY_BYTES,
        )  # fmt: skip
        self._pool = ChatPool(server, config.num_threads, config.max_failures)
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[bytes, JudgeValue] = collections.OrderedDict()

    def __enter__(self) -> "JudgeModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def failures(self) -> collections.Counter[str]:
        return self._pool.failures

    def ask(self, problem: Problem, response: str) -> JudgeValue:
        """The judge's value, later. The future raises JudgeFailure, or UserError where the run should stop."""
        prompt = fill_prompt(self.config, problem, response)
        key = hashlib.sha256(prompt.encode(errors="surrogatepass")).digest()
        with self._lock:
            known = self._known.get(key)
            if known is not None and not (known.done() and known.exception()):  # failures are not remembered
                self._known.move_to_end(key)
                return known
            body = {
                "model": self.config.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": self.config.max_tokens,
            }
            value = self._known[key] = self._pool.ask(body, _value)
            if len(self._known) > CACHE_SIZE:
                self._known.popitem(last=False)
        return value

    def close(self) -> None:
        """Requests that are under way are given up; what waits for them raises JudgeFailure."""
        self._pool.close()


def _value(choice: Mapping[str, Any]) -> float:
    text = choice["message"].get("content")
    if not isinstance(text, str):
        raise JudgeFailure("unreadable", again=True)
    return read_value(text)


def fill_prompt(config: JudgeConfig, problem: Problem, response: str) -> str:
    """The prompt with question, answer and the marked-off response, each put in once and never read for places."""
    shown = response
    if len(response) > config.max_response_chars:
        half = config.max_response_chars // 2
        left_out = len(response) - 2 * half
        shown = f"{response[:half]}\n[{left_out} characters left out]\n{response[len(response) - half :]}"
    shown = shown.replace("<|", "< |")  # the tokens with which chat templates end a message
    mark = hashlib.sha256(response.encode(errors="surrogatepass")).hexdigest()[:16]
    values = {
        "question": problem.question,
        "answer": problem.answer,
        "response": f"BEGIN RESPONSE {mark}\n{shown}\nEND RESPONSE {mark}",
    }
    return _PLACE.sub(lambda place: values[place[1]], config.prompt)


def read_value(text: str) -> float:
    """`{"score": x}`, x alone, or yes or no; x from 0 to 1. A thought before it is skipped. Raises JudgeFailure."""
    thought = _THOUGHT.match(text)
    text = (text[thought.end() :] if thought else text).strip()
    word = text.lower().removesuffix(".")
    if word in _WORDS:
        return _WORDS[word]
    if len(text) <= 16 and _NUMBER.fullmatch(text):
        return float(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise JudgeFailure("unreadable", again=True) from None
    score = value.get("score") if isinstance(value, dict) else None
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise JudgeFailure("unreadable", again=True)
    return float(score)


def gather(values: Sequence[JudgeValue]) -> list[float | str]:
    """The values in their order, or the reason where there is none. Raises UserError where the run should stop."""
    found: list[float | str] = []
    for value in values:
        try:
            found.append(value.result())
        except JudgeFailure as failure:
            found.append(str(failure))
    return found
