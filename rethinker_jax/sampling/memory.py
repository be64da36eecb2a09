"""How much cache a call takes, known before it begins: slots, prompts of a wave, kept first responses."""

import dataclasses
import os

import jax

from rethinker_jax.errors import UserError

GIB = 2**30
SHARE = 0.8  # of a device's free memory; the rest is for what the layers hold while they run
HOST_SHARE = 0.25  # of a computer's memory, where it is the device


@dataclasses.dataclass(frozen=True)
class CacheNeeds:
    """What is asked for, in tokens and in bytes of one token's keys and values on one device.

    wave_rows: prompts that may be prefilled together, by other bounds. kept_tokens: of first responses whose caches
    outlive their slot, in all `kept_rows` rows of a shard; 0 = none. prefilled: the prompts' caches are there already.
    """

    bytes_per_token: int
    shards: int
    num_slots: int
    prompt_tokens: int
    new_tokens: int
    num_prompts: int
    wave_rows: int
    kept_rows: int = 0
    kept_tokens: int = 0
    prefilled: bool = False


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """What there is room for. It takes at most `bytes_per_device`, of which `kept_bytes` outlive the call.

    shared: every shard holds all prompts, because they are fewer than the shards.
    """

    shared: bool
    num_slots: int
    wave_rows: int
    keep_responses: bool
    keep_prompts: bool
    bytes_per_device: int
    kept_bytes: int = 0


def plan_caches(needs: CacheNeeds, room: int) -> CachePlan:
    """The most slots and then the widest waves that fit in `room` bytes on each device; what is left keeps caches.

    A slot holds its own copy of its prompt's cache. Raises UserError if one slot and one prompt do not fit.
    """
    size, shards = needs.bytes_per_token, needs.shards
    slot = size * (needs.prompt_tokens + needs.new_tokens)
    prompt = 0 if needs.prefilled else size * needs.prompt_tokens
    if slot + prompt > room:
        raise UserError(
            f"one completion of {needs.new_tokens} tokens behind a prompt of {needs.prompt_tokens} wants "
            f"{(slot + prompt) / GIB:.3g} GiB of cache on a device, and {room / GIB:.3g} GiB are there. "
            "Lower sampling.max_new_tokens, rethink.max_new_tokens or data.max_prompt_tokens, spread kv heads with "
            "--mesh tensor=N, or set sampling.cache_gib if the device has more."
        )
    shared = needs.num_prompts < shards and slot + needs.num_prompts * prompt <= room
    in_all = needs.num_prompts if shared else -(-needs.num_prompts // shards)
    slots = min(-(-needs.num_slots // shards), (room - (in_all if shared else 1) * prompt) // slot)
    left = room - slots * slot
    wave = in_all if shared else max(1, min(in_all, needs.wave_rows // shards, left // max(prompt, 1)))
    wave = -(-in_all // -(-in_all // wave))  # waves of one size, the last one not much smaller
    kept = size * needs.kept_tokens * needs.kept_rows
    keep_prompts = kept > 0 and in_all * prompt <= left
    left -= (in_all if keep_prompts else wave) * prompt
    keep_responses = 0 < kept <= left
    outlives = (in_all * prompt if keep_prompts else 0) + (kept if keep_responses else 0)
    taken = slots * slot + (0 if keep_prompts else wave * prompt) + outlives
    rows = wave if shared else wave * shards
    return CachePlan(shared, slots * shards, rows, keep_responses, keep_prompts, taken, outlives)


def room_for_caches(device: jax.Device, gib: float, held: int) -> int:
    """Bytes of one device that caches may take: of `gib` if it is not 0, else most of what is free now.

    held: bytes of caches that the call before has left there.
    """
    if gib:
        return int(gib * GIB) - held
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(HOST_SHARE * memory / jax.local_device_count()) - held
