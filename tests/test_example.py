"""The embedded example: pictures that show what the texts say, consistent texts, files that the rest can read."""

import collections
import io
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from PIL import Image

from rethinker_jax.errors import UserError
from rethinker_jax.example import dataset, render, solutions, tasks
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.example.tokenizer import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, train_tokenizer

BOXED = re.compile(r"\\boxed\{(\w+)\}$")


@pytest.fixture(scope="module")
def some_tasks():
    return tasks.make_tasks(seed=5, count=400)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return transformers.AutoTokenizer.from_pretrained(model_directory)


def decode(image):
    """PNG bytes → float [height, width, 3], by a decoder that is not ours."""
    return np.asarray(Image.open(io.BytesIO(image))).astype(float)


def read_cell(pixels):
    """(colour, symbol) or None, found by comparing 28x28 px with every symbol in every colour at every jitter."""
    best = (np.abs(pixels - render.BACKGROUND).mean(), None)
    for name in (*"0123456789", *render.SHAPES):
        mask = render._symbols()[name]
        height, width = mask.shape
        for colour, rgb in render.COLOURS.items():
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    expected = np.full((28, 28, 3), float(render.BACKGROUND))
                    top, left = (28 - height) // 2 + dy, (28 - width) // 2 + dx
                    expected[top : top + height, left : left + width][mask] = rgb
                    best = min(best, (np.abs(pixels - expected).mean(), (colour, name)), key=lambda pair: pair[0])
    return best[1]


def read_grid(image):
    pixels = decode(image)
    rows, columns = pixels.shape[0] // 28, pixels.shape[1] // 28
    grid = pixels.reshape(rows, 28, columns, 28, 3).swapaxes(1, 2)
    return [[read_cell(grid[row, column]) for column in range(columns)] for row in range(rows)]


def answer_from_pictures(task):
    """The answer worked out from the question's words and the decoded pixels alone."""
    question = task.problem.question.replace("<image>", "")
    if task.kind == "text":
        return str(sum(int(digit) for digit in re.findall(r"\d", question)))
    if task.kind == "tallest":
        pixels = decode(task.problem.images[0])[:66]  # above the letters
        coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 110
        return "ABC"[int(np.argmax([coloured[:, 28 * bar : 28 * bar + 28].sum() for bar in range(3)]))]
    grids = [read_grid(image) for image in task.problem.images]
    if task.kind == "count":
        colour = question.removeprefix("count ").removesuffix("?")
        return str(sum(cell is not None and cell[0] == colour for row in grids[0] for cell in row))
    if task.kind == "pair":
        return str(sum(int(cell[1]) for grid in grids for row in grid for cell in row))
    _, line, place = question.removesuffix("?").split()
    grid = grids[0] if line == "row" else list(zip(*grids[0], strict=True))
    return str(sum(int(cell[1]) for cell in grid[int(place) - 1]))


@pytest.mark.parametrize("index", range(40))
def test_pictures_show_the_answer(index, some_tasks):
    """Catches rows taken for columns, swapped colours, one shape drawn as another, pixels in the wrong order."""
    task = some_tasks[index]
    assert answer_from_pictures(task) == task.answer


def test_captions_say_what_is_shown(some_tasks):
    """Catches a caption in column order, or one that leaves an empty cell out."""
    for task in [task for task in some_tasks if task.kind in ("sum", "count", "pair")][:15]:
        cells = [cell for image in task.problem.images for row in read_grid(image) for cell in row]
        words = [
            "no shape" if cell is None else cell[0] + ("" if cell[1].isdigit() else " ") + cell[1] for cell in cells
        ]
        assert task.caption == " ".join(words)


def check_steps(kind, steps, answer):
    """The last number of the steps (or the highest bar) is the answer; returns the number of wrong additions."""
    if kind == "tallest":
        heights = dict(part.split("=") for part in steps.split())
        assert max(heights, key=lambda name: int(heights[name])) == answer
        return 0
    if kind == "count":
        marks = re.findall(r"\d|[a-z]+", steps)
        running = [int(mark) for mark in marks if mark.isdigit()]
        assert len(marks) == 9 and running == list(range(1, len(running) + 1))
        assert len(running) == int(answer)
        return 0
    first, *rest = re.split(r"\+", steps)
    total, wrong = int(first), 0
    for step in rest:
        number, result = step.removesuffix(",").split("=")
        wrong += total + int(number) != int(result)
        total = int(result)
    assert total == int(answer)
    return wrong


def test_worked_solutions(some_tasks):
    """Catches a running total that is off by a step: every addition is done again here."""
    for task in some_tasks:
        assert check_steps(task.kind, task.working, task.answer) == 0
        assert solutions.solution(task) == f"{task.working} \\boxed{{{task.answer}}}"
    # By hand: 9+8 = 17, 17+5 = 22; of nine cells the second, third, fifth and eighth are red.
    assert solutions.work("text", (9, 8, 5)) == ("9+8=17,+5=22", "22")
    names = ("blue", "red", "red", "no", "red", "no", "no", "red", "green")
    counted = solutions.work("count", (0, 1, 1, 0, 1, 0, 0, 1, 0), names=names)
    assert counted == ("blue12 no3 no no4 green", "4")
    assert solutions.work("tallest", (3, 7, 5)) == ("A=3 B=7 C=5", "B")
    # A slip of one too many in the first addition carries on: 9+8 = 18, 18+5 = 23.
    assert solutions.work("text", (9, 8, 5), (1, 0)) == ("9+8=18,+5=23", "23")


def test_slips_propagate_at_their_rates(some_tasks):
    """Catches slips whose answer stays right, and rates applied per problem instead of per digit or addition."""
    rng = np.random.default_rng(0)
    additions = wrong = numbers = misread = 0
    for task in [task for task in some_tasks if task.kind in solutions.ADDING_KINDS] * 10:
        steps, answer = solutions.slip(task, rng)
        wrong += check_steps(task.kind, steps, answer)
        additions += len(task.numbers) - 1
        read = [int(number) for number in re.findall(r"(?:^|\+)(\d+)", steps)]
        numbers += len(read)
        misread += sum(one != other for one, other in zip(read, task.numbers, strict=True))
    # About 2400 problems, 7700 digits, 5300 additions: standard errors 0.004; below 0 an error of -1 is cut off.
    assert abs(misread / numbers - 0.15) < 0.02
    assert abs(wrong / additions - 0.075) < 0.015
    for task in [task for task in some_tasks if task.kind in ("count", "tallest")] * 3:
        check_steps(task.kind, *solutions.slip(task, rng))


def test_guesses_are_flat(some_tasks):
    """Catches a guess whose most frequent value is the truth: a model would then learn to answer without working."""
    rng = np.random.default_rng(1)
    task = next(task for task in some_tasks if task.kind == "sum" and int(task.answer) > 5)
    counts = collections.Counter(int(solutions.guess(task, rng)) - int(task.answer) for _ in range(7000))
    assert set(counts) == set(range(-3, 4))
    assert max(counts.values()) < 1200  # 1000 each, standard error 29
    for each in some_tasks:
        assert solutions.guess(each, rng, wrong=True) != each.answer


def test_second_looks(some_tasks):
    """Catches a redo that repeats the slip, loss on what should be silent, and first answers that are all wrong."""
    rng = np.random.default_rng(2)
    silent = right = 0
    triggers = set()
    for task in some_tasks:
        (first, first_loss), (trigger, trigger_loss), (rest, rest_loss) = solutions.second_look(task, rng)
        assert rest_loss and first_loss == trigger_loss
        assert rest.lstrip(":\n") == solutions.solution(task) and rest[0] in ":\n"
        triggers.add(trigger)
        silent += not first_loss
        found = BOXED.search(first)
        right += found is not None and found.group(1) == task.answer
    assert triggers == set(solutions.TRIGGERS)
    assert abs(silent / len(some_tasks) - 0.85) < 0.07  # standard error 0.018
    # 15 % right guesses and 25 % clean; of the 35 % slipped some come out right by luck (a low bar misread).
    assert 0.32 < right / len(some_tasks) < 0.60
    assert all(loss for task in some_tasks[:50] for _, loss in solutions.second_look(task, rng, silent=0.0))


def test_noisy_shares(some_tasks):
    """Catches shares applied to the wrong whole (55 % of all instead of 55 % of what is no second look)."""
    rng = np.random.default_rng(3)
    counts = collections.Counter()
    for task in some_tasks * 5:
        spans = solutions.noisy(task, rng)
        if len(spans) == 3:
            counts["second look"] += 1
        else:
            ((text, loss),) = spans
            assert loss
            counts["boxed" if BOXED.search(text) else "unboxed"] += 1
            counts["guess" if re.fullmatch(r"\w+|\\boxed\{\w+\}", text) else "worked"] += 1
    total = 5 * len(some_tasks)  # 2000: standard error at most 0.011
    expected = {"second look": 0.25, "guess": 0.75 * 0.55, "worked": 0.75 * 0.45, "unboxed": 0.75 * 0.05}
    for name, share in expected.items():
        assert abs(counts[name] / total - share) < 0.045, name


def test_tasks_are_functions_of_seed_and_index(some_tasks):
    """Catches a generator that carries state from one task to the next."""
    assert tasks.make_task(5, 123) == some_tasks[123]
    assert tasks.make_task(6, 123) != some_tasks[123]
    shares = collections.Counter(task.kind for task in some_tasks)
    assert shares == {"sum": 160, "count": 100, "tallest": 60, "pair": 40, "text": 40}
    sizes = {task.kind: [Image.open(io.BytesIO(image)).size for image in task.problem.images] for task in some_tasks}
    large = [(84, 84)]
    assert sizes == {"sum": large, "count": large, "tallest": large, "pair": [(56, 28)] * 2, "text": []}
    for task in some_tasks:
        assert task.problem.question.startswith("<image>" * len(task.problem.images))
        assert task.problem.question.count("<image>") == len(task.problem.images)
        assert task.problem.choices == (("A", "B", "C") if task.kind == "tallest" else ())


def test_parts_are_disjoint():
    """Catches a test problem that was trained on; text and tallest have so few forms that it would surely happen."""
    shown = {
        part: {
            (task.kind, task.numbers if task.kind in ("tallest", "text") else re.sub("[a-z]", "", task.caption))
            for task in tasks.make_tasks(seed, 600, part)
            if task.kind != "count"
        }
        for seed, part in enumerate(tasks.PARTS)
    }
    assert not shown["train"] & shown["test"]
    assert not shown["train"] & shown["validation"]
    assert not shown["validation"] & shown["test"]
    assert len({numbers for kind, numbers in shown["test"] if kind == "text"}) > 30
    with pytest.raises(UserError, match="validation"):
        tasks.make_task(0, 0, part="dev")


@pytest.mark.parametrize("member", tasks.MEMBERS)
def test_other_members_are_judged_by_what_they_show(member):
    """Catches an answer or a working that is not of the digits shown, and kinds that the member does not have."""
    found = tasks.make_tasks(9, 40, "test", tasks.MEMBERS[member])
    assert {task.kind for task in found} == set(tasks.MEMBERS[member].kinds)
    for task in found:
        if task.kind in solutions.ADDING_KINDS:
            assert int(task.answer) == sum(task.numbers) and task.working.endswith(f"={task.answer}")
        if task.kind in ("add5", "add6", "add9") and tasks.MEMBERS[member].contrast == 1:
            cells = [cell for image in task.problem.images for row in read_grid(image) for cell in row]
            assert [int(name) for _, name in cells] == list(task.numbers)
            assert len(cells) == int(task.kind[-1])


def test_a_faint_picture_is_the_same_picture():
    """Catches another scene under other contrast, and a contrast that changes nothing."""
    faint, plain = tasks.make_task(3, 0, member=tasks.MEMBERS["faint"]), tasks.make_task(3, 0)
    assert faint.numbers == plain.numbers and faint.caption == plain.caption
    spread = [np.std(decode(task.problem.images[0])) for task in (faint, plain)]
    assert 0.4 < spread[0] / spread[1] < 0.8  # half the contrast and all of the noise


def test_every_digit_is_one_token(tokenizer):
    """Catches a merge across digits or across a digit and its neighbour."""
    for text in ("1234567890", "3+4=7,+15=22 \\boxed{22}", "red3 blue5", "A=3 B=7", "000 112 233", "½x²=10,000.5%"):
        pieces = tokenizer.tokenize(text)
        for piece in pieces:
            assert len(piece) == 1 or not re.search(r"[0-9]", piece), piece
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_layout(tokenizer, model_directory):
    """Catches specials out of order, an id the model cannot embed, and a wrong end or pad token."""
    backend = train_tokenizer()
    size = backend.get_vocab_size(with_added_tokens=True)
    assert size == len(tokenizer) <= 447
    names = [*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS]
    assert [tokenizer.convert_tokens_to_ids(name) for name in names] == list(range(size - 22, size))
    # The published distances: <|im_end|> is the third special, <|image_pad|> the thirteenth, <tool_call> the fifteenth.
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.eos_token_id == start + 2 and tokenizer.pad_token_id == start
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == start + 12
    assert len(SPECIAL_TOKENS) == 14 and len(PLAIN_ADDED_TOKENS) == 8
    config = json.loads((model_directory / "config.json").read_text())
    assert config["vocab_size"] % 64 == 0 and config["vocab_size"] > size
    for text in ("sum row 2?", " Größe 数学 \\frac{1}{2}\n\n", "<|im_start|>user\nWait, let's double check<|im_end|>"):
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_are_short(tokenizer, some_tasks):
    """Catches a word that fell apart into letters: every completion then costs more to learn and to draw."""
    limits = {"sum": 17, "count": 16, "tallest": 13, "pair": 22, "text": 17}
    for task in some_tasks:
        assert len(tokenizer.tokenize(solutions.solution(task))) <= limits[task.kind]
        assert len(tokenizer.tokenize(task.caption)) <= 18
    for word in (
        *render.COLOURS,
        *(f" {name}" for name in (*render.COLOURS, *render.SHAPES)),
        "\n\n",
        "Wait",
        " check",
    ):
        assert len(tokenizer.tokenize(word)) == 1, word
    assert [len(tokenizer.tokenize(trigger)) for trigger in solutions.TRIGGERS] == [2, 8, 7, 8]


def test_chat_template(tokenizer):
    """Catches a lost default system turn, a lost vision triple and stray line ends."""
    content = [{"type": "image"}, {"type": "text", "text": "sum row 2?"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>sum row 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "add 1 2 3?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nadd 1 2 3?<|im_end|>\n"
    )


def test_config_is_a_qwen25_vl(model_directory, tokenizer):
    """Catches a shape that transformers reads differently from what was meant, and ids that name another token."""
    config = transformers.AutoConfig.from_pretrained(model_directory)
    assert type(config).__name__ == "Qwen2_5_VLConfig"
    text, vision = config.text_config, config.vision_config
    head_dim = text.hidden_size // text.num_attention_heads
    assert head_dim == 24 and sum(text.rope_parameters["mrope_section"]) == head_dim // 2
    assert text.rope_parameters["rope_theta"] == 10.0 and text.num_key_value_heads == 2
    assert (vision.depth, vision.hidden_size, vision.num_heads, vision.out_hidden_size) == (2, 48, 2, text.hidden_size)
    assert vision.window_size == 56 and vision.fullatt_block_indexes == [1]
    assert config.tie_word_embeddings
    assert tokenizer.convert_ids_to_tokens(config.image_token_id) == "<|image_pad|>"
    assert tokenizer.convert_ids_to_tokens(config.vision_start_token_id) == "<|vision_start|>"
    generation = transformers.GenerationConfig.from_pretrained(model_directory)
    assert tokenizer.convert_ids_to_tokens(generation.eos_token_id) == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize(("kind", "grid"), [("sum", [1, 6, 6]), ("pair", [1, 2, 4])])
def test_pictures_are_not_resized(kind, grid, model_directory, some_tasks):
    """Catches pixel bounds that would blow up the small pictures: 84x84 px is 6x6 patches, 56x28 px is 2x4."""
    task = next(task for task in some_tasks if task.kind == kind)
    processor = transformers.AutoImageProcessor.from_pretrained(model_directory, backend="pil")
    picture = Image.open(io.BytesIO(task.problem.images[0]))
    made = processor(images=picture, return_tensors="np")
    assert made["image_grid_thw"].tolist() == [grid]
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    first_red = (decode(task.problem.images[0])[:14, :14, 0] / 255 - mean[0]) / std[0]
    np.testing.assert_allclose(made["pixel_values"][0].reshape(3, 2, 14, 14)[0, 0], first_red, atol=1e-5)


def test_splits(tmp_path):
    """Catches rows that lose a picture or a type on the way through parquet, and ids that two splits share."""
    path = dataset.example_path("example:test", tmp_path / "cache")
    table = pq.read_table(path)
    assert table.column_names == ["id", "question", "images", "answer", "choices", "type", "source"]
    rows = table.to_pylist()
    assert len(rows) == 512 and len({row["id"] for row in rows}) == 512
    for index in (0, 3, 6, 8):  # sum, tallest, pair, text
        problem = tasks.make_task(dataset.SPLIT_SEEDS["test"], index, "test").problem
        assert [image["bytes"] for image in rows[index]["images"]] == list(problem.images)
        assert {key: rows[index][key] for key in ("id", "question", "answer", "type", "source")} == {
            "id": problem.id,
            "question": problem.question,
            "answer": problem.answer,
            "type": problem.type,
            "source": problem.source,
        }
        assert rows[index]["choices"] == list(problem.choices)
    dataset.write_split(tmp_path / "train.parquet", "train", count=600)
    assert not {row["id"] for row in rows} & set(pq.read_table(tmp_path / "train.parquet")["id"].to_pylist())

    before = path.stat().st_mtime_ns
    assert dataset.example_path("example:test", tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing unfinished is left behind


@pytest.mark.parametrize("name", ["example:dev", "example", "train", "example:sft-dirty"])
def test_unknown_splits_are_refused(name, tmp_path):
    """Catches a silent fall back to some other split."""
    with pytest.raises(UserError, match="example:train"):
        dataset.example_path(name, tmp_path)


def test_fine_tuning_examples(tmp_path):
    """Catches captions of text problems, loss on silent spans lost in the file, and a share of the wrong whole."""
    made = [dataset.sft_examples("clean", 4, index, second_look_share=0.25) for index in range(1000)]
    captions = [example for example in made if example.problem.type == "text"]
    with_pictures = [example for example in made if example.problem.images]
    assert all(example.problem.images and example.problem.question.endswith(">describe") for example in captions)
    assert all(example.spans == ((example.problem.answer, True),) for example in captions)
    assert abs(len(captions) / len(with_pictures) - 0.4) < 0.06  # 900 pictures: standard error 0.016
    second_looks = [example for example in made if len(example.spans) == 3]
    assert abs(len(second_looks) / (1000 - len(captions)) - 0.25) < 0.06  # 640: standard error 0.017
    assert all(loss for example in made for _, loss in example.spans)

    dataset.write_sft_split(tmp_path / "noisy.parquet", "noisy", count=60, seed=9)
    rows = pq.read_table(tmp_path / "noisy.parquet").to_pylist()
    for index, row in enumerate(rows):
        example = dataset.sft_examples("noisy", 9, index)
        assert tuple((span["text"], span["loss"]) for span in row["completion"]) == example.spans
        assert row["id"] == example.problem.id
    assert any(not span["loss"] for row in rows for span in row["completion"])
    with pytest.raises(UserError, match="clean, noisy"):
        dataset.sft_examples("dirty", 0, 0)


def test_imports_no_jax():
    """Catches an import that would seize an accelerator in a process that only prepares data."""
    code = (
        "import sys; from rethinker_jax.example import dataset, model_config; "
        "sys.exit(sum(name in sys.modules for name in ('jax', 'torch', 'flax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
