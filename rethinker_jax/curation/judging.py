"""From lines to judged samples: by the verdicts that are there, else by the verifier's worker processes."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from rethinker_jax.config import VerifierConfig
from rethinker_jax.curation.openvlthinker import same_text, stated_answer
from rethinker_jax.curation.records import Group, Sample
from rethinker_jax.curation.samples import Line
from rethinker_jax.types import VerdictName
from rethinker_jax.verify.pool import JudgeItem, PendingVerdicts, VerifierPool

BATCH = 64
BATCHES_IN_FLIGHT = 32


@dataclasses.dataclass(frozen=True)
class Judged:
    """Samples by the place of their problem, and how many of them were judged here."""

    samples: dict[int, list[Sample]]
    num_judged_here: int


def judge_lines(
    lines: Iterable[Line], golds: Sequence[JudgeItem], config: VerifierConfig, keep_texts: bool = True
) -> Judged:
    """Every line as a sample. `golds` are by place of the problem; workers start only if a line has no verdict.

    Without `keep_texts` a sample's completion is "": they are most of what a selection holds in memory.
    """
    found: dict[int, list[Sample]] = {}
    waiting: collections.deque[tuple[list[Line], PendingVerdicts]] = collections.deque()
    batch: list[Line] = []
    num_judged = 0

    def keep(line: Line, verdict: VerdictName) -> None:
        sample = Sample(
            line.number,
            line.completion if keep_texts else "",
            verdict,
            line.finish_reason,
            line.num_tokens,
            line.mean_log_prob,
        )
        found.setdefault(line.row, []).append(sample)

    def finish() -> None:
        judged, pending = waiting.popleft()
        for line, verdict in zip(judged, pending.result(), strict=True):
            keep(line, verdict.verdict)

    with ExitStack() as stack:
        pool: VerifierPool | None = None

        def submit() -> None:
            nonlocal pool, batch
            if pool is None:
                pool = stack.enter_context(VerifierPool(config))
            items = [dataclasses.replace(golds[line.row], response=line.completion) for line in batch]
            waiting.append((batch, pool.submit(items)))
            batch = []
            if len(waiting) >= BATCHES_IN_FLIGHT:
                finish()

        for line in lines:
            if line.verdict is not None:
                keep(line, line.verdict)
                continue
            num_judged += 1
            batch.append(line)
            if len(batch) == BATCH:
                submit()
        if batch:
            submit()
        while waiting:
            finish()
    for samples in found.values():
        samples.sort(key=lambda sample: sample.number)
    return Judged(found, num_judged)


def judge_as_openvlthinker(groups: Sequence[Group], golds: Sequence[JudgeItem], config: VerifierConfig) -> list[Group]:
    """The groups with `same_answer` of every sample. What the texts leave open the verifier decides, in its workers.

    As in the generator, the gold's choices and type play no part.
    """
    open_places: list[tuple[int, int]] = []
    items: list[JudgeItem] = []
    answers: list[list[bool]] = []
    for place, group in enumerate(groups):
        gold = golds[group.row].answer
        found = []
        for number, sample in enumerate(group.samples):
            stated = stated_answer(sample.completion)
            same = False if stated is None else same_text(stated, gold)
            if same is None:
                open_places.append((place, number))
                items.append(JudgeItem(f"<answer>{stated}</answer>", gold))
            found.append(bool(same))
        answers.append(found)
    if items:
        with VerifierPool(config) as pool:
            for (place, number), verdict in zip(open_places, pool.judge_many(items), strict=True):
                answers[place][number] = verdict.correct
    return [
        dataclasses.replace(
            group,
            samples=tuple(
                dataclasses.replace(sample, same_answer=same) for sample, same in zip(group.samples, found, strict=True)
            ),
        )
        for group, found in zip(groups, answers, strict=True)
    ]
