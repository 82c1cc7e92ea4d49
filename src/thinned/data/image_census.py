"""A census of stored images: the hash of each content, and what its header says, kept on disk if it takes long.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from thinned.data.content_split import content_hash
from thinned.data.hugging_face import fingerprint
from thinned.data.image_sources import StoredImages
from thinned.data.pixels import header
from thinned.files import whole_file

CENSUS = np.dtype([("hash", "<u8"), ("header", "u1")])  # 9 bytes an image, 90 MB for ten million
FILES = np.dtype([("path", "<u8"), ("size", "<u8"), ("time", "<u8"), *CENSUS.descr])  # 33 bytes a file
MANY = 10_000  # images, from which on a census is kept on disk


def take_census(images: StoredImages, cache: Path) -> np.ndarray:
    """Returns hash and header of each image, (N,) of dtype `CENSUS`. Contents are read a few at a time.

    A file is known again by its path, its size and the time of its last change. The images within a dataset are known
    by the fingerprint of the dataset.

    Args:
        images: The images of a stored split.
        cache: Folder for what takes long.

    Raises:
        OSError: If an image cannot be read.
        ValueError: If an image is missing.
    """
    column = images.stored.data.column("image")
    in_files = column.null_count == 0 and all(chunk.field("bytes").null_count == len(chunk) for chunk in column.chunks)
    key = f"{images.root.resolve()} {[*images.parts]}" if in_files else fingerprint(images.stored)
    kept = cache / f"census-{content_hash(key.encode()):016x}.npy"
    if len(images) >= MANY:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"Expected data.cache_dir to be a folder to write to, but got {error}") from None
    with FileLock(kept.with_suffix(".lock")) if len(images) >= MANY else nullcontext():  # one process, others wait
        known = _read(kept, FILES if in_files else CENSUS)
        if in_files:
            found = _of_files(images, known)
        elif known is not None and len(known) == len(images):
            found = known
        else:
            found = np.fromiter((_examine(images, row, stored) for row, stored in _stored(images)), CENSUS, len(images))
        if len(images) >= MANY and (known is None or not np.array_equal(found, known)):
            with whole_file(kept) as temporary:
                np.save(temporary, found)
    return found[list(CENSUS.names or ())].astype(CENSUS)


def _read(kept: Path, kind: np.dtype[Any]) -> np.ndarray | None:
    """Returns what was kept; None if there is nothing, or it is damaged."""
    try:
        known: np.ndarray = np.load(kept)
    except (OSError, EOFError, ValueError):
        return None
    return known if known.dtype == kind else None


def _of_files(images: StoredImages, known: np.ndarray | None) -> np.ndarray:
    """Returns a record of dtype `FILES` for each file. Files that have not changed since `known` are not read."""
    found = np.zeros(len(images), FILES)
    for row, stored in _stored(images):
        assert stored is not None
        try:
            state = Path(stored["path"]).stat()
        except OSError as error:
            raise images.unreadable(row, error) from None
        found[row] = content_hash(stored["path"].encode()), state.st_size, state.st_mtime_ns, 0, 0
    same = np.zeros(len(found), bool)
    if known is not None and len(known):
        known = known[np.argsort(known["path"])]
        match = known[np.searchsorted(known["path"], found["path"]).clip(max=len(known) - 1)]
        same = np.logical_and.reduce([match[name] == found[name] for name in ("path", "size", "time")])
        found[same] = match[same]
    for row, stored in _stored(images) if not same.all() else ():
        if not same[row]:
            found[row]["hash"], found[row]["header"] = _examine(images, row, stored)
    return found


def _stored(images: StoredImages) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields the row of each image with its bytes and path."""
    batches = images.stored.with_format("arrow").iter(1024)
    yield from enumerate(stored for batch in batches for stored in batch["image"].to_pylist())


def _examine(images: StoredImages, row: int, stored: dict[str, Any] | None) -> tuple[int, int]:
    if stored is None:
        raise ValueError(f"Expected images in data.path, but got None in {images.names([row])[0]}")
    try:
        content = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
        return content_hash(content), header(content)
    except Exception as error:
        raise images.unreadable(row, error) from None
