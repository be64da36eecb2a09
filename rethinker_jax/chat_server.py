"""Questions to an OpenAI-compatible chat server, by threads of their own, each tried again where that may help.

The server chooses what it sends: replies are bounded in bytes and in time, redirects are not followed (they would carry
the key to where they lead), and a reply that is no JSON of the wanted form is one more failure that is counted. The key
comes from the environment and stands in no message.
"""

import collections
import concurrent.futures
import dataclasses
import email.utils
import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rethinker_jax.errors import UserError

MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 60.0  # of what a server asks to wait; one that asks for more is tried earlier
MAX_DETAIL_BYTES = 2048  # of what a server says of a request that it refuses
MAX_DETAIL_CHARS = 300
_RETRIED = (408, 409, 425, 429)  # besides all from 500
_ABOUT_THE_KEY = (401, 403)  # what a server says with these may repeat a part of it

T = TypeVar("T")


class ChatFailure(Exception):
    """No usable reply. The message is a short name, such as http_500 or unreadable.

    again   whether trying again may help.
    status  of a request that the server refused, 0 of all other failures.
    wait_s  how long the server asks to wait before the next try.
    detail  what the server said of it, for people; text of a stranger.
    """

    def __init__(self, reason: str, *, again: bool, status: int = 0, wait_s: float = 0.0, detail: str = ""):
        super().__init__(reason)
        self.again, self.status, self.wait_s, self.detail = again, status, wait_s, detail


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """None: the redirect itself is the reply."""


@dataclasses.dataclass(frozen=True)
class ChatServer:
    """Where to ask and for how long. `url` goes up to and without /chat/completions.

    section  of the config, for messages; `limits` is that of max_failures and the like.
    """

    section: str
    limits: str
    url: str
    key: str = dataclasses.field(repr=False)
    timeout_s: float
    retries: int
    backoff_s: float
    max_reply_bytes: int

    def ask(self, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T], stopped: threading.Event) -> T:
        """What `read` makes of the first choice of the reply. Raises ChatFailure, as `read` may."""
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            try:
                if stopped.is_set():
                    raise ChatFailure("closed", again=False)
                return read(_first_choice(self._send(data)))
            except ChatFailure as failure:
                if not failure.again or attempt == self.retries:
                    raise
                wait_s = max(min(self.backoff_s * 2**attempt, MAX_BACKOFF_S), failure.wait_s)
            stopped.wait(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, data: bytes) -> bytes:
        """The body of the reply. `timeout_s` bounds connecting, the wait for each piece, and all pieces together."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", data, headers)
        end = time.monotonic() + self.timeout_s
        found = bytearray()
        try:
            # A new opener each time: it holds nothing but handlers, and the proxies of the environment.
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_s) as reply:
                while chunk := reply.read1(65536):
                    found += chunk
                    if time.monotonic() > end:
                        raise ChatFailure("timeout", again=True)
                    if len(found) > self.max_reply_bytes:
                        raise ChatFailure("too_long", again=False)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except TimeoutError:
            raise ChatFailure("timeout", again=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError)
            raise ChatFailure("timeout" if late else "connection", again=True) from None
        return bytes(found)

    def _refused(self, error: urllib.error.HTTPError) -> ChatFailure:
        again = error.code >= 500 or error.code in _RETRIED
        if again:
            wait_s = _retry_after(error.headers.get("Retry-After", ""))
            return ChatFailure(f"http_{error.code}", again=True, status=error.code, wait_s=wait_s)
        detail = "" if error.code < 400 or error.code in _ABOUT_THE_KEY else self._detail(error)
        return ChatFailure(f"http_{error.code}", again=False, status=error.code, detail=detail)

    def _detail(self, error: urllib.error.HTTPError) -> str:
        """The beginning of what the server said, in one printable line and without the key."""
        body = error.fp
        try:
            data = body.read1(MAX_DETAIL_BYTES) if isinstance(body, http.client.HTTPResponse) else b""
        except (OSError, http.client.HTTPException):
            return ""
        said = " ".join(data.decode(errors="replace").split())
        if self.key:
            said = said.replace(self.key, "...")
        return "".join(char for char in said if char.isprintable())[:MAX_DETAIL_CHARS]


class ChatPool:
    """A context manager over the threads that ask a server. `failures` counts requests without a reply by reason."""

    def __init__(self, server: ChatServer, num_threads: int, max_failures: int, *, refusals_stop: bool = False):
        """refusals_stop: a request that the server refuses for good (such as 401 or 404) stops the run at once."""
        self.server = server
        self.failures: collections.Counter[str] = collections.Counter()
        self._max_failures, self._refusals_stop = max_failures, refusals_stop
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._closed = threading.Event()
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            # Daemons: a request that hangs must not keep the interpreter from ending.
            threading.Thread(target=self._run, name=f"{server.section}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "ChatPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> concurrent.futures.Future[T]:
        """What `read` makes of the reply, later. The future raises ChatFailure, or UserError where the run should stop.

        `read` gets the reply's first choice and raises ChatFailure for one that it cannot use.
        """
        value: concurrent.futures.Future[T] = concurrent.futures.Future()

        def answer() -> None:
            try:
                found = self.server.ask(body, read, self._closed)
            except ChatFailure as failure:
                value.set_exception(self._count(failure))
            else:
                with self._lock:
                    self._in_a_row = 0
                value.set_result(found)
            finally:
                if not value.done():  # a defect, which ends this thread; nobody shall wait for it
                    value.set_exception(RuntimeError(f"{self.server.section}: a request ended without a result"))

        self._waiting.put(answer)
        return value

    def close(self) -> None:
        """Requests that are under way are given up; what waits for them raises ChatFailure."""
        self._closed.set()
        for _ in self._threads:
            self._waiting.put(None)

    def _run(self) -> None:
        while (answer := self._waiting.get()) is not None:
            answer()

    def _count(self, failure: ChatFailure) -> Exception:
        """Counts a failure, and says what its future raises."""
        with self._lock:
            self.failures[str(failure)] += 1
            self._in_a_row += 1
            if self._refusals_stop and failure.status and not failure.again:
                return _refusal(self.server, failure)
            if self._in_a_row < self._max_failures:
                return failure
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.failures.most_common())
        return UserError(
            f"{self.server.section}: {self._max_failures} requests in a row to {self.server.url} gave no value "
            f"({self.server.limits}.max_failures); failures so far: {reasons}. Look at the server and its model's "
            "replies."
        )


def read_key(section: str, variable: str) -> str:
    """The key that the environment variable holds, "" where none is named. Raises UserError, which never shows it."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{section}.key_variable: the environment variable {variable} is not set; set it to the key of the server."
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{section}.key_variable: {variable} holds characters that no key has; set it to the key alone")
    return key


def check_url(section: str, url: str) -> None:
    """Raises UserError for what is no address of a server up to /chat/completions."""
    try:
        parts = urllib.parse.urlsplit(url)
        named = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise UserError(f"{section}.url is no address ({error}); wanted one such as http://host:8000/v1") from error
    if "@" in parts.netloc:
        raise UserError(f"{section}.url holds a name or a password; keys come from {section}.key_variable alone")
    if parts.scheme not in ("http", "https") or not named[0] or not url.isascii() or not url.isprintable():
        raise UserError(f"{section}.url is {url!r}; wanted one such as http://host:8000/v1")
    if " " in url or parts.query or parts.fragment or parts.path.rstrip("/").endswith("/chat/completions"):
        raise UserError(
            f"{section}.url is {url!r}; wanted the part before /chat/completions, such as http://host:8000/v1"
        )


def _refusal(server: ChatServer, failure: ChatFailure) -> UserError:
    """What to do about a request that the server refused for good."""
    if failure.status < 400:
        hint = "A redirect, which is not followed: name the address that it leads to."
    elif failure.status in _ABOUT_THE_KEY:
        hint = f"The server wants another key: look at {server.section}.key_variable and the variable that it names."
    elif failure.status == 404:
        hint = f"Look at {server.section}.url and {server.section}.model."
    else:
        hint = "Trying again does not help: look at the request, such as the length of its prompt and its settings."
    said = f", saying {failure.detail!r}" if failure.detail else ""
    return UserError(
        f"{server.section}: {server.url}/chat/completions refused a request with status {failure.status}{said}. {hint}"
    )


def _retry_after(value: str) -> float:
    """Seconds that the header asks for, from 0 to MAX_RETRY_AFTER_S; it holds seconds or a date."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(min(int(value[:9]), MAX_RETRY_AFTER_S))
    try:
        wait_s = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError, OSError):
        return 0.0
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)


def _first_choice(data: bytes) -> Mapping[str, Any]:
    try:
        choice = json.loads(data)["choices"][0]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise ChatFailure("unreadable", again=True) from None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise ChatFailure("unreadable", again=True)
    return choice
