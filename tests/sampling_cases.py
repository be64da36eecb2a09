"""The model, prompts and oracles of the decoding tests. As a program: a few completions on a mesh, as JSON.

python tests/sampling_cases.py MODEL_DIRECTORY
"""

import dataclasses
import functools
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rethinker_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, SamplingConfig
from rethinker_jax.example.model_config import build_model_directory
from rethinker_jax.example.tasks import make_task
from rethinker_jax.models.qwen25vl import Model, Params, param_shapes
from rethinker_jax.models.qwen_config import read_config
from rethinker_jax.models.weights import save_params
from rethinker_jax.prompts.batch import PromptBatch, pack_prompts
from rethinker_jax.prompts.positions import mrope_positions
from rethinker_jax.sampling.sampler import Budgets, Counters, Drawn, Kept, Request
from rethinker_jax.system import System, load_system, make_updater
from rethinker_jax.training.batch import pack_rows
from rethinker_jax.training.layout import TrainRow
from rethinker_jax.training.update import Updater
from rethinker_jax.types import Completion, Prompt

TASKS = (0, 1, 3, 6, 8, 16)  # one image three times, two images, none, two images
NUM_SAMPLES = 4
NEW = 10  # tokens
# On the first every device holds all six prompts, on the second each kv head is there twice.
MESHES = (MeshConfig(data=1, fsdp=4, context=2), MeshConfig(data=2, fsdp=1, tensor=4))
MESH_BUDGETS = Budgets(first=6)
MESH_SETTINGS = SamplingConfig(num_slots=8, steps_per_call=4)


PLAIN = Budgets(first=NEW)
SECOND_LOOK = 5
MAX_FIRST = 5
FORCED = Budgets(first=NEW, second=SECOND_LOOK, max_first=MAX_FIRST, trigger_width=4)
CONTINUED = Budgets(first=MAX_FIRST, second=SECOND_LOOK, prefix_width=MAX_FIRST + 4)
NEAR = 5e-5  # between log-probs of other shapes; sums are taken in another order


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in both layouts, requests, and what they draw when nothing ends them."""

    system: System
    params: Params
    updater: Updater
    requests: list[Request]
    trigger: np.ndarray

    @property
    def prompts(self) -> list[Prompt]:
        return [request.prompt for request in self.requests[::NUM_SAMPLES]]

    def generate(
        self,
        requests: Sequence[Request] | None = None,
        budgets: Budgets = PLAIN,
        *,
        ends: tuple[int, ...] | None = None,
        seed: int = 0,
        step: int = 0,
        second_temperature: float = 0.9,
        num_prompts: int | None = None,
        num_requests: int | None = None,
        kept: Kept | None = None,
        ring: int = 256,
        **settings: Any,
    ) -> tuple[list[Drawn], Counters]:
        sampler = self.system.sampler
        ends = sampler.end_ids if ends is None else ends
        return dataclasses.replace(sampler, end_ids=ends, ring=ring).generate(
            self.params, self.requests if requests is None else requests, SamplingConfig(**settings), budgets,
            seed=seed, step=step, second_temperature=second_temperature, num_prompts=num_prompts,
            num_requests=num_requests, kept=kept,
        )  # fmt: skip

    def draw(self, *args: Any, **options: Any) -> list[Completion]:
        return [one.completion for one in self.generate(*args, **options)[0]]

    @functools.cached_property
    def free(self) -> list[Completion]:
        """All requests' completions, which only their budget ends."""
        return self.draw(ends=())

    @functools.cached_property
    def common(self) -> tuple[int, ...]:
        """Tokens by how often they stand early in `free`; as end tokens they end some early, some late, some never."""
        counts = np.bincount(np.concatenate([one.token_ids[:6] for one in self.free]))
        return tuple(np.argsort(-counts, kind="stable").tolist())

    @property
    def ends(self) -> tuple[int, ...]:
        return self.common[:4]

    @functools.cached_property
    def forced_requests(self) -> list[Request]:
        """Every second request has the trigger."""
        return [
            dataclasses.replace(one, trigger_ids=self.trigger) if place % 2 else one
            for place, one in enumerate(self.requests)
        ]


def build_directory(directory: Path) -> None:
    """The example's model directory, one layer shorter, with random weights.

    The next token hangs on all that it sees: no norm or bias is at its default, and logits are of size 3.
    """
    build_model_directory(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    config = read_config(directory)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape, np.float32)
        if name.endswith("['scale']"):
            return 1.0 + np.float32(0.3) * noise
        small = name.endswith(("bias']", "['embedding']"))
        return np.float32(0.3 if small else 0.15) * noise

    params = jax.tree_util.tree_map_with_path(draw, param_shapes(config))
    save_params(directory, config, params, "float32")


def make_config(directory: Path, mesh: MeshConfig) -> Config:
    return Config(model=ModelConfig(path=str(directory)), mesh=mesh, data=DataConfig(prompt_template="none"))


def make_prompts(system: System) -> list[Prompt]:
    return [system.builder.build(make_task(0, index).problem) for index in TASKS]


def make_requests(prompts: Sequence[Prompt]) -> list[Request]:
    return [Request(prompt, sample) for prompt in prompts for sample in range(NUM_SAMPLES)]


def grown(prompt: Prompt, ids: np.ndarray, system: System) -> Prompt:
    """The prompt with `ids` behind it, positions made anew for the whole."""
    token_ids = np.concatenate([prompt.token_ids, ids]).astype(np.int32)
    grids = [image.grid for image in prompt.images]
    positions, after = mrope_positions(token_ids, system.tokenizer.image_token_id, grids, system.geometry.merge_size)
    index = np.append(prompt.image_index, np.full(len(ids), -1)).astype(np.int32)
    return dataclasses.replace(prompt, token_ids=token_ids, positions=positions, image_index=index, next_position=after)


def load(directory: Path) -> Loaded:
    build_directory(directory)
    config = make_config(directory, MeshConfig())
    system = load_system(config)
    return Loaded(
        system, system.sampling_params(system.params), make_updater(config, system, 1, LossConfig()),
        make_requests(make_prompts(system)), system.tokenizer.encode("\n\nWait"),
    )  # fmt: skip


def assert_same(ours: Sequence[Completion], theirs: Sequence[Completion]) -> None:
    assert [one.token_ids.tolist() for one in ours] == [one.token_ids.tolist() for one in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=NEAR)
        assert (a.finish_reason, a.text, a.parts) == (b.finish_reason, b.text, b.parts)


def trainer_log_probs(loaded: Loaded, completions: Sequence[Completion]) -> list[np.ndarray]:
    rows = []
    for request, one in zip(loaded.requests, completions, strict=True):
        none = np.zeros(len(one), bool)
        rows.append(TrainRow(request.prompt, one.token_ids, none, none, np.zeros(len(one), np.float32)))
    batch = pack_rows(rows, loaded.system.geometry, FORCED.total, len(rows))
    found = np.asarray(loaded.updater.log_probs(loaded.system.params, batch))
    return [row[: len(one)] for row, one in zip(found, completions, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def last_logits(model: Model, params: Params, batch: PromptBatch) -> jax.Array:
    table = None if batch.vision is None else model.encode_images(params, batch.vision)
    hidden = model.hidden(params, batch.text, table)
    last = jnp.take_along_axis(hidden, (batch.text.lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(params, last)


def naive_greedy(system: System, prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    """`count` most probable tokens for each prompt, by the whole model on the growing sequence; no caches, no slots."""
    params, never = system.params, system.sampler.never
    ids: list[list[int]] = [[] for _ in prompts]
    for _ in range(count):
        longer = [
            grown(prompt, np.array(tokens, np.int32), system) for prompt, tokens in zip(prompts, ids, strict=True)
        ]
        batch = pack_prompts(longer, system.geometry, seq_minimum=128, vision_buckets=[(8, 4)])
        assert batch.vision is not None
        batch = dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, merged_index=()))
        logits = np.array(last_logits(system.model, params, batch))
        logits[:, never] = -np.inf
        for tokens, row in zip(ids, logits, strict=True):
            tokens.append(int(row.argmax()))
    return ids


def mesh_completions(system: System) -> list[Completion]:
    """What is drawn on a mesh, and with all prompts in another order of slots than on one device."""
    requests = make_requests(make_prompts(system))
    drawn, _ = system.sampler.generate(
        system.sampling_params(system.params), requests, MESH_SETTINGS, MESH_BUDGETS, seed=3, step=5
    )
    return [one.completion for one in drawn]


def main(directory: Path) -> None:
    """Print for every mesh the completions' tokens and log-probs, and how many decode loops were compiled."""
    compiled: list[str | int] = []

    def note(event: str, duration_secs: float, **names: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(names["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    found = []
    for mesh in MESHES:
        compiled.clear()
        drawn = mesh_completions(load_system(make_config(directory, mesh)))
        found.append(
            {
                "ids": [completion.token_ids.tolist() for completion in drawn],
                "log_probs": [completion.log_probs.tolist() for completion in drawn],
                "compiled": compiled.count("jit(run)"),
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
