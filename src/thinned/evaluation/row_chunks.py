"""Writes rows to parquet: any number of processes write chunks, which are merged in the order of `index`.

A chunk appears whole or not at all. Merging reads one range of indices after the other, so few rows are in memory. It
reads a chunk for every range that the chunk overlaps: for few if its rows ascend, for all if they come in any order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyarrow import dataset
from torch import Tensor

from thinned.files import whole_file

CHUNK_ROWS = 2**13
CHUNK_BYTES = 2**23
GROUP_BYTES = 2**23  # of a row group of the merged file


class ChunkWriter:
    """Gathers rows, and writes them to files `<stem>-<number>.parquet`; no other writer has the stem."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory, self.stem = directory, stem
        self._held: list[pa.Table] = []
        self._number = 0

    def write(self, rows: Mapping[str, Tensor | list[str]]) -> None:
        """Adds rows, given by column: (B,) for numbers, (B, K) for lists, or B texts."""
        self._held.append(pa.table({name: _array(column) for name, column in rows.items()}))

    @property
    def full(self) -> bool:
        """Whether it is time to flush."""
        rows, size = (sum(getattr(table, name) for table in self._held) for name in ("num_rows", "nbytes"))
        return bool(rows >= CHUNK_ROWS or size >= CHUNK_BYTES)

    def flush(self) -> None:
        """Writes what it holds as a chunk."""
        if self._held:
            table = pa.concat_tables(self._held)
            with whole_file(self.directory / f"{self.stem}-{self._number:06d}.parquet") as temporary:
                pq.write_table(table, temporary)
            self._held.clear()
            self._number += 1


def merge(chunks: Sequence[Path], path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the rows of all chunks to one file, in ascending order of `index`, each index once.

    Any one of the rows with the same index counts. The file appears whole or not at all, with metadata in its schema.
    """
    rows = dataset.dataset(chunks, format="parquet")
    index = _distinct_index(chunks)
    schema = rows.schema.with_metadata({key: json.dumps(value) for key, value in metadata.items()})
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


class Columns(Mapping[str, Tensor]):
    """Reads columns of a parquet file, (N,) or (N, K) for lists, when they are asked for, and does not keep them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: list[str] = pq.read_schema(path).names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with pq.ParquetFile(self.path) as file:  # pq.read_table would make a column of a folder named `a=b`
            column = file.read([name])[name].combine_chunks()
        is_list = pa.types.is_list(column.type)
        values = torch.from_numpy((column.flatten() if is_list else column).to_numpy(zero_copy_only=False).copy())
        return values.view(len(column), -1) if is_list else values

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ColumnsOfWay(Mapping[str, Tensor]):
    """Holds the columns of one way without its name before them, and those that all ways share."""

    def __init__(self, rows: Mapping[str, Tensor], name: str) -> None:
        self.rows, self.name = rows, name

    def __getitem__(self, key: str) -> Tensor:
        prefixed = f"{self.name}_{key}"
        return self.rows[prefixed if prefixed in self.rows else key]

    def __contains__(self, key: object) -> bool:
        return f"{self.name}_{key}" in self.rows or key in self.rows

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(f"{self.name}_") for name in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _array(column: Tensor | list[str]) -> pa.Array:
    if isinstance(column, list):
        return pa.array(column, pa.string())
    column = column.cpu()
    if column.dim() == 1:
        return pa.array(column.numpy())
    offsets = np.arange(0, column.numel() + 1, column.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, column.reshape(-1).numpy())
