"""Turns images of any mode into arrays: scales each depth by its range, and composes alpha on a background.

Intensities are uint8 in [0, 255] if all images of a set have 8 bits. Otherwise they are float32: in [0, 1] for 8 and 16
bits, and unscaled for 32-bit integers and floats, whose range only the data know. Only the first of several frames is
used. PIL reads the upper 8 bits of 16-bit colours.

Shapes: C channels (1 for grey, 3 for colour), H height, W width.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL import ImageColor, ImageOps
from PIL.Image import Image, Resampling

GREY = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
DEPTH, COLOUR = 3, 4  # fields of `header`: depth, and whether there is colour
SCALES = ("8 or 16 bits", "8 or 16 bits", "32-bit integers", "floats")  # by depth; a set has one


def header(content: bytes) -> int:
    """Returns depth and colour of an image file, which its header says before it is decoded."""
    image = PIL.Image.open(io.BytesIO(content))
    is_grey = image.mode in GREY
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        is_grey = bool((palette == palette[:, :1]).all())
    return depth_of(image) | (0 if is_grey else COLOUR)


def depth_of(image: Image) -> int:
    """Returns the depth of an image: 0 for 8 bits, 1 for 16 bits, 2 for 32-bit integers, 3 for floats.

    >>> depth_of(PIL.Image.new("RGBA", (2, 2))), depth_of(PIL.Image.new("I;16", (2, 2)))
    (0, 1)
    """
    return 1 if image.mode.startswith("I;16") else {"I": 2, "F": 3}.get(image.mode, 0)


def open_image(content: bytes) -> Image:
    """Decodes an image file, and turns it upright by its EXIF orientation."""
    image = PIL.Image.open(io.BytesIO(content))
    image.load()
    return ImageOps.exif_transpose(image)


def image_of(given: Any) -> Image:
    """Returns the image in a file or in pixels, decoded and upright.

    It may be the path of a file, a PIL image, or an array or tensor of pixels: (H, W), (H, W, C) or (C, H, W), where C
    is 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGBA. The type says the depth: uint8, or uint16, int32 or
    floats in one channel. ValueError if it is none of these.
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    if isinstance(given, np.ndarray):
        return _image_of_pixels(given)
    if not isinstance(given, str | Path | Image):
        raise ValueError(f"Expected an image, its pixels or the path of its file, but got {type(given).__name__}")
    try:
        return ImageOps.exif_transpose(given) if isinstance(given, Image) else open_image(Path(given).read_bytes())
    except Exception as error:  # PIL raises many types
        cause = getattr(error, "strerror", None) or str(error).partition(" <_io")[0]
        raise ValueError(f"Expected an image that can be decoded, but got {given} ({cause})") from None


def _image_of_pixels(pixels: np.ndarray) -> Image:
    shape, kind = pixels.shape, pixels.dtype
    channels_first, channels_last = (len(shape) == 3 and 1 <= shape[axis] <= 4 for axis in (0, 2))
    if pixels.size == 0 or not (len(shape) == 2 or channels_first != channels_last):
        raise ValueError(f"Expected pixels (H, W), (H, W, C) or (C, H, W) with C from 1 to 4, but got {shape}")
    pixels = np.moveaxis(pixels, 0, -1) if channels_first else pixels
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    pixels = pixels.astype(np.float32) if np.issubdtype(kind, np.floating) else pixels
    if pixels.dtype not in ((np.uint8,) if pixels.ndim == 3 else (np.uint8, np.uint16, np.int32, np.float32)):
        expected = "pixels of type uint8, or in one channel uint16, int32 or floats"
        raise ValueError(f"Expected {expected}, but got {kind} of shape {shape}")
    return PIL.Image.fromarray(pixels)


def to_array(
    image: Image, shape: tuple[int, int, int], *, resize: bool = False, deep: bool = False, background: str = "white"
) -> np.ndarray:
    """Returns the intensities of an image of any mode, (C, H, W), which is its `shape`.

    An image of another size is resized bilinearly if it may `resize`. The result is float32 if the set is `deep`: it
    has images of more than 8 bits. The `background` stands behind transparent pixels, a name or #rrggbb.

    Raises:
        ValueError: If it has another size, is in colour although C is 1, or holds NaN or infinity.
    """
    channels, height, width = shape
    if image.size != (width, height) and not resize:
        raise ValueError(f"is {image.width}x{image.height}")
    if depth_of(image):
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("holds NaN or infinity")
        image = PIL.Image.fromarray(values / 65535 if depth_of(image) == 1 else values)
    else:
        mode = "L" if image.mode in GREY else "RGB"
        if image.mode in ALPHA or "transparency" in image.info:
            behind = PIL.Image.new("RGBA", image.size, ImageColor.getcolor(background, "RGBA"))
            image = PIL.Image.alpha_composite(behind, image.convert("RGBA"))
        image = image.convert(mode)
    if resize:
        image = image.resize((width, height), Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(height, width, -1)  # one channel or three
    if pixels.shape[2] > channels:
        if (pixels != pixels[..., :1]).any():
            raise ValueError("is in colour")
        pixels = pixels[..., :1]
    if deep and pixels.dtype == np.uint8:
        pixels = pixels / np.float32(255)
    return np.broadcast_to(pixels.transpose(2, 0, 1), shape)
