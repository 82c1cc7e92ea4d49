"""Rows in parquet: any number of processes write them in chunks, which are merged in the order of `index`.

A chunk appears whole or not at all. Merging holds the chunks that overlap: about one for each process if each of them
writes ascending rows, and all of them if rows come in any order.
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
from torch import Tensor

from thinned.files import whole_file

CHUNK_ROWS = 2**13
CHUNK_BYTES = 2**23
GROUP_VALUES = 2**18  # of a row group: the same groups, however the rows were dealt out


class ChunkWriter:
    """Gathers rows, and writes them to files `<stem>-<number>.parquet`.

    Args:
        directory: Of the chunks; it exists when the first is written.
        stem: No other writer has it.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        self.directory, self.stem = directory, stem
        self._held: list[pa.Table] = []
        self._number = 0

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Adds rows, given by column: (B,) for numbers, (B, K) for lists."""
        self._held.append(pa.table({name: _array(column.cpu()) for name, column in rows.items()}))

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
                pq.write_table(table, temporary, row_group_size=table.num_rows)
            self._held.clear()
            self._number += 1


def merged(chunks: Sequence[Path], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yields the rows of all chunks in ascending order of `index`, each index once.

    Args:
        chunks: In any order. Of rows with the same index, the one whose chunk begins first counts.
        columns: Names of those to read, with `index` among them; None reads all.
    """
    starts = sorted((_first_index(chunk), chunk) for chunk in chunks)
    held, left = None, 0
    for i, (_, chunk) in enumerate(starts):
        table = _read(chunk, columns)
        held = table if held is None else pa.concat_tables([held, table])
        if i + 1 == len(starts):
            yield _distinct(held)
        elif held.num_rows >= 2 * left:  # else more would be copied than comes out
            is_ready = pc.less(held["index"], starts[i + 1][0])
            yield _distinct(held.filter(is_ready))
            held = held.filter(pc.invert(is_ready))
            left = held.num_rows


def merge(chunks: Sequence[Path], path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the rows of all chunks to one file, in ascending order of `index`, each index once.

    Args:
        chunks: At least one.
        path: Of the file, which appears whole or not at all.
        metadata: JSON values for the file's schema, by key.
    """
    schema = pq.read_schema(chunks[0]).with_metadata({key: json.dumps(value) for key, value in metadata.items()})
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        held = schema.empty_table()
        size = 0
        for table in merged(chunks):
            held = pa.concat_tables([held, table.replace_schema_metadata(schema.metadata)])
            if not size and held.num_rows:
                (row,) = held.slice(0, 1).to_pylist()
                size = max(1, GROUP_VALUES // sum(len(v) if isinstance(v, list) else 1 for v in row.values()))
            while held.num_rows > size:
                writer.write_table(held.slice(0, size).combine_chunks())
                held = held.slice(size)
        writer.write_table(held.combine_chunks())


def first_missing(chunks: Sequence[Path]) -> int:
    """Returns the lowest index from 0 on that no chunk has."""
    expected = 0
    for table in merged(chunks, ["index"]):
        index = table["index"].to_numpy()
        gaps = np.flatnonzero(index != np.arange(expected, expected + len(index)))
        if len(gaps):
            return expected + int(gaps[0])
        expected += len(index)
    return expected


class Columns(Mapping[str, Tensor]):
    """The columns of a parquet file, (N,) or (N, K) for lists. They are read when they are asked for, and not kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: list[str] = pq.read_schema(path).names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        column = _read(self.path, [name])[name].combine_chunks()
        is_list = pa.types.is_list(column.type)
        values = torch.from_numpy((column.flatten() if is_list else column).to_numpy(zero_copy_only=False).copy())
        return values.view(len(column), -1) if is_list else values

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _array(column: Tensor) -> pa.Array:
    if column.dim() == 1:
        return pa.array(column.numpy())
    offsets = np.arange(0, column.numel() + 1, column.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, column.reshape(-1).numpy())


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    with pq.ParquetFile(path) as file:  # pq.read_table would make a column of a folder named `a=b`
        return file.read(columns)


def _first_index(path: Path) -> int:
    with pq.ParquetFile(path) as file:
        column = file.schema_arrow.get_field_index("index")
        assert file.metadata.num_row_groups == 1
        first: int = file.metadata.row_group(0).column(column).statistics.min
        return first


def _distinct(table: pa.Table) -> pa.Table:
    """Sorts by `index` and keeps the first row of each."""
    table = table.sort_by("index")
    index = table["index"].to_numpy()
    return table.filter(pa.array(np.diff(index, prepend=index[:1] - 1) != 0))
