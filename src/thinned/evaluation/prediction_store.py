"""Stores predictions: writes rows to parquet, resumes what is interrupted, and reads columns.

Each process writes chunks of rows to `predictions.parts/`, from time to time. In the end one of them merges all chunks
to `predictions.parquet` and, for text, `sequences.parquet`, and removes the folder. If it is there when a prediction
begins, that prediction resumes with the first example that is missing, with the same settings, but on any number of
processes and in batches of any size.

Merging reads one range of indices after the other, so few rows are in memory. It reads a chunk for every range that the
chunk overlaps: for few if its rows ascend, for all if they come in any order.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyarrow import dataset
from torch import Tensor

from thinned.evaluation.provenance import differences
from thinned.files import whole_file

NAMES = ("predictions", "sequences")  # in this order: the tokens of a sequence are on the disk before it is
CHUNK_ROWS, CHUNK_BYTES = 2**13, 2**23  # that a process holds at most
GROUP_BYTES = 2**23  # of a row group of the merged file


class PredictionStore:
    """Takes the rows of a prediction to the files in a folder."""

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.directory, self.rank = directory, rank
        self.parts = directory / "predictions.parts"
        self._settings = self.parts / "settings.json"
        self.interrupted: dict[str, Any] | None = None  # provenance of the interrupted prediction that was found
        self.has_begun = False  # so that rows can be written
        self._attempt = self._flushed = 0
        self._held: dict[str, list[pa.Table]] = {}  # by the name of their file

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
        self._held = {name: [] for name in NAMES}
        self.has_begun = True

    def _first_missing(self) -> int:
        """Returns the first example, or window of a text, that the chunks do not hold as a whole."""
        sequences, predictions = map(self.chunks, reversed(NAMES))
        if not sequences and "position" in pq.read_schema(predictions[0]).names:
            return 0  # no window is complete
        return first_missing(sequences or predictions)

    def write(self, rows: Mapping[str, Tensor | list[str]], sequences: Mapping[str, Tensor]) -> None:
        """Takes the rows of a batch, and those of its sequences if it is text; writes full chunks."""
        for held, columns in zip(self._held.values(), (rows, sequences), strict=True):
            if columns:
                held.append(table_of(columns))
        tables = [table for held in self._held.values() for table in held]
        if sum(t.num_rows for t in tables) >= CHUNK_ROWS or sum(t.nbytes for t in tables) >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes all rows that this process holds, as chunks that appear whole or not at all."""
        self._flushed += 1
        for name, held in self._held.items():
            if held:
                chunk = f"{name}-{self._attempt:03d}-{self.rank:05d}-{self._flushed:06d}.parquet"
                with whole_file(self.parts / chunk) as temporary:
                    pq.write_table(pa.concat_tables(held), temporary)
                held.clear()

    def chunks(self, name: str) -> list[Path]:
        """Returns all chunks of one of the files, from any process and attempt."""
        return sorted(self.parts.glob(f"{name}-*.parquet"))

    def merge(self, provenance: dict[str, Any]) -> None:
        """Merges all chunks into the files. The chunks stay until they are discarded."""
        for name in reversed(NAMES):  # predictions last: where they are, all is
            if chunks := self.chunks(name):
                merge(chunks, self.directory / f"{name}.parquet", provenance)

    def keep(self) -> None:
        """Writes what this process holds, if it still can, for a later attempt; without any rows, nothing stays."""
        if self.has_begun:
            with suppress(OSError):  # such as a full disk, which the exception at hand tells of
                self.flush()
            if self.rank == 0 and not any(map(self.chunks, NAMES)):
                self._remove()

    def discard(self) -> None:
        """Removes all chunks, if it has begun."""
        if self.has_begun:
            self._remove()

    def _remove(self) -> None:
        self._settings.unlink(missing_ok=True)  # first: without it, nobody resumes from what is left
        shutil.rmtree(self.parts, ignore_errors=True)


def merge(chunks: Sequence[Path], path: Path, provenance: Mapping[str, Any]) -> None:
    """Writes the rows of all chunks to one file, in ascending order of `index`, each index once.

    The first of the rows with the same index counts. The file appears whole or not at all.
    """
    rows = dataset.dataset(chunks, format="parquet")
    index = _distinct_index(chunks)
    schema = rows.schema.with_metadata({"thinned": json.dumps(provenance)})
    flat = [field.name for field in schema if not pa.types.is_list(field.type)]  # probabilities hardly repeat
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, use_dictionary=flat) as writer:
        size = max(1, GROUP_BYTES // rows.head(1).nbytes)
        for start in range(0, len(index), size):
            wanted = index[start : start + size]
            group = rows.filter((pc.field("index") >= wanted[0]) & (pc.field("index") <= wanted[-1])).to_table()
            _, first = np.unique(group["index"], return_index=True)
            writer.write_table(group.take(first).combine_chunks())  # else the pages would end where chunks do


def first_missing(chunks: Sequence[Path]) -> int:
    """Returns the lowest index from 0 on that no chunk has."""
    index = _distinct_index(chunks)
    return int(np.append(index == np.arange(len(index)), False).argmin())


def _distinct_index(chunks: Sequence[Path]) -> np.ndarray:
    """Returns the indices of all chunks in ascending order, each once."""
    index = dataset.dataset(chunks, pa.schema({"index": pa.int64()}), format="parquet")
    return np.unique(index.to_table()["index"])


def table_of(rows: Mapping[str, Tensor | list[str]]) -> pa.Table:
    """Returns rows as a table, given by column: (B,) for numbers, (B, K) for lists, or B texts."""
    columns = {}
    for name, column in rows.items():
        if isinstance(column, list):
            columns[name] = pa.array(column, pa.string())
        elif column.dim() == 1:
            columns[name] = pa.array(column.cpu().numpy())
        else:
            offsets = np.arange(0, column.numel() + 1, column.shape[1], dtype=np.int32)
            columns[name] = pa.ListArray.from_arrays(offsets, column.cpu().reshape(-1).numpy())
    return pa.table(columns)


class Columns(Mapping[str, Tensor]):
    """Reads columns when they are asked for, (N,) or (N, K) for lists, and does not keep them.

    Args:
        rows: Path of a parquet file, or columns by their names.
        way: A way to predict, whose name is left out before its columns.
    """

    def __init__(self, rows: Path | Mapping[str, Tensor], way: str = "") -> None:
        self._rows = rows
        names = pq.read_schema(rows).names if isinstance(rows, Path) else rows
        self._names = {name.removeprefix(way and f"{way}_"): name for name in names}

    def __getitem__(self, key: str) -> Tensor:
        name = self._names[key]
        if not isinstance(self._rows, Path):
            return self._rows[name]
        with pq.ParquetFile(self._rows) as file:  # pq.read_table would make a column of a folder named `a=b`
            column = file.read([name])[name].combine_chunks()
        is_list = pa.types.is_list(column.type)
        values = torch.from_numpy((column.flatten() if is_list else column).to_numpy(zero_copy_only=False).copy())
        return values.view(len(column), -1) if is_list else values

    def __contains__(self, key: object) -> bool:  # without reading it
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
