"""The directory of a run: what lies where in it, and who may write there."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

from rethinker_jax.config import Config, MeshConfig
from rethinker_jax.config_file import load_config, save_config
from rethinker_jax.config_health import HealthConfig
from rethinker_jax.errors import UserError
from rethinker_jax.metrics import plain
from rethinker_jax.output_files import hash_of as hash_of
from rethinker_jax.output_files import versions as versions
from rethinker_jax.output_files import write_whole as write_whole
from rethinker_jax.processes import is_first
from rethinker_jax.replay import Selection
from rethinker_jax.rollout import Group
from rethinker_jax.types import SEGMENT_NAMES, Rollout

# What may differ when a run goes on: its length, what it leaves behind and what it survives, never what it computes.
LENGTHS = frozenset({"run.num_steps", "sft.num_steps", "sft.num_epochs"})
FREE_KEYS = LENGTHS | {
    "run.dir", "run.save_every", "run.keep_checkpoints", "run.keep_best", "run.rollouts_every",
    "run.compilation_cache", "run.max_bad_rows", "training.max_skipped_updates", "verifier.num_workers",
    "verifier.deadline_s",  # of the wall clock: a backstop, no verdict of a run that has the time depends on it
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),  # the same numbers up to rounding
    *(f"health.{field.name}" for field in dataclasses.fields(HealthConfig)),
}  # fmt: skip

Kind = Literal["rl", "sft"]
# Sections of the config that a kind of run does not read.
UNUSED: Mapping[Kind, frozenset[str]] = {
    "rl": frozenset({"sft", "select", "distill"}),
    "sft": frozenset(
        {"sampling", "rollout", "verifier", "reward", "advantage", "replay", "rethink", "loss", "evaluation", "select"}
        | {"distill"}
    ),
}
# Of those, what `sft.evaluate` reads.
EVALUATED = frozenset({"sampling", "verifier", "reward", "rethink", "evaluation"})


class RunDirectory:
    """config.yaml, metrics.jsonl, rollouts/, evaluations/, checkpoints/, summary.json, report.html.

    Nothing is made before `locked` is entered. `kind` says which sections of the config count. Of several processes the
    first one holds the directory and writes; in the others the same calls write nothing.
    """

    def __init__(self, path: Path, kind: Kind):
        self.path = path
        self.kind: Kind = kind
        self._noted: list[str] = []  # lines of bad_rows.jsonl

    @property
    def writes(self) -> bool:
        return is_first()

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Hold the directory alone; it is made if need be, and goes again if nothing was put into it."""
        with hold(self.path) if self.writes else contextlib.nullcontext():
            yield

    def start(self, config: Config) -> None:
        """Keep the config, once all that it names was found to be usable."""
        if not self.writes:
            return
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(self.path)))
        save_config(config, self.path / "config.yaml")

    def changes(self, config: Config, free: Set[str] = FREE_KEYS) -> list[str]:
        """How `config` differs from that of the run that lies here, a phrase a key; none where no run lies here."""
        path = self.path / "config.yaml"
        if not path.is_file() or not (self.path / "checkpoints").is_dir():
            return []
        before, now = _flat(load_config(path, [])), self._deciding(config, free)
        return [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]

    def manifest(self, config: Config) -> dict[str, Any]:
        """What every checkpoint says of its origin: a hash of the keys that may not change, commit, versions."""
        return {"config": hash_of(sorted(self._deciding(config, FREE_KEYS).items()))} | versions()

    def _deciding(self, config: Config, free: Set[str]) -> dict[str, Any]:
        """The keys that this kind of run reads and that are not `free`, with their values."""
        unused = UNUSED[self.kind]
        if self.kind == "sft" and config.sft.evaluate:
            unused -= EVALUATED
        flat = _flat(config)
        return {key: flat[key] for key in flat if key not in free and key.partition(".")[0] not in unused}

    def check_config(self, config: Config) -> None:
        """Refuse to go on with a run under another config. Only its length and logging may change."""
        steps = [path for path in (self.path / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
        if steps and not (self.path / "config.yaml").is_file():
            raise UserError(
                f"{self.path} holds checkpoints without the config.yaml with which they were made. Put it back, or "
                "name another run.dir."
            )
        changed = self.changes(config)
        if changed:
            raise UserError(
                f"{self.path} holds a run with another config: {'; '.join(changed)}. "
                "Go on with the old values, or name another run.dir."
            )

    def read_summary(self) -> dict[str, Any]:
        path = self.path / "summary.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{path}: wanted JSON ({error}). Remove the file; the run will write it again.") from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        if not self.writes:
            return
        write_whole(self.path / "summary.json", json.dumps(plain(summary), indent=2) + "\n")

    def write_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        self._write_groups(self.path / "rollouts" / f"step_{step:06d}.jsonl", step, groups)

    def write_trained(self, step: int, trained: Sequence[tuple[int, Selection]]) -> None:
        """The rows of each (optimizer step, selection) of a step: which problem, advantage, weight, and how old."""
        if not self.writes:
            return
        updates = [{"update": update, "rows": _trained_rows(update, chosen)} for update, chosen in trained]
        path = self.path / "rollouts" / f"trained_{step:06d}.json"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(updates) + "\n")

    def write_evaluation(self, when: str, groups: Sequence[Group]) -> None:
        self._write_groups(self.path / "evaluations" / f"{when}.jsonl", None, groups)

    def note_bad_row(self, step: int, problem: str, kind: str, why: str, limit: int) -> None:
        """Add a row to bad_rows.jsonl, once however often it is met. Raises UserError above `limit` rows."""
        path = self.path / "bad_rows.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # Where another process writes the file, it may be behind us or ahead.
        lines += [line for line in self._noted if line not in lines]
        line = json.dumps({"step": step, "id": problem, "kind": kind, "why": why})
        if line not in lines:
            self._noted.append(line)
            lines.append(line)
            if self.writes:
                write_whole(path, "".join(line + "\n" for line in lines))
        count = len({json.loads(line)["id"] for line in lines})
        if count > limit:
            raise UserError(
                f"{path}: {count} rows cannot be used, more than run.max_bad_rows={limit}; the last: {why}. "
                "Mend or remove them, or raise run.max_bad_rows."
            )

    def _write_groups(self, path: Path, step: int | None, groups: Sequence[Group]) -> None:
        if not self.writes:
            return
        (self.path / "rollouts" / "images").mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(self._group(step, group), ensure_ascii=False) for group in groups]
        write_whole(path, "".join(line + "\n" for line in lines))

    def _group(self, step: int | None, group: Group) -> dict[str, Any]:
        problem = group.prompt.problem
        return {
            "step": step,
            "problem": {
                "id": problem.id,
                "question": problem.question,
                "answer": problem.answer,
                "choices": list(problem.choices),
                "type": problem.type,
                "source": problem.source,
            },
            "prompt_text": group.prompt.text,
            "images": [self._image(image) for image in problem.images],
            "samples": [_sample(rollout) for rollout in group.rollouts],
        }

    def _image(self, image: bytes | str) -> str:
        """Keep an image once, under the hash of its bytes; returns its file name, "" where its file is gone by now."""
        try:
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
        except OSError:
            return ""
        kind = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpg", b"RIFF": "webp", b"GIF8": "gif"}.get(data[:4], "jpg")
        name = f"{hashlib.sha256(data).hexdigest()}.{kind}"
        path = self.path / "rollouts" / "images" / name
        if not path.is_file():
            temporary = path.with_suffix(".part")
            temporary.write_bytes(data)
            os.replace(temporary, path)
        return name


def _sample(rollout: Rollout) -> dict[str, Any]:
    shown = rollout.forced or rollout.first
    verdict = rollout.forced_verdict or rollout.first_verdict
    return {
        "sample": rollout.sample,
        "segments": [{"kind": SEGMENT_NAMES[number], "text": text} for number, text in shown.parts],
        "verdict": verdict.verdict,
        "first_verdict": rollout.first_verdict.verdict,
        "reward": verdict.reward,
        "reward_parts": dict(verdict.parts),
        "reward_missing": dict(verdict.missing),
        "extracted": verdict.extracted,
        "rule": verdict.rule,
        "advantage": rollout.advantage,
        "num_tokens": len(shown),
        "finish_reason": shown.finish_reason,
        "forced": rollout.forced is not None,
        "kept": rollout.kept,
    }


def _trained_rows(update: int, chosen: Selection) -> list[dict[str, Any]]:
    rows = (*chosen.fresh, *chosen.replayed)
    weights = chosen.weights or (1.0,) * len(rows)
    return [
        {
            "problem": row.problem,  # its number among the training rows
            "advantage": row.advantage if row.loss_mask.any() else 0.0,
            "weight": weight,
            "replayed": place >= len(chosen.fresh),
            "age": update - row.update,
        }
        for place, (row, weight) in enumerate(zip(rows, weights, strict=True))
    ]


@contextlib.contextmanager
def hold(directory: Path) -> Generator[None]:
    """Hold a directory alone; made if need be, and removed again if nothing was put into it.

    The lock goes with the process, so a killed run leaves nothing stale. Raises UserError.
    """
    lock = directory / ".lock"
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise UserError(
            f"run.dir: {directory} cannot be written ({error.strerror}). Name a directory that can."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"run.dir: another process is writing to {directory}. Wait for it, or name another run.dir."
            ) from error
        try:
            yield
        finally:
            if made and [path.name for path in directory.iterdir()] == [lock.name]:
                lock.unlink()
                directory.rmdir()


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        for key, value in values.items()
    }
