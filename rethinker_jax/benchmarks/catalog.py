"""The benchmarks by name, and reading one: name → published place, rows → items."""

import collections
import dataclasses
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from rethinker_jax.benchmarks.adapters.cure import read_cure
from rethinker_jax.benchmarks.adapters.emma import read_emma
from rethinker_jax.benchmarks.adapters.fields import Place, Reader
from rethinker_jax.benchmarks.adapters.flat import read_flat, read_vl_rethinker
from rethinker_jax.benchmarks.adapters.grounding import read_refcoco
from rethinker_jax.benchmarks.adapters.hallusionbench import read_hallusionbench
from rethinker_jax.benchmarks.adapters.mathverse import read_mathverse
from rethinker_jax.benchmarks.adapters.mathvision import read_mathvision
from rethinker_jax.benchmarks.adapters.mathvista import read_mathvista
from rethinker_jax.benchmarks.adapters.mega_bench import read_mega_bench
from rethinker_jax.benchmarks.adapters.mmmu import read_mmmu, read_mmmu_vision
from rethinker_jax.benchmarks.items import Headline, Item
from rethinker_jax.benchmarks.media import MEDIA_CACHE, Media
from rethinker_jax.benchmarks.sources import Table, read_tables
from rethinker_jax.errors import UserError
from rethinker_jax.prompts.dataset import BadRow, read_problems
from rethinker_jax.prompts.rows import BadField

ROWS = "rows"
# Rows that are left out by design, counted, and no fault of the file.
REFUSED_KINDS = ("video",)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark as published.

    hub             dataset on the Hugging Face hub, "" where there is none that can be loaded; `configs` of it are read
                    one after the other ("" = its only one), of each the `split` ("" = whatever files there are).
    read            a row → items.
    headline        how accuracies become the one number: "mean" over items, "macro" over the means of `macro_over`.
    cluster_by      what the items of a cluster share, "" where each stands alone.
    separate_media  pictures are files beside the rows, so that the rows alone, as on the hub, are not enough.
    """

    name: str
    read: Reader
    hub: str
    split: str
    configs: tuple[str, ...] = ("",)
    headline: Headline = "mean"
    macro_over: str = ""
    cluster_by: str = ""
    separate_media: bool = False
    licence: str = ""
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class ReadItems:
    """The items of a benchmark in the order of its rows, ids unique, and the rows that were left out."""

    items: tuple[Item, ...]
    bad_rows: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def bad_kinds(self) -> dict[str, int]:
        """How many rows were left out, by kind."""
        return dict(collections.Counter(row.kind for row in self.bad_rows))


_EMMA_CONFIGS = ("Math", "Physics", "Chemistry", "Coding")
_ALL = (
    Benchmark(
        "mathvista", read_mathvista, "AI4Math/MathVista", "testmini",
        licence="CC BY-SA 4.0 for new parts; test only, training is prohibited; images keep their own rights",
        notes="1,000 items; answers of the split test are withheld",
    ),
    Benchmark(
        "mathverse", read_mathverse, "CaraJ/MathVerse-lmmseval", "testmini", ("testmini",),
        cluster_by="problem_index", licence="MIT",
        notes="788 problems in 5 versions; the published headline is the mean over all 3,940",
    ),
    Benchmark(
        "mathverse_text_only", read_mathverse, "AI4Math/MathVerse", "testmini_text_only", ("testmini_text_only",),
        licence="MIT", notes="the 788 problems without a picture",
    ),
    Benchmark("mathvision", read_mathvision, "MathLLMs/MathVision", "test", licence="MIT", notes="3,040 items"),
    Benchmark("mathvision_testmini", read_mathvision, "MathLLMs/MathVision", "testmini", licence="MIT"),
    Benchmark(
        "mmmu_pro_standard4", read_mmmu, "MMMU/MMMU_Pro", "test", ("standard (4 options)",), licence="Apache-2.0"
    ),
    Benchmark(
        "mmmu_pro_standard10", read_mmmu, "MMMU/MMMU_Pro", "test", ("standard (10 options)",), licence="Apache-2.0",
        notes="MMMU-Pro's overall number is the mean of this and mmmu_pro_vision",
    ),
    Benchmark(
        "mmmu_pro_vision", read_mmmu_vision, "MMMU/MMMU_Pro", "test", ("vision",), licence="Apache-2.0",
        notes="a screenshot holds question and options",
    ),
    Benchmark(
        "mmmu", read_mmmu, "lmms-lab/MMMU", "validation", licence="Apache-2.0",
        notes="900 items, all 30 subjects in one table; answers of the split test are withheld",
    ),
    Benchmark("emma", read_emma, "luckychao/EMMA", "test", _EMMA_CONFIGS, notes="2,788 items; no licence stated"),
    Benchmark("emma_mini", read_emma, "luckychao/EMMA-mini", "test", _EMMA_CONFIGS, notes="100 items a subject"),
    Benchmark(
        "mega_bench", read_mega_bench, "TIGER-Lab/MEGA-Bench", "test", ("core", "open"), "macro", "task", "task", True,
        "Apache-2.0", "data.zip (9 GB) holds the pictures; tasks of videos are left out; open tasks are not scored",
    ),
    Benchmark(
        "hallusionbench", read_hallusionbench, "lmms-lab/HallusionBench", "image", licence="BSD-3-Clause",
        cluster_by="set of pictures", notes="951 questions with a picture; accuracy over all questions",
    ),
    Benchmark("geometry3k", read_flat, "hiyouga/geometry3k", "test", notes="601 items"),
    Benchmark("mm_math", read_flat, "", "test", notes="JSON lines as MAYE (arXiv 2504.02587) published them"),
    Benchmark(
        "refcoco", read_refcoco, "lmms-lab/RefCOCO", "val", cluster_by="picture",
        notes="right is IoU of at least 0.5, in pixels of the published picture",
    ),
    Benchmark(
        "cure", read_cure, "", "", cluster_by="chain", separate_media=True,
        notes="1,622 chains; pictures must be downloaded from the addresses in the rows",
    ),
    Benchmark(
        "vl_rethinker", read_vl_rethinker, "", "",
        notes="VL-Rethinker's flat rows; the benchmark is the prefix of qid, the overall number the mean of all rows",
    ),
)  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """Raises UserError for an unknown name, with the nearest one; `rows` is no entry of the table."""
    if name not in BENCHMARKS:
        known = [*BENCHMARKS, ROWS]
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.4)
        raise UserError(
            f"unknown benchmark {name!r} (--benchmark); known are {', '.join(known)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return BENCHMARKS[name]


def read_benchmark(
    name: str,
    data: str | None = None,
    *,
    image_root: str = "",
    max_bad_rows: int = 100,
    media_cache: str = MEDIA_CACHE,
) -> ReadItems:
    """Reads the items of a benchmark.

    data          a folder, a .parquet, .jsonl or .json file, or a hub id; None = the published place. `rows` reads any
                  source of problems that training reads.
    image_root    folder that paths in rows start from and that none may leave; "" = where the rows are.
    max_bad_rows  more unusable rows than this are an error; fewer are left out and listed. Videos do not count.

    Raises UserError for anything that cannot be used.
    """
    if image_root and not os.path.isdir(os.path.expanduser(image_root)):
        raise UserError(f"the image root {image_root} is not a folder")
    if name == ROWS:
        return _read_rows(data, image_root, max_bad_rows)
    benchmark = find_benchmark(name)
    is_local = bool(data) and Path(str(data)).expanduser().exists()
    if benchmark.separate_media and benchmark.hub and not is_local and not image_root:
        raise UserError(
            f"the pictures of {name} are not in its rows: download {benchmark.hub} ({benchmark.notes}) and name its "
            f"folder by --data, or the folder of its pictures by data.image_root"
        )
    items: dict[str, Item] = {}
    bad_rows: list[BadRow] = []
    for table in read_tables(data, benchmark.hub, benchmark.configs, benchmark.split, name):
        for item, where in _table_items(benchmark, table, image_root, media_cache, bad_rows):
            if item.problem.id in items:
                bad_rows.append(BadRow(where, "double_id", f"the id {item.problem.id!r} occurred before"))
                continue
            items[item.problem.id] = item
    found = ReadItems(tuple(items.values()), tuple(bad_rows))
    num_bad = sum(row.kind not in REFUSED_KINDS for row in bad_rows)
    if num_bad > max_bad_rows:
        raise UserError(f"{name}: {describe(found)}; more than max_bad_rows={max_bad_rows} (run.max_bad_rows)")
    if not items:
        raise UserError(f"{name}: {data or benchmark.hub} holds no usable row: {describe(found)}")
    return found


def _table_items(
    benchmark: Benchmark, table: Table, image_root: str, media_cache: str, bad_rows: list[BadRow]
) -> Iterator[tuple[Item, str]]:
    """(item, where) of each usable row; the others are added to `bad_rows`."""
    folder = Path(image_root).expanduser() if image_root else table.folder
    media = Media(os.path.realpath(folder) if folder is not None else None, media_cache)
    for number, row in enumerate(table.rows):
        where = f"{table.name} row {number}"
        if isinstance(row, BadRow):
            bad_rows.append(row)
            continue
        place = Place(benchmark.name, table.config, f"{Path(table.name).stem}-{number}", media)
        try:
            found = benchmark.read(row, place)
        except BadField as error:
            bad_rows.append(BadRow(where, error.kind, error.why))
            continue
        for item in found:
            yield item, where


def _read_rows(data: str | None, image_root: str, max_bad_rows: int) -> ReadItems:
    if not data:
        raise UserError(f"the benchmark {ROWS!r} needs rows: name a file, folder or hub id by --data")
    found = read_problems(data, image_root=image_root, max_bad_rows=max_bad_rows)
    items = (Item(problem, "", {"source": problem.source} if problem.source else {}) for problem in found.problems)
    return ReadItems(tuple(items), found.bad_rows)


def describe(found: ReadItems) -> str:
    """What was left out, by kind, with one example each: "2 rows cannot be used: 2 video (core row 3: ...)"."""
    if not found.bad_rows:
        return "it has no rows"
    first = {row.kind: row for row in reversed(found.bad_rows)}
    kinds = sorted(found.bad_kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    listed = ", ".join(f"{count} {kind} ({first[kind].where}: {first[kind].why})" for kind, count in kinds)
    return f"{len(found.bad_rows)} rows cannot be used: {listed}"
