"""What a stage depends on, as one hash: its config, the content of its files, and the keys of the stages before it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from rethinker_jax.config import Config
from rethinker_jax.evaluation.trained import CHUNK_BYTES, COMPANIONS, Trained, companions_hash, weights_hash
from rethinker_jax.example.dataset import content_version
from rethinker_jax.json_lines import object_of
from rethinker_jax.output_files import write_whole
from rethinker_jax.pipeline.recipe import Kind
from rethinker_jax.run_directory import EVALUATED, FREE_KEYS, LENGTHS, UNUSED
from rethinker_jax.sample import PACE

# What a kind of stage reads of its config, by key or section; runs read all but what `run_directory.UNUSED` names.
_PROMPT = ("data.prompt_template", "data.max_prompt_tokens", "data.min_pixels", "data.max_pixels")
_SAMPLING = ("run.seed", "model.dtype", "model.init", "sampling", "verifier", *_PROMPT)
READS: Mapping[Kind, tuple[str, ...]] = {
    "distill": (*_SAMPLING, "distill"),
    "sample": _SAMPLING,
    "select": ("run.seed", "select", "verifier"),
    "evaluate": (*_SAMPLING, "rethink"),
}
# Where things lie is not what they are: models and data count by their content. The mesh changes roundings alone, and
# so does what fits a stage to the memory.
PLACES = {
    "model.path", "data.train", "data.test", "data.validation", "data.image_root", "sft.data", "sft.validation",
    "select.ratings", "verifier.deadline_s", "distill.num_threads", "distill.timeout_s", "distill.retries",
    "distill.backoff_s", "distill.max_failures", "distill.caption.url", "distill.reason.url",
    "distill.caption.key_variable", "distill.reason.key_variable",
}  # fmt: skip
ROUNDINGS = {"model.attention", "model.remat", "training.micro_batch_tokens"}
NOT_COUNTED = PLACES | ROUNDINGS | (FREE_KEYS - LENGTHS) | {f"sampling.{key}" for key in PACE}

UNSTABLE = ("ms", "log_probs", "truncated_log_probs")  # of lines of samples


def stage_key(kind: Kind, settings: Mapping[str, Any], model: str, inputs: Sequence[tuple[str, str]]) -> str:
    """Hash of all that decides what a stage leaves, but the code.

    model   hash of the base's files, or the key of the stage that makes the model; "" for none.
    inputs  (role, hash of content or key of the stage that makes it).
    """
    found = {"kind": kind, "settings": dict(settings), "model": model, "inputs": sorted(inputs)}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def counted_settings(kind: Kind, config: Config) -> dict[str, Any]:
    """The keys of the config that decide what a stage leaves, where they are not the defaults; lists, not tuples."""
    read = EVALUATED if kind == "sft" and config.sft.evaluate else frozenset()
    values = {key: value for key, value in _changed(config, Config()) if _counts(kind, key, read)}
    for name, role in (("caption", config.distill.caption), ("reason", config.distill.reason)):
        if not role.url:
            values.pop(f"distill.{name}.model", None)  # a directory, which counts by its content
    return json.loads(json.dumps(values))


def _counts(kind: Kind, key: str, also_read: Set[str]) -> bool:
    section = key.partition(".")[0]
    if key in NOT_COUNTED or section == "mesh":
        return False
    if kind == "rl" or kind == "sft":
        return section not in UNUSED[kind] - also_read
    return any(key == one or key.startswith(f"{one}.") for one in READS[kind])


def _changed(values: Any, defaults: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of what differs from the defaults: a key that is added to the program later changes no hash."""
    for field in dataclasses.fields(values):
        value, default = values.__dict__[field.name], defaults.__dict__[field.name]
        if dataclasses.is_dataclass(value):
            yield from _changed(value, default, f"{prefix}{field.name}.")
        elif value != default:
            yield prefix + field.name, value


class Contents:
    """Hashes of files, kept in a file of their own: what has the size and times of before is not read again.

    `keep` None keeps them in memory alone.
    """

    def __init__(self, keep: Path | None):
        self._keep = keep
        self._known: dict[str, str] = {}
        if keep is not None and keep.is_file():
            try:
                self._known = dict(json.loads(keep.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                self._known = {}  # all is read again

    def model(self, directory: Path) -> str:
        """Of a model directory: weights and what travels with them, as evaluations and exports name them."""
        trained = Trained(Config(), directory)
        files = [*trained.weight_files, *(directory / name for name in COMPANIONS)]
        both = lambda: f"{weights_hash(trained)} {companions_hash(trained)}"  # noqa: E731
        return self._found("model", files, lambda: hashlib.sha256(both().encode()).hexdigest())

    def rows(self, source: str) -> str:
        """Of a source of rows or of a benchmark: a file, a folder with all that is in it, or the built-in example."""
        if source.startswith("example:"):
            return hashlib.sha256(f"{source} {content_version()}".encode()).hexdigest()
        path = Path(source).expanduser()
        files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        return self._found("files", files, lambda: _hash_files(path, files))

    def samples(self, path: Path) -> str:
        """Of judged samples, without how long each verdict took, and without log-probs: with other batches, as after a
        kill, those differ in their last bits.
        """
        return self._found("samples", [path], lambda: _hash_samples(path))

    def _found(self, what: str, files: Sequence[Path], make: Callable[[], str]) -> str:
        found = [(str(one.resolve()), one.stat()) for one in files if one.is_file()]
        # The time of the last change of any kind: a copy can bring the time of writing with it.
        stamps = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]
        stamp = hashlib.sha256(json.dumps([what, stamps]).encode()).hexdigest()
        if stamp not in self._known:
            self._known[stamp] = make()
            if self._keep is not None:
                write_whole(self._keep, json.dumps(self._known, indent=0) + "\n")
        return self._known[stamp]


def _hash_files(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 of a file, or of the names, sizes and bytes of the files in a folder."""
    digest = hashlib.sha256()
    for path in files:
        if path != root:
            digest.update(f"{path.relative_to(root)}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(CHUNK_BYTES), b""):
                digest.update(block)
    return digest.hexdigest()


def _hash_samples(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for line in file:
            try:
                row = object_of(line)
            except ValueError:  # no stage left it so
                digest.update(line)
                continue
            kept = {key: row[key] for key in sorted(row) if key not in UNSTABLE}
            digest.update(json.dumps(kept).encode() + b"\n")
    return digest.hexdigest()
