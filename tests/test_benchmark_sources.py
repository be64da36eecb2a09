"""Where benchmarks' rows and pictures come from: folders, files, archives; hostile rows; names that do not exist."""

import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature_files import MINIATURES, by_id, image_folder, png

from rethinker_jax.benchmarks import media, sources
from rethinker_jax.benchmarks.adapters import fields
from rethinker_jax.benchmarks.catalog import BENCHMARKS, read_benchmark
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.rows import BadField


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path)


def test_zip_members_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an archive bomb, links, and damaged members as a crash."""
    monkeypatch.setattr(media, "MAX_MEMBER_BYTES", 1000)
    link = zipfile.ZipInfo("data/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/large.png", b"\0" * 1001)
        archive.writestr("data/small.png", b"\0" * 1000)
        archive.writestr(link, "/etc/passwd")
    found = media.Media(str(tmp_path), str(tmp_path / "cache"))
    assert Path(found.path("./data/small.png")).read_bytes() == b"\0" * 1000
    for name, kind in (("large", "bad_image"), ("link", "bad_image"), ("none", "image_missing")):
        with pytest.raises(BadField) as caught:
            found.path(f"data/{name}.png")
        assert caught.value.kind == kind
    (tmp_path / "data.zip").write_bytes(b"PK no archive")
    with pytest.raises(BadField, match="cannot be unpacked"):
        found.path("data/other.png")


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.png", "data/../../outside.png", "https://x/y.png", "a\0b"])
def test_paths_that_leave_their_folder(images: Path, name: str) -> None:
    with pytest.raises(BadField) as caught:
        media.Media(str(images)).path(name)
    assert caught.value.kind in ("image_path", "image_url")


def test_a_folder_of_images_and_parquet_is_read_by_its_parquet(images: Path) -> None:
    """Catches pictures taken for the data set, JSON beside the data for rows, and other splits and configs mixed in."""
    rows = [json.loads(line) for line in (MINIATURES / "mmmu_pro.jsonl").read_text().splitlines()[1:2]]
    for config, split, id in (
        ("standard (10 options)", "test-00000-of-00001", "ten"),
        ("standard (4 options)", "test-00000-of-00001", "four"),
        ("standard (10 options)", "testmini-00000-of-00001", "mini"),
    ):
        (images / config).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([rows[0] | {"id": id}]), images / config / f"{split}.parquet")
    (images / "source.json").write_text("[]")
    assert list(by_id(read_benchmark("mmmu_pro_standard10", str(images)))) == ["ten"]
    assert list(by_id(read_benchmark("mmmu_pro_standard4", str(images)))) == ["four"]
    with pytest.raises(UserError, match="wanted vision"):
        read_benchmark("mmmu_pro_vision", str(images))


def test_vl_rethinker_folder_holds_a_file_a_benchmark(images: Path) -> None:
    """Catches a folder refused because no file is called test, and benchmarks of which only the first is read."""
    rows = [json.loads(line) for line in (MINIATURES / "vl_rethinker.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        pq.write_table(pa.Table.from_pylist([row]), images / f"{row['qid'].partition('-')[0]}_testmini.parquet")
    found = read_benchmark("vl_rethinker", str(images))
    assert {item.categories["benchmark"] for item in found.items} == {"MathVista", "MathVerse"}


def test_splits_in_one_folder(images: Path) -> None:
    """Catches test answers that are withheld read together with testmini."""
    rows = [json.loads(line) for line in (MINIATURES / "mathvision.jsonl").read_text().splitlines()]
    for number, split in enumerate(("test", "testmini")):
        pq.write_table(pa.Table.from_pylist([rows[number + 1]]), images / f"{split}-00000-of-00001.parquet")
    assert list(by_id(read_benchmark("mathvision", str(images)))) == ["2"]
    assert list(by_id(read_benchmark("mathvision_testmini", str(images)))) == ["3"]
    (images / "test-00000-of-00001.parquet").rename(images / "train.parquet")
    with pytest.raises(UserError, match="named after the split 'test'"):
        read_benchmark("mathvision", str(images))


def test_json_by_id_and_bad_lines(images: Path, tmp_path: Path) -> None:
    """Catches MathVista's object of rows by pid read as one row, and a broken line that ends the reading."""
    row = json.loads((MINIATURES / "mathvista.jsonl").read_text().splitlines()[0])
    (tmp_path / "by_pid.json").write_text(json.dumps({"1": row, "2": row | {"pid": "2"}}))
    assert list(by_id(read_benchmark("mathvista", str(tmp_path / "by_pid.json"), image_root=str(images)))) == ["1", "2"]
    lines = [json.dumps(row), "{broken", "[1]", json.dumps(row)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    found = read_benchmark("mathvista", str(tmp_path / "bad.jsonl"), image_root=str(images))
    assert found.bad_kinds == {"bad_json": 2, "double_id": 1}
    assert [bad.where for bad in found.bad_rows if bad.kind == "bad_json"] == ["bad.jsonl row 1", "bad.jsonl row 2"]


HOSTILE = (
    None, "", " ", 0, -1, True, 1e308, [], {}, [None], [[]], [{}], "[[", "[1]", "{'a': 1}", "\0", b"", b"x", {"a": {}},
    {"bytes": b"", "path": None}, {"bytes": 1}, ["a", 1], "x" * 100_000, "<image 1>" * 50, "../a.png",
)  # fmt: skip


@pytest.mark.parametrize("file", sorted(path.name for path in MINIATURES.iterdir()))
def test_no_row_ends_the_reading(file: str, images: Path) -> None:
    """Catches a crash, or the end of all reading, for one row of a published file that is not as expected."""
    name = {"mmmu_pro.jsonl": "mmmu_pro_standard10", "refcoco_lmms.jsonl": "refcoco", "refcoco_vlm_r1.json": "refcoco"}
    benchmark = BENCHMARKS[name.get(file, file.partition(".")[0])]
    text = (MINIATURES / file).read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    place = fields.Place(benchmark.name, "", "row-0", media.Media(str(images)))
    for row in rows:
        for column in row:
            for value in HOSTILE:
                try:
                    found = benchmark.read(row | {column: value}, place)
                except BadField:
                    continue
                for item in found:
                    tags = (item.problem.question + "".join(item.problem.choices)).count("<image>")
                    assert tags in (0, len(item.problem.images))


def test_images_of_hub_rows_are_not_decoded() -> None:
    """Catches PIL images, which no prompt can be made of, and pictures that are compressed again."""
    import datasets

    features = datasets.Features({"pid": datasets.Value("string"), "decoded_image": datasets.Image()})
    rows = [{"pid": "1", "decoded_image": {"bytes": png(), "path": None}}]
    table = datasets.Dataset.from_list(rows, features=features)
    assert list(sources._hub_rows(table)) == rows


def test_rows_of_any_source(images: Path) -> None:
    """Catches the generic benchmark reading rows otherwise than training does."""
    (images / "rows.jsonl").write_text(json.dumps({"id": "1", "question": "Q", "answer": "4", "source": "mine"}))
    (item,) = read_benchmark("rows", str(images / "rows.jsonl")).items
    assert (item.problem.answer, item.categories) == ("4", {"source": "mine"})
    with pytest.raises(UserError, match="needs rows"):
        read_benchmark("rows")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("mathvist", None, "did you mean 'mathvista'"),
        ("MMMU-Pro-Vision", None, "did you mean 'mmmu_pro_vision'"),
        ("mathvista", "no/such/file.parquet", "there is no no/such/file.parquet"),
        ("mm_math", None, "no published place"),
    ],
)
def test_what_cannot_be_read(name: str, data: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_benchmark(name, data)


def test_the_table_is_whole() -> None:
    """Catches a macro headline over nothing, and a benchmark filed under another name."""
    assert all(
        name == one.name and (one.headline == "macro") == bool(one.macro_over) for name, one in BENCHMARKS.items()
    )
    assert BENCHMARKS["mega_bench"].macro_over == "task"
