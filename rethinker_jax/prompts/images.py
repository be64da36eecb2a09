"""Image files → patches, bit for bit as transformers ≥ 5 makes them with PIL (`Qwen2VLImageProcessorPil`).

Other backends resize a little differently (torchvision: up to 2 grey levels), so pixel parity always names this one.
"""

import dataclasses
import io
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from rethinker_jax.errors import Stopped, UserError
from rethinker_jax.json_values import mapping, number, read_object, three_numbers, whole
from rethinker_jax.types import ImagePatches

MAX_FILE_PIXELS = 64_000_000  # a larger picture is refused before it is decoded
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations
MAX_ASPECT_RATIO = 200  # of the published resize rule
# Raster formats only: PIL would hand PostScript files to an external interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What PIL raises on files that are cut short, forged or not images.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class BadImage(ValueError):
    """An image that cannot be used: unreadable, too large or too narrow. The message says which and why."""


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How pixels become patches: what matters of preprocessor_config.json. `*_pixels` bound height x width."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def factor(self) -> int:
        """Side of one merged token in pixels; resized images are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_directory(cls, model_dir: str | Path, min_pixels: int = 0, max_pixels: int = 0) -> "ImageSettings":
        """Settings of a model directory; bounds that are not 0 replace the directory's.

        Reads preprocessor_config.json, or the `image_processor` part of processor_config.json that newer versions of
        transformers write. Bounds are `min_pixels`, `max_pixels` or `size: {shortest_edge, longest_edge}`; the former
        win where a file has both. Raises UserError for a missing or unusable file and for bounds that contradict.
        """
        path, found = _read_processor_config(Path(model_dir))
        default = cls()
        try:
            _refuse_other_processing(found)
            settings = cls(
                min_pixels=min_pixels or _bound(found, "min_pixels", "shortest_edge", default.min_pixels),
                max_pixels=max_pixels or _bound(found, "max_pixels", "longest_edge", default.max_pixels),
                patch_size=whole(found, "patch_size", default.patch_size),
                merge_size=whole(found, "merge_size", default.merge_size),
                temporal_patch_size=whole(found, "temporal_patch_size", default.temporal_patch_size),
                mean=three_numbers(found, "image_mean", default.mean),
                std=three_numbers(found, "image_std", default.std, positive=True),
            )
        except ValueError as error:
            raise UserError(
                f"{path}: a value cannot be used: {error}. Compare it with the published {path.name}."
            ) from error
        if settings.max_pixels < max(settings.min_pixels, settings.factor**2):
            raise UserError(
                f"max_pixels must be at least min_pixels and one merged token ({settings.factor**2} pixels), got "
                f"min_pixels {settings.min_pixels} and max_pixels {settings.max_pixels} ({path} and data.min_pixels, "
                f"data.max_pixels): change one of them"
            )
        return settings


def _bound(found: Mapping[str, Any], key: str, edge: str, default: int) -> int:
    """The bound of the file; a null is none, as in transformers."""
    size = mapping(found, "size")
    for section, name in ((found, key), (size, edge), (size, key)):
        if section.get(name) is not None:
            return whole(section, name, default)
    return default


def _read_processor_config(directory: Path) -> tuple[Path, dict[str, Any]]:
    """(file, its image processor part)."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        found = read_object(path)
        if name == "processor_config.json":
            found = found.get("image_processor")
        if isinstance(found, dict):
            return path, found
    raise UserError(
        f"wanted preprocessor_config.json (or processor_config.json with an image_processor part) in {directory}, "
        f"found neither: copy it from the model this one was trained from"
    )


def _refuse_other_processing(found: Mapping[str, Any]) -> None:
    """Raises ValueError where the file asks for steps that `preprocess` does not do."""
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
    for key, value in wanted.items():
        if found.get(key, value) not in (value, None):
            raise ValueError(f"{key} is {found[key]!r}, and only {value!r} is supported for Qwen2.5-VL")
    if not math.isclose(number(found, "rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(f"rescale_factor is {found['rescale_factor']!r}, and only 1/255 is supported")


def open_image(ref: bytes | str) -> Image.Image:
    """The image with its header read but no pixels decoded; `ref` is an encoded file or a path. Raises BadImage."""
    name = f"{len(ref)} bytes" if isinstance(ref, bytes) else ref
    try:
        image = Image.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref, formats=FORMATS)
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot read image {name}: {type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > MAX_FILE_PIXELS:
        raise BadImage(f"image {name} has {width} x {height} pixels; more than {MAX_FILE_PIXELS} are refused")
    if min(width, height) < 1:
        raise BadImage(f"image {name} is empty: {width} x {height} pixels")
    return image


def load_image(ref: bytes | str) -> Image.Image:
    """The decoded image, turned upright by its EXIF orientation as Hugging Face's loaders do. Raises BadImage."""
    image = open_image(ref)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS as error:
        image.close()
        name = f"{len(ref)} bytes" if isinstance(ref, bytes) else ref
        raise BadImage(f"cannot decode image {name}: {type(error).__name__}: {error}") from error


def smart_resize(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) as multiples of `factor` within the pixel bounds, near the given shape.

    The published rule: round both to the nearest multiple (halves to even); if the area is out of bounds, scale both by
    the square root of what is missing, rounding down below max_pixels and up above min_pixels. Raises BadImage for
    images more than 200 times as long as wide.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise BadImage(f"image of {width} x {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other")
    factor = settings.factor
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        new_height, new_width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif new_height * new_width < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def image_grid(image: Image.Image, settings: ImageSettings) -> tuple[int, int, int]:
    """(1, h, w) in patches that `preprocess` will give, from the header alone. Raises BadImage."""
    width, height = image.size
    try:
        orientation = _orientation(image)
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot read the EXIF part of an image: {type(error).__name__}: {error}") from error
    if orientation in ON_ITS_SIDE:
        width, height = height, width
    height, width = smart_resize(height, width, settings)
    return 1, height // settings.patch_size, width // settings.patch_size


def _orientation(image: Image.Image) -> int:
    """What the EXIF part says, as far as it stands before the pixels.

    The base class's method: that of PNG files decodes the whole picture, to find a part that may stand behind them.
    """
    return Image.Image.getexif(image).get(0x0112, 1)


def num_tokens(grid: tuple[int, int, int], settings: ImageSettings) -> int:
    """Merged tokens of an image with this grid."""
    return grid[0] * grid[1] * grid[2] // settings.merge_size**2


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparent pixels composited on white. Raises BadImage for pixel formats that have no RGB form."""
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except ValueError as error:
        raise BadImage(f"cannot turn an image of mode {image.mode} into RGB: {error}") from error


class LatePatches:
    """Patches of an image whose header alone was read; it is decoded when the first rows are asked for.

    `decoded` raises BadImage where it cannot be, or is not what its header said: a PNG may tell behind its pixels that
    it lies on its side. Rows are asked for when others rely on them: Stopped ends the run where they are gone since.
    """

    def __init__(self, ref: bytes | str, settings: ImageSettings, grid: tuple[int, int, int]):
        self._ref, self._settings, self._grid = ref, settings, grid
        self.shape = math.prod(grid), settings.patch_dim
        self.ndim, self.nbytes = 2, 4 * math.prod(self.shape)
        self._patches: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        try:
            return self.decoded()[rows]
        except BadImage as error:
            raise Stopped(
                f"{error}; it was there a moment ago. Started again, the run leaves its row out", 75
            ) from error

    def decoded(self) -> np.ndarray:
        if self._patches is None:
            made = preprocess(load_image(self._ref), self._settings)
            if made.grid != self._grid:
                raise BadImage(f"an image changed its size: it had a grid of {self._grid}, now {made.grid}")
            self._patches = made.patches
        return self._patches


def late_image(image: Image.Image, ref: bytes | str, settings: ImageSettings) -> ImagePatches:
    """What `preprocess` would give, from the header of the opened image alone. Raises BadImage."""
    grid = image_grid(image, settings)
    turned = _orientation(image) in ON_ITS_SIDE
    original_size = image.size[::-1] if turned else image.size
    size = grid[2] * settings.patch_size, grid[1] * settings.patch_size
    return ImagePatches(LatePatches(ref, settings, grid), grid, original_size, size)


def preprocess(image: Image.Image, settings: ImageSettings) -> ImagePatches:
    """Resizes, normalises and cuts an image: float32 [h * w, patch_dim], patch = (channel, time, row, column).

    Patches come in merge-block order. Both time slices of a still image are the same. Raises BadImage.
    """
    rgb = to_rgb(image)
    original_size = (rgb.width, rgb.height)
    height, width = smart_resize(rgb.height, rgb.width, settings)
    # PIL resizes uint8; where the size is right already its bicubic filter is the identity.
    if (rgb.height, rgb.width) != (height, width):
        rgb = rgb.resize((width, height), resample=Image.Resampling.BICUBIC)
    size, merge = settings.patch_size, settings.merge_size
    h, w = height // size, width // size
    pixels = np.asarray(rgb).reshape(h // merge, merge, size, w // merge, merge, size, 3)
    pixels = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, 1, size, size)
    # A pixel has 256 values: normalising a table and looking up is exact and much cheaper than normalising pixels.
    grey = (np.arange(256) * (1 / 255)).astype(np.float32)
    patches = np.empty((h * w, 3, settings.temporal_patch_size, size, size), np.float32)
    for channel, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        table = (grey - np.float32(mean)) / np.float32(std)
        patches[:, channel] = table[pixels[:, channel]]
    return ImagePatches(patches.reshape(h * w, settings.patch_dim), (1, h, w), original_size, (width, height))
