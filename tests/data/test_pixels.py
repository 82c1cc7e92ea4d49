"""Images of any mode that PIL can write become the intensities that a person sees."""

import io
from itertools import product
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

from thinned.data.pixels import COLOUR, DEPTH, depth_of, header, image_of, open_image, to_array

GREY = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def written(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def read(content: bytes, channels: int = 1, **options: Any) -> np.ndarray:
    return to_array(open_image(content), (channels, 5, 7), **options)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "GIF", "TGA", "SGI", "PCX", "ICO"])
def test_grey_stays_grey_in_every_lossless_format(kind: str) -> None:
    options = {"sizes": [(7, 5)]} if kind == "ICO" else {}
    content = written(Image.fromarray(GREY), kind, **options)
    assert header(content) & (DEPTH | COLOUR) == 0
    assert np.array_equal(read(content)[0], GREY)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("RGB", "BMP"), ("YCbCr", "TIFF"), ("CMYK", "TIFF"), ("P", "PNG")]
)
def test_colour_stays_colour(mode: str, kind: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    content = written(image, kind)
    assert header(content) == COLOUR
    assert np.array_equal(read(content, 3), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@pytest.mark.parametrize(
    ("kind", "mode"), [*product(["PNG"], PNG_MODES), *product(["TIFF"], [*PNG_MODES, "CMYK", "I", "F"])]
)
def test_any_mode_shows_the_same_two_intensities(kind: str, mode: str) -> None:
    """Black and white, in each mode's own numbers."""
    image = Image.fromarray((GREY > 127).astype(np.uint8) * 255)
    if mode in ("I;16", "I", "F"):
        values = (GREY > 127) * {"I;16": 65535, "I": 2**31 - 1, "F": 1.0}[mode]
        image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    elif mode in ("LA", "RGBA", "CMYK"):
        image = image.convert("RGB").convert(mode)
    else:
        image = image.convert(mode)
    content = written(image, kind)
    deep = bool(header(content) & DEPTH)
    pixels = read(content, 3 if header(content) & COLOUR else 1, deep=deep)
    assert pixels.dtype == (np.float32 if deep else np.uint8)
    assert np.array_equal(pixels[0] / pixels.max(), GREY > 127)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range(kind: str) -> None:
    content = written(Image.fromarray(GREY.astype(np.uint16) * 257), kind)
    assert header(content) & DEPTH == 1
    assert np.allclose(read(content, deep=True), GREY / np.float32(255), atol=1e-7)
    twelve = written(Image.fromarray(GREY.astype(np.uint16) * 16), kind)  # 12 of the 16 bits
    assert len(np.unique(read(twelve, deep=True))) == len(np.unique(GREY))


@pytest.mark.parametrize(("dtype", "scale"), [(np.int32, 1000), (np.float32, 0.001)])
def test_integers_and_floats_stay_what_they_are(dtype: Any, scale: float) -> None:
    values = (GREY.astype(np.float64) * scale - 3).astype(dtype)
    content = written(Image.fromarray(values), "TIFF")
    assert np.array_equal(read(content, deep=True)[0], values.astype(np.float32))


def test_eight_bits_in_a_deep_set_have_the_same_scale() -> None:
    assert np.array_equal(read(written(Image.fromarray(GREY)), deep=True)[0], GREY / np.float32(255))


@pytest.mark.parametrize(("background", "under"), [("white", 255), ("black", 0), ("#646464", 100)])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_composed_on_the_background(mode: str, background: str, under: int) -> None:
    alpha = np.array([[0, 255, 51]], np.uint8)  # 51 is a fifth
    channels = [np.full_like(alpha, 200)] * (len(mode) - 1) + [alpha]
    image = Image.fromarray(np.stack(channels, -1))
    pixels = to_array(image, (len(mode) - 1, 1, 3), background=background)
    assert pixels[0, 0] == pytest.approx([under, 200, 0.2 * 200 + 0.8 * under], abs=1)


def test_a_transparent_palette_entry_shows_the_background() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([9, 9, 9, 90, 90, 90])
    content = written(image, transparency=0)
    shown = to_array(open_image(content), (1, 1, 2), background="white")
    assert shown.tolist() == [[[255, 90]]]


def test_grey_in_colour_is_taken_and_colour_as_grey_refused() -> None:
    grey_as_rgb = written(Image.fromarray(GREY).convert("RGB"))
    assert np.array_equal(read(grey_as_rgb, 1)[0], GREY)
    with pytest.raises(ValueError, match="is in colour"):
        read(written(Image.fromarray(RGB)), 1)
    assert np.array_equal(read(written(Image.fromarray(GREY)), 3), np.stack([GREY] * 3))


def test_cameras_orientation_is_obeyed() -> None:
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    content = written(Image.fromarray(GREY.T.copy()), exif=exif)
    assert np.array_equal(read(content)[0], np.rot90(GREY.T, -1))


def test_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        read(written(Image.fromarray(np.full((5, 7), np.nan, np.float32)), "TIFF"), deep=True)


def test_another_size_is_refused_or_resized() -> None:
    with pytest.raises(ValueError, match="is 5x7"):
        read(written(Image.fromarray(GREY.T.copy())))
    expected = Image.fromarray(GREY.T.copy()).resize((7, 5), Image.Resampling.BILINEAR)
    assert np.array_equal(read(written(Image.fromarray(GREY.T.copy())), resize=True)[0], np.asarray(expected))


def test_pixels_are_the_image_that_a_file_of_them_would_be() -> None:
    rgba = np.dstack([RGB, GREY])
    for pixels, mode in ((GREY, "L"), (RGB[..., :2], "LA"), (RGB, "RGB"), (rgba, "RGBA")):
        shapes = [pixels] if pixels.ndim == 2 else [pixels, pixels.transpose(2, 0, 1)]
        shapes += [pixels[None], pixels[..., None]] if pixels.ndim == 2 else []
        for given in (*shapes, *(torch.from_numpy(each.copy()) for each in shapes)):
            image = image_of(given)
            assert image.mode == mode
            assert np.array_equal(np.asarray(image), pixels)


def test_the_type_of_pixels_is_their_depth() -> None:
    deep = GREY.astype(np.uint16) * 257
    assert depth_of(image_of(deep)) == depth_of(image_of(torch.from_numpy(deep))) == 1
    assert np.array_equal(to_array(image_of(deep), (1, 5, 7), deep=True)[0], deep / np.float32(65535))
    assert depth_of(image_of(GREY.astype(np.int32))) == 2
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        image = image_of(torch.from_numpy(GREY.copy()).to(kind).requires_grad_())
        assert depth_of(image) == 3
        np.testing.assert_allclose(np.asarray(image), GREY, rtol=0.004)
