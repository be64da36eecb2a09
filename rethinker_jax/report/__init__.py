"""A run directory, as one HTML page to look at: read → choose → draw → write. Imports no jax."""

import os
from pathlib import Path

from rethinker_jax.errors import UserError
from rethinker_jax.report.page import render_page
from rethinker_jax.report.read import read_run

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html, whole or not at all, and returns its path. The run may still be in progress.

    Raises UserError where `run_dir` is not a run directory or the page cannot be written.
    """
    page = render_page(read_run(Path(run_dir)))
    path = Path(run_dir) / "report.html"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(page)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"the report could not be written to {path}: {error.strerror}; free space or fix rights"
        ) from error
    return path
