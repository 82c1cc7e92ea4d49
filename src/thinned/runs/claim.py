"""At most one process at a time writes to a folder: the one that holds its claim.

A claim is a folder `.claim` with one file, whose name says who holds it. It appears with its content, by a renaming,
and is taken over by a renaming of that file: Both are atomic, on network file systems too, where locks often are not.

A process that has ended holds nothing. On the machine of the holder that is known at once; others go by the time of the
file, which the holder renews.
"""

import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from threading import Event, Thread
from typing import NamedTuple
from zlib import crc32

RENEWAL, STALE = 15.0, 90.0  # seconds
_held: dict[Path, "Claim"] = {}  # by this process


class Holder(NamedTuple):
    """A process, as the file in a claim is named after it."""

    host: str
    machine: str  # a boot of it, and the namespace in which `pid` is a process
    pid: str
    start: str  # of the process, since pids come again
    folder: str  # the inode of what is claimed, so that a copy of a folder is not held by whoever holds the original
    token: str

    @classmethod
    def of_this_process(cls, folder: Path) -> "Holder":
        host = socket.gethostname().replace(",", "_")
        return cls(
            host, _machine(), str(os.getpid()), _start_of(os.getpid()) or "", _inode(folder), secrets.token_hex(4)
        )

    def holds(self, claim: Path, now: float) -> bool:
        """Whether another process still runs, as far as one can tell at a time of the file system of the claim."""
        if self.machine == _machine():
            return (
                self.pid != str(os.getpid())
                and self.folder == _inode(claim.parent)
                and self.start == _start_of(int(self.pid))
            )
        return now - (claim / self.name).stat().st_mtime < STALE

    @property
    def name(self) -> str:
        return ",".join(self)


class Claim:
    """The right to write to a folder, held until it is released or the process ends.

    Args:
        folder: A folder.

    Raises:
        ValueError: Another process holds the claim.
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self._released = folder, folder / ".claim", Event()
        self.holder = Holder.of_this_process(folder)
        self._file = self.path / self.holder.name
        while not (self._appears() or self._takes_over()):
            time.sleep(0.01)
        Thread(target=self._renew, daemon=True).start()

    def _appears(self) -> bool:
        """Claims a folder that nobody has claimed; a renaming fails if there is a folder that is not empty."""
        prepared = self.folder / f".claim.{self.holder.token}"
        prepared.mkdir()
        try:
            (prepared / self.holder.name).touch()
            prepared.rename(self.path)
        except OSError:
            if not self.path.exists():
                raise
            return False
        finally:
            rmtree(prepared, ignore_errors=True)
        return True

    def _takes_over(self) -> bool:
        """Takes the claim of a process that has ended; of several that try, one does."""
        with suppress(FileNotFoundError):  # released or taken meanwhile
            for file in self.path.iterdir():
                if file.name.count(",") != len(Holder.__annotations__) - 1:  # such as a .DS_Store
                    file.unlink()
                    continue
                holder = Holder(*file.name.split(","))
                if holder.holds(self.path, _now(self.folder)):
                    raise ValueError(
                        f"Expected a folder that no other process writes to, but got {self.folder}, in use by process "
                        f"{holder.pid} on {holder.host}"
                    )
                os.utime(file)  # before it is renamed, so that the new holder is seen to be alive
                file.rename(self._file)
                return True
        return False

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            try:
                os.utime(self._file)
            except FileNotFoundError:
                if self.path.exists():  # this process has been suspended for long
                    print(f"error: Expected to write to {self.folder} alone, but got another process", file=sys.stderr)
                    os._exit(1)
            except OSError:  # such as a file system that is not reached for a while
                continue

    def release(self) -> None:
        """Lets other processes claim the folder."""
        self._released.set()
        with suppress(OSError):  # gone, or claimed by the next one
            self._file.unlink()
            self.path.rmdir()


def claim(folder: Path) -> Claim:
    """Returns the claim of this process on a folder, which it may hold already."""
    key = folder.resolve()
    if key not in _held:
        _held[key] = Claim(key)
    return _held[key]


def release(folder: Path) -> None:
    """Releases the claim of this process on a folder, if it holds one."""
    if held := _held.pop(folder.resolve(), None):
        held.release()


def _now(folder: Path) -> float:
    """Returns the time of the file system, which may differ from the machine's."""
    file = folder / f".claim.{secrets.token_hex(4)}"
    file.touch()
    try:
        return file.stat().st_mtime
    finally:
        file.unlink()


def _inode(folder: Path) -> str:
    return str(folder.stat().st_ino)


def _machine() -> str:
    """Identifies a boot of a machine, and the namespace of processes in it: containers may share all the rest."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        text = socket.gethostname()
    return f"{crc32(text.encode()):08x}"


def _start_of(pid: int) -> str | None:
    """Returns when a process of this machine started, or "" if that is not told; None if it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
