"""Benchmarks read from miniatures of their published schemas; every trap of a schema has a test of its own."""

import json
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature_files import MINIATURES, by_id, image_folder, png, read

from rethinker_jax.benchmarks.adapters import fields
from rethinker_jax.benchmarks.adapters.mathvista import rounded
from rethinker_jax.benchmarks.catalog import ReadItems, read_benchmark
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.benchmarks.wording import split_choices, with_choices
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.rows import BadField
from rethinker_jax.verify.judge import check_gold, judge


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path)


def right(item: Item, answer: str) -> bool:
    problem = item.problem
    return judge(f"So \\boxed{{{answer}}}.", problem.answer, problem.choices, problem.type).correct


def names(item: Item) -> list[str]:
    """File names of the item's images, in order."""
    return [Path(str(image)).name for image in item.problem.images]


# ---- MathVista


@pytest.mark.parametrize(
    ("id", "answer", "wanted"),
    [
        ("1", "3", True),  # null choices, unit and precision: not a crash, not the text "None"
        ("2", "C", True),  # the gold is the text of option C
        ("2", "5", True),
        ("2", "B", False),
        ("3", "12.4", True),
        ("3", "12.43", True),  # rounds to 12.4
        ("3", "12.5", False),
        ("4", "12.4", True),
        ("4", "12.37", False),  # rounds to the 12.4 that is printed, but the benchmark's precision is two decimals
        ("5", "[2011, 2012]", True),
        ("5", "2011, 2012", True),
        ("5", "2012, 2011", False),
        ("5", "2011", False),
        ("6", "A", True),  # the gold text "B" stands at A: it is no letter
        ("6", "C", False),
    ],
)
def test_mathvista_golds(images: Path, id: str, answer: str, wanted: bool) -> None:
    """Catches golds taken as letters where they are texts, decimals without their precision, lists as text."""
    assert right(by_id(read("mathvista", images))[id], answer) is wanted


def test_mathvista_items(images: Path) -> None:
    """Catches a gold that is none of the choices and is kept, and a problem with two skills that counts for one."""
    found = read("mathvista", images)
    item = by_id(found)["1"]
    assert item.categories["task"] == "figure question answering"
    assert {"skill: statistical reasoning", "skill: numeric commonsense"} <= set(item.categories)
    assert item.query.startswith("Hint: ") and "Hint" not in item.problem.question
    assert names(item) == ["a.png"]
    assert [(row.where, row.kind) for row in found.bad_rows] == [("mathvista.jsonl row 6", "not_an_option")]


@pytest.mark.parametrize(
    ("gold", "precision", "wanted"), [("12.43", 1.0, "12.4"), ("7", 2, "7.00"), ("1.5", None, "1.5")]
)
def test_precision_is_a_float_or_null(gold: str, precision: float | None, wanted: str) -> None:
    """Catches f"{x:.1.0f}" and a gold with more decimals than the benchmark compares."""
    assert rounded(gold, precision) == wanted


@pytest.mark.parametrize("precision", [float("nan"), -1.0, 1e9, "1"])
def test_bad_precision_is_a_bad_row(precision: object) -> None:
    with pytest.raises(BadField, match="precision"):
        rounded("1.5", precision)


def test_decoded_image_goes_before_the_path(tmp_path: Path) -> None:
    """Catches the path being followed on the hub's rows, where there is no such file."""
    row = json.loads((MINIATURES / "mathvista.jsonl").read_text().splitlines()[0])
    row |= {"decoded_image": {"bytes": png(9), "path": None}, "image": "images/missing.jpg"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "testmini-00000-of-00001.parquet")
    (item,) = read_benchmark("mathvista", str(tmp_path)).items
    assert item.problem.images == (png(9),)
    assert "decoded_image" not in item.problem.row


# ---- MathVerse


def test_mathverse_vision_only_shows_nothing_and_is_judged_by_its_options(images: Path) -> None:
    """Catches options or question of the evaluation in the prompt, and a text answer that is not known as option C."""
    items = by_id(read("mathverse", images))
    vision = items["2"]
    assert vision.problem.question == ""
    assert vision.problem.choices == ("30°", "45°", "60°", "90°")
    assert right(vision, "C") and right(vision, "60^\\circ") and not right(vision, "45^\\circ")
    text = items["1"].problem
    assert text.question == "In the figure, find angle CED ()"
    assert text.choices == vision.problem.choices
    assert items["1"].cluster == items["2"].cluster == "1" != items["3"].cluster
    assert items["2"].categories["version"] == "Vision Only"
    assert items["3"].categories["subject"] == "Solid Geometry"


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("12.57", True), (r"12.57\text{ cm}^3", True), (r"12.57\text{ cm}^2", False), ("12.75", False)],
)
def test_mathverse_gold_with_name_and_unit(images: Path, answer: str, wanted: bool) -> None:
    r"""Catches a gold `Volume $=12.57 \mathrm{~cm}^{3}$` that nothing equals (a ninth of the benchmark)."""
    items = by_id(read("mathverse", images))
    assert right(items["3"], answer) is wanted
    assert items["4"].problem.images == ()  # text only


@pytest.mark.parametrize(
    "gold",
    [
        r"Area $=9 \pi \mathrm{cm}^{2}$",
        "118掳T",
        "35掳",
        "69{degrees}",
        r"8\sqrt{3}{squareinches}",
        "\x0crac{36}{13}",
        "$6$",
    ],
)
def test_odd_golds_of_mathverse_and_mathvision_can_be_judged(gold: str) -> None:
    """Catches golds that are bad by the verifier, so that no answer could be right."""
    assert check_gold(gold) == ""
    assert not judge("\\boxed{17}", gold).correct


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Q\nChoices:\nA:30°\nB:45°", ("30°", "45°")),
        ("Q\nChoices:\n(A) 3\n(B) 4 m", ("3", "4 m")),
        ("Q\nChoices:\nA. two\nlines\nB. one", ("two\nlines", "one")),
        ("Q\nChoices:\nA:1\nC:2", ()),  # letters that do not run on
        ("Which choice is best: A: or B?", ()),
        ("Q", ()),
    ],
)
def test_options_in_the_text_of_a_question(text: str, options: tuple[str, ...]) -> None:
    """Catches options with their letters left on, and letters inside an option taken for one."""
    question, found = split_choices(text)
    assert found == options
    assert question == ("Q" if options else text)


# ---- MATH-Vision


def test_mathvision(images: Path) -> None:
    """Catches `<image1>` left as text, options equal to the letters, and a free-form gold that is a letter."""
    net, area, point = read("mathvision", images).items
    assert net.problem.question == "Which net folds into the cube?\n<image>"
    assert net.problem.choices == tuple("ABCDE")
    assert right(net, "D") and not right(net, "A")
    assert right(area, r"4\sqrt{2}+6") and not right(area, r"6-4\sqrt{2}")
    assert check_gold(point.problem.answer, (), point.problem.type) == ""
    assert right(point, "C") and not right(point, "B")
    assert area.categories == {"subject": "metric geometry - area", "level": "4"}


# ---- MMMU, MMMU-Pro


def test_images_in_the_order_of_their_mention(images: Path) -> None:
    """Catches images in the order of their columns, markers of options forgotten, an image shown twice, and one that
    nothing names left out."""
    item = by_id(read("mmmu_pro_standard10", images, "mmmu_pro.jsonl"))["test_Physics_1"]
    assert names(item) == ["d.png", "b.png", "a.png", "c.png"]
    assert item.problem.question == "<image>\nCompare <image> with <image>. Is image 2 larger?"
    assert item.problem.choices == ("yes, as in <image>", "no")


def test_options_as_text_are_read_and_never_run(images: Path) -> None:
    """Catches eval(), and a nesting that kills the parser."""
    found = read("mmmu_pro_standard10", images, "mmmu_pro.jsonl")
    item = by_id(found)["test_Physics_2"]
    assert item.problem.choices == ("0.1 A", "0.2 A", "0.3 A")
    assert item.problem.question == "What is the current?"  # one image, named nowhere: it stands in front by itself
    assert right(item, "0.2 A") and not right(item, "C")
    assert [row.kind for row in found.bad_rows] == ["bad_options", "bad_options"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        "-" * 40_000 + "1",
        "1+" * 20_000 + "1",
        "{[]: 1}",
        "1 +",
        "['a'" + ", 'a'" * 20_000 + "]",
        "f(1)",
        "\0",
    ],
)
def test_literals_are_bounded(text: str) -> None:
    """Catches RecursionError, MemoryError, TypeError and megabytes of text coming through as a crash."""
    with pytest.raises(BadField):
        fields.literal(text, "options")


def test_vision_config_has_no_question(images: Path) -> None:
    """Catches a tag for an image that only the screenshot shows, which would make the prompt refuse the item."""
    (item,) = read("mmmu_pro_vision", images, "mmmu_pro_vision.jsonl").items
    assert (item.problem.question, len(item.problem.images)) == ("", 1)
    assert item.problem.choices == ("as in image 1", "0.2 A", "0.3 A")
    assert right(item, "B")


def test_mmmu_list_golds(images: Path) -> None:
    """Catches a list gold read as one tuple, and a list of synonyms of which only the first counts."""
    items = by_id(read("mmmu", images))
    current = items["validation_Electronics_1"]
    # 1/3 rounds to 0.33, which is not 1/3: the gold 0.33 accepts both, the gold 1/3 only itself.
    assert (current.problem.answer, current.alternatives) == ("0.33", ())
    assert right(current, "1/3") and right(current, "0.33") and not right(current, "0.34")
    part = items["validation_Electronics_2"]
    assert (part.problem.answer, part.alternatives) == ("transistor", ("BJT",))
    style = items["validation_Art_Theory_3"]
    assert style.categories["subject"] == "Art_Theory"
    assert style.categories["discipline"] == "Art and Design"
    assert style.problem.type == "mcq" and current.problem.type == "auto"


@pytest.mark.parametrize(
    ("texts", "numbers", "placed", "order"),
    [
        (["a <image 1> b"], [1], ["a <image> b"], [1]),
        (["a <image_2>", "<image1>"], [1, 2], ["a <image>", "<image>"], [2, 1]),
        (["a"], [1, 2], ["a"], [1, 2]),
        (["a <image 3>"], [1], ["a image 3"], [1]),  # names an image that is not there
        (["<image> <image>"], [1, 2, 3], ["<image>\n<image> <image>"], [3, 1, 2]),
        (["a <image>"], [], ["a image"], []),
    ],
)
def test_tags_and_images_agree(texts: list[str], numbers: list[int], placed: list[str], order: list[int]) -> None:
    """Catches prompts with another number of tags than images, which cannot be built."""
    found, shown = fields.place_images(texts, {number: str(number) for number in numbers})
    assert list(found) == placed
    assert [int(image) for image in shown] == order
    assert sum(text.count("<image>") for text in found) in (0, len(shown))


def test_deep_literals_are_refused_by_their_depth() -> None:
    """Catches nesting that the parser survives and whatever walks the value does not."""
    assert fields.literal("[" * 12 + "]" * 12, "options") != []
    with pytest.raises(BadField, match="nests brackets 13 deep"):
        fields.literal("[" * 13 + "]" * 13, "options")


# ---- EMMA


def test_emma(images: Path) -> None:
    """Catches options left as one text, the second spelling of the type, and `;` taken for part of a letter or name."""
    items = by_id(read("emma", images))
    assert items["Math_1"].problem.question == "How many squares are in step 7?\n<image>"
    assert right(items["Math_1"], "28") and items["Math_1"].problem.choices == ()
    assert "category: Counting" in items["Math_1"].categories
    code = items["Coding_2"]
    assert code.problem.choices == ("plt.bar(x, y)", "plt.barh(x, y)", "plt.plot(x, y)")
    assert right(code, "B") and not right(code, "A")
    assert {"category: Alignment", "category: Color & Texture"} <= set(code.categories)
    both = items["Coding_3"]
    assert right(both, "A, C") and right(both, "C and A") and not right(both, "A") and not right(both, "A, B")
    assert names(both) == ["b.png", "a.png"]
    assert items["Physics_4"].problem.question == "A ball is thrown.\nWhere does it land?"
    assert items["Physics_4"].categories["category"] == "2D"


# ---- MEGA-Bench


@pytest.fixture
def mega(images: Path) -> ReadItems:
    """MEGA-Bench with its media in data.zip, in its folder `core`."""
    (images / "core").mkdir()
    shutil.copy(MINIATURES / "mega_bench.jsonl", images / "core" / "test.jsonl")
    with zipfile.ZipFile(images / "data.zip", "w") as archive:
        for grey, name in enumerate("geq"):
            archive.writestr(f"data/{name}.png", png(grey))
        archive.writestr("../outside.png", b"secret")
    return read_benchmark("mega_bench", str(images), media_cache=str(images.parent / "cache"))


def test_mega_bench_prompt_and_media(mega: ReadItems, tmp_path: Path) -> None:
    """Catches the example's image taken for the question's, and the worked example's answer without its picture."""
    problem = by_id(mega)["1"].problem
    assert [Path(str(image)).read_bytes() for image in problem.images] == [png(0), png(1), png(2)]
    assert problem.question == (
        "Read the chart <image>.\n\nExample of the task:\nExample Question: <image> Which? Example Response: Answer: 12"
        "\n\nAnswer the new question.\nWhat is the red bar?\n<image>"
    )
    assert all(Path(str(image)).is_relative_to(tmp_path / "cache") for image in problem.images)
    assert by_id(mega)["2"].problem.question.endswith("<image>\nWhich?")  # an image that no text names


def test_mega_bench_kinds(mega: ReadItems) -> None:
    """Catches partial-credit, model-judged and several-field tasks in the score, and golds left as str(list)."""
    items = by_id(mega)
    assert {id: (item.problem.type, item.scored) for id, item in items.items()} == {
        "1": ("number", True),
        "2": ("mcq", True),
        "3": ("set", True),
        "4": ("tuple", True),
        "5": ("text", False),
        "6": ("text", False),
        "9": ("bbox", True),
    }
    assert right(items["1"], "42") and not right(items["1"], "42.3")
    assert right(items["2"], "B") and not right(items["2"], "Because")
    assert right(items["3"], "oslo, Rome") and not right(items["3"], "Rome")
    assert right(items["4"], "one, two") and not right(items["4"], "two, one")
    assert right(items["9"], "[0.1, 0.2, 0.5, 0.6]") and not right(items["9"], "[0.6, 0.7, 0.8, 0.9]")
    assert items["3"].cluster == items["3"].categories["task"] == "cities"
    assert items["6"].categories["metric"] == "gpt_4o_as_judge"


def test_mega_bench_refusals(mega: ReadItems, images: Path) -> None:
    """Catches a video shown as nothing, a path out of the folder or the archive, and a literal that is run."""
    assert mega.bad_kinds == {"video": 1, "image_path": 1, "bad_answer": 1}
    with pytest.raises(UserError, match="max_bad_rows=1"):  # the path and the literal; the video does not count
        read_benchmark("mega_bench", str(images), max_bad_rows=1, media_cache=str(images.parent / "cache"))
    read_benchmark("mega_bench", str(images), max_bad_rows=2, media_cache=str(images.parent / "cache"))


def test_mega_bench_open_tasks_are_not_scored(mega: ReadItems, images: Path) -> None:
    """Catches open tasks in the number of the core, even where their metric looks like a rule."""
    assert by_id(mega)["1"].scored
    (images / "core").rename(images / "open")
    found = read_benchmark("mega_bench", str(images), media_cache=str(images.parent / "cache"))
    assert not any(item.scored for item in found.items)


def test_mega_bench_needs_its_pictures(images: Path) -> None:
    """Catches thousands of bad rows, or 9 GB fetched unasked, where only the rows are at hand."""
    with pytest.raises(UserError, match=r"data\.zip"):
        read_benchmark("mega_bench")


# ---- the others


def test_hallusionbench(images: Path) -> None:
    """Catches "1" judged as a number, "0" as yes, and one id for the same question about another figure."""
    found = read("hallusionbench", images)
    yes, no, text = found.items
    assert right(yes, "Yes") and not right(yes, "no") and not right(yes, "1")
    assert right(no, "No") and not right(no, "yes")
    assert yes.cluster == no.cluster != text.cluster
    assert text.problem.images == ()  # visual_input 0: the file it names is not shown
    assert found.bad_kinds == {"bad_answer": 1}


def test_flat_layouts(images: Path) -> None:
    """Catches tags that do not fit the images, and a worked solution taken for the answer."""
    found = read("geometry3k", images)
    assert [item.problem.id for item in found.items] == ["geometry3k-0"]
    assert right(found.items[0], r"2\sqrt{221}")
    assert found.bad_kinds == {"image_count": 1}
    (item,) = read("mm_math", images).items
    assert (item.problem.id, item.problem.answer, item.problem.source) == ("5", "20", "mm_math")


def test_refcoco_of_lmms_lab(images: Path) -> None:
    """Catches the captioning question as prompt, expressions as gold, and width and height read as a corner."""
    left, red = read("refcoco", images, "refcoco_lmms.jsonl").items
    assert left.problem.question.endswith("describes: left cup") and red.problem.question.endswith("the red cup")
    # (x, y, w, h) = (10, 20, 30, 40): the corners are (10, 20) and (40, 60).
    assert left.problem.answer == "[10, 20, 40, 60]"
    assert right(left, "[10, 20, 40, 60]") and not right(left, "[10, 20, 30, 40]")
    assert (left.problem.id, red.problem.id) == ("9-0", "9-1") and left.cluster == red.cluster == "x.jpg"


def test_refcoco_in_other_spellings(images: Path) -> None:
    """Catches a degenerate box kept as a gold that nothing can meet, and other columns not found."""
    found = read("refcoco", images, "refcoco_vlm_r1.json")
    whole, cat = found.items
    assert whole.problem.question.endswith("left cup.") and whole.problem.answer == "[10, 20, 40, 60]"
    assert cat.problem.question.endswith("describes: the cat") and cat.problem.answer == "[1, 2, 4, 6]"
    assert found.bad_kinds == {"bad_box": 1}
    # IoU of [10, 20, 40, 60] and [10, 20, 40, 40]: 600 / 1200 = 0.5, right; of [10, 20, 40, 39]: 570 / 1200, wrong.
    assert right(whole, "[10, 20, 40, 40]") and not right(whole, "[10, 20, 40, 39]")


def test_cure_chains(images: Path) -> None:
    """Catches the one JSON list in a .jsonl file, gt counted from 1, the clue (a step's answer) in a prompt, and
    corners in pixels of a picture whose size a model that sees it resized cannot know."""
    (images / "VG_100K").mkdir()
    (images / "VG_100K" / "7.jpg").write_bytes(png())
    found = read("cure", images)
    final, first, second = found.items
    assert [item.categories["role"] for item in found.items] == ["final", "step", "step"]
    assert len({item.cluster for item in found.items}) == len({item.categories["chain"] for item in found.items}) == 1
    assert len({item.problem.id for item in found.items}) == 3
    assert right(final, "C") and right(first, "A") and right(second, "F") and not right(final, "B")
    assert "[10, 20, 40, 60]" in final.problem.question and "28 x 28" in final.problem.question
    assert "fruit" not in final.problem.question
    assert found.bad_kinds == {"image_missing": 1}


def test_vl_rethinker_rows(images: Path) -> None:
    """Catches an option's text judged wrong, a benchmark's name beyond the first hyphen, and a question rewritten."""
    vista, verse, number = read("vl_rethinker", images).items
    assert vista.categories == number.categories == {"benchmark": "MathVista"}
    assert with_choices(vista.problem.question, vista.problem.choices).endswith("(C) 5\n(D) 6")
    assert right(vista, "5") and right(vista, "C") and not right(vista, "4")
    # "A:30°" would come back as "(A) 30°": the question stays as it is.
    assert verse.problem.choices == () and verse.problem.question.endswith("A:30°\nB:45°")
    assert right(verse, "B") and right(number, "7")
