"""Accuracy before and after fine-tuning: `data.test` answered and judged, as in an RL run."""

import contextlib
import dataclasses
from collections.abc import Generator

from rethinker_jax.config import Config
from rethinker_jax.errors import UserError
from rethinker_jax.evaluate import evaluate
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.prompts.build import BadPrompt
from rethinker_jax.prompts.dataset import read_problems
from rethinker_jax.rewards.scorer import Scorer
from rethinker_jax.rewards.terms import check_row
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.system import System
from rethinker_jax.types import Problem
from rethinker_jax.verify.judge import check_gold
from rethinker_jax.verify.pool import VerifierPool


@dataclasses.dataclass(frozen=True)
class Evaluator:
    config: Config
    run: RunDirectory
    problems: tuple[Problem, ...]
    scorer: Scorer

    def scores(self, system: System, params: Params, when: str) -> dict[str, float]:
        """The scores under training parameters; the sampled groups are left in the run as evaluation `when`."""
        prompts = []
        for problem in self.problems:
            try:
                prompts.append(system.builder.build(problem))
            except BadPrompt as error:
                self.run.note_bad_row(-1, problem.id, error.kind, str(error), self.config.run.max_bad_rows)
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
    problems = _problems(config, run)[:count]
    with VerifierPool(config.verifier) as pool, Scorer(config, pool) as scorer:
        yield Evaluator(config, run, problems, scorer)


def _problems(config: Config, run: RunDirectory) -> tuple[Problem, ...]:
    """The rows of `data.test` that can be judged; the others are listed in `run`."""
    limit = config.run.max_bad_rows
    found = read_problems(config.data.test, image_root=config.data.image_root, max_bad_rows=limit)
    for row in found.bad_rows:
        run.note_bad_row(-1, row.where, row.kind, row.why, limit)
    good = []
    for problem in found.problems:
        trouble = check_gold(problem.answer, problem.choices, problem.type) or check_row(problem, config.reward)
        if trouble:
            run.note_bad_row(-1, problem.id, "bad_gold", f"{trouble}: {problem.answer!r:.80}", limit)
        else:
            good.append(problem)
    if not good:
        raise UserError(f"{config.data.test}: wanted at least one usable row, found none; see bad_rows.jsonl.")
    return tuple(good)
