"""Who does what: prompts over shards and waves, requests over the queues of the shards. Numpy alone.

A *shard* is one place along the batch axes of the mesh; it has its own slots and its own queue. A *wave* is what is
prefilled together. A request goes to the shard that holds its prompt, and behind all requests of earlier waves.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """shared: every shard holds all prompts, because they are fewer than the shards.

    waves       wave → int [rows of a wave], the number of the prompt in each row, -1 = none.
    queue       places in every shard's queue; row of the device's tables = shard · queue + place.
    row_of      int [requests], that row.
    prompt_row  int [requests], the prompt's row in its shard's part of its wave.
    wave_place  int [requests], the place among its shard's requests of the wave.
    limits      int [waves, shards], how many of its requests a shard may have begun once a wave is prefilled.
    """

    shards: int
    shared: bool
    waves: np.ndarray
    queue: int
    row_of: np.ndarray
    prompt_row: np.ndarray
    wave_of: np.ndarray
    wave_place: np.ndarray
    limits: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """int [shards], requests of each."""
        return self.limits[-1]

    @property
    def num_rows(self) -> int:
        return self.shards * self.queue

    @property
    def wave_queue(self) -> int:
        """Most requests that a shard has in one wave."""
        return int(np.diff(self.limits, axis=0, prepend=0).max())


def make_schedule(
    prompt_of: Sequence[int],
    num_prompts: int,
    samples: Sequence[int],
    *,
    shards: int,
    wave_rows: int,
    requests_per_prompt: int,
) -> Schedule:
    """Prompts go round the shards, so that no shard has two more than another.

    prompt_of, samples: the prompt of each request, numbered from 0, and its sample. wave_rows: prompts of a wave over
    all shards. num_prompts and requests_per_prompt give the shapes, which may be larger than what is there.
    """
    asked = np.array(prompt_of, np.int64)
    shared = num_prompts < shards
    if shared:
        per_shard = num_prompts
        waves = np.arange(num_prompts)[None]
        # By its name, so that the second pass over a sample finds it where the first left it.
        shard_of, wave_of, prompt_row = (asked + np.array(samples)) % shards, np.zeros_like(asked), asked
        queue = -(-num_prompts * requests_per_prompt // shards)
    else:
        per_shard = max(1, wave_rows // shards)
        num_waves = -(-(int(asked.max()) + 1) // (shards * per_shard))
        # Prompt p: shard p mod shards, and there the place p div shards.
        places = np.arange(num_waves * shards * per_shard).reshape(num_waves, per_shard, shards)
        waves = np.where(places < num_prompts, places, -1).swapaxes(1, 2).reshape(num_waves, -1)
        shard_of, local = asked % shards, asked // shards
        wave_of, prompt_row = local // per_shard, local % per_shard
        queue = -(-num_prompts // shards) * requests_per_prompt
    row_of, wave_place = np.zeros_like(asked), np.zeros_like(asked)
    limits = np.zeros((len(waves), shards), np.int64)
    queues = []
    for shard in range(shards):
        mine = np.flatnonzero(shard_of == shard)
        mine = mine[np.argsort(wave_of[mine], kind="stable")]
        limits[:, shard] = np.searchsorted(wave_of[mine], np.arange(len(waves)), side="right")
        queues.append(mine)
    queue = max(queue, *map(len, queues), 1)
    for shard, mine in enumerate(queues):
        row_of[mine] = shard * queue + np.arange(len(mine))
        begins = np.concatenate([[0], limits[:-1, shard]])
        wave_place[mine] = np.arange(len(mine)) - begins[wave_of[mine]]
    return Schedule(shards, shared, waves, queue, row_of, prompt_row, wave_of, wave_place, limits)
