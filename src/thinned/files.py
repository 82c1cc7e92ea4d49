"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file replaces `path` if the block ends without an exception.

    Args:
        path: Path of the file; its folder is made if need be.

    Raises:
        OSError: The file cannot be written; the message names it, and the file before is kept.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # some writers take the format from the suffix
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
    """Makes a renaming last, if the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
