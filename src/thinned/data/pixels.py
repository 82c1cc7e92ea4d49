"""Images of any mode to arrays: each depth is scaled by its own range, and alpha is composed on a background.

Intensities are uint8 in [0, 255] if all images of a set have 8 bits. Otherwise they are float32: in [0, 1] for 8 and 16
bits, and as they are for 32-bit integers and floats, whose range only the data know.

Shapes: C channels (1 for grey, 3 for colour), H height, W width.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL import ImageColor, ImageOps
from PIL.Image import Image, Resampling

GREY = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
# What `header` tells: the depth (0 for 8 bits, 1 for 16 bits, 2 for 32-bit integers, 3 for floats) and flags.
DEPTH, COLOUR, FRAMES, NARROWED = 3, 4, 8, 16  # of the last, PIL reads the upper 8 of 16 bits alone
SCALES = ("8 or 16 bits", "8 or 16 bits", "32-bit integers", "floats")  # by depth; a set has one
PLAIN_PNG = (b"\x01\x00", b"\x02\x00", b"\x04\x00", b"\x08\x00")  # bits of a pixel; 0 stands for grey


def header(content: bytes) -> int:
    """Returns what an image file says before it is decoded: depth and flags."""
    if content[12:16] == b"IHDR" and content[24:26] in PLAIN_PNG and not (b"tRNS" in content or b"acTL" in content):
        return 0  # a short way for the most frequent case
    image = PIL.Image.open(io.BytesIO(content))
    is_grey = image.mode in GREY or (image.mode in ("P", "PA") and _has_grey_palette(image))
    narrowed = content[12:16] == b"IHDR" and content[24] == 16 and content[25] != 0
    several = getattr(image, "is_animated", False)
    return depth_of(image) | (0 if is_grey else COLOUR) | (FRAMES if several else 0) | (NARROWED if narrowed else 0)


def depth_of(image: Image) -> int:
    """Returns the depth of an image: 0 for 8 bits, 1 for 16 bits, 2 for 32-bit integers, 3 for floats.

    >>> depth_of(PIL.Image.new("RGBA", (2, 2))), depth_of(PIL.Image.new("I;16", (2, 2)))
    (0, 1)
    """
    return 1 if image.mode.startswith("I;16") else {"I": 2, "F": 3}.get(image.mode, 0)


class Kind(NamedTuple):
    """What the headers of a set tell."""

    scale: str  # one of `SCALES`
    channels: int  # C: 3 if any image is in colour
    deep: bool  # whether any image has more than 8 bits
    said: list[str]  # what a person should know


def kind_of(headers: np.ndarray, scale: str | None = None) -> Kind:
    """Returns what kind of images a set holds, by their headers, (N,).

    Args:
        headers: What `header` tells of each image.
        scale: The scale that the set must have; None takes its own.

    Raises:
        ValueError: If the images have several scales, or another one.
    """
    scales = sorted({SCALES[depth] for depth in np.unique(headers & DEPTH)})
    scale = scale or scales[0]
    if scales != [scale]:
        raise ValueError(f"Expected images of {scale} in data.path, but got {' and '.join(scales)}")
    said = []
    for flag, fact in (
        (FRAMES, "have several frames: the first is used"),
        (NARROWED, "have 16 bits a colour: the upper 8 of them are used"),
    ):
        if number := int((headers & flag > 0).sum()):
            said.append(f"{number} images of data.path {fact}")
    return Kind(scale, 3 if (headers & COLOUR).any() else 1, bool((headers & DEPTH).any()), said)


def _has_grey_palette(image: Image) -> bool:
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def open_image(stored: dict[str, Any]) -> Image:
    """Decodes a stored image, from its bytes or its path, and turns it upright as its camera says."""
    content = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
    image = PIL.Image.open(io.BytesIO(content))
    image.load()
    return ImageOps.exif_transpose(image)


def image_of(given: Any) -> Image:
    """Returns an image that a person has, decoded and upright.

    Args:
        given: Path of a file, a PIL image, or an array or tensor of pixels: (H, W), (H, W, C) or (C, H, W), where C is
            1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGBA. The type says the depth: uint8, uint16, int32 or
            floats; the last two in one channel. Of uint16 in several channels, the upper 8 bits are used, as of files.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    if isinstance(given, np.ndarray):
        return _image_of_pixels(given)
    try:
        if isinstance(given, str | Path):
            return open_image({"bytes": None, "path": given})
        if isinstance(given, Image):
            return ImageOps.exif_transpose(given)
    except Exception as error:  # PIL raises many types
        cause = getattr(error, "strerror", None) or str(error).partition(" <_io")[0]
        raise ValueError(f"Expected an image that can be decoded, but got {given} ({cause})") from None
    raise ValueError(f"Expected an image, its pixels or the path of its file, but got {type(given).__name__}")


def _image_of_pixels(pixels: np.ndarray) -> Image:
    shape, kind = pixels.shape, pixels.dtype
    channels_first, channels_last = (len(shape) == 3 and 1 <= shape[axis] <= 4 for axis in (0, 2))
    if pixels.size == 0 or not (len(shape) == 2 or channels_first != channels_last):
        raise ValueError(f"Expected pixels (H, W), (H, W, C) or (C, H, W) with C from 1 to 4, but got {shape}")
    pixels = np.moveaxis(pixels, 0, -1) if channels_first else pixels
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    if np.issubdtype(kind, np.floating):
        pixels = pixels.astype(np.float32)
    elif kind not in (np.uint8, np.uint16, np.int32):
        raise ValueError(f"Expected pixels of type uint8, uint16, int32 or floats, but got {kind}")
    if pixels.ndim == 3 and kind == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.dtype != np.uint8:
        raise ValueError(f"Expected one channel of type {kind}, but got the shape {shape}")
    return PIL.Image.fromarray(pixels)


def to_array(
    image: Image, shape: tuple[int, int, int], *, resize: bool = False, deep: bool = False, background: str = "white"
) -> np.ndarray:
    """Returns the intensities of an image, (C, H, W).

    Args:
        image: Any mode that PIL knows.
        shape: (C, H, W).
        resize: Whether an image of another size is resized, bilinearly.
        deep: Whether the set has more than 8 bits, so that the result is float32.
        background: Colour behind transparent pixels, a name or #rrggbb.

    Raises:
        ValueError: If it has another size, is in colour although C is 1, or holds NaN or infinity.
    """
    channels, height, width = shape
    if image.size != (width, height) and not resize:
        raise ValueError(f"is {image.width}x{image.height}")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("holds NaN or infinity")
        image = PIL.Image.fromarray(values / 65535 if image.mode.startswith("I;16") else values)
    else:
        image = _composed(image, background)
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


def _composed(image: Image, background: str) -> Image:
    """Returns an image of mode L or RGB, with the background behind transparent pixels."""
    is_grey = image.mode in GREY
    if image.mode in ALPHA or "transparency" in image.info:
        behind = PIL.Image.new("RGBA", image.size, ImageColor.getcolor(background, "RGBA"))
        image = PIL.Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("L" if is_grey else "RGB")
