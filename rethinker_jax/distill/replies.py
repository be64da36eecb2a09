"""What a model wrote, and the file that remembers it: a line a reply, under the key of all that it depends on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker_jax.chat_server import ChatFailure
from rethinker_jax.curation.samples import MAX_CHARS
from rethinker_jax.errors import UserError
from rethinker_jax.types import FinishReason

# The trace made of a reply may be longer by tags and a copy of the answer, and must still be one that `select` reads.
MAX_REPLY_CHARS = MAX_CHARS // 2
_REASONING = ("reasoning_content", "reasoning")  # of DeepSeek and older vLLM; of vLLM since 0.11 and OpenRouter
_LINE_BEGINS = b'{"key": '
_FINISH_REASONS: dict[object, FinishReason] = {"stop": "stop", "length": "length", "stop_string": "stop_string"}


@dataclasses.dataclass(frozen=True)
class Reply:
    """One reply. `reasoning` is what a server told apart from the text, "" where it did not.

    finish_reason  None where the server gave none that `sample` knows.
    drawn          of our sampler: `completion_ids` and `log_probs` of the text.
    """

    text: str
    reasoning: str = ""
    finish_reason: FinishReason | None = None
    drawn: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)


def read_choice(choice: Mapping[str, Any]) -> Reply:
    """The reply in a choice of a server. Raises ChatFailure for one that holds no text, or too much of it."""
    message = choice["message"]
    text = message.get("content")
    reasoning = next((message[key] for key in _REASONING if message.get(key)), "")
    if not isinstance(text, str | None) or not isinstance(reasoning, str):
        raise ChatFailure("unreadable", again=True)
    text = text or ""
    if len(text) + len(reasoning) > MAX_REPLY_CHARS:
        raise ChatFailure("too_long", again=False)
    if not text.strip() and not reasoning.strip():
        raise ChatFailure("empty", again=True)
    ended = choice.get("finish_reason")
    return Reply(
        whole_text(text), whole_text(reasoning), _FINISH_REASONS.get(ended) if isinstance(ended, str) else None
    )


def key_of(*parts: object) -> str:
    """32 hex digits that tell the parts, JSON values, from all others."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


class ReplyFile:
    """A context manager over JSON lines `{key, ..., text, reasoning, finish_reason, drawn}`, which only grow.

    Held in memory are keys and places alone. A line is there whole or not at all: what a kill tore off is cut away.
    """

    def __init__(self, path: Path):
        """Raises UserError for a file of other lines, which stays as it is."""
        self.path = path
        self._place_of: dict[str, int] = {}
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: replies cannot be kept there ({error.strerror})") from error
        try:
            self._end = self._read_places()
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(self._end)

    def __enter__(self) -> "ReplyFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._place_of

    def get(self, key: str) -> Reply | None:
        """The reply that is remembered under the key, the last one if there are several."""
        place = self._place_of.get(key)
        if place is None:
            return None
        self._file.seek(place)
        return _read_line(self._file.readline())[1]

    def add(self, key: str, reply: Reply, names: Mapping[str, Any]) -> None:
        """Remembers a reply; `names` say for people what it is of. It is in the file when this returns."""
        line = json.dumps({"key": key, **names, **dataclasses.asdict(reply)}).encode("ascii") + b"\n"
        self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        self._place_of[key] = self._end
        self._end += len(line)

    def _read_places(self) -> int:
        """Fills the table of places, and returns where the last whole line ends."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n") and (line.startswith(_LINE_BEGINS) or _LINE_BEGINS.startswith(line)):
                break  # torn
            try:
                key, _ = _read_line(line)
            except ValueError as error:
                raise UserError(
                    f"{self.path}, line {number}: {error}. Wanted a reply that `distill` kept; remove the line, or the "
                    "file to ask for everything anew."
                ) from error
            self._place_of[key] = end
            end += len(line)
        return end


def _read_line(line: bytes) -> tuple[str, Reply]:
    """(key, reply). Raises ValueError."""
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("not JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("key"), str):
        raise ValueError("it has no key")
    texts = [found.get(name) for name in ("text", "reasoning")]
    drawn, ended = found.get("drawn"), found.get("finish_reason")
    if not all(isinstance(text, str) for text in texts) or not isinstance(drawn, dict):
        raise ValueError("text, reasoning or drawn is missing")
    if ended is not None and ended not in _FINISH_REASONS.values():
        raise ValueError(f"finish_reason is {ended!r:.40}")
    return found["key"], Reply(str(texts[0]), str(texts[1]), ended, drawn)


def whole_text(text: str) -> str:
    """The text with U+FFFD for each half of a character, which no file could hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
