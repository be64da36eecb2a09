"""Rows of every format against transformers' own rendering of the chat template; bad rows, and what is said of them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rethinker_jax.config import Config, DataConfig, RunConfig, SftConfig
from rethinker_jax.errors import UserError
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.prompts.build import PromptBuilder
from rethinker_jax.prompts.dataset import BadRow
from rethinker_jax.prompts.images import ImageSettings
from rethinker_jax.prompts.positions import mrope_positions
from rethinker_jax.prompts.template import ChatTokenizer
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.sft.conversation import SftRow, chat_frame
from rethinker_jax.sft.encode import RowEncoder
from rethinker_jax.sft.rows import open_rows, open_split
from rethinker_jax.sft.samples import learned_spans

PAD = "<|image_pad|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_model_directory(path)
    return path


@pytest.fixture(scope="module")
def published(directory: Path) -> Any:
    """transformers' tokenizer as anyone loads it: the oracle."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def encoder(directory: Path) -> RowEncoder:
    builder = PromptBuilder(
        ChatTokenizer(directory), ImageSettings.from_directory(directory), VisionGeometry(14, 2, 56), "default"
    )
    return RowEncoder(builder, 1000)


def png(grey: int, side: int = 56) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def opened(rows: Sequence[Row], folder: Path, **options: Any) -> tuple[list[SftRow], list[BadRow]]:
    """(rows, bad rows) of a JSON-lines file in `folder`, where a.png and b.png lie too."""
    for name, grey in (("a.png", 10), ("b.png", 200)):
        (folder / name).write_bytes(png(grey))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad: list[BadRow] = []
    found = open_rows(Config(sft=SftConfig(**options)), str(path), "sft.data", bad.append)
    return [found.read(number) for number in range(found.count)], bad


def tokens(encoder: RowEncoder, row: SftRow) -> tuple[list[int], str]:
    """(prompt and completion, what of the completion is learned, runs joined by |)."""
    one = encoder.encode(row)
    spans = learned_spans(encoder.tokenizer, one)
    learned = "|".join(span["text"] for span in spans if span["learned"])
    return [*one.row.prompt.token_ids.tolist(), *one.row.completion_ids.tolist()], learned


def oracle(published: Any, messages: Sequence[Row], counts: Sequence[int] = ()) -> list[int]:
    """transformers' ids of a whole conversation, its images' pads repeated, without the line break at its end."""
    text = published.apply_chat_template(list(messages), tokenize=False)
    assert text.endswith("<|im_end|>\n")
    pieces = text[:-1].split(PAD)
    assert len(pieces) == len(counts) + 1
    text = pieces[0] + "".join(PAD * count + piece for count, piece in zip(counts, pieces[1:], strict=True))
    return published(text, add_special_tokens=False)["input_ids"]


TALK = [
    {"role": "user", "content": "add 3 5?"},
    {"role": "assistant", "content": "3+5=8 \\boxed{8}"},
    {"role": "user", "content": "\n\nsure? <|im_end|>"},
    {"role": "assistant", "content": "yes, 8"},
]
RULES = {"role": "system", "content": "Answer in French.\n"}


@pytest.mark.parametrize("system", [None, RULES])
@pytest.mark.parametrize("num_turns", [2, 4])
def test_a_conversation_is_what_transformers_writes(
    tmp_path: Path, encoder: RowEncoder, published: Any, system: Row | None, num_turns: int
) -> None:
    """Catches a forgotten default system turn, one that stays beside a given one, a missing line break between turns,
    a question's line break that is not merged with the role's, and a prompt template put behind a verbatim question."""
    messages = [*([system] if system else []), *TALK[:num_turns]]
    (row,), bad = opened([{"messages": messages}], tmp_path)
    assert not bad
    ids, learned = tokens(encoder, row)
    # transformers reads the mark that the user writes as a token; we never do, so the oracle is asked piece by piece.
    plain = [one | {"content": one["content"].replace("<|im_end|>", "@@")} for one in messages]
    (other,), _ = opened([{"messages": plain}], tmp_path)
    assert tokens(encoder, other)[0] == oracle(published, plain)
    mark = encoder.tokenizer.encode("<|im_end|>").tolist()
    assert len(mark) > 1 and ids.count(encoder.tokenizer.end_token_ids[0]) == len(messages) + (system is None)
    assert learned == "3+5=8 \\boxed{8}<|im_end|>" + ("|yes, 8<|im_end|>" if num_turns == 4 else "")


def test_images_stand_where_they_are_named(tmp_path: Path, encoder: RowEncoder, published: Any) -> None:
    """Catches images in front of the text instead of at their tags, and positions that the system message moves."""
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>first, <image> second"}, TALK[1]],
            "images": ["a.png", "b.png"],
        },
        {
            "messages": [
                RULES,
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png"},
                        {"type": "text", "text": "first, "},
                        {"type": "image_url", "image_url": {"url": "file://b.png"}},
                        {"type": "text", "text": " second"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "3+5=8 \\boxed{8}"}]},
            ]
        },
    ]  # fmt: skip
    (plain, ruled), bad = opened(rows, tmp_path)
    assert not bad
    parts = [
        {"type": "image"},
        {"type": "text", "text": "first, "},
        {"type": "image"},
        {"type": "text", "text": " second"},
    ]
    user = {"role": "user", "content": parts}
    # 56 x 56 pixels are 4 x 4 patches, 4 merged tokens.
    assert tokens(encoder, plain)[0] == oracle(published, [user, TALK[1]], [4, 4])
    assert tokens(encoder, ruled)[0] == oracle(published, [RULES, user, TALK[1]], [4, 4])
    prompt = encoder.prompt(ruled)
    positions, following = mrope_positions(prompt.token_ids, encoder.tokenizer.image_token_id, [(1, 4, 4)] * 2, 2)
    np.testing.assert_array_equal(prompt.positions, positions)
    assert prompt.next_position == following
    is_image = prompt.token_ids == encoder.tokenizer.image_token_id
    np.testing.assert_array_equal(prompt.image_index, np.where(is_image, np.cumsum(is_image) - 1, -1))
    assert prompt.text.startswith(
        "<|im_start|>system\nAnswer in French.\n<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )


def test_sharegpt_and_alpaca_are_the_same_conversations(tmp_path: Path, encoder: RowEncoder, published: Any) -> None:
    """Catches roles taken for one another, a `system` column that is not read or takes the place of a turn, an
    observation that is learned, and alpaca's input left out."""
    human, gpt = {"from": "human", "value": "add 3 5?"}, {"from": "gpt", "value": "3+5=8 \\boxed{8}"}
    (first, second, third), bad = opened(
        [
            {"conversations": [human, gpt], "system": ""},
            {"conversations": [human, gpt], "system": "Answer in French.\n"},
            {"conversations": [human, gpt, {"from": "observation", "value": "8"}, {"from": "gpt", "value": "ok"}]},
        ],
        tmp_path,
    )
    assert not bad
    assert tokens(encoder, first)[0] == oracle(published, TALK[:2])
    assert tokens(encoder, second)[0] == oracle(published, [RULES, *TALK[:2]])
    seen = {"role": "user", "content": "<tool_response>\n8\n</tool_response>"}
    ids, learned = tokens(encoder, third)
    assert ids == oracle(published, [*TALK[:2], seen, {"role": "assistant", "content": "ok"}])
    assert learned == "3+5=8 \\boxed{8}<|im_end|>|ok<|im_end|>"

    (with_input, without), bad = opened(
        [
            {"instruction": "add", "input": "3 5?", "output": "8", "history": []},
            {"instruction": "add 3 5?", "input": "", "output": "8"},
        ],
        tmp_path,
    )
    assert not bad and with_input.problem.question == "add\n3 5?"
    eight = {"role": "assistant", "content": "8"}
    assert tokens(encoder, with_input)[0] == oracle(published, [{"role": "user", "content": "add\n3 5?"}, eight])
    assert tokens(encoder, without) == (oracle(published, [TALK[0], eight]), "8<|im_end|>")


def test_questions_have_the_prompt_template_and_spans(tmp_path: Path, encoder: RowEncoder) -> None:
    """Catches a question without the template that the RL run gives it, and spans that are learned though they say no;
    the end token is learned whatever the last span says, as the rows of the embedded example want it."""
    spans = [{"text": "3+5=9. ", "loss": False}, {"text": "Wait, 8", "loss": True}, {"text": "!", "loss": False}]
    (text, parts), bad = opened(
        [{"question": "add 3 5?", "completion": "8"}, {"question": "add 3 5?", "completion": spans}], tmp_path
    )
    assert not bad
    ids, learned = tokens(encoder, text)
    wanted = "add 3 5?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert encoder.prompt(text).text == f"{SYSTEM}<|im_start|>user\n{wanted}<|im_end|>\n<|im_start|>assistant\n"
    assert learned == "8<|im_end|>" and encoder.tokenizer.decode(ids[-2:]) == "8"
    assert tokens(encoder, parts)[1] == "Wait, 8|<|im_end|>"


def test_last_turn_only(tmp_path: Path, encoder: RowEncoder) -> None:
    """Catches a key that is read and does nothing."""
    (row,), _ = opened([{"messages": TALK}], tmp_path, learned_turns="last")
    assert tokens(encoder, row)[1] == "yes, 8<|im_end|>"


def test_completions_are_cut_to_fit(tmp_path: Path, encoder: RowEncoder) -> None:
    """Catches a cut that keeps the end token in the place of the last word, and one that is not counted."""
    (row,), _ = opened([{"messages": TALK[:2]}], tmp_path)
    whole = encoder.encode(row)
    short = RowEncoder(encoder._with_template, 3).encode(row)
    assert not whole.is_cut and short.is_cut and short.num_tokens == whole.num_tokens == len(whole.row.completion_ids)
    np.testing.assert_array_equal(short.row.completion_ids, whole.row.completion_ids[:3])
    assert len(short.row.nll_mask) == 3


USER, ASSISTANT = TALK[0], TALK[1]
IMAGE = {"role": "user", "content": "<image>what?"}
# (row, kind, words of the reason)
BAD = [
    ({"messages": [IMAGE, ASSISTANT]}, "image_count", "1 <image> tags, the row 0 images"),
    ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "image_count", "0 <image> tags, the row 1 images"),
    ({"messages": [USER, ASSISTANT, IMAGE, ASSISTANT], "images": ["a.png"]}, "late_image", "turn 3 (user)"),
    ({"messages": [IMAGE, ASSISTANT], "images": ["../secret.png"]}, "image_path", "leads out of"),
    ({"messages": [IMAGE, ASSISTANT], "images": ["c.png"]}, "image_missing", "there is no file"),
    ({"messages": [IMAGE, ASSISTANT], "images": ["http://x/a.png"]}, "image_url", "is an address"),
    ({"messages": [USER]}, "turn_order", "came user"),
    ({"messages": [USER, ASSISTANT, USER]}, "turn_order", "came user, assistant, user"),
    ({"messages": [USER, USER, ASSISTANT]}, "turn_order", "came user, user, assistant"),
    ({"messages": [USER, ASSISTANT, RULES, ASSISTANT]}, "turn_order", "system"),
    ({"messages": [ASSISTANT, USER, ASSISTANT, ASSISTANT]}, "turn_order", "came assistant"),
    ({"messages": [USER, ASSISTANT | {"content": ""}]}, "empty_completion", "turn 2"),
    ({"messages": [USER | {"content": " "}, ASSISTANT]}, "empty_question", "empty"),
    ({"messages": [USER | {"role": "robot"}, ASSISTANT]}, "bad_role", "'robot'"),
    ({"messages": [USER | {"role": ["user"]}, ASSISTANT]}, "bad_role", "['user']"),
    ({"messages": ["hello", ASSISTANT]}, "bad_turns", "as turn 1; came 'hello'"),
    ({"messages": []}, "bad_turns", "came []"),
    ({"messages": "hello"}, "bad_turns", "came 'hello'"),
    ({"messages": [USER, ASSISTANT | {"content": None, "tool_calls": [{"x": 1}]}]}, "tool_calls", "turn 2"),
    ({"messages": [USER, {"role": "assistant"}]}, "bad_turns", "turn 2"),
    ({"messages": [USER | {"content": [{"type": "video"}]}, ASSISTANT]}, "bad_part", "video"),
    ({"messages": [USER | {"content": [{"type": "text", "text": "<image>"}]}, ASSISTANT]}, "image_tag", "turn 1"),
    (
        {"messages": [USER | {"content": [{"type": "image"}, {"type": "image", "image": "a.png"}]}, ASSISTANT]},
        "image_count",
        "some image parts",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "kind", "words"), BAD)
def test_bad_rows_are_named_and_left_out(tmp_path: Path, row: Row, kind: str, words: str) -> None:
    """Catches a row dropped in silence, a whole file refused for one row, and a sentence that does not say which."""
    rows, bad = opened([{"messages": [USER, ASSISTANT]}, row], tmp_path)
    assert len(rows) == 1
    (one,) = bad
    assert (one.where, one.kind) == ("rows.jsonl row 1", kind) and words in one.why


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": "?", "completion": ""}, "bad_completion"),
        ({"question": "?", "completion": [{"text": "a"}]}, "bad_completion"),
        ({"question": "<image>?", "completion": "a", "images": ["a.png", "b.png"]}, "image_count"),
        ({"instruction": "a", "output": ""}, "bad_completion"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history"),
        ({"instruction": 7, "output": "b"}, "bad_question"),
    ],
)
def test_bad_rows_of_other_formats(tmp_path: Path, row: Row, kind: str) -> None:
    good = {"question": "?", "completion": "a"} if "question" in row else {"instruction": "a", "output": "b"}
    rows, bad = opened([good, row], tmp_path)
    assert len(rows) == 1 and [one.kind for one in bad] == [kind]


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"text": "a"}, {}, ["rows.jsonl", "columns text", "completion", "messages", "conversations", "alpaca"]),
        ({"question": "a", "answer": "b"}, {}, ["columns question, answer", "`completion`"]),
        ({"messages": TALK}, {"format": "alpaca"}, ["sft.format is alpaca", "columns are messages"]),
        ({"messages": TALK, "instruction": "a", "output": "b"}, {}, ["conversation and alpaca", "sft.format"]),
        ({"messages": [USER, ASSISTANT], "videos": ["a.mp4"]}, {}, ["has videos"]),
    ],
)
def test_no_format_fits(tmp_path: Path, row: Row, options: dict[str, Any], words: list[str]) -> None:
    """Catches a file read as something else, and a refusal that does not list what was looked for."""
    with pytest.raises(UserError) as error:
        opened([row], tmp_path, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_list_in_a_json_file_and_parquet_are_read_alike(tmp_path: Path) -> None:
    """LLaMA-Factory's data sets are .json files; in parquet, every part has the keys of all parts, unset ones None."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    row: Row = {
        "id": "7",
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[1]]}],
    }
    row |= {"images": [{"bytes": png(3), "path": None}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    written = {"id": "7", "images": ["c.png"], "messages": [IMAGE, {"role": "assistant", "content": "what?"}]}
    (tmp_path / "c.png").write_bytes(png(3))
    (tmp_path / "rows.json").write_text(json.dumps([written, "no row"]))
    bad: list[BadRow] = []
    one, two = (open_rows(Config(), str(tmp_path / f"rows.{end}"), "", bad.append) for end in ("parquet", "json"))
    assert one.count == two.count == 1
    assert [each.where for each in bad] == ["rows.json row 1"]
    first, second = one.read(0), two.read(0)
    assert first.problem.question == second.problem.question == "<image>what?" and first.turns == second.turns
    assert first.problem.id == second.problem.id == "7" and first.problem.images == (png(3),)
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(UserError, match="wanted a list of rows"):
        open_rows(Config(), str(tmp_path / "rows.json"), "", bad.append)


def test_ids_that_occur_twice_are_told_apart(tmp_path: Path) -> None:
    """LLaVA's conversations repeat ids. Catches prompts kept under one name for two rows."""
    rows, _ = opened([{"id": "x", "messages": TALK[:2]}, {"id": "x", "messages": TALK}], tmp_path)
    assert [row.problem.id for row in rows] == ["x", "x (rows.jsonl row 1)"]


def test_a_template_of_another_model_is_refused_where_turns_rely_on_it(directory: Path, tmp_path: Path) -> None:
    """Catches turns written in marks that the model has never seen."""
    build_model_directory(tmp_path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        read = json.loads((tmp_path / name).read_text())
        template = read["chat_template"].replace("<|im_start|>' + message.role + '", "[' + message.role + ']")
        (tmp_path / name).write_text(json.dumps(read | {"chat_template": template}))
    with pytest.raises(UserError, match=r"want the template of a Qwen2\.5-VL model"):
        chat_frame(ChatTokenizer(tmp_path))
    assert chat_frame(ChatTokenizer(directory)).system_text == SYSTEM


def test_held_out_rows_are_others_than_those_learned(tmp_path: Path) -> None:
    """Catches validation on rows that are trained on, a split that moves from start to start, and an empty half."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "question": "?", "completion": f"{n}"}) + "\n" for n in range(10))
    )

    def split(seed: int = 0, **options: Any) -> tuple[list[str], list[str]]:
        sft = SftConfig(data=str(tmp_path / "rows.jsonl"), **options)
        found = open_split(Config(run=RunConfig(seed=seed), data=DataConfig(), sft=sft), lambda bad: None)
        train = [found.train.read(number).problem.id for number in range(found.train.count)]
        return train, [row.problem.id for row in found.validation]

    train, held = split(validation_fraction=0.25)  # 2.5 rows, rounded up
    assert len(train) == 7 and len(held) == 3 and sorted(train + held) == sorted(map(str, range(10)))
    assert (train, held) == split(validation_fraction=0.25) != split(1, validation_fraction=0.25)
    assert split(validation_fraction=0.25, validation_rows=1)[0] == train  # fewer are measured, none of them is learned
    other = str(tmp_path / "rows.jsonl")
    assert [len(part) for part in split(validation=other, validation_rows=4)] == [10, 4]
    with pytest.raises(UserError, match="leaves none to learn"):
        split(validation_fraction=1.0)
    with pytest.raises(UserError, match="both set"):
        split(validation=other, validation_fraction=0.1)


def test_other_pictures_are_other_rows(tmp_path: Path) -> None:
    """Catches a run that goes on with pictures that were exchanged under the same questions."""
    hashes = []
    for number, colour in enumerate(("red", "red", "blue")):
        buffer = io.BytesIO()
        Image.new("RGB", (28, 28), colour).save(buffer, "PNG")
        path = tmp_path / f"rows{number}.parquet"
        row = {"id": "a", "question": "What?", "completion": "That.", "images": [{"bytes": buffer.getvalue()}]}
        pq.write_table(pa.Table.from_pylist([row]), path)
        hashes.append(open_rows(Config(), str(path), "sft.data", fail).hash)
    assert hashes[0] == hashes[1] != hashes[2]


def fail(row: BadRow) -> None:
    raise AssertionError(row)


def test_a_system_column_of_something_else_is_a_bad_row(tmp_path: Path) -> None:
    """Catches a system message that is dropped without a word because it is no text."""
    rows = [{"instruction": "a", "output": "b", "system": system} for system in ("s", "", None, {"text": "s"})]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad: list[BadRow] = []
    found = open_rows(Config(), str(path), "sft.data", bad.append)
    assert [found.read(number).system for number in range(found.count)] == ["s", None, None]
    assert [(row.kind, row.where) for row in bad] == [("bad_system", "rows.jsonl row 3")]
