"""Token choice against a softmax and a sorting oracle in float64. Uniform numbers are a grid, so counts are exact."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rethinker_jax.sampling.choose import choose_tokens, request_keys, uniforms

GRID = (np.arange(2048, dtype=np.float32) + 0.5) / 2048
LAST = np.nextafter(np.float32(1), np.float32(0))  # no uniform number is larger
VOCABS = (
    7,
    448,
    1500,
)  # less than a block, less than a block of blocks of the example's, more of them; none a multiple


def draw(
    logits: np.ndarray,
    uniform: np.ndarray,
    *,
    banned: np.ndarray | None = None,
    temperature: float | np.ndarray = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    log_probs_wanted: bool = False,
) -> np.ndarray:
    """One token (or its log-prob) a uniform number, from `logits` [vocab] or [rows, vocab], on the grid's shape."""
    count, vocab = len(uniform), logits.shape[-1]
    rows = np.resize(np.broadcast_to(logits, (count, vocab)), (len(GRID), vocab)).astype(np.float32)
    allowed = np.ones(vocab, bool)
    allowed[[] if banned is None else banned] = False
    temperatures = np.resize(np.asarray(temperature, np.float32), len(GRID))
    arrays = rows, np.resize(uniform, len(GRID)).astype(np.float32), allowed, temperatures
    numbers = np.int32(top_k), np.float32(top_p), np.float32(min_p)
    tokens, log_probs = jitted(*map(jnp.asarray, arrays), *map(jnp.asarray, numbers))
    return (np.asarray(log_probs) if log_probs_wanted else np.asarray(tokens))[:count]


jitted = jax.jit(choose_tokens)


def softmax(logits: np.ndarray, temperature: float = 1.0, banned: np.ndarray | None = None) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    scaled[[] if banned is None else banned] = -np.inf
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def truncated(probs: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """By sorting, as transformers does: top-k, then top-p of what is left, then min-p; ties stay."""
    if top_k:
        probs = np.where(probs >= np.sort(probs)[::-1][min(top_k, len(probs)) - 1], probs, 0.0)
        probs = probs / probs.sum()
    if top_p < 1.0:
        falling = np.sort(probs)[::-1]
        sums = np.cumsum(falling)
        assert np.abs(sums - top_p).min() > 1e-6  # else float32 may decide otherwise: choose another case
        probs = np.where(probs >= falling[np.argmax(sums >= top_p)], probs, 0.0)
    probs = np.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


def logits_of(kind: str, vocab: int) -> np.ndarray:
    noise = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    return {"flat": 0.01 * noise, "usual": 3.0 * noise, "peaked": 20.0 * noise}[kind]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("kind", ["flat", "usual", "peaked"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_frequencies_are_the_softmax(vocab: int, kind: str, temperature: float) -> None:
    """Catches a block or its first token left out, and a temperature that multiplies.

    A grid of N uniform numbers puts between N·p − 1 and N·p + 1 of them into an interval of length p.
    """
    logits, banned = logits_of(kind, vocab), np.array([0, 3, vocab - 1])
    tokens = draw(logits, GRID, banned=banned, temperature=temperature)
    counts = np.bincount(tokens, minlength=vocab)
    expected = len(GRID) * softmax(logits, temperature, banned)
    assert np.abs(counts - expected).max() < 1.01
    large = expected > 5
    chi_square = ((counts - expected)[large] ** 2 / expected[large]).sum()
    assert chi_square < max(1, large.sum())  # random numbers would give the number of terms, the grid less
    assert (np.diff(tokens) >= 0).all()  # the inverse of a distribution function rises


@pytest.mark.parametrize("options", [
    {"top_k": 1}, {"top_k": 5}, {"top_k": 100000}, {"top_p": 0.9}, {"top_p": 0.35}, {"top_p": 1e-9}, {"top_p": 0.0},
    {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 40, "top_p": 0.8}, {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["flat", "usual", "peaked"])
@pytest.mark.parametrize("vocab", VOCABS[1:])
def test_truncation_is_that_of_sorting(vocab: int, kind: str, options: dict[str, Any]) -> None:
    """Catches a threshold off by one token, top-p of the untruncated rest, and settings that leave nothing."""
    logits = logits_of(kind, vocab)
    tokens = draw(logits, GRID, **options)
    wanted = truncated(softmax(logits), options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0))
    assert np.abs(np.bincount(tokens, minlength=vocab) - len(GRID) * wanted).max() < 1.02
    assert (wanted[tokens] > 0).all()
    # Every token whose interval is longer than the grid's step is met.
    assert set(np.flatnonzero(wanted > 1.01 / len(GRID))) <= set(tokens.tolist())


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.35}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}
], ids=str)  # fmt: skip
def test_log_probs_are_under_what_was_drawn_from(options: dict[str, Any]) -> None:
    """Catches the full softmax's log-probs, those before the temperature or before the ban, and a kept mass below 1."""
    logits, banned = logits_of("usual", 1500), np.array([0, 7])
    tokens = draw(logits, GRID, banned=banned, **options)
    found = draw(logits, GRID, banned=banned, log_probs_wanted=True, **options)
    rest = {name: options.get(name, value) for name, value in {"top_k": 0, "top_p": 1.0, "min_p": 0.0}.items()}
    wanted = truncated(softmax(logits, options.get("temperature", 1.0), banned), **rest)
    np.testing.assert_allclose(found, np.log(wanted[tokens]), rtol=0, atol=2e-5)
    assert (draw(logits, GRID, temperature=0.0, log_probs_wanted=True) == 0).all()


def test_ties_at_a_threshold_stay() -> None:
    """Catches a choice among equals by their number."""
    logits = np.array([1.0, 2.0, 0.0, 2.0, 2.0, -1.0], np.float32)
    cases: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}]
    for options in cases:
        assert set(draw(logits, GRID, **options).tolist()) == {1, 3, 4}


@pytest.mark.parametrize("vocab", VOCABS)
def test_what_is_banned_is_never_drawn(vocab: int) -> None:
    """Catches a ban that only the random draw heeds, or only the greedy one, and truncation before the ban."""
    logits = logits_of("usual", vocab)
    order = np.argsort(-logits)
    banned = order[: vocab // 2]
    assert not np.isin(draw(logits, GRID, banned=banned), banned).any()
    assert set(draw(logits, GRID, banned=banned, temperature=0.0).tolist()) == {int(order[vocab // 2])}
    cases: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
    for options in cases:
        assert set(draw(logits, GRID, banned=banned, **options).tolist()) == {int(order[vocab // 2])}


@pytest.mark.parametrize("vocab", [*VOCABS, 4097])
def test_only_what_has_mass_is_drawn(vocab: int) -> None:
    """Catches a draw past the last token with mass, before the first, and where a rounded running sum rises on nothing.

    The uniform numbers are 0, the largest, and for each row a border between two tokens and its neighbours.
    """
    rng = np.random.default_rng(vocab)
    rows = 1000
    logits = 2.0 * rng.standard_normal((rows, vocab)).astype(np.float32)
    massless = rng.random((rows, vocab)) < rng.choice([0.2, 0.9], size=(rows, 1))
    massless[:, [0, -1]] = True
    massless[:, 1] = False
    logits[massless] = -1e4  # exp of it is 0
    probs = np.where(massless, 0.0, np.exp(logits.astype(np.float64)))
    sums = np.cumsum(probs, axis=1) / probs.sum(axis=1, keepdims=True)
    border = sums[np.arange(rows), rng.integers(vocab, size=rows)].astype(np.float32)
    above, below = np.nextafter(border, np.float32(2)), np.nextafter(border, np.float32(-1))
    for uniform in (np.zeros(rows), np.full(rows, LAST), *(np.clip(edge, 0, LAST) for edge in (border, above, below))):
        tokens = draw(logits, uniform)
        assert not massless[np.arange(rows), tokens].any()
        # And it is the right token, or one whose interval is that near.
        ends = sums[np.arange(rows), tokens]
        starts = ends - probs[np.arange(rows), tokens] / probs.sum(axis=1)
        assert (starts - 1e-5 <= uniform).all() and (uniform <= ends + 1e-5).all()


def test_a_single_allowed_token_is_always_drawn() -> None:
    """Catches sums that underflow or a target of zero that is met before the token."""
    for vocab in VOCABS:
        for token in (0, vocab // 2, vocab - 1):
            banned = np.delete(np.arange(vocab), token)
            for temperature in (0.0, 1.0):
                found = draw(np.zeros(vocab), np.array([0.0, 0.5, LAST]), banned=banned, temperature=temperature)
                assert found.tolist() == [token] * 3


def test_cold_is_greedy() -> None:
    """Catches a temperature near zero that makes logits infinite, and ties that are not the first one's at zero."""
    logits = logits_of("usual", 448)
    logits[[5, 400]] = logits.max() + 1.0
    assert set(draw(logits, GRID, temperature=0.0).tolist()) == {5}
    assert set(draw(logits, GRID, temperature=1e-37).tolist()) == {5, 400}
    assert set(draw(logits * 1e30, GRID, temperature=1e-5).tolist()) == {5, 400}


def test_rows_have_their_own_temperature() -> None:
    """Catches one temperature for all slots: a second look's is not the first response's."""
    logits = logits_of("usual", 448)
    temperatures = np.array([0.0, 1.0, 3.0], np.float32)
    grid = GRID[::4]
    found = draw(logits, np.repeat(grid, 3), temperature=np.tile(temperatures, len(grid)))
    for place, temperature in enumerate(temperatures.tolist()):
        assert found[place::3].tolist() == draw(logits, grid, temperature=temperature).tolist()
    assert len(set(found[::3].tolist())) == 1 < len(set(found[1::3].tolist())) < len(set(found[2::3].tolist()))


def test_numbers_are_named() -> None:
    """Catches a name that is left out of the key, and numbers that hang on the slot."""
    problems, samples = (part.ravel().astype(np.int32) for part in np.meshgrid([5, 6, 2**31 - 1], np.arange(4)))
    keys = [
        np.asarray(
            request_keys(jnp.full(len(problems), seed, jnp.uint32), step, *map(jnp.asarray, (problems, samples)))
        )
        for seed, step in [(0, 0), (0, 1), (1, 0)]
    ]
    many = np.concatenate(keys)
    assert len(np.unique(many, axis=0)) == len(many) == 36
    segment, position = np.zeros(36, np.int32), np.arange(36, dtype=np.int32)
    numbers = [
        np.asarray(uniforms(*map(jnp.asarray, (many, segments, places))))
        for segments, places in [(segment, position), (segment + 2, position), (segment, position + 36)]
    ]
    assert len(np.unique(np.concatenate(numbers))) == 108
    assert min(map(np.min, numbers)) >= 0 and max(map(np.max, numbers)) < 1
    turned = uniforms(*map(jnp.asarray, (many[::-1], segment, position[::-1])))
    assert np.asarray(turned)[::-1].tolist() == numbers[0].tolist()
    spread = np.asarray(uniforms(jnp.asarray(np.repeat(many[:1], 4000, 0)), jnp.zeros(4000, int), jnp.arange(4000)))
    # Ten bins of 400 each; their chi-square has 9 degrees of freedom: above 28 once in a thousand seeds.
    assert ((np.bincount((spread * 10).astype(int), minlength=10) - 400) ** 2 / 400).sum() < 28
