"""Writes the files of a prediction, and keeps the folder from which an interrupted one resumes.

Each process writes chunks of rows to `predictions.parts/`, from time to time. In the end one of them merges all chunks
to `predictions.parquet` and, for text, `sequences.parquet`, and removes the folder. If it is there when a prediction
begins, that prediction resumes with the first example that is missing, with the same settings, but on any number of
processes and in batches of any size.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from torch import Tensor

from thinned.evaluation.provenance import differences
from thinned.evaluation.row_chunks import ChunkWriter, first_missing, merge
from thinned.files import whole_file

NAMES = ("predictions", "sequences")  # in this order: the tokens of a sequence are on the disk before it is


def stored_provenance(path: Path) -> dict[str, Any] | None:
    """Returns what decided the rows of a file of predictions; None if there is no such file."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(b"thinned", b"{}"))
    return found


class PredictionStore:
    """Takes the rows of a prediction to the files in a folder."""

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.directory, self.rank = directory, rank
        self.parts = directory / "predictions.parts"
        self._settings = self.parts / "settings.json"
        self.interrupted: dict[str, Any] | None = None  # provenance of the interrupted prediction that was found
        self._attempt = 0
        self._writers: dict[str, ChunkWriter] = {}  # once it has begun

    def find_interrupted(self, broadcast: Callable[[Any], Any]) -> int:
        """Returns the first example that an interrupted prediction lacks, or 0 if there is no such prediction.

        `broadcast` returns to all processes what the first one gives it.
        """
        found, attempt, start = None, 0, 0
        if self.rank == 0 and self._settings.exists() and self.chunks("predictions"):
            stored = json.loads(self._settings.read_text())
            found, attempt, start = stored["provenance"], stored["attempt"] + 1, self._first_missing()
        self.interrupted, self._attempt, start = broadcast((found, attempt, start))
        return start

    def begin(self, provenance: dict[str, Any], barrier: Callable[[str], None]) -> None:
        """Says what decides the rows, as JSON; `barrier` waits for all processes.

        A ValueError says that the interrupted prediction that was found has another provenance.
        """
        if self.interrupted and (changed := differences(provenance, self.interrupted)):
            said = f"Expected the settings of the interrupted prediction, but got {', '.join(changed)}"
            raise ValueError(f"{said}: to predict all again, remove {self.parts}")
        if self.rank == 0:
            if not self.interrupted:
                self._remove()
            with whole_file(self._settings) as temporary:
                content = {"provenance": provenance, "attempt": self._attempt}
                temporary.write_text(json.dumps(content, indent=2) + "\n")
        barrier("predictions begin")
        stem = f"{self._attempt:03d}-{self.rank:05d}"
        self._writers = {name: ChunkWriter(self.parts, f"{name}-{stem}") for name in NAMES}

    @property
    def has_begun(self) -> bool:
        """Whether `begin` was called, so that rows can be written."""
        return bool(self._writers)

    def _first_missing(self) -> int:
        """Returns the first example, or window of a text, that the chunks do not hold as a whole."""
        sequences, predictions = map(self.chunks, reversed(NAMES))
        if not sequences and "position" in pq.read_schema(predictions[0]).names:
            return 0  # no window is complete
        return first_missing(sequences or predictions)

    def write(self, rows: Mapping[str, Tensor | list[str]], sequences: dict[str, Tensor]) -> None:
        """Takes the rows of a batch, and those of its sequences if it is text."""
        self._writers["predictions"].write(rows)
        if sequences:
            self._writers["sequences"].write(sequences)
        if any(writer.full for writer in self._writers.values()):
            self.flush()

    def flush(self) -> None:
        """Writes all rows that this process holds."""
        for writer in self._writers.values():
            writer.flush()

    def chunks(self, name: str) -> list[Path]:
        """Returns all chunks of one of the files, from any process and attempt."""
        return sorted(self.parts.glob(f"{name}-*.parquet"))

    def merge(self, provenance: dict[str, Any]) -> None:
        """Merges all chunks into the files. The chunks stay until they are discarded."""
        for name in reversed(NAMES):  # predictions last: where they are, all is
            if chunks := self.chunks(name):
                merge(chunks, self.directory / f"{name}.parquet", {"thinned": provenance})

    def keep(self) -> None:
        """Writes what this process holds, if it still can, for a later attempt; without any rows, nothing stays."""
        if self._writers:
            with suppress(OSError):  # such as a full disk, which the exception at hand tells of
                self.flush()
            if self.rank == 0 and not any(map(self.chunks, NAMES)):
                self._remove()

    def discard(self) -> None:
        """Removes all chunks, if it has begun."""
        if self._writers:
            self._remove()

    def _remove(self) -> None:
        self._settings.unlink(missing_ok=True)  # first: without it, nobody resumes from what is left
        shutil.rmtree(self.parts, ignore_errors=True)
