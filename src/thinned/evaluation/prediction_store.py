"""The files of a prediction, and the directory in which one that was interrupted waits to go on."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from torch import Tensor

from thinned.evaluation.row_chunks import ChunkWriter, first_missing, merge
from thinned.files import whole_file

NAMES = ("predictions", "sequences")  # in this order: the tokens of a sequence are on the disk before it is


class PredictionFiles:
    """`predictions.parquet` and, for text, `sequences.parquet`, written by any number of processes.

    Each process writes chunks of rows to `predictions.parts/` beside them, with which a later attempt can go on. In the
    end one of them merges all chunks.

    Args:
        directory: of the files.
        rank: of this process.
        attempt: how often the prediction has been interrupted.
    """

    def __init__(self, directory: Path, rank: int = 0, attempt: int = 0) -> None:
        self.directory = directory
        self.parts = directory / "predictions.parts"
        self._settings = self.parts / "settings.json"
        self._writers = {name: ChunkWriter(self.parts, f"{name}-{attempt:03d}-{rank:05d}") for name in NAMES}

    def interrupted(self) -> dict[str, Any] | None:
        """What `begin` was given by a prediction that was interrupted after it had written rows."""
        if not self._settings.exists() or not self.chunks("predictions"):
            return None
        settings: dict[str, Any] = json.loads(self._settings.read_text())
        return settings

    def first_missing(self) -> int:
        """The first example, or window of a text, of which the chunks do not hold everything."""
        sequences, predictions = map(self.chunks, reversed(NAMES))
        if not sequences and "position" in pq.read_schema(predictions[0]).names:
            return 0  # tokens of windows, of which none is complete
        return first_missing(sequences or predictions)

    def begin(self, settings: dict[str, Any], *, anew: bool) -> None:
        """Says what the chunks will be rows of; removes any that are there already if it begins anew."""
        if anew:
            self.discard()
        self.parts.mkdir(parents=True, exist_ok=True)
        with whole_file(self._settings) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")

    def write(self, rows: dict[str, Tensor], sequences: dict[str, Tensor]) -> None:
        """Takes the rows of a batch, and those of its sequences where it is text."""
        self._writers["predictions"].write(rows)
        if sequences:
            self._writers["sequences"].write(sequences)
        if any(writer.full for writer in self._writers.values()):
            self.flush()

    def flush(self) -> None:
        """Writes all rows that this process holds."""
        for name in NAMES:
            self._writers[name].flush()

    def chunks(self, name: str) -> list[Path]:
        """All chunks of one of the files, of any process and attempt."""
        return sorted(self.parts.glob(f"{name}-*.parquet"))

    def merge(self, provenance: dict[str, Any]) -> None:
        """Merges all chunks in the files; they stay until they are discarded."""
        for name in NAMES:
            if chunks := self.chunks(name):
                merge(chunks, self.directory / f"{name}.parquet", {"thinned": provenance})

    def keep(self) -> None:
        """Writes what this process holds, if it still can, for a later attempt; without any rows, nothing stays."""
        with suppress(OSError):  # a full disk, say, of which the exception at hand tells
            self.flush()
        if not any(map(self.chunks, NAMES)):
            self.discard()

    def discard(self) -> None:
        """Removes all chunks."""
        self._settings.unlink(missing_ok=True)  # first: without it, whatever is left is not gone on with
        shutil.rmtree(self.parts, ignore_errors=True)
