"""scripts/fetch_virl39k.py on a made-up miniature: what it unpacks, what it refuses, what it reports. No network."""

import importlib
import io
import json
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.dataset import read_problems

DATA = Path(__file__).parent / "data"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in (DATA / "virl39k.jsonl").read_text().splitlines()]
PATHS = [path for row in ROWS for path in row["image"]]


@pytest.fixture(scope="module")
def script() -> Generator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
        yield importlib.import_module("fetch_virl39k")


def jpeg(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (grey, grey, grey)).save(buffer, "JPEG")
    return buffer.getvalue()


def publish(
    directory: Path, rows: list[dict[str, Any]] = ROWS, name_of: Callable[[str], str] = str, skip: str = ""
) -> Path:
    """The two files as published, with a file in the archive that no row names."""
    pq.write_table(pa.Table.from_pylist(rows), directory / "39Krelease.parquet")
    with zipfile.ZipFile(directory / "images.zip", "w") as archive:
        archive.writestr("images/unused.jpg", b"-")
        for grey, path in enumerate(PATHS):
            if path != skip:
                archive.writestr(name_of(path), jpeg(grey))
    return directory


@pytest.mark.parametrize("name_of", [str, lambda path: path.removeprefix("images/")], ids=["images/", "bare"])
def test_the_published_files_are_read_as_they_are(
    script: ModuleType, tmp_path: Path, name_of: Callable[[str], str]
) -> None:
    """Catches images that lie where training does not look, files that nobody asked for, rows that are left out, and a
    second run that writes everything again."""
    publish(tmp_path, name_of=name_of)
    report = script.check(tmp_path, 4, unpack=True)
    assert report.problems == []
    assert (report.facts["usable_rows"], report.facts["left_out"]) == (4, {})
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(Path(path).name for path in PATHS)
    problems = read_problems(str(tmp_path / "39Krelease.parquet")).problems
    assert [one.id for one in problems] == [row["qid"] for row in ROWS]
    assert [[Path(str(path)).read_bytes() for path in one.images] for one in problems] == [
        [jpeg(0)], [jpeg(1), jpeg(2)], [jpeg(3)], [],
    ]  # fmt: skip
    assert (problems[0].source, problems[0].answer, problems[0].row["PassRate_7BBase"]) == (
        "Processed", "\\boxed{B}", 0.5,
    )  # fmt: skip
    written = [(tmp_path / path).stat().st_mtime_ns for path in PATHS]
    assert script.check(tmp_path, 4, unpack=True).problems == []
    assert [(tmp_path / path).stat().st_mtime_ns for path in PATHS] == written


def test_what_is_reported(script: ModuleType, tmp_path: Path) -> None:
    """Two of four rows are Non-Geo Math, 38.33 % in the paper; one has an image and no tag; rates 1, 0.75, 0.25, 1."""
    facts = script.check(publish(tmp_path), 4, unpack=True).facts
    assert facts["categories"]["(GradeSchool) Non-Geo Math"] == {"rows": 2, "percent": 50.0, "paper_percent": 38.33}
    assert facts["images_a_row"] == {"0": 1, "1": 2, "2": 1}
    assert (facts["rows_without_tag"], facts["rows_with_other_number_of_tags"], facts["answers_without_box"]) == (
        1,
        0,
        0,
    )
    assert facts["pass_rate_32b"] == {"unknown": 0, "0": 0, "(0, 0.3)": 1, "[0.3, 0.7)": 0, "[0.7, 1)": 1, "1": 2}
    assert facts["pass_rate_7b"]["unknown"] == 2


def test_check_only_writes_no_images(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --check-only that reaches for the network or unpacks, and a wrong number of rows that passes."""
    publish(tmp_path)
    monkeypatch.setattr("sys.argv", ["fetch_virl39k.py", str(tmp_path), "--check-only"])
    assert script.main() == 1
    report = json.loads((tmp_path / "virl39k_report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["problems"] == ["wanted 38870 rows, found 4"]
    assert report["left_out"] == {"image_missing": 3} and not (tmp_path / "images").exists()
    monkeypatch.setattr("sys.argv", ["fetch_virl39k.py", str(tmp_path), "--check-only", "--rows", "4"])
    assert script.main() == 0


@pytest.mark.parametrize(
    "path", ["../secret.jpg", "/etc/passwd", "images/../../secret.jpg", "..\\secret.jpg", "C:\\a.jpg"]
)
def test_paths_that_lead_out_are_refused(script: ModuleType, tmp_path: Path, path: str) -> None:
    """Catches an archive that writes beside its folder: its entry has the same name as the row's path."""
    (tmp_path / "data").mkdir()
    rows = [*ROWS, ROWS[0] | {"qid": "evil", "image": [path]}]
    publish(tmp_path / "data", rows)
    with zipfile.ZipFile(tmp_path / "data" / "images.zip", "a") as archive:
        archive.writestr(path, b"evil")
    report = script.check(tmp_path / "data", 5, unpack=True)
    assert report.problems == [f"1 image paths that lead out of the folder: {path!r}"]
    found = [one for one in tmp_path.rglob("*") if one.is_file() and one.read_bytes() == b"evil"]
    assert found == [] and report.facts["usable_rows"] == 4


def test_links_damage_and_gaps(script: ModuleType, tmp_path: Path) -> None:
    """Catches a link of the archive that is made, a folder that is a link to elsewhere, a missing image that is seen in
    the middle of training, and damaged bytes that are left under an image's name."""
    publish(tmp_path, skip=PATHS[0])
    link = zipfile.ZipInfo(PATHS[0])
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "images.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    report = script.check(tmp_path, 4, unpack=True)
    assert report.problems == [f"1 entries of the archive that are no plain file or too large: {PATHS[0]!r}"]
    assert not (tmp_path / PATHS[0]).exists() and report.facts["left_out"] == {"image_missing": 1}

    publish(tmp_path, skip=PATHS[0])
    assert script.check(tmp_path, 4, unpack=True).problems == [
        f"1 images that are neither in the archive nor unpacked: {PATHS[0]!r}"
    ]

    (tmp_path / PATHS[1]).unlink()
    publish(tmp_path)
    data = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(data.replace(jpeg(1), jpeg(1)[:-9] + bytes(9)))
    report = script.check(tmp_path, 4, unpack=True)
    assert report.problems == [f"1 images that could not be unpacked: {PATHS[1]!r}"]
    assert not (tmp_path / PATHS[1]).exists() and not list(tmp_path.rglob("*.part"))

    away = tmp_path / "away"
    away.mkdir()
    (tmp_path / "other").mkdir()
    publish(tmp_path / "other")
    (tmp_path / "other" / "images").symlink_to(away)
    assert "4 images that could not be unpacked" in script.check(tmp_path / "other", 4, unpack=True).problems[0]
    assert list(away.iterdir()) == []


def test_columns_ids_and_files_that_cannot_be_read(script: ModuleType, tmp_path: Path) -> None:
    """Catches a release with other columns that is taken for the published one, and a traceback."""
    rows = [{key: value for key, value in row.items() if key != "category"} | {"qid": "same"} for row in ROWS]
    report = script.check(publish(tmp_path, rows), 4, unpack=False)
    assert report.problems == ["there is no column category", "1 ids that several rows have: 'same'"]
    (tmp_path / "images.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"cannot read .* as a zip archive"):
        script.check(tmp_path, 4, unpack=False)
    (tmp_path / "39Krelease.parquet").write_bytes(b"no rows")
    with pytest.raises(UserError, match=r"cannot read .* as parquet"):
        script.check(tmp_path, 4, unpack=False)
