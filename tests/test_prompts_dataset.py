"""Data sets as people have them: layouts read as they are, bad rows counted, paths that leave their folder refused."""

import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.dataset import read_problems


def png(grey=0):
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """data/images/a.png and b.png, with a secret file next to data."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "data" / "images" / f"{name}.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    return tmp_path / "data"


def row(**fields):
    return {"id": "1", "question": "Q", "answer": "4"} | fields


def test_virl39k_layout(folder):
    """qid, relative paths in a list column called image, and columns a reward may want."""
    rows = [
        {
            "question": "<image><image>\nWhat?",
            "answer": "\\boxed{B}",
            "PassRate_7BTrained": 0.5,
            "category": "(GradeSchool) Geometric",
            "source": "Processed",
            "qid": "Processed-1",
            "image": ["images/a.png", "images/b.png"],
        },
        {"question": "1+1?", "answer": "2", "source": "Text", "qid": "Text-1", "image": []},
    ]
    first, second = read_problems(write_parquet(folder / "39K.parquet", rows)).problems
    assert first.id == "Processed-1"
    assert first.images == tuple(os.path.realpath(folder / "images" / f"{name}.png") for name in "ab")
    assert (first.question, first.answer) == ("<image><image>\nWhat?", "\\boxed{B}")
    assert (first.source, first.type) == ("Processed", "auto")
    assert first.row["PassRate_7BTrained"] == 0.5
    assert first.row["category"] == "(GradeSchool) Geometric"
    assert second.images == ()


def test_geometry3k_layout_has_embedded_images_and_no_id(tmp_path):
    rows = [{"images": [{"bytes": png(i), "path": None}], "problem": "<image>Find x.", "answer": "3"} for i in range(2)]
    problems = read_problems(write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)).problems
    assert [one.id for one in problems] == ["train-00000-of-00001-0", "train-00000-of-00001-1"]
    assert [one.images for one in problems] == [(png(0),), (png(1),)]
    assert "images" not in problems[0].row


def test_mm_math_style_json_lines(folder):
    """One path as a string, numbers as answers and ids, a worked solution that must not become the answer."""
    rows = [
        {"id": 7, "question": "Q", "answer": 12, "solution": "so it is 12", "image": "images/a.png"},
        {"id": 8, "question": "R", "answer": 2.5, "solution": "", "image": None},
        {"id": 9, "question": "S", "answer": "0", "solution": "", "image": ""},
    ]
    problems = read_problems(write_lines(folder / "mm.jsonl", rows)).problems
    assert [(one.id, one.answer, len(one.images)) for one in problems] == [
        ("7", "12", 1),
        ("8", "2.5", 0),
        ("9", "0", 0),
    ]


@pytest.mark.parametrize(
    "image",
    [png(), [png()], {"bytes": png(), "path": "a.png"}, [{"bytes": png(), "path": "gone.png"}]],
    ids=["bytes", "list of bytes", "struct", "list of structs"],
)
def test_every_form_of_an_embedded_image(tmp_path, image):
    (found,) = read_problems(write_parquet(tmp_path / "x.parquet", [row(image=image)])).problems
    assert found.images == (png(),)


def test_choices_and_type(tmp_path):
    rows = [
        row(id="1", choices=["x", "y"], type="mcq"),
        row(id="2", choices={"A": "x", "B": "y"}),
        row(id="3", options=[1, 2]),
        row(id="4"),
    ]
    found = [read_problems(write_lines(tmp_path / f"{i}.jsonl", [one])).problems[0] for i, one in enumerate(rows)]
    assert [one.choices for one in found] == [("x", "y"), ("x", "y"), ("1", "2"), ()]
    assert [one.type for one in found] == ["mcq", "auto", "auto", "auto"]


def test_columns_can_be_named(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"q": "Q", "a": "4", "answer": "wrong column", "n": "k"}])
    (found,) = read_problems(path, columns={"question": "q", "answer": "a", "id": "n"}).problems
    assert (found.id, found.question, found.answer) == ("k", "Q", "4")
    with pytest.raises(UserError, match=r"has no column 'aa'.*did you mean 'a'"):
        read_problems(path, columns={"question": "q", "answer": "aa"})
    with pytest.raises(UserError, match=r"unknown field 'quesion'.*did you mean 'question'"):
        read_problems(path, columns={"quesion": "q"})


def test_missing_columns_name_what_is_there(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [{"questoin": "Q", "answer": "4"}])
    with pytest.raises(UserError, match=r"x\.parquet lacks the column question.*it has questoin, answer; did you mean"):
        read_problems(path)


def test_bad_rows_are_left_out_by_kind(folder):
    """Each row is bad in one way; row "ok" survives. Catches a reader that stops, or keeps a row without answer."""
    rows = [
        row(id="a", answer=""),
        row(id="b", answer=None),
        row(id="c", question=" "),
        row(id="d", answer=["A", "C"]),
        row(id="", question="Q"),
        row(id="e", image="../secret.png"),
        row(id="f", image=str(folder.parent / "secret.png")),
        row(id="g", image="/etc/hostname"),
        row(id="h", image="images/gone.png"),
        row(id="i", image="images"),
        row(id="j", image="https://example.org/a.png"),
        row(id="k", image="images/a.png", question="<image> and <image>"),
        row(id="l", question="<image>"),
        row(id="m", image=[5]),
        row(id="n", image="images/a\0.png"),
        row(id="o", choices="A or B"),
        "{broken",
        "[1, 2]",
        "[" * 100_000,
        row(id="ok", image="images/a.png"),
    ]
    found = read_problems(write_lines(folder / "x.jsonl", rows))
    assert [one.id for one in found.problems] == ["ok"]
    assert [one.kind for one in found.bad_rows] == [
        "empty_answer",
        "empty_answer",
        "empty_question",
        "bad_answer",
        "empty_id",
        "image_path",
        "image_path",
        "image_path",
        "image_missing",
        "image_missing",
        "image_url",
        "image_count",
        "image_count",
        "bad_image",
        "image_path",
        "bad_choices",
        "bad_json",
        "bad_json",
        "bad_json",
    ]
    assert found.bad_rows[5].where == "x.jsonl row 5"
    assert found.bad_kinds["image_path"] == 4


def test_links_out_of_the_image_root_are_refused(folder):
    """A link inside the root is a way out that string comparison does not see; a link that stays inside is fine."""
    os.symlink(folder.parent / "secret.png", folder / "images" / "link.png")
    os.symlink(folder.parent, folder / "images" / "up")
    os.symlink(folder / "images" / "a.png", folder / "images" / "inside.png")
    names = ["link.png", "up/secret.png", "inside.png"]
    rows = [row(id=name, image=f"images/{name}") for name in names]
    found = read_problems(write_lines(folder / "x.jsonl", rows))
    assert [one.kind for one in found.bad_rows] == ["image_path", "image_path"]
    assert found.problems[0].images == (os.path.realpath(folder / "images" / "a.png"),)


def test_a_folder_with_a_longer_name_is_not_inside_the_root(folder):
    """/x/data-private starts with /x/data. Catches comparing paths by prefix."""
    (folder.parent / "data-private").mkdir()
    (folder.parent / "data-private" / "a.png").write_bytes(png())
    rows = [row(id="1", image="../data-private/a.png"), row(id="2", image=str(folder / "images" / "a.png"))]
    found = read_problems(write_lines(folder / "x.jsonl", rows))
    assert [one.id for one in found.problems] == ["2"]


def test_image_root_replaces_the_folder_of_the_rows(folder, tmp_path):
    path = write_lines(tmp_path / "elsewhere" / "x.jsonl", [row(image="a.png")])
    assert read_problems(path, image_root=str(folder / "images")).problems[0].images
    assert os.path.isabs(read_problems(path, image_root=str(folder / "images")).problems[0].images[0])
    with pytest.raises(UserError, match="is not a folder"):
        read_problems(path, image_root=str(folder / "nothing"))


def test_too_many_bad_rows_stop_the_run_and_are_listed(tmp_path):
    rows = [row(id=str(i), answer="" if i < 3 else "4") for i in range(5)] + ["{"]
    path = write_lines(tmp_path / "x.jsonl", rows)
    assert len(read_problems(path, max_bad_rows=4)) == 2
    with pytest.raises(UserError, match=r"4 of 6 rows.*3 empty_answer \(x\.jsonl row 0: .*1 bad_json.*max_bad_rows=3"):
        read_problems(path, max_bad_rows=3)


def test_a_row_with_videos_is_refused_with_a_sentence(tmp_path):
    """An empty list of videos is a row without videos."""
    read_problems(write_lines(tmp_path / "ok.jsonl", [row(videos=[])]))
    with pytest.raises(UserError, match=r"x\.jsonl row 0 has videos"):
        read_problems(write_lines(tmp_path / "x.jsonl", [row(videos=["a.mp4"])]))


def test_an_id_that_occurs_twice_is_an_error(tmp_path):
    """Two problems of one id would share their random stream and each other's replayed rows."""
    write_parquet(tmp_path / "set" / "a.parquet", [row(id="1"), row(id="2")])
    write_parquet(tmp_path / "set" / "b.parquet", [row(id="3"), row(id="2")])
    with pytest.raises(UserError, match=r"'2' occurs twice, in a\.parquet row 1 and b\.parquet row 1"):
        read_problems(str(tmp_path / "set"))


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name in "cab":
        write_parquet(tmp_path / f"{name}.parquet", [{"question": "Q", "answer": "4"}])
    write_parquet(tmp_path / "deeper" / "d.parquet", [{"question": "Q", "answer": "4"}])
    assert [one.id for one in read_problems(str(tmp_path)).problems] == ["a-0", "b-0", "c-0"]


def test_a_folder_that_mixes_splits_is_refused(tmp_path):
    """The layout of a downloaded data set: reading all of it would train on its test rows."""
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [{"question": "Q", "answer": "4"}])
    with pytest.raises(UserError, match="several splits"):
        read_problems(str(tmp_path))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x.csv", b"question,answer", r"wanted a \.parquet or \.jsonl"),
        ("x.parquet", b"not parquet", "cannot read .* as parquet"),
        ("x.jsonl", b"", "no usable problem: it has no rows"),
        ("x.jsonl", b"{", "no usable problem: 1 of 1 rows"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_problems(str(tmp_path / name))


def test_a_misspelt_file_is_not_looked_for_on_the_hub(tmp_path):
    write_lines(tmp_path / "train.jsonl", [row()])
    with pytest.raises(UserError, match=r"did you mean .*train\.jsonl"):
        read_problems(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"no \.parquet files"):
        read_problems(str(tmp_path))


def test_a_hub_id_offline_says_what_to_do():
    """In a process of its own, because the hub client reads the switch when it is imported."""
    code = "from rethinker_jax.prompts.dataset import read_problems; read_problems('owner/dataset:test')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert "UserError: cannot load 'owner/dataset:test' from the Hugging Face hub" in done.stderr
    assert "download the parquet files" in done.stderr


def test_rows_of_a_hub_dataset_come_with_encoded_images():
    """Catches images decoded to pixels and encoded again."""
    datasets = pytest.importorskip("datasets")
    from rethinker_jax.prompts.dataset import _hub_rows

    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    table = datasets.Dataset.from_list(
        [{"question": "Q", "answer": "4", "image": {"bytes": png(), "path": None}}], features
    )
    part = _hub_rows("a/b:test", table)
    assert part.columns == ["question", "answer", "image"]
    assert isinstance(part.rows[0], dict) and part.rows[0]["image"]["bytes"] == png()


def test_the_example_is_a_source():
    found = read_problems("example:test")
    assert len(found) == 512
    assert not found.bad_rows
    assert {len(one.images) for one in found.problems} == {0, 1, 2}
    with pytest.raises(UserError, match="example:train"):
        read_problems("example:trian")
