"""Asked by the launchers before every start, so that none restarts a run for ever that never makes a step.

    python -m rethinker_jax.starts FILE WORD...

WORDs are those of `rethinker_jax.main`. Exit code 0: start it. 2: it was started MOST_STARTS times since it last made a
step, as one is that has too little memory. Steps are lines of metrics.jsonl in the run's directory, and in those of a
pipeline's stages. FILE keeps the count; who starts a run by hand takes it away.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rethinker_jax.config_file import config_name, find_config, load_config
from rethinker_jax.errors import UserError

MOST_STARTS = 6


def run_directory(words: Sequence[str]) -> Path:
    """Where a command line will put its run: as said by run.dir, or runs/NAME."""
    said = [word.partition("=")[2] for word in words if word.startswith("run.dir=")]
    if said and said[-1]:
        return Path(said[-1])
    named = next((word for word in words if word.endswith((".yaml", ".yml")) or word.startswith("package:")), None)
    try:
        path = None if named is None else find_config(named)
        said = [load_config(path, ()).run.dir]
    except (UserError, OSError):  # the recipe of a pipeline, or a mistake that the program will report
        said = [""]
        path = None if named is None else Path(named)
    return Path(said[0] or f"runs/{config_name(path)}")


def steps_made(directory: Path) -> int:
    files = [path for pattern in ("", "*/", "*/*/") for path in directory.glob(f"{pattern}metrics.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in files)


def count_start(file: Path, steps: int) -> int:
    """Starts since the run made a step, this one included: 1 for the first. `file` holds their number and the steps."""
    try:
        starts, most = map(int, file.read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        starts, most = 0, -1
    starts = starts + 1 if steps <= most else 1
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{starts} {max(steps, most)}\n", encoding="utf-8")
    return starts


def main(arguments: Sequence[str]) -> int:
    file, *words = arguments
    directory = run_directory(words)
    try:
        starts = count_start(Path(file), steps_made(directory))
    except OSError as error:
        print(f"warning: starts are not counted: {error}", file=sys.stderr)
        return 0
    if starts <= MOST_STARTS:
        return 0
    print(
        f"error: started {MOST_STARTS} times without a step made in {directory}: not again. Its last words say why "
        "(137: killed, for want of memory as a rule). Mend that and start it anew.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
