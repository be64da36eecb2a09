"""The decode loop against the trainer's log-probs, against a loop without caches, and against itself on other shapes.

Randomness is named by (seed, step, problem, sample, segment, position), so what a request draws is known from one call
and must come again in every other: with other end tokens it is the same completion, cut.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from sampling_cases import (
    CONTINUED,
    FORCED,
    MAX_FIRST,
    NEAR,
    NEW,
    NUM_SAMPLES,
    SECOND_LOOK,
    Loaded,
    assert_same,
    grown,
    load,
    naive_greedy,
    trainer_log_probs,
)

from rethinker_jax.sampling.sampler import Drawn, Request
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tmp_path_factory.mktemp("model"))


def cut_at(completion: Completion, ends: Sequence[int], budget: int = NEW) -> tuple[list[int], str]:
    """Tokens and finish reason that a `free` completion would have if `ends` ended it."""
    places = np.flatnonzero(np.isin(completion.token_ids[:budget], ends))
    if len(places) == 0:
        return completion.token_ids[:budget].tolist(), "length"
    return completion.token_ids[: places[0] + 1].tolist(), "stop"


# --- the trainer, and the model without caches ----------------------------------------------------------------------


def test_log_probs_are_the_trainers(loaded: Loaded) -> None:
    """Catches log-probs of the truncated or tempered distribution, of the replaced end token, or one place off."""
    drawn, _ = loaded.generate(loaded.forced_requests, FORCED, ends=loaded.common[:12], temperature=0.8, top_p=0.9)
    whole = [one.completion for one in drawn]
    firsts = [one.first or one.completion for one in drawn]
    assert sum(one.forced for one in whole) >= 4 and {one.finish_reason for one in whole} == {"stop", "length"}
    for completions in (whole, firsts):
        for ours, theirs in zip(completions, trainer_log_probs(loaded, completions), strict=True):
            np.testing.assert_allclose(ours.log_probs, theirs, rtol=0, atol=1e-4)


def test_greedy_is_that_of_a_loop_without_caches(loaded: Loaded) -> None:
    """Catches what each part may do right and the loop wrong: positions, masks, the ring, the first token's logits."""
    found = loaded.draw(temperature=0.0, ends=())
    wanted = naive_greedy(loaded.system, loaded.prompts, NEW)
    assert len({tuple(ids) for ids in wanted}) == len(wanted)  # the prompts matter
    for place, request in enumerate(loaded.requests):
        assert found[place].token_ids.tolist() == wanted[loaded.prompts.index(request.prompt)]


# --- shapes that must not matter ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"num_slots": 1}, {"num_slots": 3}, {"num_slots": 64}, {"num_prompts": 9}, {"steps_per_call": 1}],
    ids=str,
)
def test_shapes_change_nothing(loaded: Loaded, options: dict[str, int]) -> None:
    """Catches keys and values of the slot's last request, noise by slot or loop step, results put in slot order."""
    wanted = [cut_at(one, loaded.ends) for one in loaded.free]
    found = loaded.draw(ends=loaded.ends, **options)
    assert [(one.token_ids.tolist(), one.finish_reason) for one in found] == wanted
    for one, free in zip(found, loaded.free, strict=True):
        np.testing.assert_allclose(one.log_probs, free.log_probs[: len(one)], rtol=0, atol=NEAR)


@pytest.mark.parametrize("num_slots", [0, 3])
def test_order_of_requests_changes_nothing(loaded: Loaded, num_slots: int) -> None:
    """Catches noise by the request's place, and prompts mistaken for each other."""
    order = np.random.default_rng(0).permutation(len(loaded.requests))
    found = loaded.draw([loaded.requests[place] for place in order], ends=loaded.ends, num_slots=num_slots)
    assert [(found[i].token_ids.tolist(), found[i].finish_reason) for i in np.argsort(order)] == [
        cut_at(one, loaded.ends) for one in loaded.free
    ]


def test_only_shapes_are_compiled(loaded: Loaded) -> None:
    """Catches settings, seeds or the number of samples left as constants of the trace."""
    requests = [dataclasses.replace(one, sample=one.sample + 7) for one in loaded.requests[::-1]]
    loaded.generate(ends=loaded.ends, stop_strings=("never",))
    compiled: list[str] = []

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        loaded.generate(
            requests, ends=loaded.ends[:1], seed=2**31 + 1, step=4, temperature=0.5, top_k=9, top_p=0.8, min_p=0.1,
            steps_per_call=3, stop_strings=("no", "yes"),
        )  # fmt: skip
        assert compiled == []
        loaded.generate(requests[:2])  # another number of requests is another shape, so the count works
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


# --- randomness by name ---------------------------------------------------------------------------------------------


def test_randomness_has_a_name(loaded: Loaded) -> None:
    """Catches samples that share noise, a step that draws what the last one drew, and a seed that is not read."""
    free = [tuple(one.token_ids.tolist()) for one in loaded.free]
    assert len(set(free)) == len(free)
    again, step, seed = (
        [tuple(one.token_ids.tolist()) for one in loaded.draw(ends=(), **name)]
        for name in ({"step": 0}, {"step": 1}, {"seed": 1})
    )
    assert again == free
    for other in (step, seed):
        assert sum(a == b for a, b in zip(other, free, strict=True)) == 0
    assert step != seed


# --- what ends a completion -----------------------------------------------------------------------------------------


def test_end_tokens_and_budgets(loaded: Loaded) -> None:
    """Catches one end id of several that is not heeded, a text with the end token, a budget off by one."""
    found = loaded.draw(ends=loaded.ends)
    wanted = [cut_at(one, loaded.ends) for one in loaded.free]
    assert [(one.token_ids.tolist(), one.finish_reason) for one in found] == wanted
    assert len({one.token_ids[-1] for one in found if one.finish_reason == "stop"}) >= 2
    assert {len(one) for one in found if one.finish_reason == "length"} == {NEW}
    for one in found:
        shown = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
        assert one.text == loaded.system.tokenizer.decode(shown)
        assert "".join(text for _, text in one.parts) == one.text and (one.segments == FIRST).all()


def test_ignored_end_tokens_are_not_drawn(loaded: Loaded) -> None:
    """Catches an end token that is drawn and gone past: the completion would say so and still be trained on."""
    found = loaded.draw(ends=loaded.ends, ignore_eos=True)
    assert {(len(one), one.finish_reason) for one in found} == {(NEW, "length")}
    assert not np.isin([one.token_ids for one in found], loaded.ends).any()
    assert np.isin([one.token_ids for one in loaded.free], loaded.ends).any()


def across_tokens(loaded: Loaded) -> str:
    """A string that begins inside one token and ends inside the next, drawn by one of the `free` completions."""
    for one in loaded.free:
        for place in range(2, len(one) - 2):
            pair = [loaded.system.tokenizer.decode(one.token_ids[i : i + 1]) for i in (place, place + 1)]
            if all(len(text) >= 2 and text.isascii() and text.isprintable() for text in pair):
                return pair[0][1:] + pair[1][:-1]
    raise AssertionError("no two neighbouring tokens are long enough")


@pytest.mark.parametrize("steps_per_call", [3, 64])
def test_stop_strings(loaded: Loaded, steps_per_call: int) -> None:
    """Catches a cut that hangs on when the host looked, a text with the string, one across tokens missed."""
    tokenizer = loaded.system.tokenizer
    strings, ends = ((across_tokens(loaded),), ()) if steps_per_call == 64 else (("s", "re"), loaded.ends[:1])
    found = loaded.draw(ends=ends, stop_strings=strings, steps_per_call=steps_per_call)
    plain = loaded.draw(ends=ends)
    stopped = 0
    for ours, whole in zip(found, plain, strict=True):
        texts = [tokenizer.decode(whole.token_ids[:count]) for count in range(len(whole) + 1)]
        cut = [count for count, text in enumerate(texts) if any(string in text for string in strings)]
        if not cut:
            assert_same([ours], [whole])
            continue
        stopped += 1
        assert ours.token_ids.tolist() == whole.token_ids[: cut[0]].tolist()
        assert len(ours.log_probs) == len(ours.segments) == cut[0]
        text = texts[cut[0]]
        assert ours.text == text[: min(text.find(string) for string in strings if string in text)]
        assert ours.parts == ((FIRST, ours.text),) and ours.finish_reason == "stop_string"
    assert len(strings) <= stopped < len(found)


# --- second looks ---------------------------------------------------------------------------------------------------


def test_a_trigger_takes_the_place_of_the_end_token(loaded: Loaded) -> None:
    """Catches a second look on a response that was cut off or too long, and first responses that triggers change."""
    plain = loaded.draw(ends=loaded.ends, budgets=FORCED)
    drawn, _ = loaded.generate(loaded.forced_requests, FORCED, ends=loaded.ends)
    assert [(one.token_ids.tolist(), one.finish_reason) for one in plain] == [
        cut_at(one, loaded.ends) for one in loaded.free
    ]
    width = len(loaded.trigger)
    seen = set()
    for request, one, alone in zip(loaded.forced_requests, drawn, plain, strict=True):
        eligible = alone.finish_reason == "stop" and len(alone) <= MAX_FIRST
        seen.add((len(request.trigger_ids) > 0, alone.finish_reason == "stop", len(alone) <= MAX_FIRST))
        if not (eligible and len(request.trigger_ids)):
            assert one.first is None
            assert_same([one.completion], [alone])
            continue
        assert one.first is not None
        assert_same([one.first], [alone])
        forced, count = one.completion, len(alone) - 1
        assert forced.token_ids[:count].tolist() == alone.token_ids[:-1].tolist()
        assert forced.token_ids[count : count + width].tolist() == loaded.trigger.tolist()
        length = len(forced) - count - width
        assert forced.segments.tolist() == [FIRST] * count + [TRIGGER] * width + [SECOND] * length
        second = forced.token_ids[count + width :]
        assert not np.isin(second[:-1], loaded.ends).any()
        assert (forced.finish_reason == "stop") == bool(np.isin(second[-1], loaded.ends))
        assert length == SECOND_LOOK or forced.finish_reason == "stop"
        decode = loaded.system.tokenizer.decode
        shown = second[:-1] if forced.finish_reason == "stop" else second
        texts = ((FIRST, decode(alone.token_ids[:-1])), (TRIGGER, "\n\nWait"), (SECOND, decode(shown)))
        # A response that ended at once, or a second look that did, has no tokens to show and no part.
        assert forced.parts == tuple(part for part in texts if part[1] or part[0] == TRIGGER)
        assert forced.text == "".join(text for _, text in texts)
    assert {(True, True, True), (True, True, False), (True, False, False), (False, True, True)} <= seen


def test_the_longest_forced_completion_fits(loaded: Loaded) -> None:
    """Catches a ring or an output that is too short for first response, trigger and second look at their budgets."""
    last = MAX_FIRST - 1
    row = next(n for n, one in enumerate(loaded.free) if one.token_ids[last] not in one.token_ids[:last])
    requests = [dataclasses.replace(one, trigger_ids=np.tile(loaded.trigger, 2)[:4]) for one in loaded.requests]
    end = int(loaded.free[row].token_ids[last])
    found = loaded.draw(requests, FORCED, ends=(end,))
    assert len(found[row]) == last + 4 + SECOND_LOOK == FORCED.total - 1  # the end token is not in it
    for ours, theirs in zip(found, trainer_log_probs(loaded, found), strict=True):
        np.testing.assert_allclose(ours.log_probs, theirs, rtol=0, atol=1e-4)


def test_stop_strings_of_first_responses_come_before_triggers(loaded: Loaded) -> None:
    """Catches a trigger that stops what it was to continue, and one fed behind a response that a string had stopped."""
    forced, _ = loaded.generate(loaded.forced_requests, FORCED, ends=loaded.ends)
    looked = [one for one in forced if one.first is not None]
    same, _ = loaded.generate(loaded.forced_requests, FORCED, ends=loaded.ends, stop_strings=("\nWait", "Wait"))
    for ours, theirs in zip(same, forced, strict=True):
        assert_same([ours.completion], [theirs.completion])
        assert (ours.first is None) == (theirs.first is None)
    whole = max((one.completion for one in looked), key=lambda one: (one.segments == FIRST).sum())
    string = next(text[-1:] for number, text in whole.parts if number == FIRST)
    for steps_per_call in (1, 64):
        drawn, _ = loaded.generate(
            loaded.forced_requests, FORCED, ends=loaded.ends, stop_strings=(string,), steps_per_call=steps_per_call
        )
        one = drawn[[other.completion is whole for other in forced].index(True)]
        assert one.first is None and not one.completion.forced and one.completion.finish_reason == "stop_string"
        assert string not in one.completion.text


def second_pass(loaded: Loaded) -> tuple[list[Request], list[Drawn]]:
    """Requests that go on from first response and trigger, and the forced completions they should repeat."""
    forced, _ = loaded.generate(loaded.forced_requests, FORCED, ends=loaded.ends, second_temperature=0.0)
    requests = []
    for request, one in zip(loaded.requests, forced, strict=True):
        kept = one.completion.segments != SECOND if one.first is not None else np.zeros(len(one.completion), bool)
        ids, segments = one.completion.token_ids[kept], one.completion.segments[kept].astype(np.int32)
        requests.append(dataclasses.replace(request, prefix_ids=ids, prefix_segments=segments))
    return requests, forced


def test_a_prefix_is_a_longer_prompt(loaded: Loaded) -> None:
    """Catches a second pass at other positions or on another cache, and a first temperature in the second look."""
    requests, forced = second_pass(loaded)
    drawn, _ = loaded.generate(requests, CONTINUED, ends=loaded.ends, second_temperature=0.0)
    chosen = [place for place, request in enumerate(requests) if len(request.prefix_ids)]
    longer = [grown(requests[place].prompt, requests[place].prefix_ids, loaded.system) for place in chosen]
    wanted = naive_greedy(loaded.system, longer, SECOND_LOOK)
    assert len(chosen) >= 4
    for place, ids in zip(chosen, wanted, strict=True):
        assert drawn[place].first is None
        assert_same([drawn[place].completion], [forced[place].completion])
        found = drawn[place].completion
        second = found.token_ids[len(requests[place].prefix_ids) :].tolist()
        assert second == ids[: len(second)] and (found.segments[-len(second) :] == SECOND).all()
    # Requests without a prefix draw what they always draw, up to this call's budget.
    for place in set(range(len(requests))) - set(chosen):
        found = drawn[place].completion
        assert (found.token_ids.tolist(), found.finish_reason) == cut_at(loaded.free[place], loaded.ends, MAX_FIRST)
    for ours, theirs in zip(drawn, trainer_log_probs(loaded, [one.completion for one in drawn]), strict=True):
        np.testing.assert_allclose(ours.completion.log_probs, theirs, rtol=0, atol=1e-4)


def test_a_stop_string_in_a_prefix_stops_nothing(loaded: Loaded) -> None:
    """Catches a second pass that ends on its first token because the first response, or the trigger, says so."""
    requests, forced = second_pass(loaded)
    place = max(
        range(len(requests)),
        key=lambda place: (forced[place].completion.segments == FIRST).sum() * bool(forced[place].first),
    )
    texts = dict(forced[place].completion.parts)
    assert texts[FIRST] and texts[FIRST] not in texts[SECOND]
    found = loaded.draw(
        requests, CONTINUED, ends=loaded.ends, second_temperature=0.0, stop_strings=(texts[FIRST], "Wait")
    )
    assert_same([found[place]], [forced[place].completion])


def test_a_prompt_that_ends_in_an_image_is_refused(loaded: Loaded) -> None:
    """Catches tokens drawn behind an image pad that was fed as text: wrong, and nothing would say so."""
    prompt = loaded.prompts[0]
    cut = int(np.flatnonzero(prompt.image_index >= 0)[-1]) + 1
    short = dataclasses.replace(
        prompt, token_ids=prompt.token_ids[:cut], positions=prompt.positions[:, :cut],
        image_index=prompt.image_index[:cut],
    )  # fmt: skip
    with pytest.raises(ValueError, match="ends in an image"):
        loaded.generate([Request(short, 0)], ends=())


# --- counters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [0, 3])
def test_counters(loaded: Loaded, num_slots: int) -> None:
    """Catches idle slots counted as busy, and prompts or images counted once a sample."""
    found, counters = loaded.generate(ends=loaded.ends, num_slots=num_slots)
    lengths = [len(one.completion) for one in found]
    # A slot takes the next request in the step after its last one ended: each request goes to the slot free first.
    slots = num_slots or len(lengths)
    free_at = [0] * slots
    for length in lengths:
        slot = free_at.index(min(free_at))
        free_at[slot] += length
    assert (counters.busy_steps, counters.slot_steps) == (sum(lengths), max(free_at) * slots)
    assert (counters.images, counters.prompts, counters.waves) == (7, 6, 1)
    assert counters.busy_steps < counters.slot_steps < NEW * len(lengths) + (num_slots == 0)


def test_an_image_of_two_prompts_is_counted_once(loaded: Loaded) -> None:
    """Catches images counted by prompt: the vision tower sees the shared one once."""
    prompt = loaded.prompts[0]
    twin = dataclasses.replace(prompt, problem=dataclasses.replace(prompt.problem, id="twin"))
    pairs = [
        dataclasses.replace(one, prompt=twin) if one.prompt is loaded.prompts[1] else one for one in loaded.requests
    ]
    found, counters = loaded.generate(pairs, ends=())
    assert (counters.prompts, counters.images) == (6, 6)
    ours, theirs = found[0].completion, found[NUM_SAMPLES].completion
    assert ours.token_ids.tolist() == loaded.free[0].token_ids.tolist() != theirs.token_ids.tolist()
