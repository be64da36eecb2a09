"""FILE.html: a result and its generations, to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rethinker_jax.benchmarks.catalog import read_benchmark
from rethinker_jax.benchmarks.compare import read_result
from rethinker_jax.benchmarks.record_files import beside, generations_path, read_records
from rethinker_jax.benchmarks.records import Record
from rethinker_jax.errors import UserError
from rethinker_jax.evaluation.asks import Ask
from rethinker_jax.report.evaluation import Images, render_evaluation
from rethinker_jax.report.read import as_mapping, as_text

# Of a benchmark that is read for its pictures alone: rows that were bad before are so still.
ANY_BAD_ROWS = 1 << 62


def write_page(result_path: Path) -> Path:
    """The page of a result file, with the images where the data still lies where it did. Raises UserError."""
    result = read_result(result_path)
    return _write(result_path, result, read_records(generations_path(result_path)), _images_of(result))


def write_page_of(result_path: Path, records: Sequence[Record], asks: Sequence[Ask]) -> Path:
    """The same where records and items are at hand."""
    return _write(result_path, read_result(result_path), records, {a.problem.id: a.problem.images for a in asks})


def _write(result_path: Path, result: dict[str, Any], records: Sequence[Record], images: Images) -> Path:
    page = beside(result_path, ".html")
    unfinished = page.with_name(page.name + ".tmp")
    try:
        unfinished.write_bytes(render_evaluation(result_path.stem, result, records, images))
        unfinished.replace(page)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"the page {page} cannot be written ({error.strerror}); free space or fix rights") from error
    return page


def _images_of(result: dict[str, Any]) -> Images:
    """Images of the items, read again from local data; none where it has moved, or is on the hub."""
    made_by = as_mapping(result.get("made_by"))
    data = made_by.get("data")
    if not isinstance(data, str) or not (data.startswith("example:") or Path(data).expanduser().exists()):
        return {}
    try:
        found = read_benchmark(
            result["benchmark"], data, image_root=as_text(made_by.get("image_root")), max_bad_rows=ANY_BAD_ROWS
        )
    except UserError:  # the page is worth having without pictures
        return {}
    return {item.problem.id: item.problem.images for item in found.items}
