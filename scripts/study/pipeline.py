"""OpenVLThinker's three iterations in small (iterations.yaml), over seeds, with the ablations of its paper.

    python scripts/study/pipeline.py [--seeds 3] [--processes 2] [--runs runs/study_pipeline] [--output docs/results]

An arm is the recipe with some stages changed. The arms of a seed share a directory, so what an arm leaves as it was is
run once: its stages have the same keys. Runs lie in --runs; what is done is not run again, and what was cut goes on.
`--collect-only` makes tables and figures of what is there. Results: OUTPUT/pipeline.json, pipeline-*.svg, and the
tables between the markers of pipeline.md.
"""

import dataclasses
import itertools
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pipeline_figures import draw_figures
from pipeline_tables import write_tables
from study_runs import Failed, Job, interval, options_of, provenance, run_all

from rethinker_jax.curation.difficulty import LABELS
from rethinker_jax.curation.markers import MARKERS, cut_reasoning
from rethinker_jax.example.dataset import PROBLEM_SCHEMA, problem_row, sft_examples, write_split

Json = dict[str, Any]

RECIPE = Path(__file__).with_name("iterations.yaml")
CONFIG = "iterations_config.yaml"
POOL_ROWS = 1024  # of example:train
# Traces of a reasoner that looks twice more often than not, for want of a larger model to distill from: the example's
# own solutions. Their seed and indices are those of no other rows.
DISTILLED_ROWS, DISTILLED_SEED, SECOND_LOOKS = 640, 23, 0.7
# Signs of a second look that this family's models have words for, each counted as often as it occurs in any case.
KEYWORDS = ("wait", "double check", "seem right", "mistake")
SCORES = ("greedy", "pass@1", "pass@8")
_BOX = re.compile(r"\\boxed\{[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Arm:
    """The stages of the recipe from `first` to `last`, renamed STAGE_NAME and changed; those before stay.

    change  stage → the changed one, or None for one that is left out.
    """

    name: str
    first: str
    last: str
    change: Callable[[Json], Json | None]


def _continue(stage: Json) -> Json:
    """Fine-tuning goes on from the newest model."""
    return stage | {"starts_from": "previous"} if stage["kind"] == "sft" else stage


def _hard_only(stage: Json) -> Json | None:
    """As many steps as both stages of GRPO have together."""
    if stage["name"] == "medium1":
        return None
    return stage | {"set": stage.get("set", {}) | {"run.num_steps": 2 * _num_steps()}}


def _rl_only(stage: Json) -> Json:
    return stage | {"starts_from": "base"} if stage["name"] == "medium1" else stage


def _shortest(stage: Json) -> Json:
    """The paper's choice among right traces."""
    if stage["kind"] != "select":
        return stage
    filters = [{"pick": "shortest"} if "pick" in one else one for one in stage["set"]["select.filters"]]
    return stage | {"set": stage["set"] | {"select.filters": filters}}


def _distilled(name: str) -> Callable[[Json], Json]:
    return lambda stage: stage | {"data": f"{name}.parquet"} if stage["kind"] == "sft" else stage


ARMS = (
    Arm("continue", "sft2", "hard3", _continue),
    Arm("hard_only", "medium1", "hard1", _hard_only),
    Arm("rl_only", "medium1", "hard1", _rl_only),
    Arm("shortest", "traces1", "sft1", _shortest),
    Arm("raw", "sft1", "sft1", _distilled("raw")),
    Arm("truncated", "sft1", "sft1", _distilled("truncated")),
)
# (what is compared, its first stage, its second stage).
COMPARISONS = (
    ("restart from base − continue, iteration 2", "hard2", "hard2_continue"),
    ("restart from base − continue, iteration 3", "hard3", "hard3_continue"),
    ("medium then hard − hard only", "hard1", "hard1_hard_only"),
    ("SFT and RL − RL only", "hard1", "hard1_rl_only"),
    ("SFT and RL − SFT only", "hard1", "sft1"),
    ("truncated − raw traces, after SFT", "sft1_truncated", "sft1_raw"),
    ("second longest − shortest trace, after SFT", "sft1", "sft1_shortest"),
)
COMPARED = ("greedy", "pass@1", "pass@1 medium", "pass@1 hard", "tokens", "keywords")


def _num_steps() -> int:
    return yaml.safe_load(RECIPE.with_name(CONFIG).read_text())["run"]["num_steps"]


def recipe_of(arm: Arm | None) -> Json:
    """The recipe of an arm, of None the one that all are made of."""
    recipe = yaml.safe_load(RECIPE.read_text())
    if arm is None:
        return recipe
    names = [stage["name"] for stage in recipe["stages"]]
    first, last = names.index(arm.first), names.index(arm.last)
    renamed = {name: f"{name}_{arm.name}" for name in names[first : last + 1]}
    changed = [arm.change(stage) for stage in recipe["stages"][first : last + 1]]
    made = [_rename(stage, renamed) for stage in changed if stage is not None]
    return recipe | {"stages": [*recipe["stages"][:first], *made]}


def _rename(stage: Json, renamed: Mapping[str, str]) -> Json:
    """The stage under its new name, reading what the arm itself made where it makes it."""
    stage = stage | {"name": renamed[stage["name"]]}
    if "starts_from" in stage:
        stage["starts_from"] = renamed.get(stage["starts_from"], stage["starts_from"])
    data = stage["data"]
    if isinstance(data, dict) and "from" in data:
        stage["data"] = {"from": renamed.get(data["from"], data["from"])}
    return stage


def write_inputs(root: Path, pool_rows: int = POOL_ROWS, distilled_rows: int = DISTILLED_ROWS) -> None:
    """The recipes, the rows to draw from, and the traces that are distilled."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(RECIPE.with_name(CONFIG), root / CONFIG)
    for name, arm in (("iterations", None), *((one.name, one) for one in ARMS)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe_of(arm), sort_keys=False))
    if not (root / "pool.parquet").is_file():
        write_split(root / "pool.parquet", "train", pool_rows)
    if not (root / "truncated.parquet").is_file():
        write_distilled(root / "raw.parquet", distilled_rows)
        write_cut(root / "raw.parquet", root / "truncated.parquet")


def write_distilled(path: Path, count: int) -> None:
    """Problems of the training part, each with a right trace, SECOND_LOOKS of them with a second look."""
    found = (sft_examples("clean", DISTILLED_SEED, index, SECOND_LOOKS) for index in itertools.count())
    kept = itertools.islice((one for one in found if not one.problem.id.endswith("-caption")), count)
    rows = [problem_row(one.problem) | {"completion": "".join(text for text, _ in one.spans)} for one in kept]
    pq.write_table(pa.Table.from_pylist(rows, PROBLEM_SCHEMA.append(pa.field("completion", pa.string()))), path)


def cut_text(text: str) -> tuple[str, str]:
    """A trace without its reasoning from the first marker on, its final answer kept, and "" or why it was not cut.

    `cut_reasoning` reads reasoning and answer off tags, which this family's models do not write: the last box is the
    answer, and what stands before it the reasoning, of which earlier boxes, answers that were taken back, are no part.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return text, "no_answer"
    reasoning, answer = _BOX.sub("", text[: boxes[-1].start()]), boxes[-1].group()
    cut, why = cut_reasoning(f"<think>{reasoning}</think>{answer}", ("Wait", *MARKERS))
    if why:
        return text, why
    return f"{cut.removeprefix('<think>').partition('</think>')[0].strip()} {answer}", ""


def write_cut(traces: Path, output: Path) -> None:
    """The rows of `traces` with truncated reasoning; those of which nothing would be left are dropped, as by `cut`."""
    table = pq.read_table(traces)
    found = [cut_text(text) for text in table["completion"].to_pylist()]
    reasons = [why or "cut" for _, why in found]
    kept = [why in ("cut", "unchanged") for why in reasons]
    texts = pa.array([text for (text, _), keep in zip(found, kept, strict=True) if keep], pa.string())
    place = table.column_names.index("completion")
    output.with_suffix(".json").write_text(json.dumps({why: reasons.count(why) for why in sorted(set(reasons))}) + "\n")
    pq.write_table(table.filter(pa.array(kept)).set_column(place, "completion", texts), output)


def seed_jobs(root: Path, seed: int) -> list[Job]:
    """One after the other: they share a directory."""
    jobs: list[Job] = []
    for name, last in (("iterations", "hard3"), *((arm.name, f"{arm.last}_{arm.name}") for arm in ARMS)):
        words = ("pipeline", f"{name}.yaml", f"dir=seed{seed}", f"run.seed={seed}", "sources.pool=pool.parquet")
        leaves = root / f"seed{seed}" / last / "model" / "config.json"
        jobs.append(Job(f"{name}/{seed}", words, leaves, (jobs[-1].name,) if jobs else ()))
    return jobs


def stage_numbers(stage: Path, when: str, labels: Mapping[str, str]) -> Json:
    """Of a stage's evaluation: shares, mean lengths of the samples, and keywords in a hundred of them.

    labels  source → easy, medium or hard.
    """
    scores = json.loads((stage / "summary.json").read_text())[when]
    groups = [json.loads(line) for line in (stage / "evaluations" / f"{when}.jsonl").read_text().splitlines()]
    rows = [(group["problem"]["source"], _text(sample), sample) for group in groups for sample in group["samples"]]
    wrong = [text for _, text, sample in rows if sample["verdict"] != "correct"]
    texts = [text for _, text, _ in rows]
    right = {
        f"pass@1 {label}": _mean([s["verdict"] == "correct" for source, _, s in rows if labels.get(source) == label])
        for label in LABELS
    }
    by_word = {f"keyword {word}": 100 * _mean([text.lower().count(word) for text in texts]) for word in KEYWORDS}
    numbers = {
        "words": _mean([len(text.split()) for text in texts]),
        "words incorrect": _mean([len(text.split()) for text in wrong]),
        "tokens": _mean([sample["num_tokens"] for _, _, sample in rows]),
        "tokens incorrect": _mean([s["num_tokens"] for _, _, s in rows if s["verdict"] != "correct"]),
        "keywords": sum(by_word.values()),
        "at once": _mean([text.startswith("\\boxed") for text in texts]),
    }
    return {score: scores[score] for score in SCORES} | right | numbers | by_word


def _text(sample: Mapping[str, Any]) -> str:
    return "".join(segment["text"] for segment in sample["segments"])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def collect(root: Path, seeds: Sequence[int]) -> Json:
    """All numbers of the study: a list over seeds for each stage and metric, and the comparisons' differences."""
    folders = [root / f"seed{seed}" for seed in seeds]
    places = {"base": ("sft1", "before")} | {name: (name, "after") for name in evaluated()}
    difficulty = [[_difficulty(folder / f"traces{number}") for number in (1, 2, 3)] for folder in folders]
    labels = [{source: one["label"] for source, one in rounds[0].items()} for rounds in difficulty]
    found = {
        name: [stage_numbers(folder / stage, when, label) for folder, label in zip(folders, labels, strict=True)]
        for name, (stage, when) in places.items()
    }
    stages = {
        name: {metric: summarize([one[metric] for one in numbers]) for metric in numbers[0]}
        for name, numbers in found.items()
    }
    comparisons = [
        {"what": what, "stages": [first, second]} | {
            metric: summarize([a[metric] - b[metric] for a, b in zip(found[first], found[second], strict=True)])
            for metric in COMPARED
        }
        for what, first, second in COMPARISONS
    ]  # fmt: skip
    spent = json.loads((root / "cpu_seconds.json").read_text())
    return {
        "seeds": len(folders),
        "iterations_cpu_s": summarize([spent[f"iterations/{seed}"] for seed in seeds]),
        "stages": stages,
        "comparisons": comparisons,
        "difficulty": difficulty,
        "traces": [[_traces(folder / f"traces{number}") for number in (1, 2, 3)] for folder in folders],
        "cut": json.loads((root / "truncated.json").read_text()),
    }


def evaluated() -> list[str]:
    """The stages with an evaluation: those of the recipe, and those that arms have besides."""
    stages = [stage for arm in (None, *ARMS) for stage in recipe_of(arm)["stages"]]
    return list(dict.fromkeys(stage["name"] for stage in stages if stage["kind"] in ("sft", "rl")))


def summarize(values: Sequence[float]) -> Json:
    """Every seed's value, the mean, and the half-width of its 95% interval; null for what is not known."""
    known = [value for value in values if not math.isnan(value)]
    found = {"values": list(values)} | (interval(known) if known else {"mean": math.nan, "half": math.nan})
    return json.loads(json.dumps(found).replace("NaN", "null"))


def _difficulty(stage: Path) -> Json:
    """Source → error rate and class of what was drawn for this stage, whether it was used or not."""
    report = json.loads((stage / "traces.parquet.report.json").read_text())["difficulty"]
    return {one["source"]: {"error_rate": one["error_rate"], "label": one["label"]} for one in report["sources"]}


def _traces(stage: Path) -> Json:
    """Traces of a round, and how many of them hold a second look or answer at once."""
    texts = pq.read_table(stage / "traces.parquet", columns=["completion"])["completion"].to_pylist()
    looks = sum("wait" in text.lower() for text in texts)
    return {"traces": len(texts), "second_looks": looks, "at_once": sum(text.startswith("\\boxed") for text in texts)}


def main() -> int:
    options = options_of(__doc__, 3, "runs/study_pipeline")
    root = options.runs.resolve()
    if not options.collect_only:
        write_inputs(root)
        try:
            run_all([job for seed in range(options.seeds) for job in seed_jobs(root, seed)], root, options.processes)
        except Failed as failed:
            print(failed, file=sys.stderr)
            return 1
    done = [seed for seed in range(options.seeds) if all(job.leaves.is_file() for job in seed_jobs(root, seed))]
    if not done:
        print(f"{root}: no seed has finished all its arms", file=sys.stderr)
        return 1
    results = collect(root, done) | {"provenance": provenance(root, ["python", *sys.argv])}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pipeline.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_figures(results, options.output)
    write_tables(results, options.output / "pipeline.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
