"""What is asked of a model, and which model: the same for one behind a server and for our sampler."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from rethinker_jax.chat_server import check_url
from rethinker_jax.config_curation import CaptionConfig, DistillConfig, ReasonConfig
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.template import IMAGE_TAG

Role = CaptionConfig | ReasonConfig
Failures = collections.Counter[str]  # asks without a reply, by reason
_SET_BY_US = ("model", "messages", "n", "stream")  # keys of a request that `body` may not hold


@dataclasses.dataclass(frozen=True)
class Ask:
    """One reply that is wanted.

    key     under which it is remembered: everything that it depends on.
    name    what names its random stream, with `sample`: the id of a row, or the digest of an image.
    label   for messages, as in "row 'a'".
    image   an encoded file or its path, in front of the text.
    """

    key: str
    name: str
    label: str
    text: str
    sample: int = 0
    image: bytes | str | None = dataclasses.field(default=None, repr=False)


def section_of(role: Role) -> str:
    return "distill.caption" if isinstance(role, CaptionConfig) else "distill.reason"


def body_of(role: Role, config: DistillConfig) -> Mapping[str, Any]:
    """Keys of a request that the config adds."""
    return config.caption_body if isinstance(role, CaptionConfig) else config.reason_body


def check_role(role: Role, body: Mapping[str, Any]) -> None:
    """Raises UserError for what no request could be made of."""
    section = section_of(role)
    if not role.model:
        wanted = "the model's name on the server" if role.url else "a Hugging Face directory, `example`, or a url too"
        raise UserError(f"{section}.model is empty; wanted {wanted}")
    if role.url:
        check_url(section, role.url)
    elif role.key_variable or body:
        raise UserError(f"{section}.key_variable and {section}_body are of a server; set {section}.url too")
    if role.top_p <= 0:
        raise UserError(f"{section}.top_p is 0, which leaves no token to draw; wanted 0 < top_p <= 1 (1 = off)")
    wrong = [key for key in _SET_BY_US if key in body]
    if wrong:
        raise UserError(f"{section}_body sets {', '.join(wrong)}, which the command sets by itself; leave it out")
    prompts = {"prompt": ("{question}", "{caption}"), "text_prompt": ("{question}",)}
    for name, places in prompts.items() if isinstance(role, ReasonConfig) else [("prompt", ())]:
        text = role.text_prompt if isinstance(role, ReasonConfig) and name == "text_prompt" else role.prompt
        missing = [place for place in places if place not in text]
        if missing or not text.strip() or IMAGE_TAG in text:
            wanted = f"wanted one with {' and '.join(places)}" if missing else f"wanted text without {IMAGE_TAG}"
            raise UserError(f"{section}.{name} is {text!r:.80}; {wanted}")


def served_identity(role: Role, body: Mapping[str, Any]) -> dict[str, Any]:
    """What the replies of a server depend on, besides the question."""
    names = ("model", "temperature", "top_p", "max_tokens", "seed")
    found = dataclasses.asdict(role)
    return {name: found[name] for name in names} | {"url": role.url.rstrip("/"), "body": dict(body)}
