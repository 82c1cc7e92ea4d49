"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file takes the place of `path` when the block has ended without an exception.

    Args:
        path: of the file; its folder is made if need be.

    Raises:
        OSError: it cannot be written; the message names it. What was there before is still there.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix tells some writers the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # some file systems notice only now that they are full
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"Expected to write {path}, but got {error.strerror or error}") from error
        raise


def _sync_directory(directory: Path) -> None:
    """Makes a renaming last, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
