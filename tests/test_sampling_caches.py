"""Where keys and values come from changes no completion: waves, chunks, longer rings, kept and re-read responses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from sampling_cases import (
    MAX_FIRST,
    NEAR,
    NEW,
    SECOND_LOOK,
    Loaded,
    assert_same,
    load,
    trainer_log_probs,
)

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.windows import bucket
from rethinker_jax.sampling.sampler import Budgets, Counters, Drawn, Kept, Request
from rethinker_jax.types import FIRST, SECOND, TRIGGER


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tmp_path_factory.mktemp("model"))


# --- prompts ---


def two_of(loaded: Loaded) -> int:
    """`prefill_tokens` for two prompts at once."""
    return 2 * bucket(max(map(len, loaded.prompts)), 32)


@pytest.mark.parametrize("num_slots", [0, 5])
def test_waves_change_nothing(loaded: Loaded, num_slots: int) -> None:
    """Catches requests that read the prompts of another wave; images and prompts are still counted once."""
    drawn, counters = loaded.generate(ends=(), num_slots=num_slots, prefill_tokens=two_of(loaded), steps_per_call=3)
    assert_same([one.completion for one in drawn], loaded.free)
    assert (counters.waves, counters.prompts, counters.images) == (3, 6, 7)
    # While prompts wait no slot is idle: all idling comes after the last request was begun.
    idle = counters.slot_steps - counters.busy_steps
    assert idle == counters.drain_slot_steps - counters.drain_busy_steps


def test_chunked_prefill_changes_nothing(loaded: Loaded) -> None:
    """Catches a chunk that does not see the chunks before it; images lie across their borders (chunks of 11 tokens)."""
    drawn, counters = loaded.generate(ends=(), prefill_tokens=11)
    assert_same([one.completion for one in drawn], loaded.free)
    assert counters.waves == 6


def test_a_longer_ring_changes_nothing(loaded: Loaded) -> None:
    """Rings of 2, 4, 8 and 10 columns one after the other, slots refilled in between."""
    drawn, _ = loaded.generate(ends=(), ring=2, num_slots=5, steps_per_call=1)
    assert_same([one.completion for one in drawn], loaded.free)


def test_a_request_without_room_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UserError, match=r"one completion of 10 tokens behind a prompt of \d+ wants"):
        loaded.generate(cache_gib=1e-6)


def test_what_cannot_be_drawn_is_refused(loaded: Loaded) -> None:
    """Catches a prefix or a trigger that is cut in silence, and a budget of nothing that draws a token."""
    request, long = loaded.requests[0], np.arange(10, 16, dtype=np.int32)
    segments = np.zeros(6, np.int32)
    with pytest.raises(ValueError, match="6 tokens of prefix"):
        loaded.generate([dataclasses.replace(request, prefix_ids=long, prefix_segments=segments)], Budgets(5))
    with pytest.raises(ValueError, match="6 of trigger, over prefix_width=0 and trigger_width=4"):
        loaded.generate([dataclasses.replace(request, trigger_ids=long)], Budgets(5, 5, 5, trigger_width=4))
    with pytest.raises(ValueError, match="a budget of 0 tokens"):
        loaded.generate([dataclasses.replace(request, budget=0)])
    assert loaded.generate([])[0] == []


def test_an_image_is_encoded_once_over_waves(loaded: Loaded) -> None:
    """Two prompt objects with one image, and others between them: catches an image that is encoded once a wave."""
    first = loaded.prompts[0]
    twin = dataclasses.replace(first, token_ids=first.token_ids.copy())
    requests = [Request(prompt, 0) for prompt in (*loaded.prompts, twin)]
    _, counters = loaded.generate(requests, ends=(), prefill_tokens=two_of(loaded))
    assert (counters.waves, counters.prompts, counters.images) == (4, 7, 7)


# --- requests of their own ---


def test_budgets_and_seeds_of_single_requests(loaded: Loaded) -> None:
    """Catches a budget or a seed that another request gets."""
    other_seed = loaded.draw(ends=(), seed=7)
    requests = [
        dataclasses.replace(one, budget=3 if place % 3 == 0 else None, seed=7 if place % 2 else None)
        for place, one in enumerate(loaded.requests)
    ]
    found = loaded.draw(requests, ends=(), num_slots=5)
    for place, one in enumerate(found):
        wanted = (other_seed if place % 2 else loaded.free)[place]
        assert one.token_ids.tolist() == wanted.token_ids[: 3 if place % 3 == 0 else NEW].tolist()


def long_tail(count: int, mean: float, most: int) -> list[int]:
    """Lengths of a log-normal law, scaled to `mean`."""
    draws = np.exp(np.random.default_rng(0).normal(0, 1.1, count))
    return np.clip(draws * mean / draws.mean(), 1, most).astype(int).tolist()


def test_slots_stay_busy_under_a_long_tail(loaded: Loaded) -> None:
    """32 requests a slot: at least 98 % until the queue is empty, 90 % in all; a plain batch wastes three quarters."""
    slots, budgets = 4, long_tail(128, 10, 51)
    requests = [Request(loaded.prompts[number % 6], number, budget=budget) for number, budget in enumerate(budgets)]
    drawn, counters = loaded.generate(requests, Budgets(51), ends=(), num_slots=slots)
    assert [len(one.completion) for one in drawn] == budgets
    steady = counters.busy_steps - counters.drain_busy_steps
    assert steady / (counters.slot_steps - counters.drain_slot_steps) >= 0.98
    assert counters.busy_steps / counters.slot_steps >= 0.90
    batches = [budgets[start : start + slots] for start in range(0, 128, slots)]
    assert sum(budgets) / sum(slots * max(batch) for batch in batches) < 0.55


# --- log-probs under what was drawn from ---


def test_truncated_log_probs(loaded: Loaded) -> None:
    """Catches a sum over what was cut: with top_k 1 all is certain; without truncation only banned ids are lacking."""
    certain = loaded.draw(ends=(), top_k=1)
    for one in certain:
        assert one.truncated_log_probs is not None
        np.testing.assert_allclose(one.truncated_log_probs, 0.0, atol=1e-6)
    for one in loaded.free:
        assert one.truncated_log_probs is not None
        assert (one.truncated_log_probs >= one.log_probs - 1e-5).all()
    for cut, one in zip(loaded.draw(ends=(), min_p=0.5), loaded.free, strict=True):
        # Alike up to the first token that is cut off; from the same logits the truncated one is never less probable.
        same = cut.token_ids == one.token_ids
        count = len(same) if same.all() else int(same.argmin())
        assert cut.truncated_log_probs is not None and one.truncated_log_probs is not None
        assert (cut.truncated_log_probs[:count] >= one.truncated_log_probs[:count] - 1e-5).all()
        assert (cut.truncated_log_probs > np.log(0.5 / loaded.system.model.config.vocab)).all()


# --- second looks after the first pass ---


CONTINUED = Budgets(first=NEW, second=SECOND_LOOK, prefix_width=NEW + 4)


def continued(
    loaded: Loaded, firsts: Sequence[Drawn], resume: bool, cut: int = 0, requests: Sequence[Request] | None = None
) -> list[Request]:
    """Requests that go on from their first responses, the last `cut` tokens of these replaced by another."""
    found = []
    for request, one in zip(loaded.requests if requests is None else requests, firsts, strict=True):
        prefix = one.completion.token_ids[:-1].copy()
        if cut and len(prefix) > cut:
            prefix = np.append(prefix[:-cut], loaded.trigger[0]).astype(np.int32)
        ids = np.concatenate([prefix, loaded.trigger]).astype(np.int32)
        segments = np.repeat(np.array([FIRST, TRIGGER], np.int32), [len(prefix), len(loaded.trigger)])
        response = one.completion if resume else None
        found.append(dataclasses.replace(request, prefix_ids=ids, prefix_segments=segments, resume=response))
    return found


def second_looks(
    loaded: Loaded, firsts: Sequence[Drawn], *, resume: bool, kept: Kept | None = None, cut: int = 0, every: int = 1
) -> tuple[list[Drawn], Counters]:
    requests = continued(loaded, firsts, resume, cut)[::every]
    return loaded.generate(requests, CONTINUED, ends=loaded.ends, kept=kept, num_slots=7, steps_per_call=4)


@pytest.mark.parametrize("cut", [0, 2])
def test_second_looks_from_kept_caches_and_from_chunks(loaded: Loaded, cut: int) -> None:
    """Both draw what feeding token by token draws, and count what it cost. Log-probs are the trainer's.

    Catches columns that are off by one, the caches of another sample, and those of tokens that were cut away.
    """
    kept = Kept(NEW)
    firsts, _ = loaded.generate(ends=loaded.ends, kept=kept, num_slots=5, steps_per_call=2)
    assert kept.caches is not None and kept.waves
    fed, counters = second_looks(loaded, firsts, resume=False, cut=cut)
    requests = continued(loaded, firsts, True, cut)
    tokens = sum(len(request.prefix_ids) for request in requests)
    assert (counters.prompts, counters.read_tokens, counters.fed_tokens) == (6, 0, tokens)

    from_kept, counters = second_looks(loaded, firsts, resume=True, kept=kept, cut=cut)
    assert_same([one.completion for one in from_kept], [one.completion for one in fed])
    resumed = sum(request.num_resumed for request in requests)
    assert 0 < resumed < tokens
    assert (counters.prompts, counters.images, counters.read_tokens) == (0, 0, 0)
    assert counters.fed_tokens == tokens - resumed

    read, counters = second_looks(loaded, firsts, resume=True, cut=cut)
    assert_same([one.completion for one in read], [one.completion for one in fed])
    assert (counters.prompts, counters.read_tokens, counters.fed_tokens) == (6, resumed, tokens - resumed)

    trainers = trainer_log_probs(loaded, [one.completion for one in from_kept])
    for one, wanted in zip(from_kept, trainers, strict=True):
        np.testing.assert_allclose(one.completion.log_probs, wanted, rtol=0, atol=NEAR)
    assert any((one.completion.segments == SECOND).any() for one in from_kept)


def test_the_number_of_second_looks_compiles_nothing(loaded: Loaded) -> None:
    """Catches a store of re-read responses that is as large as what the verdicts chose."""
    firsts, _ = loaded.generate(ends=loaded.ends, num_slots=5)
    requests = continued(loaded, firsts, True)
    compiled: list[str | int] = []

    def note(event: str, duration_secs: float, **names: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(names["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for count in (24, 17, 3):
            looks, counters = loaded.generate(
                requests[:count], CONTINUED, ends=loaded.ends, num_prompts=6, num_requests=24, num_slots=6
            )
            assert len(looks) == count and counters.read_tokens
            if count == 24:
                assert "jit(run)" in compiled
                compiled.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not {"jit(run)", "jit(prefill_responses)", "jit(prefill)"} & set(compiled)


def test_second_looks_find_room(loaded: Loaded) -> None:
    """Catches a call that is refused for caches which another one left: they make way."""
    kept = Kept(NEW)
    firsts, counters = loaded.generate(ends=loaded.ends, kept=kept, num_slots=1)
    assert kept.bytes_per_device
    wanted, _ = second_looks(loaded, firsts, resume=False)
    gib = counters.cache_bytes / 2**30  # exactly what the first call took; a second look is longer
    found, counters = loaded.generate(
        continued(loaded, firsts, True), CONTINUED, ends=loaded.ends, kept=kept, num_slots=1, cache_gib=gib
    )
    assert counters.prompts == 6 and not kept.bytes_per_device
    assert_same([one.completion for one in found], [one.completion for one in wanted])


def test_a_second_pass_over_some_samples(loaded: Loaded) -> None:
    """Prompts of several waves are kept as they were; responses that are read again come wave by wave, in blocks."""
    kept = Kept(MAX_FIRST)
    firsts, counters = loaded.generate(ends=loaded.ends, kept=kept, prefill_tokens=two_of(loaded))
    assert counters.waves == len(kept.waves) == 3
    wanted, _ = second_looks(loaded, firsts, resume=False, every=3)
    kept.caches = None  # as where there was no room for them
    requests = continued(loaded, firsts, True)[::3]
    found, counters = loaded.generate(
        requests, CONTINUED, ends=loaded.ends, kept=kept, num_slots=3, prefill_tokens=two_of(loaded)
    )
    assert_same([one.completion for one in found], [one.completion for one in wanted])
    assert counters.prompts == 0 and counters.read_tokens == sum(request.num_resumed for request in requests)


@pytest.mark.parametrize("count", [24, 1])
def test_stop_strings_leave_their_caches_too(loaded: Loaded, count: int) -> None:
    """A completion that the host stopped is resumed from a cache that was kept when its slot was freed.

    With one request nothing else is left to draw when it is stopped: catches a loop that is not run once more.
    """
    requests, kept = loaded.requests[:count], Kept(NEW)
    text = loaded.free[0].text
    options: dict[str, Any] = {"stop_strings": (text[len(text) // 2 :][:2],), "steps_per_call": 3}
    firsts, _ = loaded.generate(requests, ends=(), kept=kept, **options)
    assert firsts[0].completion.finish_reason == "stop_string"
    asked = continued(loaded, firsts, True, requests=requests)
    fed, _ = loaded.generate(continued(loaded, firsts, False, requests=requests), CONTINUED, ends=loaded.ends)
    found, counters = loaded.generate(asked, CONTINUED, ends=loaded.ends, kept=kept)
    assert counters.read_tokens == 0 < asked[0].num_resumed
    assert_same([one.completion for one in found], [one.completion for one in fed])
