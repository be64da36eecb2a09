"""What a command is asked besides its config: the options of `sample` and `score`."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """`sample`: n completions for every row of `data`, or for one question with its images.

    Exactly one of `data` and `question` is given. `output` None is standard output.
    """

    model: str
    data: str | None
    image: tuple[str, ...]
    question: str | None
    output: Path | None
    n: int
    seed: int
    prompt_template: str


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """`score`: the log-probs of given completions.

    Every row of `data` holds a problem and its `completion` (text) or `completion_ids`.
    `output` None is standard output.
    """

    model: str
    data: str
    output: Path | None
    prompt_template: str


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """`evaluate`: n completions for every item of a benchmark.

    `data` None is the benchmark's published place; `protocol` "" is its own. `shard` (I, N): of the items by id, those
    whose number is I modulo N. `force_rethink`: every completion that ends gets a trigger and goes on.
    """

    model: str
    benchmark: str
    data: str | None
    protocol: str
    output: Path
    n: int
    seed: int
    shard: tuple[int, int] = (0, 1)
    force_rethink: bool = False
