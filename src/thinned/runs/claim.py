"""At most one process at a time writes to a folder: the one that holds its claim.

A claim is a lock on the file `.claim` in the folder. The system releases it when the process ends, however that ends.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

FILE = ".claim"
_held: dict[Path, FileLock] = {}  # by this process


def claim(folder: Path) -> None:
    """Takes the claim of a folder until it is released or the process ends, unless this process holds it already.

    Raises:
        ValueError: Another process holds the claim.
        OSError: The folder is missing or cannot be written to.
    """
    folder = folder.resolve(strict=True)
    if folder in _held:
        return
    lock, file = FileLock(folder / FILE, thread_local=False), folder / FILE
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = ""
        with suppress(FileNotFoundError):  # released meanwhile
            holder = " ".join(file.read_text(encoding="utf-8").split())
        raise ValueError(
            f"Expected a folder that no other process writes to, but got {folder}, in use by "
            f"{holder or 'another process'}"
        ) from None
    if type(lock) is FileLock:  # on a file system without locks, filelock writes who holds the file
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    _held[folder] = lock


def release(folder: Path) -> None:
    """Releases the claim of this process on a folder, if it holds one."""
    if lock := _held.pop(folder.resolve(), None):
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
