"""Items as a protocol words them: what is drawn, and the hash that says of what data."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from rethinker_jax.benchmarks.catalog import ROWS, ReadItems, find_benchmark, read_benchmark
from rethinker_jax.benchmarks.items import Headline, Item
from rethinker_jax.benchmarks.protocols import Protocol, find_protocol, keeps, problem_of
from rethinker_jax.config import Config, DataConfig
from rethinker_jax.errors import UserError
from rethinker_jax.output_files import hash_of
from rethinker_jax.types import Problem

# Where no protocol is named: for one sample, for several.
GREEDY, SAMPLED = "vl_rethinker", "vl_rethinker_sampled"
OWN = ("own", "own_sampled")  # the same for rows of one's own
MAX_PROMPT_TOKENS = 16_384  # five full-size images and their text


@dataclasses.dataclass(frozen=True)
class Ask:
    """What the drawing of one item needs: `problem` is worded by the protocol, `item` is as it was read."""

    item: Item
    problem: Problem


def choose_protocol(name: str, n: int | None, benchmark: str) -> Protocol:
    """The protocol of that name; of none, VL-Rethinker's, or for `rows` the model's own. Raises UserError."""
    greedy, sampled = OWN if benchmark == ROWS else (GREEDY, SAMPLED)
    return find_protocol(name or (sampled if n is not None and n > 1 else greedy))


def overrides_of(protocol: Protocol, own: DataConfig) -> list[str]:
    """The protocol as `section.key=value`; what the command line says goes after it. `own` is for its namesake."""
    decoding = protocol.decoding
    template, bounds = protocol.template, (protocol.min_pixels, protocol.max_pixels)
    if protocol.name in OWN:
        template, bounds = own.prompt_template, (own.min_pixels, own.max_pixels)
    return [
        f"sampling.temperature={decoding.temperature}",
        f"sampling.top_p={decoding.top_p}",
        f"sampling.top_k={decoding.top_k}",
        f"sampling.max_new_tokens={decoding.max_new_tokens}",
        f"data.prompt_template={template}",
        f"data.min_pixels={bounds[0]}",
        f"data.max_pixels={bounds[1]}",
    ]


def read_shard(text: str | None) -> tuple[int, int]:
    """`I/N` → (I, N), of nothing (0, 1). Raises UserError."""
    number, slash, count = (text or "0/1").partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"evaluate: --shard {text}: wanted I/N, whole numbers with I below N, as in 0/4 to 3/4")
    return int(number), int(count)


def read_items(benchmark: str, data: str | None, config: Config) -> ReadItems:
    """Raises UserError."""
    return read_benchmark(benchmark, data, image_root=config.data.image_root, max_bad_rows=config.run.max_bad_rows)


def headline_of(benchmark: str) -> tuple[Headline, str]:
    """How accuracies become one number, and over which dimension where that is a macro mean."""
    if benchmark == ROWS:
        return "mean", ""
    found = find_benchmark(benchmark)
    return found.headline, found.macro_over


def asks_of(items: Iterable[Item], protocol: Protocol) -> list[Ask]:
    """The items that the protocol measures, by id, whatever the order of the rows."""
    kept = sorted((item for item in items if keeps(item, protocol)), key=lambda item: item.problem.id)
    return [Ask(item, problem_of(item, protocol)) for item in kept]


def asks_hash(asks: Sequence[Ask]) -> str:
    """Of all that is asked and judged, images by the hash of their bytes."""
    return hash_of(map(_content, asks))


def _content(ask: Ask) -> tuple[object, ...]:
    item, problem = ask.item, ask.item.problem
    images = [one if isinstance(one, bytes) else Path(one).read_bytes() for one in problem.images]
    return (
        problem.id, problem.question, ask.problem.question, problem.answer, item.alternatives, problem.choices,
        problem.type, sorted(item.categories.items()), item.cluster, item.scored,
        [hashlib.sha256(image).hexdigest() for image in images],
    )  # fmt: skip
