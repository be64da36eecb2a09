"""Images → patches, bit for bit against transformers' PIL image processor (which needs no torch)."""

import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from rethinker_jax.errors import UserError
from rethinker_jax.prompts.images import (
    MAX_FILE_PIXELS,
    BadImage,
    ImageSettings,
    image_grid,
    load_image,
    num_tokens,
    open_image,
    preprocess,
    smart_resize,
)


def noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    return (
        image
        if mode == "RGBA"
        else image.convert("LA").convert(mode)
        if mode == "LA"
        else image.convert("RGB").convert(mode)
    )


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def published():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return module.Qwen2VLImageProcessorPil


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "CMYK", "1"])
@pytest.mark.parametrize("size", [(224, 224), (643, 477), (14, 14), (30, 2000), (1500, 900)])
def test_patches_equal_the_published_processor(published, mode, size):
    """Catches alpha dropped instead of composited on white, another filter, float64 normalisation, patch order."""
    image = noise(*size, mode)
    wanted = published()(images=[image], return_tensors="np")
    found = preprocess(image, ImageSettings())
    assert found.patches.dtype == np.float32
    np.testing.assert_array_equal(found.patches, wanted["pixel_values"])
    assert found.grid == tuple(wanted["image_grid_thw"][0]) == image_grid(image, ImageSettings())


RARE_MODES = ["PA", "RGBa", "RGBX", "YCbCr", "HSV", "LAB", "I", "F"]


@pytest.mark.parametrize("mode", RARE_MODES)
def test_rare_modes_too(published, mode):
    """Catches a mode that is turned into RGB by another way than Pillow's."""
    image = noise(70, 90, "RGBA")
    image = image.convert(mode) if mode in ("PA", "RGBa") else image.convert("RGB").convert(mode)
    assert image.mode == mode
    wanted = published()(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(preprocess(image, ImageSettings()).patches, wanted)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_are_clipped_as_published(published, mode):
    """Grey of 16 bits, as PNG and TIFF hold it: values above 255 are white, there and here. Catches a division."""
    grey = np.random.default_rng(0).integers(0, 600, (90, 70)).astype("<u2" if mode == "I;16" else ">u2")
    image = Image.frombytes(mode, (70, 90), grey.tobytes())
    wanted = published()(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(preprocess(image, ImageSettings()).patches, wanted)
    if mode == "I;16":
        np.testing.assert_array_equal(preprocess(load_image(encoded(image)), ImageSettings()).patches, wanted)


@pytest.mark.parametrize("mode, transparency", [("L", 0), ("RGB", 0), ("P", 0), ("P", bytes(range(256))), ("1", 0)])
def test_transparency_beside_the_pixels(published, mode, transparency):
    """PNG's tRNS: one colour, or an alpha for each palette entry. Catches it being lost when the file is opened."""
    image = noise(70, 90).convert(mode)
    # A colour that occurs, or what was given.
    first = image.getpixel((0, 0)) if mode in ("L", "RGB", "P") and transparency == 0 else transparency
    data = encoded(image, transparency=first)
    image = load_image(data)
    found = preprocess(image, ImageSettings()).patches
    wanted = published()(images=[Image.open(io.BytesIO(data))], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(found, wanted)
    del image.info["transparency"]
    assert not np.array_equal(found, preprocess(image, ImageSettings()).patches)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (2800, 14), (14, 2800), (27, 29), (13, 2600), (5000, 26)])
def test_tiny_and_thin_images(published, size):
    """Catches sides of no patch at all, and width exchanged with height where the aspect is extreme."""
    wanted = published()(images=[noise(*size)], return_tensors="np")
    found = preprocess(noise(*size), ImageSettings())
    np.testing.assert_array_equal(found.patches, wanted["pixel_values"])
    assert found.grid == tuple(wanted["image_grid_thw"][0])


@pytest.mark.parametrize("file_format, mode", [("JPEG", "CMYK"), ("GIF", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGB")])
def test_files_are_decoded_as_published(published, file_format, mode):
    """Catches a decoder option that the published loader does not set."""
    data = encoded(noise(70, 90, "RGBA").convert(mode), file_format)
    wanted = published()(images=[Image.open(io.BytesIO(data))], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(preprocess(load_image(data), ImageSettings()).patches, wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_that_of_the_published_loader(published, orientation, tmp_path):
    """Catches a turn the wrong way, and a mirrored image that is only turned."""
    from transformers.image_utils import load_image as published_load

    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.png").write_bytes(encoded(noise(112, 56), exif=exif))
    wanted = published()(images=[published_load(str(tmp_path / "a.png"))], return_tensors="np")["pixel_values"]
    found = preprocess(load_image(str(tmp_path / "a.png")), ImageSettings())
    np.testing.assert_array_equal(found.patches, wanted)


def test_a_palette_with_transparency_is_composited_on_white(published):
    """Transparency of palette images sits in the info, not in a band: white, not the palette's colour."""
    image = Image.new("P", (56, 56), 0)
    image.putpalette([255, 0, 0] + [0] * 765)
    image = Image.open(io.BytesIO(encoded(image, transparency=0)))
    found = preprocess(image, ImageSettings())
    np.testing.assert_array_equal(found.patches, published()(images=[image], return_tensors="np")["pixel_values"])
    white = preprocess(Image.new("RGB", (56, 56), "white"), ImageSettings())
    np.testing.assert_array_equal(found.patches, white.patches)


def test_other_bounds_and_sizes_reach_the_result(published):
    settings = ImageSettings(min_pixels=200_704, max_pixels=262_144)
    processor = published(min_pixels=200_704, max_pixels=262_144)
    for size in [(50, 70), (900, 800), (500, 450)]:
        wanted = processor(images=[noise(*size)], return_tensors="np")
        np.testing.assert_array_equal(preprocess(noise(*size), settings).patches, wanted["pixel_values"])


@pytest.mark.parametrize(
    "size, grid, tokens",
    [((224, 224), (1, 16, 16), 64), ((640, 480), (1, 34, 46), 391), ((28, 28), (1, 4, 4), 4)],
)
def test_known_grids(size, grid, tokens):
    """640 x 480 → 644 x 476 pixels; 28 x 28 lies under min_pixels 56 x 56 and grows. Catches w and h exchanged."""
    found = image_grid(Image.new("RGB", size), ImageSettings())
    assert found == grid
    assert num_tokens(found, ImageSettings()) == tokens


def test_halves_round_to_even():
    """42 = 1.5 tokens → 2, 70 = 2.5 → 2. Catches rounding halves up (70 → 84)."""
    settings = ImageSettings(min_pixels=1)
    assert smart_resize(42, 70, settings) == (56, 56)


def test_a_large_image_stays_below_max_pixels():
    height, width = smart_resize(3000, 4000, ImageSettings(max_pixels=1_003_520))
    assert height * width <= 1_003_520
    assert height % 28 == width % 28 == 0


def test_both_time_slices_are_the_image():
    patches = preprocess(noise(56, 56), ImageSettings()).patches.reshape(16, 3, 2, 14, 14)
    np.testing.assert_array_equal(patches[:, :, 0], patches[:, :, 1])


def test_exif_orientation_is_applied_and_known_from_the_header():
    """Orientation 6 turns 112 x 56 into 56 x 112. Catches a grid from the header that the pixels do not have."""
    image = noise(112, 56)
    exif = image.getexif()
    exif[0x0112] = 6
    data = encoded(image, exif=exif)
    with open_image(data) as header:
        assert image_grid(header, ImageSettings()) == (1, 8, 4)
    assert preprocess(load_image(data), ImageSettings()).grid == (1, 8, 4)


def test_a_path_and_its_bytes_are_the_same_image(tmp_path):
    data = encoded(noise(60, 60), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(load_image(str(tmp_path / "a.jpg"))))


def bomb():
    """A PNG header that claims one pixel row more than is allowed; nothing behind it."""
    side = 16_384
    header = bytearray(encoded(Image.new("1", (1, 1))))
    header[16:24] = side.to_bytes(4, "big") + (MAX_FILE_PIXELS // side + 1).to_bytes(4, "big")
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    return bytes(header)


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "cannot read"),
        (b"not an image", "cannot read"),
        (encoded(noise(90, 90))[:500], "cannot decode"),
        (bomb(), "are refused"),
        (encoded(Image.new("RGB", (8, 8)), "EPS"), "cannot read"),
        ("/nowhere/a.png", "/nowhere/a.png"),
    ],
    ids=["empty", "text", "cut", "bomb", "postscript", "missing"],
)
def test_unusable_images_raise_bad_image(data, says):
    with pytest.raises(BadImage, match=says):
        load_image(data)


def test_a_thread_is_too_narrow():
    """201 times as long as wide is over the published limit, 200 is not."""
    assert image_grid(Image.new("RGB", (2800, 14)), ImageSettings())[0] == 1
    with pytest.raises(BadImage, match="200 times"):
        preprocess(Image.new("RGB", (2814, 14)), ImageSettings())


def write(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "name, content, bounds",
    [
        ("preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12_845_056}, (3136, 12_845_056)),
        ("preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 50_176}}, (784, 50_176)),
        ("preprocessor_config.json", {"size": {"min_pixels": 784, "max_pixels": 50_176}}, (784, 50_176)),
        ("preprocessor_config.json", {"min_pixels": 1000, "size": {"shortest_edge": 784}}, (1000, 1_003_520)),
        ("preprocessor_config.json", {"min_pixels": None, "max_pixels": None}, (3136, 1_003_520)),
        ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 9, "longest_edge": 7840}}}, (9, 7840)),
    ],
)
def test_bounds_of_a_model_directory(tmp_path, name, content, bounds):
    """Catches reading one of the forms only, which would leave the class default of 1280 tokens in force."""
    settings = ImageSettings.from_directory(write(tmp_path, name, content))
    assert (settings.min_pixels, settings.max_pixels) == bounds
    given = ImageSettings.from_directory(tmp_path, min_pixels=2000, max_pixels=4000)
    assert (given.min_pixels, given.max_pixels) == (2000, 4000)


def test_a_directory_is_read_as_transformers_reads_it(tmp_path, published):
    published(min_pixels=1568, max_pixels=78_400).save_pretrained(tmp_path)
    settings = ImageSettings.from_directory(tmp_path)
    assert settings == ImageSettings(min_pixels=1568, max_pixels=78_400)


@pytest.mark.parametrize(
    "content, says",
    [
        ({"min_pixels": 9000, "max_pixels": 8000}, "max_pixels must be at least"),
        ({"max_pixels": 100, "min_pixels": 1}, "one merged token"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"rescale_factor": "x"}, "rescale_factor must be a number"),
        ({"rescale_factor": 0}, "rescale_factor must be a number"),  # not the default
        ({"patch_size": None}, "patch_size must be a whole number"),
        ({"patch_size": "x"}, "patch_size must be a whole number"),
        ({"merge_size": 2.5}, "merge_size must be a whole number"),
        ({"temporal_patch_size": True}, "temporal_patch_size must be a whole number"),
        ({"image_mean": 0.5}, "image_mean must be a list of three"),
        ({"image_mean": [0.5]}, "image_mean must be a list of three"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean must be a list of three"),
        ({"image_mean": [0, 0, float("nan")]}, "image_mean must be a list of three"),
        ({"image_std": [0, 0, 0]}, "image_std must be a list of three numbers above 0"),
        ({"image_std": [1, 1, 1e-50]}, "image_std must be a list of three numbers above 0"),  # 0 in float32
        ({"size": 224}, "size must be an object"),
        ({"size": "x"}, "size must be an object"),
        ({"size": {"shortest_edge": "x"}}, "shortest_edge must be a whole number"),
        ({"size": {"max_pixels": 1e9}}, "max_pixels must be a whole number"),
        ({"min_pixels": "x"}, "min_pixels must be a whole number"),
        ({"min_pixels": -5}, "min_pixels must be a whole number"),
        ({"min_pixels": 0}, "min_pixels must be a whole number"),  # not the default
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, content, says):
    """Catches a traceback, pixels divided by 0, and a value that is replaced by the default."""
    with pytest.raises(UserError, match=says) as caught:
        ImageSettings.from_directory(write(tmp_path, "preprocessor_config.json", content))
    assert str(tmp_path / "preprocessor_config.json") in str(caught.value)


def test_colours_may_have_any_mean(tmp_path):
    """Catches a mean held to what a deviation must be: 0 and below are used by other normalisations."""
    settings = ImageSettings.from_directory(write(tmp_path, "preprocessor_config.json", {"image_mean": [0, -1, 0.5]}))
    assert settings.mean == (0.0, -1.0, 0.5)


def test_a_directory_without_settings_says_which_file_is_wanted(tmp_path):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        ImageSettings.from_directory(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        ImageSettings.from_directory(tmp_path)
