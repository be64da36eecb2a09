"""The term `judge`: a model behind an OpenAI-compatible HTTP server gives a response a number from 0 to 1.

Its own threads send the requests, so that neither the verifier nor the sampler waits. Equal requests are sent once. The
response stands between two marker lines whose number is a hash of it, which a response cannot forge, and special tokens
in it are broken up; still, a judge that reads untrusted text can be talked to. A request that fails gives no value and
is counted by its reason; after `max_failures` in a row the run stops.
"""

import collections
import concurrent.futures
import hashlib
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from rethinker_jax.config import JudgeConfig
from rethinker_jax.errors import UserError
from rethinker_jax.types import Problem

CACHE_SIZE = 100_000
MAX_REPLY_BYTES = 1 << 20
MAX_BACKOFF_S = 30.0
_RETRIED = (408, 409, 425, 429)  # besides all from 500
_PLACE = re.compile(r"\{(question|answer|response)\}")
_NUMBER = re.compile(r"(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)", re.ASCII)
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_WORDS = {"yes": 1.0, "no": 0.0}


class JudgeFailure(Exception):
    """No value from the judge. The message is a short name, such as http_500 or unreadable."""

    def __init__(self, reason: str, *, again: bool):
        super().__init__(reason)
        self.again = again


JudgeValue = concurrent.futures.Future[float]


class JudgeModel:
    """A context manager over the threads that ask the judge. `failures` counts requests without a value by reason."""

    def __init__(self, config: JudgeConfig):
        """Raises UserError where the environment variable that is to hold the key is not set."""
        self.config = config
        self.failures: collections.Counter[str] = collections.Counter()
        self._key = os.environ.get(config.key_variable, "") if config.key_variable else ""
        if config.key_variable and not self._key:
            raise UserError(
                f"reward.judge.key_variable: the environment variable {config.key_variable} is not set; "
                "set it to the key of the judge's server."
            )
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[bytes, JudgeValue] = collections.OrderedDict()
        self._in_a_row = 0
        self._closed = threading.Event()
        self._waiting: queue.SimpleQueue[tuple[bytes, str, JudgeValue] | None] = queue.SimpleQueue()
        self._threads = [
            # Daemons: a request that hangs must not keep the interpreter from ending.
            threading.Thread(target=self._run, name=f"judge-{number}", daemon=True)
            for number in range(config.num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "JudgeModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, problem: Problem, response: str) -> JudgeValue:
        """The judge's value, later. The future raises JudgeFailure, or UserError where the run should stop."""
        prompt = fill_prompt(self.config, problem, response)
        key = hashlib.sha256(prompt.encode(errors="surrogatepass")).digest()
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
            value: JudgeValue = concurrent.futures.Future()
            self._known[key] = value
            if len(self._known) > CACHE_SIZE:
                self._known.popitem(last=False)
        self._waiting.put((key, prompt, value))
        return value

    def close(self) -> None:
        """Requests that are under way are given up; what waits for them raises JudgeFailure."""
        self._closed.set()
        for _ in self._threads:
            self._waiting.put(None)

    def _run(self) -> None:
        while (asked := self._waiting.get()) is not None:
            key, prompt, value = asked
            try:
                found = self._ask(prompt)
            except JudgeFailure as failure:
                value.set_exception(self._count(key, failure))
            else:
                with self._lock:
                    self._in_a_row = 0
                value.set_result(found)

    def _ask(self, prompt: str) -> float:
        """One prompt, tried again where that may help."""
        for attempt in range(self.config.retries + 1):
            try:
                if self._closed.is_set():
                    raise JudgeFailure("closed", again=False)
                return read_value(self._send(prompt))
            except JudgeFailure as failure:
                if not failure.again or attempt == self.config.retries:
                    raise
            self._closed.wait(min(self.config.backoff_s * 2**attempt, MAX_BACKOFF_S))
        raise AssertionError("the last attempt returns or raises")

    def _send(self, prompt: str) -> str:
        """The text of the server's reply, within `timeout_s` in all."""
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        url = self.config.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        end = time.monotonic() + self.config.timeout_s
        data = b""
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout_s) as reply:
                while chunk := reply.read1(65536):
                    data += chunk
                    if time.monotonic() > end:  # the timeout above is that of one read
                        raise JudgeFailure("timeout", again=True)
                    if len(data) > MAX_REPLY_BYTES:
                        raise JudgeFailure("too_long", again=False)
        except urllib.error.HTTPError as error:
            error.close()
            raise JudgeFailure(f"http_{error.code}", again=error.code >= 500 or error.code in _RETRIED) from None
        except TimeoutError:
            raise JudgeFailure("timeout", again=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError)
            raise JudgeFailure("timeout" if late else "connection", again=True) from None
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise JudgeFailure("unreadable", again=True) from None
        if not isinstance(text, str):
            raise JudgeFailure("unreadable", again=True)
        return text

    def _count(self, key: bytes, failure: JudgeFailure) -> Exception:
        """Counts a failure, forgets the request, and says what its future raises."""
        with self._lock:
            self._known.pop(key, None)
            self.failures[str(failure)] += 1
            self._in_a_row += 1
            if self._in_a_row < self.config.max_failures:
                return failure
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.failures.most_common())
        return UserError(
            f"reward.judge: {self.config.max_failures} requests in a row to {self.config.url} gave no value "
            f"(reward.judge.max_failures); failures so far: {reasons}. Look at the server and its model's replies."
        )


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
