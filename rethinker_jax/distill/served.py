"""Replies of an OpenAI-compatible server: an image goes as a data URL, every reply is kept as soon as it is there."""

import base64
import collections
import concurrent.futures
import contextlib
import io
import itertools
from collections.abc import Sequence
from typing import Any

from rethinker_jax.chat_server import ChatFailure, ChatPool, ChatServer, read_key
from rethinker_jax.config_curation import DistillConfig
from rethinker_jax.console import RunProgress
from rethinker_jax.curation.records import draw
from rethinker_jax.distill.asks import Ask, Failures, Role, body_of, section_of
from rethinker_jax.distill.replies import Reply, ReplyFile, read_choice
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.images import DECODE_ERRORS, BadImage, load_image, open_image, to_rgb

MAX_REPLY_BYTES = 1 << 22
SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
ORIENTATION = 0x0112  # the EXIF tag

Asked = dict[concurrent.futures.Future[Reply], Ask]


class Served:
    """Asks the server of a role."""

    def __init__(self, role: Role, config: DistillConfig):
        """Raises UserError where the key is not there."""
        self._role, self._config, self._more = role, config, body_of(role, config)
        section = section_of(role)
        key = read_key(section, role.key_variable)
        self._server = ChatServer(
            section, "distill", role.url, key, config.timeout_s, config.retries, config.backoff_s, MAX_REPLY_BYTES
        )

    def ask_all(self, asks: Sequence[Ask], replies: ReplyFile, shown: RunProgress, first: int) -> Failures:
        """Asks for all, two rounds of threads at a time, and keeps what comes; returns the failures by reason.

        `first` is how many replies were there before, of the progress that is shown. Raises UserError where the run
        should stop. What had come by then is kept.
        """
        failures: Failures = collections.Counter()
        left = iter(asks)
        asked: Asked = {}
        num_done = first
        with ChatPool(self._server, self._config.num_threads, self._config.max_failures, refusals_stop=True) as pool:
            try:
                while True:
                    for ask in itertools.islice(left, 2 * self._config.num_threads - len(asked)):
                        try:
                            asked[pool.ask(self._body(ask), read_choice)] = ask
                        except BadImage as error:
                            num_done += 1
                            failures["bad_image"] += 1
                            shown.note(f"left out (bad_image): {ask.label}: {error}")
                    if not asked:
                        return failures
                    done, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        num_done += 1
                        ask = asked.pop(future)
                        try:
                            replies.add(ask.key, future.result(), {"of": ask.label, "sample": ask.sample})
                        except ChatFailure as failure:
                            failures[str(failure)] += 1
                        except UserError as error:
                            raise UserError(f"{error} The last request was for {ask.label}.") from error
                    shown.update(num_done, {"failures": failures.total()})
            finally:
                _keep_what_came(asked, replies)

    def _body(self, ask: Ask) -> dict[str, Any]:
        """The request. Its seed depends on role, question and sample, or all samples would be one. Raises BadImage."""
        content: str | list[dict[str, Any]] = ask.text
        if ask.image is not None:
            content = [
                {"type": "image_url", "image_url": {"url": data_url(ask.image)}},
                {"type": "text", "text": ask.text},
            ]
        body = {
            "model": self._role.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self._role.temperature,
            "top_p": self._role.top_p,
            "max_tokens": self._role.max_tokens,
            "seed": draw(self._role.seed, ask.name, ask.sample) >> 33,  # 31 bits
            **self._more,
        }
        return {key: value for key, value in body.items() if value is not None}


def data_url(image: bytes | str) -> str:
    """An image as a data URL: PNG, JPEG and WEBP by their own bytes, anything else as PNG. Raises BadImage.

    One that EXIF turns is sent as PNG too, upright: not every server turns it.
    """
    decoded = load_image(image)  # whole: a broken image would be refused by the server, and end the run
    with open_image(image) as header:
        kind, turned = SENT_AS_THEY_ARE.get(header.format or ""), header.getexif().get(ORIENTATION, 1) != 1
    if kind is None or turned:
        kind, file = "image/png", io.BytesIO()
        try:
            to_rgb(decoded).save(file, "PNG")
        except DECODE_ERRORS as error:
            raise BadImage(f"cannot turn an image into PNG: {error}") from error
        data = file.getvalue()
    else:
        data = image_bytes(image)
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def image_bytes(image: bytes | str) -> bytes:
    """The encoded file. Raises BadImage where it cannot be read."""
    if isinstance(image, bytes):
        return image
    try:
        with open(image, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(f"cannot read image {image}: {error.strerror}") from error


def _keep_what_came(asked: Asked, replies: ReplyFile) -> None:
    """Replies that came while the run was stopping: they were paid for."""
    for future, ask in asked.items():
        if future.done():
            with contextlib.suppress(ChatFailure, UserError):
                replies.add(ask.key, future.result(), {"of": ask.label, "sample": ask.sample})
