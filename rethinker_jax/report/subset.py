"""Which rollouts a page holds, and their images as data URIs. A page has a size; a run has not.

The rule, which the page states: both evaluations; the first step, the last, and evenly spaced ones between; of each
file the first groups, one a file in turn, until the page is full.
"""

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from rethinker_jax.report.read import Group, RolloutFile, Run, count_lines, iterate_groups

MAX_STEP_FILES = 12
MAX_MISSES = 3  # groups too large for what is left of the page, after which a file is closed
KEPT_AS_IS_BYTES = 64_000  # a larger image file is drawn again, smaller
MAX_SIDE = 768  # pixels, of an image that is drawn again
MAX_DECODED_PIXELS = 64_000_000


@dataclasses.dataclass(frozen=True)
class InlineImage:
    """`width` and `height` are those of the file; `redrawn` says that the page holds a smaller copy."""

    uri: str
    width: int
    height: int
    redrawn: bool


@dataclasses.dataclass
class ChosenFile:
    """A rollout file and those of its groups that are on the page."""

    file: RolloutFile
    num_groups: int
    groups: list[Group] = dataclasses.field(default_factory=list)
    num_unreadable: int = 0


@dataclasses.dataclass(frozen=True)
class Subset:
    """What the page shows. `images` is keyed by the file's stem, its sha256; an unreadable image is not in it."""

    files: list[ChosenFile]
    images: dict[str, InlineImage]
    num_step_files: int

    @property
    def sentence(self) -> str:
        """What is on the page and what is not, for the reader."""
        if not self.files:
            return "No rollouts have been written yet."
        shown = sum(len(chosen.groups) for chosen in self.files)
        there = sum(chosen.num_groups for chosen in self.files)
        steps = sum(chosen.file.step is not None for chosen in self.files)
        which = "" if steps == self.num_step_files else " (first, last and evenly spaced)"
        groups = "all" if shown == there else f"the first, file by file in turn until the page was full: {shown:,} of"
        bad = sum(chosen.num_unreadable for chosen in self.files)
        unreadable = f" {bad} unreadable line{'s' if bad > 1 else ''} left out." if bad else ""
        return (
            f"This page holds {steps} of {self.num_step_files} steps with saved rollouts{which} and "
            f"{len(self.files) - steps} of 2 evaluations; of their groups, {groups} {there:,}.{unreadable}"
        )


def choose_evenly(files: Sequence[RolloutFile], limit: int) -> list[RolloutFile]:
    """At most `limit` of `files`: the first, the last, and evenly spaced ones by place between."""
    if len(files) <= limit:
        return list(files)
    places = {round(i * (len(files) - 1) / (limit - 1)) for i in range(limit)}
    return [files[place] for place in sorted(places)]


def choose_rollouts(run: Run, budget_bytes: int) -> Subset:
    """Fills `budget_bytes` of JSON with groups and their images. Groups keep the order of their file."""
    before = [file for file in run.evaluations if file.name == "before"]
    after = [file for file in run.evaluations if file.name != "before"]
    files = [*before, *choose_evenly(run.rollouts, MAX_STEP_FILES), *after]
    chosen = [ChosenFile(file, count_lines(file.path)) for file in files]
    open_files = [(target, iterate_groups(target.file.path)) for target in chosen]
    misses = dict.fromkeys((file.name for file in files), 0)
    images: dict[str, InlineImage] = {}
    left = budget_bytes
    while open_files:
        still_open = []
        for target, groups in open_files:
            try:
                group = next(groups)
            except StopIteration:
                continue
            still_open.append((target, groups))
            if group is None:
                target.num_unreadable += 1
                continue
            fresh = _new_images(group, run.image_dir, images)
            cost = json_size(dataclasses.asdict(group)) + sum(len(image.uri) + 160 for image in fresh.values())
            if cost <= left:
                left -= cost
                images |= fresh
                target.groups.append(group)
            else:
                misses[target.file.name] += 1
                if misses[target.file.name] == MAX_MISSES:
                    still_open.pop()
        open_files = still_open
    return Subset(chosen, images, len(run.rollouts))


def script_json(value: Any) -> str:
    """JSON that is inert inside a <script> element: pure ASCII, no `<`, `>` or `&`, strict (NaN raises ValueError).

    ASCII alone also covers U+2028 and U+2029, and lone surrogates, which a file in UTF-8 could not hold.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def json_size(value: Any) -> int:
    """Bytes `value` takes in the page, with a comma."""
    return len(script_json(value)) + 1


def _new_images(group: Group, image_dir: Path, known: dict[str, InlineImage]) -> dict[str, InlineImage]:
    fresh: dict[str, InlineImage] = {}
    for name in group.images:
        key = name.partition(".")[0]
        image = None if key in known or key in fresh else inline_image(image_dir / name)
        if image is not None:
            fresh[key] = image
    return fresh


def inline_image(path: Path) -> InlineImage | None:
    """The image as a data URI: the file's own bytes if small, else a WebP of at most MAX_SIDE. None if unreadable."""
    try:
        encoded = path.read_bytes()
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP")) as image:
            width, height = image.size
            mime = f"image/{(image.format or 'png').lower()}"
            if width * height > MAX_DECODED_PIXELS:
                return None
            redrawn = len(encoded) > KEPT_AS_IS_BYTES
            if redrawn:
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                buffer = io.BytesIO()
                image.convert("RGBA" if "A" in image.getbands() else "RGB").save(buffer, "WEBP", quality=80)
                encoded, mime = buffer.getvalue(), "image/webp"
            else:
                image.load()  # a truncated file is found here, not as a broken picture on the page
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return InlineImage(f"data:{mime};base64,{base64.b64encode(encoded).decode()}", width, height, redrawn)
