"""Rows as they are published → rows to learn from: question and completion, conversations, alpaca."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.rows import ALIASES, VIDEO_COLUMNS, BadField, Columns, match_columns, read_row
from rethinker_jax.prompts.template import IMAGE_TAG
from rethinker_jax.sft.conversation import Role, SftRow, Span, Turn

Format = Literal["question", "conversation", "alpaca"]
LearnedTurns = Literal["all", "last"]
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
# Names of roles → ours. ShareGPT says human, gpt and observation.
ROLES: Mapping[str, Literal["system", "user", "assistant", "tool", "observation"]] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "tool": "tool",
    "observation": "observation",
}  # fmt: skip
TOOL_RESPONSE = "<tool_response>\n{}\n</tool_response>"  # how LLaMA-Factory's template qwen2_vl writes an observation
WANTED = (
    "a problem with a `completion` (question, completion); a conversation (messages with role and content, or "
    "conversations with from and value); or alpaca (instruction, output)"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of rows: its name, format and columns, and the resolved folder its image paths start from."""

    name: str
    format: Format
    columns: Columns
    image_root: str | None
    learned_turns: LearnedTurns


@dataclasses.dataclass(frozen=True)
class Message:
    """One message as it was written: `text` has an image tag where an image stands, `images` are those inside it."""

    role: str
    text: str
    images: tuple[Any, ...]
    num_tags: int


def detect_format(
    names: Sequence[str], asked: Literal["auto", "question", "conversation", "alpaca"], where: str
) -> Format:
    """The format of a file with these columns, or the one that was asked for. Raises UserError where none fits."""
    has = {
        "question": "completion" in names and any(alias in names for alias in ALIASES["question"]),
        "conversation": any(column in names for column in CONVERSATION_COLUMNS),
        "alpaca": "instruction" in names and "output" in names,
    }
    if asked != "auto":
        if not has[asked]:
            raise UserError(f"{where}: sft.format is {asked}, but its columns are {_listed(names)}; wanted {WANTED}.")
        return asked
    fitting: list[Format] = [name for name in ("question", "conversation", "alpaca") if has[name]]
    if not fitting:
        raise UserError(f"{where}: no row format fits its columns {_listed(names)}; wanted {WANTED}.")
    if len(fitting) > 1:
        raise UserError(f"{where}: its columns fit {' and '.join(fitting)}; say which by sft.format.")
    return fitting[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "(none)"


def columns_of(names: Sequence[str], format: Format, where: str) -> Columns:
    """Which column holds which field. Raises UserError for a required one that is missing."""
    if format == "question":
        return match_columns(names, {}, where, ("question",))
    found = {field: next((a for a in ALIASES[field] if a in names), None) for field in ("id", "images", "source")}
    if format == "conversation":
        found["turns"] = next(column for column in CONVERSATION_COLUMNS if column in names)
    return Columns({field: column for field, column in found.items() if column is not None})


def read_sft_row(row: Mapping[str, Any], source: Source, number: int) -> SftRow:
    """The row to learn from. Raises BadField for one to be counted and left out, UserError for one with videos."""
    readers: dict[Format, Callable[[Mapping[str, Any], Source, int], SftRow]] = {
        "question": _question_row,
        "conversation": _conversation_row,
        "alpaca": _alpaca_row,
    }
    return readers[source.format](row, source, number)


def _where(source: Source, number: int) -> dict[str, Any]:
    stem = source.name.rpartition(".")[0] or source.name
    return {"where": f"{source.name} row {number}", "row_id": f"{stem}-{number}", "image_root": source.image_root}


def _question_row(row: Mapping[str, Any], source: Source, number: int) -> SftRow:
    spans = completion_spans(row.get("completion"))
    if not spans:
        came = f"{row.get('completion')!r:.80}"
        raise BadField("bad_completion", f"wanted `completion`, a text or a list of {{text, loss}}; came {came}")
    problem = read_row(row, source.columns, required=("question",), **_where(source, number))
    return SftRow(problem, (Turn("assistant", spans),))


def completion_spans(completion: object) -> tuple[Span, ...]:
    """The spans of a completion, none where it is not one."""
    if isinstance(completion, str):
        return ((completion, True),) if completion else ()
    if not isinstance(completion, list) or not all(
        isinstance(span, dict) and isinstance(span.get("text"), str) and isinstance(span.get("loss"), bool)
        for span in completion
    ):
        return ()
    return tuple((span["text"], span["loss"]) for span in completion)


def _alpaca_row(row: Mapping[str, Any], source: Source, number: int) -> SftRow:
    """Instruction and input, a line break between, are the question; `output` is the completion."""
    if row.get("history"):
        raise BadField("history", "alpaca rows with a history are not read: write it as a conversation")
    parts = [row.get(name) for name in ("instruction", "input") if row.get(name)]
    if not all(isinstance(part, str) for part in parts):
        raise BadField("bad_question", "wanted text as instruction and input")
    output = row.get("output")
    if not isinstance(output, str) or not output:
        raise BadField("bad_completion", f"wanted text as output; came {output!r:.80}")
    question = "\n".join(str(part) for part in parts)
    images = _column_images(row, source)
    return _verbatim(row, source, number, question, images, (Turn("assistant", ((output, True),)),), _system(row))


def _conversation_row(row: Mapping[str, Any], source: Source, number: int) -> SftRow:
    """[system,] user, assistant, [user or tool, assistant, ...]; all images in the first user's turn."""
    given = row.get(source.columns.of["turns"])
    if not isinstance(given, list) or not given:
        raise BadField("bad_turns", f"wanted a list of turns; came {given!r:.80}")
    messages = [_message(one, place) for place, one in enumerate(given)]
    system = _system(row)
    if messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    _check_order(messages)
    for place, message in enumerate(messages[1:], start=2):
        if message.num_tags:
            raise BadField(
                "late_image",
                f"turn {place} ({message.role}) has an image; images can stand in the first question alone",
            )
    first = messages[0]
    images = [*_column_images(row, source), *first.images]
    last = len(messages) - 1
    turns = tuple(
        _turn(message, source.learned_turns == "all" or place == last)
        for place, message in enumerate(messages)
        if place
    )
    return _verbatim(row, source, number, first.text, images, turns, system)


def _system(row: Mapping[str, Any]) -> str | None:
    """The column `system`; an empty one says nothing. Raises BadField."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadField("bad_system", f"wanted text as system; came {system!r:.80}")
    return system or None


def _check_order(messages: Sequence[Message]) -> None:
    wanted = [("user", "tool", "observation") if place % 2 == 0 else ("assistant",) for place in range(len(messages))]
    if (
        len(messages) < 2
        or len(messages) % 2
        or messages[0].role != "user"
        or not all(message.role in roles for message, roles in zip(messages, wanted, strict=True))
    ):
        came = ", ".join(message.role for message in messages[:8]) or "none"
        raise BadField(
            "turn_order", f"wanted turns of user and assistant in turn, the last an assistant's; came {came}"
        )
    empty = next((place for place, one in enumerate(messages, start=1) if one.role == "assistant" and not one.text), 0)
    if empty:
        raise BadField("empty_completion", f"turn {empty} (assistant) is empty")


def _turn(message: Message, is_learned: bool) -> Turn:
    if message.role == "assistant":
        return Turn("assistant", ((message.text, is_learned),))
    role: Role = "tool" if message.role == "tool" else "user"
    text = TOOL_RESPONSE.format(message.text) if message.role == "observation" else message.text
    return Turn(role, ((text, False),))


def _message(value: object, place: int) -> Message:
    """A {role, content} or {from, value}. Raises BadField."""
    if not isinstance(value, Mapping):
        raise BadField(
            "bad_turns", f"wanted {{role, content}} or {{from, value}} as turn {place + 1}; came {value!r:.80}"
        )
    name = value.get("role") or value.get("from")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadField("bad_role", f"turn {place + 1}: unknown role {name!r:.40}; known are {', '.join(ROLES)}")
    content = value.get("content") if value.get("content") is not None else value.get("value")
    if value.get("tool_calls"):
        raise BadField("tool_calls", f"turn {place + 1} has tool_calls, which are not read: write them as its content")
    if isinstance(content, str):
        return Message(role, content, (), content.count(IMAGE_TAG))
    if isinstance(content, list):
        return _parts(role, content, place)
    raise BadField("bad_turns", f"turn {place + 1}: wanted a text or a list of parts as content; came {content!r:.80}")


def _parts(role: str, parts: Iterable[object], place: int) -> Message:
    """A content of parts. An image without a file of its own takes the next one of the row's column of images."""
    text, images, num_tags, num_bare = "", [], 0, 0
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            if IMAGE_TAG in part["text"]:
                raise BadField(
                    "image_tag", f"turn {place + 1}: a part of text holds {IMAGE_TAG}, which is no image there"
                )
            text += part["text"]
        elif isinstance(part, Mapping) and kind in ("image", "image_url"):
            text += IMAGE_TAG
            num_tags += 1
            image = _part_image(part)
            num_bare += image is None
            images += [] if image is None else [image]
        else:
            raise BadField("bad_part", f"turn {place + 1}: wanted parts of type text or image; came {part!r:.80}")
    if images and num_bare:
        raise BadField("image_count", f"turn {place + 1}: some image parts name a file and some do not")
    return Message(role, text, tuple(images), num_tags)


def _part_image(part: Mapping[str, Any]) -> Any:
    """The image that a part names, None where it names none. Parquet gives each part the keys of all, None if unset."""
    for key in ("image", "image_url", "path"):
        value = part.get(key)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value:
            return value.removeprefix("file://") if isinstance(value, str) else value
    return None


def _column_images(row: Mapping[str, Any], source: Source) -> list[Any]:
    value = source.columns.value(row, "images")
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if one is not None and one != "" and one != {"bytes": None, "path": None}]


def _verbatim(
    row: Mapping[str, Any],
    source: Source,
    number: int,
    question: str,
    images: Sequence[Any],
    turns: tuple[Turn, ...],
    system: str | None,
) -> SftRow:
    """A row whose question is put as it stands. Raises BadField where its tags are not as many as its images."""
    tags = question.count(IMAGE_TAG)
    if tags != len(images):
        raise BadField("image_count", f"the question has {tags} {IMAGE_TAG} tags, the row {len(images)} images")
    kept = {name: row.get(name) for name in VIDEO_COLUMNS} | {"question": question, "images": list(images)}
    kept |= {field: source.columns.value(row, field) for field in ("id", "source") if field in source.columns.of}
    columns = Columns({field: field for field in kept if field not in VIDEO_COLUMNS})
    problem = read_row(kept, columns, required=("question",), **_where(source, number))
    # The row is its turns; kept as it was read, it would stand in memory twice.
    return SftRow(dataclasses.replace(problem, row={}), turns, system, verbatim=True)
