"""One compiled function per bucket: after a batch of every shape, no resolution, number or length compiles anything."""

import dataclasses
import io
import random

import jax
import numpy as np
import pytest
from PIL import Image

from rethinker_jax.config import BucketsConfig, Config, DataConfig, LossConfig, ModelConfig, SamplingConfig
from rethinker_jax.devices import CompileCounter
from rethinker_jax.prompts.windows import choose_bucket
from rethinker_jax.sampling.sampler import Budgets, Counters, Request
from rethinker_jax.step_metrics import packing_metrics
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import Packed, pack_micro_batches
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.update import TrainState, Updater
from rethinker_jax.types import Problem, Prompt

PROMPT_TOKENS, ROW_TOKENS = (128, 256), (160, 288)
VISION = ((2, 4), (4, 16))  # rows, windows a row; an image has at most 16 windows
BUCKETS = BucketsConfig(PROMPT_TOKENS, ROW_TOKENS, rows=(2,), targets=(64,), vision=VISION)
NUM_PROMPTS, NUM_NEW = 2, 6
NUM_BATCHES = 200


@dataclasses.dataclass
class Run:
    """The sampler and the update of one model; counts what is compiled for them."""

    system: System
    updater: Updater
    state: TrainState
    compiled: CompileCounter

    def feed(self, prompts: list[Prompt], lengths: list[int]) -> tuple[Counters, Packed, int]:
        """Draw from the prompts, and make a step on completions of `lengths` tokens. Counts what was compiled."""
        before = self.compiled.count
        requests = [Request(prompt, 0) for prompt in prompts]
        settings = SamplingConfig(num_slots=NUM_PROMPTS, steps_per_call=4, stop_strings=("never drawn",))
        _, counters = self.system.sampler.generate(
            self.system.sampling_params(self.state.params), requests, settings, Budgets(NUM_NEW), seed=0, step=0,
            num_prompts=NUM_PROMPTS,
        )  # fmt: skip
        rows = [make_row(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
        packed = pack_micro_batches(rows, self.system.geometry, 32, NUM_PROMPTS, 0, BUCKETS)
        self.state, sums = self.updater.step(self.state, packed.batches)
        assert np.isfinite(jax.device_get(sums["loss"]))
        return counters, packed, self.compiled.count - before


def shape_of(packed: Packed) -> tuple[int, tuple[int, ...] | None]:
    [batch] = packed.batches
    return batch.text.token_ids.shape[-1], None if batch.vision is None else batch.vision.shape


def make_row(prompt: Prompt, length: int) -> TrainRow:
    learned = np.ones(length, bool)
    ids = np.arange(10, 10 + length, dtype=np.int32)
    return TrainRow(prompt, ids, learned, ~learned, np.zeros(length, np.float32), 1.0)


def make_prompt(system: System, name: str, sizes: list[tuple[int, int]], num_words: int) -> Prompt:
    """Words and images of (width, height) pixels in random order."""
    rng = random.Random(name)
    parts = [rng.choice(("red", "circle", "how", "many")) for _ in range(num_words)]
    files = []
    for size in sizes:
        file = io.BytesIO()
        Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3))).save(file, "png")
        files.append(file.getvalue())
        parts.insert(rng.randrange(len(parts) + 1), "<image>")
    return system.builder.build(Problem(name, " ".join(parts), "1", tuple(files)))


@pytest.fixture(scope="module")
def run(quick_compilation: None) -> Run:
    config = Config(model=ModelConfig(init="random"), buckets=BUCKETS, data=DataConfig(prompt_template="none"))
    system, compiled = load_system(config), CompileCounter()
    updater = make_updater(config, system, 1000, LossConfig())
    return Run(system, updater, updater.init(system.params), compiled)


def test_no_resolution_number_or_length_compiles_anew(run: Run) -> None:
    """Catches a shape that depends on an image's grid, on the number of images or on a length, and not on a bucket."""
    small, large, seen = (56, 56), (220, 220), set()
    # Short and long prompts with no image, small ones and large ones: every bucket once.
    for words in (5, 80):
        for number, images in enumerate(([], [small], [large])):
            prompts = [make_prompt(run.system, f"warm-{words}-{number}-{i}", images, words) for i in range(NUM_PROMPTS)]
            _, packed, _ = run.feed(prompts, [1] * NUM_PROMPTS)
            seen.add(shape_of(packed))
    assert len(seen) == len(ROW_TOKENS) * (len(VISION) + 1)
    assert run.compiled.count > 2 * len(seen)  # else nothing is counted

    rng = random.Random(0)
    grids, shapes, padding = set(), set(), []
    for number in range(NUM_BATCHES):
        prompts = []
        for i in range(NUM_PROMPTS):
            sizes = [(rng.randrange(28, 221), rng.randrange(28, 221)) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
            prompts.append(make_prompt(run.system, f"{number}-{i}", sizes, rng.randrange(1, 45)))
        lengths = [rng.randrange(1, 33) for _ in prompts]
        counters, packed, compiled = run.feed(prompts, lengths)
        vision = packed.batches[0].vision
        grids |= {image.grid for prompt in prompts for image in prompt.images}
        shapes.add(shape_of(packed))
        assert compiled == 0, f"batch {number} compiled {compiled} programs: {shape_of(packed)}, {sizes}, {lengths}"

        # Waste is what was padded: by hand, from the lengths and the bucket.
        longest = max(map(len, prompts))
        tokens = sum(map(len, prompts))
        assert counters.prompt_fill == pytest.approx(tokens / NUM_PROMPTS / choose_bucket(longest, PROMPT_TOKENS))
        if vision is not None:
            patches = {id(image): len(image.patches) for prompt in prompts for image in prompt.images}
            assert vision.fill == counters.vision_fill
            assert vision.fill * vision.valid.size == pytest.approx(sum(patches.values()))
        used = tokens + sum(lengths) - NUM_PROMPTS  # a completion's last token predicts nothing
        found = packing_metrics(packed)
        assert found["row_padding_share"] == pytest.approx(1 - used / packed.batches[0].text.token_ids.size)
        assert found["shared_prompt_saving"] == 0
        padding.append(found["row_padding_share"])
    assert len(grids) > 40 and len(shapes) >= 4 and len(set(padding)) > 100


def test_what_no_bucket_holds_is_compiled_and_not_refused(run: Run) -> None:
    """Catches a stop, or a cut prompt, where a row is longer than every bucket of the config."""
    prompt = make_prompt(run.system, "long", [], PROMPT_TOKENS[-1] + 10)
    counters, packed, compiled = run.feed([prompt, prompt], [3, 3])
    assert compiled > 0 and packed.batches[0].text.token_ids.shape[-1] == ROW_TOKENS[-1]
    # The prompt without its last token, which is run with each completion; these without their own last one.
    assert counters.prompts == 1 and packed.num_tokens == len(prompt) - 1 + 2 * 3
    assert packed.num_separate == 2 * (len(prompt) + 2)
