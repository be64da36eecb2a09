"""Fetch ViRL39K, the training data of VL-Rethinker, check it and unpack its images where training looks for them.

    python scripts/fetch_virl39k.py DIR [--revision COMMIT]  # from the Hugging Face hub
    python scripts/fetch_virl39k.py DIR --check-only         # what lies in DIR already: no network, nothing unpacked

DIR then holds 39Krelease.parquet, images.zip, images/ and virl39k_report.json, and is trained on with
data.train=DIR/39Krelease.parquet. Checked are the number of rows, the columns, that every image of a row is in the
archive (or unpacked already), that no path leads out of DIR, and that no row has an id of another. Only what rows name
is unpacked, and what is unpacked already stays. The report is printed too; exit code 1 where something is not as
published, 2 where the files cannot be read.
"""

import argparse
import collections
import dataclasses
import json
import os
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rethinker_jax.errors import UserError
from rethinker_jax.output_files import write_whole
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.prompts.template import IMAGE_TAG

HUB_ID, ROWS_FILE, ARCHIVE, REPORT = "TIGER-Lab/ViRL39K", "39Krelease.parquet", "images.zip", "virl39k_report.json"
NUM_ROWS = 38_870
COLUMNS = ("question", "answer", "image", "qid", "category", "source", "PassRate_32BTrained", "PassRate_7BBase")
# Fig. 8 of the paper, version 3, in percent; "(GradeSchool)" of the names is left out in comparing.
PAPER_SHARES = {
    "Non-Geo Math": 38.33, "Geometric": 27.35, "Tables/Diagrams/Charts": 15.92, "Science": 8.94,
    "Spatial Reasoning": 4.94, "Broader STEM Topics": 2.46, "Social Science": 1.74, "Commonsense": 0.31,
}  # fmt: skip
MAX_IMAGE_BYTES = 64 * 2**20  # of one unpacked image
MAX_SHOWN = 20  # names in each list of the report


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found. `problems` are sentences; where there are none the data is as published."""

    facts: dict[str, Any]
    problems: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--check-only", action="store_true", help="no network and no unpacking")
    parser.add_argument("--revision", help="commit or tag of the data set on the hub; the newest by default")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="how many rows there should be")
    options = parser.parse_args()
    try:
        if not options.check_only:
            fetch(options.directory, options.revision)
        report = check(options.directory, options.rows, unpack=not options.check_only)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    text = json.dumps(report.facts | {"problems": report.problems}, indent=2, ensure_ascii=False)
    write_whole(options.directory / REPORT, text + "\n")
    print(text)
    return int(bool(report.problems))


def fetch(directory: Path, revision: str | None) -> None:
    """Both files, unless they are there. Raises UserError where the hub cannot be reached."""
    import huggingface_hub  # what transformers downloads with
    from huggingface_hub.errors import HfHubHTTPError

    for name in (ROWS_FILE, ARCHIVE):
        if (directory / name).is_file():
            continue
        try:
            huggingface_hub.hf_hub_download(
                HUB_ID, name, repo_type="dataset", revision=revision, local_dir=str(directory)
            )
        except (OSError, HfHubHTTPError) as error:
            raise UserError(
                f"cannot fetch {name} of {HUB_ID} ({type(error).__name__}: {error}). Check the connection, or put the "
                f"file into {directory} yourself and run the same command again."
            ) from error


def check(directory: Path, num_rows: int, *, unpack: bool) -> Report:
    """Reads rows and archive of `directory`, unpacks images if asked, and reads the rows as training does."""
    rows = read_rows(directory / ROWS_FILE)
    columns = sorted({name for row in rows for name in row})
    problems = [f"wanted {num_rows} rows, found {len(rows)}"] if len(rows) != num_rows else []
    problems += [f"there is no column {name}" for name in COLUMNS if name not in columns]
    twice = [name for name, count in collections.Counter(str(row.get("qid")) for row in rows).items() if count > 1]
    problems += listed("ids that several rows have", twice)

    paths = {path for row in rows for path in images_of(row)}
    outside = sorted(path for path in paths if not is_inside(path))
    problems += listed("image paths that lead out of the folder", outside)
    wanted = sorted(paths.difference(outside))
    places, missing, unsafe = find_images(directory, wanted)
    problems += listed("images that are neither in the archive nor unpacked", missing)
    problems += listed("entries of the archive that are no plain file or too large", unsafe)
    if unpack:
        problems += listed("images that could not be unpacked", unpack_images(directory, places))

    facts = {
        "rows": len(rows), "columns": columns, "images": len(paths), "images_in_archive": len(places),
        **contents(rows), **readable(directory),
    }  # fmt: skip
    return Report(facts, problems)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the parquet file, whatever columns it has. Raises UserError."""
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {error}. Fetch it again.") from error


def images_of(row: Mapping[str, Any]) -> list[str]:
    value = row.get("image")
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str) and one]


def is_inside(path: str) -> bool:
    """Does a relative path, of either kind of slash, stay below where it starts?"""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return bool(parts) and not path.startswith(("/", "\\")) and ".." not in parts and ":" not in parts[0]


def find_images(directory: Path, wanted: Sequence[str]) -> tuple[dict[str, zipfile.ZipInfo], list[str], list[str]]:
    """Path → entry of the archive (which may lack the folder `images/`), what is nowhere, and what is not to be used.

    Raises UserError where there is an archive that cannot be read.
    """
    path, entries = directory / ARCHIVE, {}
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {path} as a zip archive: {error}. Fetch it again.") from error
    places, missing, unsafe = {}, [], []
    for name in wanted:
        entry = entries.get(name) or entries.get(name.removeprefix("images/"))
        if entry is not None and not is_plain(entry):
            unsafe.append(name)
        elif entry is not None:
            places[name] = entry
        elif not (directory / name).is_file():
            missing.append(name)
    return places, missing, unsafe


def is_plain(entry: zipfile.ZipInfo) -> bool:
    """A file, no folder and no link, of a size that an image has, not encrypted."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    encrypted = entry.flag_bits & 1
    return kind in (0, stat.S_IFREG) and not entry.is_dir() and entry.file_size <= MAX_IMAGE_BYTES and not encrypted


def unpack_images(directory: Path, places: Mapping[str, zipfile.ZipInfo]) -> list[str]:
    """Writes entries to their paths, each at once or not at all; one that is there with its size stays.

    Returns the paths that failed: damaged entries, and paths on which a link of `directory` leads out of it.
    """
    failed, root = [], directory.resolve()
    if not places:
        return failed
    with zipfile.ZipFile(directory / ARCHIVE) as archive:
        for name, entry in places.items():
            path = directory / name
            if path.is_file() and path.stat().st_size == entry.file_size:
                continue
            if not path.parent.resolve().is_relative_to(root):
                failed.append(name)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            try:
                with archive.open(entry) as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(part, path)
            except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error):
                part.unlink(missing_ok=True)
                failed.append(name)
    return failed


def contents(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rows are: categories beside the paper's shares, sources, images a row, what is odd about them."""
    categories = collections.Counter(str(row.get("category")) for row in rows)
    tags = [(str(row.get("question")).count(IMAGE_TAG), len(images_of(row))) for row in rows]
    return {
        "categories": {
            name: {"rows": count, "percent": round(100 * count / len(rows), 2), "paper_percent": paper_share(name)}
            for name, count in categories.most_common()
        },
        "sources": dict(collections.Counter(str(row.get("source")) for row in rows).most_common()),
        "images_a_row": {
            str(number): count for number, count in sorted(collections.Counter(have for _, have in tags).items())
        },
        "rows_without_tag": sum(have > 0 and not found for found, have in tags),
        "rows_with_other_number_of_tags": sum(found not in (0, have) for found, have in tags),
        "answers_without_box": sum("\\boxed" not in str(row.get("answer")) for row in rows),
        "pass_rate_32b": pass_rates(rows, "PassRate_32BTrained"),
        "pass_rate_7b": pass_rates(rows, "PassRate_7BBase"),
    }


def paper_share(name: str) -> float | None:
    """The published share of a category, by the words of its name."""
    bare = name.replace("(GradeSchool)", "").strip().lower()
    return next((share for key, share in PAPER_SHARES.items() if bare.startswith(key.lower())), None)


def pass_rates(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, int]:
    """How many rows have which pass rate; -1 is the published "unknown"."""
    values = [row.get(column) for row in rows]
    known = [value for value in values if isinstance(value, int | float) and value >= 0]
    return {
        "unknown": len(values) - len(known),
        "0": sum(value == 0 for value in known),
        "(0, 0.3)": sum(0 < value < 0.3 for value in known),
        "[0.3, 0.7)": sum(0.3 <= value < 0.7 for value in known),
        "[0.7, 1)": sum(0.7 <= value < 1 for value in known),
        "1": sum(value >= 1 for value in known),
    }


def readable(directory: Path) -> dict[str, Any]:
    """How many rows training would use, and by kind which it would leave out."""
    try:
        found = read_problems(str(directory / ROWS_FILE), max_bad_rows=sys.maxsize)
    except UserError as error:
        return {"usable_rows": 0, "left_out": str(error)}
    return {"usable_rows": len(found), "left_out": found.bad_kinds}


def listed(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(map(repr, names[:MAX_SHOWN]))}{more}"] if names else []


if __name__ == "__main__":
    sys.exit(main())
