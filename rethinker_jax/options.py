"""What a command is asked besides its config: the options of `sample`, `score`, `evaluate`, and `--profile`."""

import dataclasses
import re
from pathlib import Path

from rethinker_jax.errors import UserError

# For the help of `evaluate`, which must not wait for the modules that know them.
EVALUATE_NAMES = """\
benchmarks: rows mathvista mathverse mathverse_text_only mathvision mathvision_testmini mmmu mmmu_pro_standard4
  mmmu_pro_standard10 mmmu_pro_vision emma emma_mini mega_bench hallusionbench geometry3k mm_math refcoco cure
  vl_rethinker
protocols (without one, for one sample and for several: own and own_sampled for rows, else vl_rethinker and
  vl_rethinker_sampled): own own_sampled vl_rethinker vl_rethinker_8192 vl_rethinker_rethink
  vl_rethinker_sampled openvlthinker openvlthinker_qwen maye maye_sampled maye_pass8 limit_of_rlvr"""


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

    `data` None is the benchmark's published place. `shard` (I, N): of the items by id, those
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


@dataclasses.dataclass(frozen=True)
class ProfileSteps:
    """`--profile`: the steps to trace, counted from 1 where this process begins. The first one compiles."""

    first: int = 2
    last: int = 4


_PROFILE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def is_profile_steps(word: str) -> bool:
    """Whether a word behind --profile is meant for it; any other word is a config or an override."""
    return word[:1].isdigit() and "=" not in word and not word.endswith((".yaml", ".yml"))


def parse_profile(text: str | None) -> ProfileSteps | None:
    """`--profile`, `--profile 3` or `--profile 3-5`; None = it was not given. Raises UserError."""
    if not text:
        return None if text is None else ProfileSteps()
    match = _PROFILE.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"--profile {text}: wanted a step or the first and last of several, counted from 1 where this process "
            "begins, as in --profile 2-4"
        )
    return ProfileSteps(first, last)
