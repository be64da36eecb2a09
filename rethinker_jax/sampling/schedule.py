"""Who does what: prompts over shards and waves, requests over the queues of the shards. Numpy alone.

A *shard* is one place along the batch axes of the mesh; it has its own slots and its own queue. A *wave* is what is
prefilled together. A request goes to the shard that holds its prompt, and behind all requests of earlier waves. The
requests of a wave come in one *round*, or in several where the first responses that they go on from are read again and
not all fit at once.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """shared: every shard holds all prompts.

    waves       wave → int [rows of a wave], the number of the prompt in each row, -1 = none.
    queue       places in every shard's queue; row of the device's tables = shard · queue + place.
    round_queue places for the requests of one round in every shard.
    row_of      int [requests], that row.
    prompt_row  int [requests], the prompt's row in its shard's part of its wave.
    round_of    int [requests], and round_place, the place among its shard's requests of the round.
    wave_of     int [rounds], the wave whose prompts a round wants.
    limits      int [rounds, shards], how many of its requests a shard may have begun once a round is ready.
    """

    shards: int
    shared: bool
    waves: np.ndarray
    queue: int
    round_queue: int
    row_of: np.ndarray
    prompt_row: np.ndarray
    round_of: np.ndarray
    round_place: np.ndarray
    wave_of: np.ndarray
    limits: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """int [shards], requests of each."""
        return self.limits[-1]

    @property
    def num_rows(self) -> int:
        return self.shards * self.queue


def make_schedule(
    prompt_of: Sequence[int],
    num_prompts: int,
    *,
    shards: int,
    shared: bool,
    wave_rows: int,
    requests_per_prompt: int,
    images_of: Sequence[Sequence[int]],
    shard_of: Sequence[int] | None = None,
    round_requests: int | None = None,
) -> Schedule:
    """Prompts go round the shards, so that no shard has two more than another.

    prompt_of: the prompt of each request, numbered from 0. wave_rows: prompts of a wave over all shards. num_prompts
    and requests_per_prompt give the shapes, which may be larger than what is there. images_of: of every prompt that
    there is, what its images are called; prompts that share one come in one wave. shard_of: under `shared`, where
    another call put each request; without it they go round. round_requests: most of a shard in one round.
    """
    asked = np.array(prompt_of, np.int64)
    if shared:
        per_shard = num_prompts
        waves = np.arange(num_prompts)[None]
        where = np.arange(len(asked)) % shards if shard_of is None else np.array(shard_of, np.int64)
        wave, prompt_row = np.zeros_like(asked), asked
        queue = round_queue = -(-num_prompts * requests_per_prompt // shards)
    else:
        per_shard = max(1, wave_rows // shards)
        places = _places(images_of, shards * per_shard)
        # Place p: shard p mod shards, and there the row p div shards.
        where, local = places[asked] % shards, places[asked] // shards
        wave, prompt_row = local // per_shard, local % per_shard
        waves = np.full((wave.max() + 1, shards, per_shard), -1)
        waves[wave, where, prompt_row] = asked
        waves = waves.reshape(len(waves), -1)
        queue, round_queue = -(-num_prompts // shards) * requests_per_prompt, per_shard * requests_per_prompt
    counts = np.zeros((len(waves), shards), np.int64)
    np.add.at(counts, (wave, where), 1)
    queue, round_queue = max(queue, int(counts.sum(axis=0).max())), max(round_queue, int(counts.max()))
    round_queue = min(round_queue, round_requests or round_queue)
    rounds = -(-counts.max(axis=1) // round_queue)  # of each wave
    first_round = np.cumsum(rounds) - rounds
    begins = np.cumsum(counts, axis=0) - counts
    order = np.lexsort((np.arange(len(asked)), wave, where))
    place = np.zeros_like(asked)  # among the shard's requests
    for shard in range(shards):
        mine = order[where[order] == shard]
        place[mine] = np.arange(len(mine))
    in_wave = place - begins[wave, where]
    wave_of = np.repeat(np.arange(len(waves)), rounds)
    passed = (np.arange(len(wave_of)) - first_round[wave_of] + 1)[:, None] * round_queue
    return Schedule(
        shards, shared, waves, queue, round_queue,
        row_of=where * queue + place,
        prompt_row=prompt_row,
        round_of=first_round[wave] + in_wave // round_queue,
        round_place=in_wave % round_queue,
        wave_of=wave_of,
        limits=begins[wave_of] + np.minimum(passed, counts[wave_of]),
    )  # fmt: skip


def _places(images_of: Sequence[Sequence[int]], wave: int) -> np.ndarray:
    """int [prompts]: places in the order of prefilling, `wave` of them at a time.

    Prompts that share an image stand side by side, and begin a wave where they would not fit into the last one. More
    of them than a wave holds are cut.
    """
    groups: list[list[int]] = []
    group_of: dict[int, list[int]] = {}  # image → prompts
    for prompt, images in enumerate(images_of):
        known = {id(group_of[image]): group_of[image] for image in images if image in group_of}
        merged = next(iter(known.values()), [])
        if not known:
            groups.append(merged)
        for other in list(known.values())[1:]:
            merged.extend(other)
            groups = [group for group in groups if group is not other]
            group_of |= {image: merged for image, group in group_of.items() if group is other}
        merged.append(prompt)
        group_of |= dict.fromkeys(images, merged)
    places, place = np.zeros(len(images_of), np.int64), 0
    for group in groups:
        if place % wave + len(group) > wave and len(group) <= wave:
            place += wave - place % wave
        places[group] = place + np.arange(len(group))
        place += len(group)
    return places
