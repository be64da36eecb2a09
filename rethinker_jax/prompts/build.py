"""Problem → prompt: images to patches, text to ids, ids to positions."""

import contextlib
import dataclasses
import os
import threading
from collections import OrderedDict

import numpy as np

from rethinker_jax.prompts.images import (
    BadImage,
    ImageSettings,
    LatePatches,
    image_grid,
    late_image,
    load_image,
    num_tokens,
    open_image,
    preprocess,
)
from rethinker_jax.prompts.positions import mrope_positions
from rethinker_jax.prompts.template import ChatTokenizer, prompt_template
from rethinker_jax.prompts.windows import VisionGeometry
from rethinker_jax.types import ImagePatches, Problem, Prompt


class BadPrompt(ValueError):
    """A problem that cannot become a prompt. `kind` is "bad_image", "image_count" or "too_long", for counting."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


Files = tuple[tuple[int, int, int] | None, ...]  # of the picture files of a problem: inode, size, time of change in ns


@dataclasses.dataclass(frozen=True)
class Made:
    """A prompt that was made before it is wanted, or why there is none, and its picture files as they were then."""

    found: Prompt | BadPrompt
    files: Files


class PromptBuilder:
    """Makes prompts, and keeps the last `cache_size` of them, least recently used leaving first.

    `cache_bytes` bounds their patches: a full-size image of 1280 tokens takes 24 MB, and thousands would fill the host.

    A prompt kept is the same object when asked for again, so `pack_prompts` sees that its images are the same too.
    Safe to call from several threads; two that ask for one problem at once may both build it.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        image_settings: ImageSettings,
        geometry: VisionGeometry,
        template_name: str,
        *,
        max_prompt_tokens: int = 0,
        cache_size: int = 0,
        cache_bytes: int = 2**30,
        decode_late: bool = False,
    ):
        """`max_prompt_tokens` 0 = no limit. `decode_late`: pixels are decoded when they are asked for. Raises UserError
        for an unknown template, ValueError if sizes differ.
        """
        prompt_template(template_name)
        if (image_settings.patch_size, image_settings.merge_size) != (geometry.patch_size, geometry.merge_size):
            raise ValueError(
                f"image processor cuts patches of {image_settings.patch_size} and merges {image_settings.merge_size}, "
                f"the vision tower wants {geometry.patch_size} and {geometry.merge_size}"
            )
        self.tokenizer = tokenizer
        self.image_settings = image_settings
        self.geometry = geometry
        self.template_name = template_name
        self.max_prompt_tokens = max_prompt_tokens
        self.decode_late = decode_late
        self._cache_size = cache_size
        self._cache_bytes = cache_bytes
        self._used_bytes = 0
        self._cache: OrderedDict[str, Prompt] = OrderedDict()
        self._lock = threading.Lock()

    def build(self, problem: Problem, made: Made | None = None) -> Prompt:
        """The prompt of a problem. Raises BadPrompt, short of decoding its images where that comes late.

        `made` is what `make` gave of it; it counts as long as its picture files are what they were.
        """
        with self._lock:
            cached = self._cache.get(problem.id)
            if cached is not None and cached.problem == problem:
                self._cache.move_to_end(problem.id)
                return cached
        if made is None or made.files != _files_of(problem):
            prompt = self._build(problem)
        elif isinstance(made.found, BadPrompt):
            raise made.found
        else:
            prompt = made.found
        if self._cache_size:
            with self._lock:
                self._keep(prompt)
        return prompt

    def make(self, problem: Problem, *, decode: bool) -> Made | None:
        """What `build` would give now, for it to take over later; None where it has the prompt already.

        Nothing is kept, so that what is kept, and which row is found to be bad when, does not depend on who asked
        early. `decode`: also the images that are decoded late; one that cannot be is left to be found by `decode`.
        """
        with self._lock:
            cached = self._cache.get(problem.id)
            if cached is not None and cached.problem == problem:
                return None
        files = _files_of(problem)  # before they are read: a change meanwhile is seen
        try:
            prompt = self._build(problem)
        except BadPrompt as error:
            return Made(error, files)
        if decode:
            with contextlib.suppress(BadPrompt):
                self.decode(prompt)
        return Made(prompt, files)

    def check(self, problem: Problem) -> int:
        """Prompt length in tokens, from the headers of its images alone. Raises BadPrompt, short of decoding."""
        return len(self._encode(problem, self._grids(problem)))

    def decode(self, prompt: Prompt) -> None:
        """Decode the images of a prompt, where that was put off. Raises BadPrompt."""
        try:
            for image in prompt.images:
                if isinstance(image.patches, LatePatches):
                    image.patches.decoded()
        except BadImage as error:
            raise BadPrompt("bad_image", f"problem {prompt.problem.id!r}: {error}") from error

    def _keep(self, prompt: Prompt) -> None:
        replaced = self._cache.pop(prompt.problem.id, None)
        self._used_bytes += _num_bytes(prompt) - (_num_bytes(replaced) if replaced is not None else 0)
        self._cache[prompt.problem.id] = prompt
        while len(self._cache) > self._cache_size or self._used_bytes > self._cache_bytes:
            self._used_bytes -= _num_bytes(self._cache.popitem(last=False)[1])

    def _grids(self, problem: Problem) -> list[tuple[int, int, int]]:
        grids = []
        for ref in problem.images:
            try:
                with open_image(ref) as image:
                    grids.append(image_grid(image, self.image_settings))
            except BadImage as error:
                raise BadPrompt("bad_image", f"problem {problem.id!r}: {error}") from error
        return grids

    def _encode(self, problem: Problem, grids: list[tuple[int, int, int]]) -> np.ndarray:
        tokens = [num_tokens(grid, self.image_settings) for grid in grids]
        try:
            token_ids = self.tokenizer.encode_problem(problem, self.template_name, tokens)
        except ValueError as error:
            raise BadPrompt("image_count", f"problem {problem.id!r}: {error}") from error
        if 0 < self.max_prompt_tokens < len(token_ids):
            raise BadPrompt(
                "too_long",
                f"problem {problem.id!r}: {len(token_ids)} tokens, {sum(tokens)} of them of images, are more than "
                f"data.max_prompt_tokens={self.max_prompt_tokens}",
            )
        return token_ids

    def _build(self, problem: Problem) -> Prompt:
        self.check(problem)  # a prompt that is too long is refused before its pixels are decoded
        try:
            images = tuple(map(self._image, problem.images))
        except BadImage as error:
            raise BadPrompt("bad_image", f"problem {problem.id!r}: {error}") from error
        grids = [image.grid for image in images]
        token_ids = self._encode(problem, grids)
        image_token = self.tokenizer.image_token_id
        positions, next_position = mrope_positions(token_ids, image_token, grids, self.geometry.merge_size)
        is_image = token_ids == image_token
        return Prompt(
            problem=problem,
            token_ids=token_ids,
            positions=positions,
            image_index=np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32),
            next_position=next_position,
            images=images,
            text=self.tokenizer.render(problem, self.template_name),
        )

    def _image(self, ref: bytes | str) -> ImagePatches:
        if not self.decode_late:
            return preprocess(load_image(ref), self.image_settings)
        with open_image(ref) as image:
            return late_image(image, ref, self.image_settings)


def _files_of(problem: Problem) -> Files:
    return tuple(_state_of(image) for image in problem.images if isinstance(image, str))


def _state_of(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _num_bytes(prompt: Prompt) -> int:
    return sum(image.patches.nbytes for image in prompt.images)
