"""Accuracy before and after fine-tuning: `data.test` answered and judged, as in an RL run."""

import contextlib
import dataclasses
from collections.abc import Generator

from rethinker_jax.config import Config
from rethinker_jax.evaluate import evaluate
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.run_data import load_problems, usable_prompts
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.system import System
from rethinker_jax.types import Problem
from rethinker_jax.verify.pool import VerifierPool


@dataclasses.dataclass(frozen=True)
class Evaluator:
    config: Config
    run: RunDirectory
    problems: tuple[Problem, ...]
    scorer: Scorer

    def scores(self, system: System, params: Params, when: str) -> dict[str, float]:
        """The scores under training parameters; the sampled groups are left in the run as evaluation `when`."""
        rows = list(enumerate(self.problems))
        prompts = [prompt for _, prompt in usable_prompts(self.config, system, rows, -1, self.run)]
        found = evaluate(system, system.sampling_params(params), prompts, self.config, self.scorer)
        self.run.write_evaluation(when, found.groups)
        return found.scores


@contextlib.contextmanager
def open_evaluator(config: Config, run: RunDirectory) -> Generator[Evaluator | None]:
    """The evaluator of a run with `sft.evaluate`, None for one without."""
    count = max(config.evaluation.num_problems, config.evaluation.num_sampled_problems)
    if not config.sft.evaluate or not count:
        yield None
        return
    problems = load_problems(config, config.data.test, run)[:count]
    with VerifierPool(config.verifier) as pool, Scorer(config, pool) as scorer:
        yield Evaluator(config, run, problems, scorer)
