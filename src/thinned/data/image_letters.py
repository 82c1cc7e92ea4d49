"""Draws the letters A to J in matplotlib's fonts: foreign data for a network of digits, without a download.

They stand for notMNIST (Bulatov 2011), letters in many fonts, on which Ovadia et al. (2019) tested MNIST networks.
"""

from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIJ"
NUMBER = 1000
SEED = 0
FONTS = [  # of several families and weights, upright and slanted
    f"{family}.ttf"
    for family in (
        *(f"DejaVuSans{kind}" for kind in ("", "-Bold", "-Oblique", "-BoldOblique", "Mono", "Mono-Bold")),
        *(f"DejaVuSerif{kind}" for kind in ("", "-Bold", "-Italic", "-BoldItalic")),
        *(f"STIXGeneral{kind}" for kind in ("", "Bol", "Italic", "BolIta")),
        *(f"cm{kind}10" for kind in ("r", "b", "ss", "ti", "tt")),
    )
]
ZOOM = 4  # letters are drawn so many times larger, then averaged


def read_letters(height: int, width: int) -> datasets.Dataset:
    """Returns 1,000 images of letters, white on black, without labels. The index of an image decides all of it."""
    import matplotlib  # takes a while

    fonts = Path(matplotlib.get_data_path(), "fonts/ttf")
    drawn = [_drawn(LETTERS[row % len(LETTERS)], fonts, height, width, row) for row in range(NUMBER)]
    contents = [{"bytes": content, "path": None} for content in drawn]
    return datasets.Dataset.from_dict({"image": contents}, features=datasets.Features(image=datasets.Image()))


def _drawn(letter: str, fonts: Path, height: int, width: int, row: int) -> bytes:
    """Returns a letter as PGM, pixel by pixel."""
    generator = np.random.default_rng((SEED, row))
    size = ZOOM * min(height, width)
    font = ImageFont.truetype(str(fonts / str(generator.choice(FONTS))), round(size * generator.uniform(0.7, 1.1)))
    image = Image.new("L", (ZOOM * width, ZOOM * height))
    place = np.array(image.size) / 2 + size * generator.uniform(-0.05, 0.05, 2)
    left, top, right, bottom = font.getbbox(letter)
    corner = place - [(left + right) / 2, (top + bottom) / 2]
    ImageDraw.Draw(image).text((corner[0], corner[1]), letter, fill=255, font=font)
    image = image.rotate(generator.uniform(-15, 15), Image.Resampling.BILINEAR).reduce(ZOOM)
    image.save(content := BytesIO(), "PPM")
    return content.getvalue()
