"""Reads the stored splits of images: scikit-learn's digits, drawn letters, a folder, or a dataset of Hugging Face.

A folder has images as <class>/... or <split>/<class>/..., images and tables with their labels, or parquet with images.
The column `file_name` or `file` of a table holds paths from its own folder.
"""

import glob
from collections import defaultdict
from collections.abc import Mapping
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw, ImageFont

from thinned.data import sources
from thinned.data.image_store import StoredImages
from thinned.data.labels import LABEL_NAMES, UNKNOWN, label_column, match_names, read_labels, shortened
from thinned.data.order import Split
from thinned.data.pixels import COLOUR, DEPTH, SCALES

TABLES = (".csv", ".tsv", ".jsonl")
FILE_COLUMNS = ("file_name", "file")
LETTERS = "ABCDEFGHIJ"
FONTS = (  # of matplotlib: several families and weights, upright and slanted
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmti10",
    "cmtt10",
)  # fmt: skip
ZOOM = 4  # letters are drawn so many times larger, then averaged
EXPECTED = "'digits', 'letters', a folder of images, the folder of a dataset or its id on the Hugging Face Hub"


def read_digits() -> datasets.Dataset:
    """Returns scikit-learn's 1,797 digits of 8x8 pixels, 17 grey levels scaled to 0..255."""
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    # PGM stores plain pixels, so hashes are the same everywhere; PNG depends on a library's version.
    contents = [{"bytes": b"P5 8 8 255\n" + image.tobytes(), "path": None} for image in images]
    classes = datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    features = datasets.Features(image=datasets.Image(), label=classes)
    return datasets.Dataset.from_dict({"image": contents, "label": digits.target}, features=features)


def read_letters(height: int, width: int) -> datasets.Dataset:
    """Returns 1,000 images of letters, white on black, without labels. The index of an image decides all of it.

    They stand for notMNIST (Bulatov 2011), on which Ovadia et al. (2019) tested MNIST networks.
    """
    import matplotlib  # takes a while

    fonts = Path(matplotlib.get_data_path(), "fonts/ttf")
    contents = [{"bytes": _letter(row, fonts, height, width), "path": None} for row in range(1000)]
    return datasets.Dataset.from_dict({"image": contents}, features=datasets.Features(image=datasets.Image()))


def _letter(row: int, fonts: Path, height: int, width: int) -> bytes:
    """Returns a letter as PGM, pixel by pixel."""
    letter, generator = LETTERS[row % len(LETTERS)], np.random.default_rng((0, row))
    size = ZOOM * min(height, width)
    font = ImageFont.truetype(str(fonts / f"{generator.choice(FONTS)}.ttf"), round(size * generator.uniform(0.7, 1.1)))
    image = Image.new("L", (ZOOM * width, ZOOM * height))
    place = np.array(image.size) / 2 + size * generator.uniform(-0.05, 0.05, 2)
    left, top, right, bottom = font.getbbox(letter)
    corner = place - [(left + right) / 2, (top + bottom) / 2]
    ImageDraw.Draw(image).text((corner[0], corner[1]), letter, fill=255, font=font)
    image = image.rotate(generator.uniform(-15, 15), Image.Resampling.BILINEAR).reduce(ZOOM)
    image.save(content := BytesIO(), "PPM")
    return content.getvalue()


class Stored(NamedTuple):
    """Holds the used part of what is stored at `data.path`."""

    images: StoredImages  # of all stored splits in turn; training comes first
    hashes: np.ndarray  # of their contents, (N,) uint64
    scale: str  # of their intensities, one of `SCALES`
    class_names: list[str]  # of the training
    classes: np.ndarray  # places in `class_names`, (N,) int64; -1 in a split without labels
    assigned: dict[Split, str]  # the name of the stored split for each split


def read_images(settings: Mapping[str, Any], trained: Mapping[str, Any]) -> Stored:
    """Returns the stored images and their classes, by the settings of an `ImageDataModule`.

    `trained` is its state in a checkpoint; empty in training. With a state, all splits are used, whatever their names.

    Raises:
        ValueError: If there is no split or no label to train on, or images or labels are unlike those of the training.
    """
    path, leave_out, size = settings["path"], settings["leave_out"] or [], settings["image_size"]
    stored, left_out = read_splits(path, (size, size) if size else trained.get("size", (28, 28)))
    assigned, others = sources.assign_splits(stored, leave_out)
    names = [*assigned.values(), *(name for name in others if trained and name not in leave_out)]
    if not names or not (trained or "train" in assigned):
        raise ValueError(f"Expected data.path to have a split 'train', but got {list(stored)}")
    if left_out := [*left_out, *(f"split {name}" for name in stored if name not in names)]:
        rank_zero_info(f"Left out of data.path: {shortened(left_out)}")
    features = stored[names[0]].features
    image = image_column(features, settings["image_column"])
    label = label_column(features, settings["label_column"]) if settings["use_labels"] else None
    found = {n: read_labels(stored[n], label, n) for n in names if label and label in stored[n].column_names}
    labels = {name: of_split for name, of_split in found.items() if (of_split.codes != UNKNOWN).any()}
    if not trained and names[0] not in labels:
        given = f"data.label_column: {settings['label_column']!r}, all columns: {list(features)}"
        raise ValueError(f"Expected labels to train on, but got none in split {names[0]!r} of data.path ({given})")
    columns = [stored[name].select_columns(image).rename_columns({image: "image"}) for name in names]
    undecoded = [column.cast_column("image", datasets.Image(decode=False)) for column in columns]
    ends = [*accumulate(map(len, columns), initial=0)]
    parts = {name: range(*rows) for name, rows in zip(names, pairwise(ends), strict=True)}
    images = StoredImages(datasets.concatenate_datasets(undecoded), parts, Path(path).expanduser())
    census = images.census(Path(settings["cache_dir"]).expanduser())
    headers = census["header"]
    scales = sorted({SCALES[depth] for depth in np.unique(headers & DEPTH)})
    scale = trained.get("scale", scales[0])
    if scales != [scale]:
        raise ValueError(f"Expected images of {scale} in data.path, but got {' and '.join(scales)}")
    class_names = trained["class_names"] if trained else labels[names[0]].names
    classes, of = np.full(len(headers), UNKNOWN), "the checkpoint" if trained else "the training split"
    for name, of_split in labels.items():
        classes[parts[name]] = match_names(of_split, class_names, name, of)
    width, height = (size, size) if size else images.open(0).size
    images.shape = trained.get("channels", 3 if (headers & COLOUR).any() else 1), height, width
    images.resize, images.deep = size is not None, bool((headers & DEPTH).any())
    images.background = (trained or settings)["background"]
    return Stored(images, census["hash"], scale, class_names, classes, assigned)


def read_splits(path: str, size: tuple[int, int] = (28, 28)) -> tuple[Mapping[str, datasets.Dataset], list[str]]:
    """Returns the stored splits at `data.path`, and the files that it does not use; drawn images have this `size`."""
    if path in ("digits", "letters"):
        return {"train": read_digits() if path == "digits" else read_letters(*size)}, []
    folder = Path(path).expanduser()
    files = [] if sources.is_dataset(folder) else [folder] if folder.is_file() else sources.walk(folder)
    if tables := [file for file in files if file.suffix.lower() == ".parquet"]:
        of_split = sources.files_by_split(tables, folder.parent if folder.is_file() else folder)
        splits = {name: _read_parquet(of_split[name]) for name in of_split}
        used = {str(file) for name in of_split for file in of_split[name]}
    elif any(map(_is_image, files)):
        splits, used = read_image_folder(folder, files)
    else:
        return sources.by_column(sources.read_stored(path, EXPECTED)), []
    return sources.by_column(splits), [str(file.relative_to(folder)) for file in files if str(file) not in used]


def _read_parquet(files: list[Path]) -> datasets.Dataset:
    try:
        if len({(pq.read_schema(file).metadata or {}).get(b"huggingface") for file in files}) > 1:
            raise ValueError("files of one split with other features or names of classes")
        paths, sizes = [glob.escape(str(file)) for file in files], [file.stat().st_size for file in files]
        # The cache of `datasets` tells files apart by path and time alone, hence the sizes in the description.
        return datasets.load_dataset("parquet", data_files={"train": paths}, description=str(sizes))["train"]
    except Exception as error:  # of many types; the message names the setting
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"Expected data.path to hold rows with images, but got {cause} ({files[0]})") from None


def image_column(features: datasets.Features, given: str | None) -> str:
    """Returns the given column, or the only one of images: encoded bytes, or bytes with a path."""
    found = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image)
        or (isinstance(feature, dict) and "bytes" in feature)
        or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
    ]
    return sources.column_of("image_column", found, given, features)


def _is_image(path: Path) -> bool:
    return Image.registered_extensions().get(path.suffix.lower(), "") in Image.OPEN


def read_image_folder(root: Path, files: list[Path]) -> tuple[dict[str, datasets.Dataset], set[str]]:
    """Returns the images of each stored split of a folder, and the paths of all files that are used.

    The top folders are splits if all have names of splits, or if the one for training contains folders; else classes.
    ValueError if a table does not fit the images, or splits are within classes.
    """
    parts = {path: path.relative_to(root).parts for path in files if _is_image(path)}
    top = next(iter(parts.values()))[0]
    while all(len(part) > 2 and part[0] == top for part in parts.values()) and not sources.split_of(top):
        parts = {path: part[1:] for path, part in parts.items()}  # one folder holds all others
        top = next(iter(parts.values()))[0]
    tops = {part[0] for part in parts.values() if len(part) > 1}
    by_folder = bool(tops) and all(map(sources.split_of, tops))
    by_folder |= any(len(part) > 2 and sources.split_of(part[0]) == "train" for part in parts.values())
    if not by_folder and all(len(part) > 2 and sources.split_of(part[1]) for part in parts.values()):
        raise ValueError("Expected classes in folders of splits in data.path, but got splits in folders of classes")
    if not by_folder:
        sources.refuse_words(tops)
    split = {path: part[0] if by_folder and len(part) > 1 else "train" for path, part in parts.items()}
    folders = {path: part[by_folder:-1] for path, part in parts.items()}

    columns: dict[str, dict[str, list[object]]] = defaultdict(lambda: defaultdict(list))
    tables = {path: rows for path in files if path.suffix.lower() in TABLES and (rows := _rows_in(path))}
    for name, of_split in sources.files_by_split(tables, root).items():
        for path, row in (row for table in of_split for row in tables[table]):
            if path not in split:
                raise ValueError(f"Expected data.path to hold each image that a table names, but got no {path}")
            for key, value in (row | {"image": str(path)}).items():
                columns[split[path] if by_folder else name][key].append(value)
    with_classes = {split[path] for path in folders if folders[path]}
    for path in () if tables else folders:
        if folders[path] or split[path] not in with_classes:  # loose images beside classes are left out
            columns[split[path]]["image"].append(str(path))
            columns[split[path]]["label"].extend(folders[path][:1])
    used = [str(path) for of_split in columns.values() for path in of_split["image"]]
    if len({*used}) < len(used):
        raise ValueError(f"Expected one row for each image in the tables of data.path, but got {[*map(str, tables)]}")
    splits = {name: datasets.Dataset.from_dict({k: v for k, v in of.items() if v}) for name, of in columns.items()}
    as_images = {name: stored.cast_column("image", datasets.Image(decode=False)) for name, stored in splits.items()}
    return as_images, {*used, *map(str, tables)}


def _rows_in(table: Path) -> list[tuple[Path, dict[str, object]]]:
    """Returns the images that a table names, each with its other cells; none for a table without files and labels."""
    rows = list(sources.rows_of(table))
    column = next((name for name in FILE_COLUMNS if rows and name in rows[0]), None)
    if not column and rows and {name.lower() for name in rows[0]}.intersection(LABEL_NAMES):
        raise ValueError(f"Expected a column file_name beside the labels in {table}, but got {[*rows[0]]}")
    return [(table.parent / row.pop(column), row) for row in rows if column]
