"""Groups that are run with their prompt once, in packed rows: who sees what, what it costs, and that it is exact."""

import dataclasses
import io
from typing import Any

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from rethinker_jax.config import BucketsConfig, Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.models.qwen25vl import Params
from rethinker_jax.models.sharding import Parts
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import Packed, pack_micro_batches
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.packing import Group, Piece, pack_cell, sequences_of, spread
from rethinker_jax.training.update import Updater
from rethinker_jax.types import Problem, Prompt

LENGTH = 64
LOSS = LossConfig(nll_coefficient=0.5, entropy_coefficient=0.01)


@dataclasses.dataclass(frozen=True)
class Tiny:
    system: System
    updater: Updater
    prompts: list[Prompt]

    def step(self, batches: Any) -> tuple[dict[str, float], Params]:
        """Metrics, and Adam's first moment after one step: the gradient, times 1 - b1."""
        state = self.updater.init(jax.tree.map(np.array, self.system.params))
        state, metrics = self.updater.step(state, batches)
        return {name: float(value) for name, value in metrics.items()}, optax.tree.get(state.opt_state, "mu")


def png(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Tiny:
    directory = tmp_path_factory.mktemp("model")
    build_model_directory(directory)
    config = Config(
        model=ModelConfig(path=str(directory), init="random", dtype="float32"),
        data=DataConfig(prompt_template="none"),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0, clip_norm=1e9),
    )
    system = load_system(config)
    problems = [
        Problem("one", "<image> How many?", "1", (png(84, 84, 1),)),
        Problem("none", "What is 2 + 3?", "5"),
        Problem("two", "<image> or <image>?", "2", (png(84, 56, 2), png(28, 28, 3))),
        Problem("alone", "Is <image> red?", "2", (png(56, 56, 4),)),
    ]
    prompts = [system.builder.build(problem) for problem in problems]
    return Tiny(system, make_updater(config, system, 100, LOSS), prompts)


def make_rows(tiny: Tiny) -> list[TrainRow]:
    """Three groups of three and a row alone, in mixed order; lengths of a long tail, some of 1."""
    rng = np.random.default_rng(0)
    lengths = [30, 1, 7, 3, 55, 12, 2, 9, 21, 5]
    rows = []
    for place, length in enumerate(lengths):
        prompt = tiny.prompts[place % 3] if place < 9 else tiny.prompts[3]
        learned = np.arange(length) % 5 != 3
        ids = rng.integers(5, 200, length).astype(np.int32)
        advantage = float(rng.normal())
        rows.append(TrainRow(prompt, ids, learned, ~learned, np.full(length, -5.9, np.float32), advantage))
    return rows


def apart(rows: list[TrainRow]) -> list[TrainRow]:
    """The same rows, each with a prompt of its own: nothing is shared but images."""
    return [dataclasses.replace(row, prompt=dataclasses.replace(row.prompt)) for row in rows]


def pack(tiny: Tiny, rows: list[TrainRow], micro_tokens: int = 0, shards: int = 1, **buckets: Any) -> Packed:
    settings = BucketsConfig(**buckets)
    parts = Parts(shards, shards)
    return pack_micro_batches(rows, tiny.system.geometry, LENGTH, len(rows), micro_tokens, settings, parts)


def log_probs(tiny: Tiny, packed: Packed) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for batch, numbers in zip(packed.batches, packed.rows, strict=True):
        values = np.asarray(tiny.updater.log_probs(tiny.system.params, batch))
        found |= {number: values[place] for place, number in enumerate(numbers)}
    return found


# How the same ten rows may be laid out: (micro_tokens, shards, buckets).
LAYOUTS = {
    "one row": (0, 1, {"row_tokens": (512,)}),
    "all cut": (0, 1, {"row_tokens": (40,)}),  # shorter than every prompt with an image
    "micro-batches and shards": (50, 2, {}),
}


@pytest.fixture(scope="module")
def separate(tiny: Tiny) -> tuple[dict[int, np.ndarray], dict[str, float], Params]:
    """Log-probs, metrics and gradients of rows with a prompt each."""
    packed = pack(tiny, apart(make_rows(tiny)), row_tokens=(512,))
    assert packed.num_tokens == packed.num_separate and not packed.batches[0].text.prefix_index.size
    return log_probs(tiny, packed), *tiny.step(packed.batches)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_group_is_exact(tiny: Tiny, separate: tuple[dict[int, np.ndarray], dict[str, float], Params], name: str):
    """Loss, log-probs and every gradient are those of rows with a prompt each, to 1e-5. Catches completions that see
    each other, a prompt whose gradient is of one completion alone, a cut piece that forgets what was before it, and
    positions that count on from another row."""
    rows = make_rows(tiny)
    micro_tokens, shards, buckets = LAYOUTS[name]
    packed = pack(tiny, rows, micro_tokens, shards, **buckets)
    assert packed.num_tokens < 0.75 * packed.num_separate
    wanted_log_probs, wanted_metrics, wanted_gradient = separate
    found = log_probs(tiny, packed)
    assert sorted(found) == list(range(len(rows)))
    for number, values in found.items():
        np.testing.assert_allclose(values, wanted_log_probs[number], atol=2e-5)
    metrics, gradient = tiny.step(packed.batches)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-6)
    for leaf, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        assert np.abs(leaf - wanted).max() <= 1e-5 * np.abs(wanted).max() + 1e-9


def long_tailed(seed: int, num_groups: int, n: int) -> list[Group]:
    """Lengths of mean 400, cut at 2,048, as completions have them; prompts of 300 to 1,500 tokens."""
    rng = np.random.default_rng(seed)
    rows = iter(range(num_groups * n))
    groups = []
    for _ in range(num_groups):
        lengths = np.clip(rng.lognormal(np.log(400) - 0.5, 1.0, n), 1, 2048).astype(int)
        groups.append(Group(tuple(next(rows) for _ in range(n)), int(rng.integers(300, 1500)), tuple(lengths.tolist())))
    return groups


def whole(pieces: list[Piece]) -> list[Piece]:
    """The sequences that the pieces make up, if they do: each begins where the one before ends."""
    made: dict[tuple[int, int | None], Piece] = {}
    for piece in sorted(pieces, key=lambda piece: piece.first):
        name = piece.group, piece.row
        before = made.get(name, dataclasses.replace(piece, first=0, num_tokens=0))
        assert piece.first == before.num_tokens
        made[name] = dataclasses.replace(before, num_tokens=before.num_tokens + piece.num_tokens)
    return sorted(made.values(), key=str)


@pytest.mark.parametrize(("num_groups", "n", "row_tokens"), [(16, 8, 512), (4, 8, 2048), (64, 1, 512), (1, 8, 128)])
def test_rows_hold_every_token_once(num_groups: int, n: int, row_tokens: int) -> None:
    """Catches tokens that are lost or run twice, rows that are overfull, and pieces too long for their row."""
    for seed in range(10):
        cell = long_tailed(seed, num_groups, n)
        rows = pack_cell(cell, row_tokens)
        assert whole([piece for row in rows for piece in row.pieces]) == sorted(sequences_of(cell), key=str)
        assert all(sum(piece.num_tokens for piece in row.pieces) == row.num_tokens <= row_tokens for row in rows)
        # Keys before a row, by hand: a prompt once for all its completions that begin here, and with every later piece
        # its prompt and what came before it.
        for row in rows:
            begun = {piece.group for piece in row.pieces if piece.row is not None and not piece.first}
            later = [piece for piece in row.pieces if piece.first]
            wanted = sum(cell[group].shared_tokens for group in begun) + sum(piece.first for piece in later)
            wanted += sum(cell[piece.group].shared_tokens for piece in later if piece.row is not None)
            assert row.prefix_tokens == wanted


def test_padding_is_a_few_percent_of_long_tailed_lengths() -> None:
    """Catches rows as long as the longest completion: 8 of mean 400 and at most 2,048 would be four fifths padding."""
    fills = [
        sum(group.num_tokens for group in cell) / (512 * len(pack_cell(cell, 512)))
        for cell in (long_tailed(seed, 16, 8) for seed in range(8))
    ]
    assert min(fills) > 0.94 and np.mean(fills) > 0.96


@pytest.mark.parametrize("num_cells", [2, 5, 8])
def test_cells_are_even_and_whole(num_cells: int) -> None:
    """Every row is in one cell; where groups are fewer than cells they are halved, else they stay whole. Catches cells
    that wait for the fullest, a row that is lost in halving, and prompts run twice for nothing."""
    for seed in range(10):
        groups = long_tailed(seed, 5, 8)
        cells = spread(groups, num_cells)
        loads = [sum(group.num_tokens for group in cell) for cell in cells]
        assert sorted(row for cell in cells for group in cell for row in group.rows) == list(range(40))
        assert max(loads) < 1.5 * np.mean(loads)  # whole groups in 8 cells: 1.6 and more
        lengths = {
            row: length for group in groups for row, length in zip(group.rows, group.completion_tokens, strict=True)
        }
        for group in (group for cell in cells for group in cell):
            assert group.completion_tokens == tuple(lengths[row] for row in group.rows)
    even = [Group(tuple(range(place * 8, place * 8 + 8)), 100, (50,) * 8) for place in range(16)]
    assert sorted((group for cell in spread(even, 8) for group in cell), key=str) == sorted(even, key=str)
    assert [len(cell) for cell in spread(even[:1], 16)].count(0) == 8  # eight rows cannot fill sixteen cells


def test_rows_of_one_prompt_are_one_group_wherever_they_come_from(tiny: Tiny) -> None:
    """A replayed row joins its fresh siblings. Catches groups that are found by neighbourhood."""
    rows = make_rows(tiny)
    packed = pack(tiny, [*rows[:4], dataclasses.replace(rows[3], fresh=False)])
    # Prompts of rows 0 and 3 and the replayed one are the same; they are fed its last token each.
    prompts = [len(row.prompt) for row in rows[:3]]
    completions = sum(len(rows[place].completion_ids) for place in (0, 1, 2, 3, 3))
    assert packed.num_tokens == sum(prompts) - 3 + completions
    assert packed.num_separate == sum(prompts) + 2 * prompts[0] + completions - 5
