"""Training in several processes: the numbers of one, through a stop and a start with another number of processes."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import STOPS_ITSELF, run_job

from rethinker_jax.example.dataset import write_split
from rethinker_jax.step_metrics import CLOCKS

# As the example: SSR, second looks at random, pictures. A rollout batch is not a multiple of the devices.
CONFIG = """
base: package:example
run: {num_steps: 2, save_every: 1, rollouts_every: 1, keep_checkpoints: 3}
data: {train: train.parquet, test: test.parquet}
rollout: {prompts_per_step: 5, samples_per_prompt: 2}
training: {batch_size: 10}
replay: {capacity: 32}
rethink: {fraction: 0.75}
reward: {consistency: {weight: 0.5, ema_every: 2}}
evaluation: {num_problems: 3, num_sampled_problems: 0, batch_size: 4}
"""
MAIN = ("-m", "rethinker_jax.main")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def rollouts_of(run: Path) -> dict[str, Any]:
    """File → lines; no clock is in them."""
    return {path.name: path.read_text() for path in sorted((run / "rollouts").glob("step_*.jsonl"))}


def arrays_of(run: Path, step: int) -> Any:
    """Weights, optimizer and replay buffer of a checkpoint."""
    with ocp.PyTreeCheckpointer() as reader:

        def read(item: str) -> Any:
            path = run / "checkpoints" / str(step) / item
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
            )
            return reader.restore(path, restore_args=as_numpy)

        return {item: read(item) for item in ("state", "arrays")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which one has a picture that breaks off behind its header: only who decodes it can know."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "small.yaml").write_text(CONFIG)
    write_split(folder / "test.parquet", "test", 4)
    write_split(folder / "train.parquet", "train", 12)
    table = pq.read_table(folder / "train.parquet")
    rows = table.to_pylist()
    broken = next(row for row in rows if row["images"])
    broken["images"][0]["bytes"] = broken["images"][0]["bytes"][:200]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "train.parquet")
    return folder


def test_a_job_of_processes_is_one_run(folder: Path) -> None:
    """One process with four devices against two with two each, of which the second is asked to stop after the first
    step, and then four with one each, on another mesh: the tokens of a row are cut between processes.

    Catches a process that draws, judges, replays or counts on its own; a picture that one of them finds bad and the
    others keep; a stop that only its hearer follows; a checkpoint that only as many processes can read.
    """
    words = ("train", "small.yaml", "--mesh", "run.dir=alone")
    codes, printed = run_job(folder, "alone", [(*MAIN, *words)], 4)
    assert codes == [0], printed

    alone, many = folder / "alone", folder / "many"
    words = (*words[:-1], "run.dir=many")
    stops = (str(STOPS_ITSELF), "rethinker_jax.loop:learn", "1", "SIGTERM", *words)
    codes, printed = run_job(folder, "two", [(*MAIN, *words), stops], 2)
    assert codes == [75, 75], printed
    assert sorted(path.name for path in (many / "checkpoints").iterdir()) == ["1"]
    assert not (many / "summary.json").exists()

    words = (*words[:3], "fsdp=2,context=2", *words[3:])
    codes, printed = run_job(folder, "four", [(*MAIN, *words)] * 4, 1)
    assert codes == [0, 0, 0, 0], printed
    assert rollouts_of(alone) == rollouts_of(many)  # token for token, with verdicts and advantages
    bad = (alone / "bad_rows.jsonl").read_text()
    assert bad == (many / "bad_rows.jsonl").read_text() and bad.count("bad_image") == 1
    one, other = metrics_of(alone), metrics_of(many)
    assert [row["step"] for row in other] == [0, 1]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if key == "row_padding_share":
                continue  # under `context` rows are packed for half as many shards
            if value is None:
                assert theirs[key] is None, key
            else:  # sums over devices, in another order; the gap is nothing but rounding
                atol = 2e-5 if key.startswith("sampler_trainer_gap") else 1e-6
                np.testing.assert_allclose(theirs[key], value, rtol=2e-4, atol=atol, err_msg=key)
    mine, theirs = arrays_of(alone, 2), arrays_of(many, 2)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    assert mine["arrays"]["problem"].size and (mine["arrays"]["problem"] == theirs["arrays"]["problem"]).all()
    learning_rate = 7e-5  # by which Adam moves most weights in an update; measured is a difference of 3e-7
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=learning_rate / 10),
        mine["state"]["params"],
        theirs["state"]["params"],
    )
    # One of them prints, and one report is written.
    assert "accuracy, greedy" in printed[0] and not any("accuracy" in text for text in printed[1:]), printed
    assert (many / "report.html").is_file()

    # One file of the newest checkpoint is cut, which one process alone reads; the others wait for it in orbax.
    files = [path for path in (many / "checkpoints/2/state/ocdbt.process_1/d").iterdir() if path.stat().st_size]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    longer = (*words, "run.num_steps=3")
    codes, printed = run_job(folder, "damaged", [(*MAIN, *longer)] * 2, 2)
    assert codes == [75, 75] and any("moved to 2.damaged" in text for text in printed), printed
    assert sorted(path.name for path in (many / "checkpoints").iterdir()) == ["1", "2.damaged"]


def test_fine_tuning_in_processes_is_one_run(folder: Path) -> None:
    """Catches a validation whose scores lie with the other process, and rows that are encoded or left out apart."""
    words = ("sft", "small.yaml", "--mesh", "sft.data=example:sft-clean", "sft.num_steps=2", "sft.batch_size=4")
    words += ("sft.validation_fraction=0.01", "sft.validation_rows=4", "sft.validate_every=1")
    codes, printed = run_job(folder, "sft-alone", [(*MAIN, *words, "run.dir=sft-alone")], 2)
    assert codes == [0], printed
    codes, printed = run_job(folder, "sft-two", [(*MAIN, *words, "run.dir=sft-two")] * 2, 1)
    assert codes == [0, 0], printed
    one, other = metrics_of(folder / "sft-alone"), metrics_of(folder / "sft-two")
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys() and "validation_nll" in mine
        np.testing.assert_allclose([theirs[key] for key in mine], list(mine.values()), rtol=2e-4, atol=1e-6)
    assert (folder / "sft-two/model/model.safetensors").is_file()


ELSEWHERE = "import os, runpy; os.chdir('other'); runpy.run_module('rethinker_jax.main', run_name='__main__')"


def test_other_rows_in_one_process_are_refused(folder: Path) -> None:
    """Catches processes that number different rows alike: each would judge and learn other problems than its peers."""
    table = pq.read_table(folder / "train.parquet")
    other = folder / "other"
    other.mkdir()
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]), other / "train.parquet")
    (other / "test.parquet").write_bytes((folder / "test.parquet").read_bytes())
    (other / "small.yaml").write_text(CONFIG)
    words = ("train", "small.yaml", "--mesh", f"run.dir={folder / 'refused'}")
    codes, printed = run_job(folder, "rows", [(*MAIN, *words), ("-c", ELSEWHERE, *words)], 1)
    assert codes == [2, 2], printed
    assert any("data.train: process 1 of 2 reads other than process 0" in text for text in printed), printed
