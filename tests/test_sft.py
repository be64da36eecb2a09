"""Fine-tuning on the example's model: what a run leaves, what it measures, how it goes on."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference_ours import for_device, forward
from sft_rows import Row, picture, talk, write

from rethinker_jax.config import Config, SftConfig
from rethinker_jax.config_file import load_config
from rethinker_jax.errors import UserError
from rethinker_jax.main import main
from rethinker_jax.models.qwen25vl import define_model
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.weights import load_params
from rethinker_jax.prompts.batch import pack_prompts
from rethinker_jax.report import write_report
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.sft.encode import RowEncoder
from rethinker_jax.sft.loop import Batch, Setup, count_steps, is_finished, prepare
from rethinker_jax.sft.rows import open_split
from rethinker_jax.system import EXAMPLE_MODEL, System, load_system
from rethinker_jax.training.layout import TrainRow

pytestmark = pytest.mark.usefixtures("quick_compilation")
REPOSITORY = Path(__file__).parent.parent
# Rows of one picture of one size and of about one length, so that little is compiled.
SMALL = """
run: {dir: out, save_every: 1, keep_checkpoints: 9}
data: {prompt_template: none}
buckets: {row_tokens: [64], vision: [[2, 4]]}
optimizer: {learning_rate: 1.0e-3, schedule: constant, warmup_steps: 1, b2: 0.99}
sft: {data: rows.jsonl, validation: held.jsonl, num_steps: 3, batch_size: 2, max_completion_tokens: 24,
      validate_every: 1}
"""


def lines(path: str) -> list[Row]:
    """Lines of a JSON-lines file without what the clock says."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def fill(folder: Path) -> None:
    (folder / "small.yaml").write_text(SMALL)
    (folder / "0.png").write_bytes(picture(0))
    bad = talk(9, True) | {"images": []}
    write(folder / "rows.jsonl", [talk(1, True), talk(2, False), bad, talk(3, True), talk(4, False), talk(5, False)])
    last = [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    held = [talk(6, True), talk(7, False) | {"messages": talk(7, False)["messages"] + last}, talk(8, False)]
    write(folder / "held.jsonl", held)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a run of three steps."""
    folder = tmp_path_factory.mktemp("sft")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["sft", "small.yaml"]) == 0
    return folder


def test_a_run_leaves_what_it_promises(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bad row dropped in silence, a step written twice, and a report without what is learned."""
    monkeypatch.chdir(straight)
    (bad,) = lines("out/bad_rows.jsonl")
    assert (bad["id"], bad["kind"]) == ("rows.jsonl row 2", "image_count")
    metrics = lines("out/metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2] and all("validation_nll" in row for row in metrics)
    summary = json.loads(Path("out/summary.json").read_text())
    found = summary["validation_nll"]
    assert summary["num_rows"] == 5 and found["after"] == metrics[-1]["validation_nll"] != found["before"]
    assert found["best"] == min(row["validation_nll"] for row in metrics)
    samples = lines("out/samples.jsonl")
    assert {row["id"] for row in samples} == {f"talk-{number}" for number in (1, 2, 3, 4, 5)}
    for row in samples:
        number = int(row["id"][-1])
        assert row["spans"] == [{"text": f"{number}+5={number + 5} \\boxed{{{number + 5}}}<|im_end|>", "learned": True}]
        assert len(row["images"]) == (number in (1, 3))
    page = Path("out/report.html").read_text()
    assert "What is learned" in page and "3+5=8 \\boxed{8}&lt;|im_end|&gt;" in page
    assert "Validation" in page and "3 steps" in page


def test_validation_is_the_mean_over_learned_tokens(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model's plain forward pass, a prompt and its completion as one text, without packing or mask arrays.

    Catches a mean over rows instead of tokens, unlearned tokens that count, images of the wrong row, and hits of the
    token before.
    """
    monkeypatch.chdir(straight)
    summary = json.loads(Path("out/summary.json").read_text())
    for directory, when in ((EXAMPLE_MODEL, "before"), (Path("out/model"), "after")):
        system, rows = opened(["data.prompt_template=none", f"model.path={directory}"])
        config, params = load_params(directory, read_config(directory), jnp.float32)
        encoder = RowEncoder(system.builder, 24)
        encoded = [encoder.encode(row).row for row in rows.validation]
        whole = [as_prompt(row) for row in encoded]
        batch = pack_prompts(whole, system.geometry, vision_buckets=[(2, 4)])
        logits = np.asarray(forward(define_model(config), params, for_device(batch)), np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = [
            (
                -log_probs[place, len(row.prompt) - 1 + t, token],
                log_probs[place, len(row.prompt) - 1 + t].argmax() == token,
            )
            for place, row in enumerate(encoded)
            for t, token in enumerate(row.completion_ids)
            if row.nll_mask[t]
        ]
        # The second row's two answers end twice, and between them stand a line break, a question and three marks.
        assert len(found) < sum(len(row.completion_ids) for row in encoded)
        nll, accuracy = np.mean(found, axis=0)
        np.testing.assert_allclose(summary["validation_nll"][when], nll, rtol=1e-4)
        assert summary["validation_token_accuracy"][when] == pytest.approx(accuracy) and 0 < accuracy < 1


def opened(overrides: Sequence[str]) -> tuple[System, Any]:
    config = load_config(Path("small.yaml"), list(overrides))
    return load_system(config), open_split(config, lambda bad: None)


def as_prompt(row: TrainRow) -> Any:
    """Prompt and completion as one prompt: text goes on from `next_position` on all axes."""
    count = len(row.completion_ids)
    following = np.broadcast_to(row.prompt.next_position + np.arange(count, dtype=np.int32), (3, count))
    return dataclasses.replace(
        row.prompt,
        token_ids=np.concatenate([row.prompt.token_ids, row.completion_ids]),
        positions=np.concatenate([row.prompt.positions, following], axis=1).astype(np.int32),
        image_index=np.concatenate([row.prompt.image_index, np.full(count, -1, np.int32)]),
    )


def test_a_run_that_goes_on_ends_as_the_straight_one(
    straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches moments, data order or the first validation that are not in the checkpoint, and rows that changed."""
    monkeypatch.chdir(straight)
    assert main(["sft", "small.yaml", "run.dir=parts", "sft.num_steps=1"]) == 0
    rows = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(rows.replace("add 4 5?", "add 4 6?"))
    capsys.readouterr()
    assert main(["sft", "small.yaml", "run.dir=parts"]) == 2
    assert "does not hold the rows" in capsys.readouterr().err
    Path("rows.jsonl").write_text(rows)
    assert main(["sft", "small.yaml", "run.dir=parts", "sft.validate_every=2"]) == 2
    assert "sft.validate_every was 1" in capsys.readouterr().err
    assert main(["sft", "small.yaml", "run.dir=parts"]) == 0
    assert lines("parts/metrics.jsonl") == lines("out/metrics.jsonl")
    one, two = (json.loads(Path(name, "summary.json").read_text())["validation_nll"] for name in ("parts", "out"))
    assert one == two
    weights = [Path(name, "model/model.safetensors").read_bytes() for name in ("parts", "out")]
    assert weights[0] == weights[1] != (EXAMPLE_MODEL / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sft.data=0.png"], "0.png"),
        (["sft.data=nothing.jsonl"], "nothing.jsonl"),
        (["sft.data=plain.jsonl"], "no row format fits its columns text"),
        (["sft.data=useless.jsonl"], "or an assistant's turn that can be learned"),
        (["sft.format=alpaca"], "sft.format is alpaca"),
        (["sft.validation_fraction=0.5"], "both set"),
        (["run.max_bad_rows=0"], "more than run.max_bad_rows=0"),
        (["sft.overlong=drop", "sft.max_completion_tokens=1"], "none of its 2 rows can be used"),
        (["sft.overlong=shorten"], "overlong"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    words: str,
) -> None:
    """Catches a traceback, a success, and a message that does not name the trouble."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    write(tmp_path / "plain.jsonl", [{"text": "a"}])
    write(tmp_path / "useless.jsonl", [{"messages": []}])
    assert main(["sft", "small.yaml", "sft.validation=held.jsonl", *overrides]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and words in said


@pytest.fixture(scope="module")
def system() -> System:
    return load_system(Config())


def setup_of(system: System, folder: Path, rows: Sequence[Row], **options: Any) -> Setup:
    write(folder / "rows.jsonl", rows)
    sft = SftConfig(data=str(folder / "rows.jsonl"), batch_size=4, max_completion_tokens=16, **options)
    config = Config(sft=sft)
    split = open_split(config, lambda bad: None)
    run = RunDirectory(folder / "run", "sft")
    return Setup(config, "x", run, system, RowEncoder(system.builder, 16), split, count_steps(sft, split.train.count))


def batch_of(setup: Setup, step: int) -> Batch:
    """The batch of a step, which one process prepares as a whole."""
    made = prepare(setup, step)
    assert isinstance(made, Batch)
    return made


def learned_counts(setup: Setup, step: int) -> Counter[int]:
    """How often each number of learned tokens occurs among the rows of a step."""
    batches = batch_of(setup, step).micro_batches
    counts = np.concatenate([np.asarray(batch.nll_mask).sum(-1) for batch in batches])
    return Counter(int(count) for count in counts if count)


def test_epochs_meet_every_row_as_often(system: System, tmp_path: Path) -> None:
    """Two passes over 5 rows in batches of 4 are 3 steps of 4, 4 and 2 rows. Catches a tail that is dropped or filled
    up with rows of a third pass."""
    # A row of n digits apart from each other has n tokens or so and an end token: different for every row.
    setup = setup_of(
        system, tmp_path, [{"question": "?", "completion": "\n".join("12345"[: n + 1])} for n in range(5)], num_epochs=2
    )
    met = [learned_counts(setup, step) for step in range(setup.num_steps)]
    assert [sum(one.values()) for one in met] == [4, 4, 2]
    total = sum(met, Counter())
    assert len(total) == 5 and set(total.values()) == {2}
    assert [count_steps(SftConfig(num_epochs=1, batch_size=4), rows) for rows in (1, 4, 5)] == [1, 1, 2]
    assert count_steps(SftConfig(num_steps=7), 5) == 7
    assert is_finished(SftConfig(num_epochs=1), {"num_epochs": 1, "num_steps": 3})
    assert not is_finished(SftConfig(num_epochs=2), {"num_epochs": 1, "num_steps": 9999})
    assert not is_finished(SftConfig(num_steps=4), {"num_epochs": 1, "num_steps": 3})


def test_long_completions_are_cut_or_left_out(system: System, tmp_path: Path) -> None:
    """Catches a row that is cut where it should be dropped, and shares that are not counted."""
    rows = [{"question": "?", "completion": text} for text in ("1", "2", "3", "4" + "\n5" * 40)]
    cut = batch_of(setup_of(system, tmp_path, rows), 0)
    drop = setup_of(system, tmp_path, rows, overlong="drop")
    dropped = batch_of(drop, 0)
    assert (cut.cut_share, cut.dropped_share, dropped.cut_share, dropped.dropped_share) == (0.25, 0.0, 0.0, 0.25)
    assert sorted(learned_counts(setup_of(system, tmp_path, rows), 0).elements()) == [2, 2, 2, 16]
    assert sorted(learned_counts(drop, 0).elements()) == [2, 2, 2]
    none = setup_of(system, tmp_path, rows[-1:], overlong="drop")
    with pytest.raises(UserError, match="too long"):
        batch_of(none, 0)


HOSTILE = "</pre></script><img src=x onerror=alert(1)>\u202eabc"


def test_a_report_of_hostile_rows_is_inert(tmp_path: Path) -> None:
    """Data sets are not ours. Catches markup out of a row, a picture that is a link, and text that turns round."""
    (tmp_path / "config.yaml").write_text("sft: {num_steps: 4, num_epochs: 0}\n")
    write(tmp_path / "metrics.jsonl", [{"step": 0, "nll": 2.0, "validation_nll": None}, {"step": 1, "nll": 1.5}])
    spans = [{"text": HOSTILE, "learned": True}, {"text": "not this", "learned": "yes"}, 7]
    images = ['x" onerror="alert(1)', "https://example.com/a.png", "UklGRg==", "A" * 300_000]
    row = {"id": HOSTILE, "prompt_text": HOSTILE, "images": images, "spans": spans, "num_tokens": "many"}
    write(tmp_path / "samples.jsonl", [row, {"id": "bare"}, {"spans": "none"}])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"id": "torn')
    page = write_report(tmp_path).read_text()
    assert "<img src=x" not in page and 'onerror="' not in page and "example.com" not in page and "\u202e" not in page
    assert page.count("data:image/") == page.count("data:image/webp;base64,UklGRg==") == 1
    assert "<mark>&lt;/pre&gt;&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;[U+202E]abc</mark>not this</pre>" in page
    assert "2 of 4 steps" in page and "Training" in page and "Validation" not in page
    assert page.count('class="card learned"') == 3


def test_presets_load() -> None:
    """The two published sets of values differ, and each is where it belongs; catches a key that has been renamed."""
    paper, released = (
        load_config(REPOSITORY / "configs" / f"openvlthinker_sft_{name}.yaml", []) for name in ("paper", "released")
    )
    assert (paper.optimizer.learning_rate, paper.optimizer.warmup_fraction, paper.sft.batch_size) == (5e-7, 0.1, 32)
    assert (released.optimizer.learning_rate, released.optimizer.warmup_fraction) == (5e-6, 0.15)
    assert released.sft.batch_size == 64 and released.model.freeze == ("vision", "merger") and not paper.model.freeze
    for config in (paper, released):
        assert (config.optimizer.schedule, config.sft.num_epochs, config.data.max_pixels) == ("cosine", 1, 262144)
