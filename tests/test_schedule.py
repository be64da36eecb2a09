"""Who draws what where, and what there is room for: numpy and arithmetic alone."""

import dataclasses

import numpy as np
import pytest

from rethinker_jax.errors import UserError
from rethinker_jax.sampling.memory import CacheNeeds, plan_caches
from rethinker_jax.sampling.schedule import Schedule, make_schedule


def schedule_of(
    prompts: list[int],
    num_prompts: int,
    shards: int,
    wave_rows: int,
    n: int,
    images: list[list[int]] | None = None,
    round_requests: int | None = None,
) -> Schedule:
    shared = num_prompts < shards
    return make_schedule(
        prompts, num_prompts, shards=shards, shared=shared, wave_rows=num_prompts if shared else wave_rows,
        requests_per_prompt=n, images_of=images or [[]] * num_prompts, round_requests=round_requests,
    )  # fmt: skip


@pytest.mark.parametrize("round_requests", [None, 1, 2])
@pytest.mark.parametrize("shards, wave_rows", [(1, 1), (1, 5), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)])
def test_every_request_finds_its_prompt(shards: int, wave_rows: int, round_requests: int | None) -> None:
    """Catches a request in a shard that lacks its prompt, or begun before its wave was prefilled."""
    rng = np.random.default_rng(shards * 100 + wave_rows)
    prompts = rng.permutation(np.repeat(np.arange(7), 3)).tolist()
    found = schedule_of(prompts, 7, shards, wave_rows, 3, round_requests=round_requests)
    assert found.round_queue <= (round_requests or 21)
    assert sorted(found.row_of) == sorted(set(found.row_of.tolist()))  # one row each
    assert found.shared == (shards == 8)
    rows_a_shard = found.waves.shape[1] if found.shared else found.waves.shape[1] // shards
    for number, prompt in enumerate(prompts):
        shard, place = divmod(int(found.row_of[number]), found.queue)
        turn = int(found.round_of[number])
        wave = int(found.wave_of[turn])
        row = found.prompt_row[number] + (0 if found.shared else shard * rows_a_shard)
        assert found.waves[wave, row] == prompt
        begun_before = found.limits[turn - 1, shard] if turn else 0
        assert begun_before <= place < found.limits[turn, shard]
        assert found.round_place[number] == place - begun_before < found.round_queue
    assert found.totals.sum() == len(prompts)
    loads = found.totals
    assert loads.max() - loads.min() <= (1 if found.shared else 3)  # whole prompts go round where they are not shared
    assert sorted(found.waves[found.waves >= 0].tolist())[:7] == list(range(7))


def test_shapes_hang_on_what_is_announced() -> None:
    """Catches a last, smaller batch that is compiled anew."""
    whole = schedule_of([0, 0, 1, 1, 2, 2, 3, 3], 4, 2, 2, 2)
    last = schedule_of([0, 1, 1], 4, 2, 2, 2)
    assert (whole.queue, whole.waves.shape[1]) == (last.queue, last.waves.shape[1]) == (4, 2)
    assert len(last.waves) == 1  # and no wave without a prompt


def test_a_sample_stays_in_its_shard() -> None:
    """Where shards share all prompts: the second pass draws some of the samples, and is told where their caches are."""
    found = make_schedule(
        [0, 1, 1], 2, shards=4, shared=True, wave_rows=2, requests_per_prompt=6, images_of=[[], []], shard_of=[1, 3, 1]
    )
    assert (found.row_of // found.queue).tolist() == [1, 3, 1]


@pytest.mark.parametrize(
    "images, waves",
    [
        ([[1], [2], [1], [3], [2], []], [[0, 2, 1, 4], [3, 5, -1, -1]]),
        ([[1], [2], [3], [4], [1], [4, 5], [5]], [[0, 4, 1, 2], [3, 5, 6, -1]]),  # 3, 5, 6 by two images
        ([[1], [2], [3], [1], [1], [1]], [[0, 3, 4, 5], [1, 2, -1, -1]]),
        ([[1]] * 5 + [[2]], [[0, 1, 2, 3], [4, 5, -1, -1]]),  # more than a wave holds are cut
        ([[1], [2, 3], [4], [1, 3], []], [[0, 1, 3, 2], [4, -1, -1, -1]]),  # two groups that a later prompt joins
    ],
)
def test_prompts_that_share_an_image_come_in_one_wave(images: list[list[int]], waves: list[list[int]]) -> None:
    """Catches an image that is encoded once a wave."""
    found = schedule_of(list(range(len(images))), len(images), 1, 4, 1, images)
    assert found.waves.tolist() == waves


NEEDS = CacheNeeds(
    bytes_per_token=10, shards=2, num_slots=8, prompt_tokens=100, new_tokens=50, num_prompts=12, wave_rows=64
)


@pytest.mark.parametrize(
    "room, slots, wave, taken",
    [
        # 4 slots a shard of 10 · 150 bytes, and all 6 prompts of 10 · 100: 6,000 + 6,000.
        (12_000, 8, 12, 12_000),
        (11_999, 8, 6, 9_000),  # not all six prompts, so two waves of three
        (7_000, 8, 2, 7_000),  # one prompt a shard
        (6_999, 6, 4, 6_500),  # a slot a shard less leaves (6,999 - 4,500) / 1,000 = 2 prompts
        (2_500, 2, 2, 2_500),
    ],
)
def test_slots_come_before_waves(room: int, slots: int, wave: int, taken: int) -> None:
    """Catches a plan that takes more than there is, or fewer slots than fit."""
    plan = plan_caches(NEEDS, room)
    assert (plan.num_slots, plan.wave_rows, plan.bytes_per_device) == (slots, wave, taken)
    assert plan.bytes_per_device <= room
    assert not plan.keep_responses and not plan.keep_prompts


def test_one_request_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"50 tokens behind a prompt of 100 .*sampling\.max_new_tokens"):
        plan_caches(NEEDS, 2_499)


def test_what_is_left_keeps_caches() -> None:
    """Kept responses: 6 rows a shard of 10 · 20 bytes, beside slots and prompts."""
    needs = dataclasses.replace(NEEDS, kept_rows=6, kept_tokens=20)
    plan = plan_caches(needs, 13_200)
    assert (plan.keep_prompts, plan.keep_responses, plan.bytes_per_device) == (True, True, 13_200)
    less = plan_caches(needs, 13_199)
    assert (less.keep_prompts, less.keep_responses, less.num_slots) == (True, False, 8)


def test_a_wave_is_no_larger_than_what_runs_at_once() -> None:
    """12 prompts, 6 a shard, at most 4 of them at once: two waves of 3, not 4 and 2."""
    assert plan_caches(dataclasses.replace(NEEDS, wave_rows=8), 10**6).wave_rows == 6


def test_shared_prompts_are_in_every_shard() -> None:
    """Fewer prompts than shards: 12 of 1,000 bytes and a slot of 1,500 each; with less room each shard has one."""
    needs = dataclasses.replace(NEEDS, shards=16, num_slots=16, num_prompts=12)
    plan = plan_caches(needs, 1_500 + 12_000)
    assert (plan.shared, plan.wave_rows, plan.num_slots) == (True, 12, 16)
    plan = plan_caches(needs, 1_499 + 12_000)
    assert (plan.shared, plan.wave_rows, plan.num_slots) == (False, 16, 16)
    with pytest.raises(UserError, match="of cache on a device"):
        plan_caches(needs, 2_499)


def test_prompts_that_are_there_cost_nothing() -> None:
    plan = plan_caches(dataclasses.replace(NEEDS, prefilled=True), 6_000)
    assert (plan.num_slots, plan.bytes_per_device) == (8, 6_000)
