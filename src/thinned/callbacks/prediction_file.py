"""A parquet file with one row per example in dataset order, written by any number of processes."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor


class PredictionFile:
    """Each rank streams its rows to a part beside the file; one of them merges the parts.

    Args:
        path: of the merged file, which appears whole or not at all.
        rank: of this process.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.rank = rank
        self._writer: pq.ParquetWriter | None = None
        self._part(rank).unlink(missing_ok=True)  # of a run that broke off

    def _part(self, rank: int) -> Path:
        return self.path.with_suffix(f".part{rank}")

    def write(self, rows: dict[str, Tensor]) -> None:
        """Appends rows, given by column: (B,) for numbers, (B, K) for lists."""
        columns = {name: column.cpu() for name, column in rows.items()}
        table = pa.table({n: pa.array(list(c.numpy()) if c.dim() > 1 else c.numpy()) for n, c in columns.items()})
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._part(self.rank), table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finishes this rank's part."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def discard(self) -> None:
        """Removes this rank's part."""
        self.close()
        self._part(self.rank).unlink(missing_ok=True)

    def merge(self, world_size: int) -> None:
        """Merges all ranks' parts, sorted by `index`, each index once, and removes them; nothing where none wrote."""
        parts = [part for part in map(self._part, range(world_size)) if part.exists()]
        if not parts:
            return
        table = pa.concat_tables([pq.read_table(part) for part in parts]).sort_by("index")
        index = table["index"].combine_chunks()
        if len(index) > 1:
            first = pa.concat_arrays([pa.array([True]), pc.not_equal(index[1:], index[:-1])])
            table = table.filter(first)
        temporary = self.path.with_suffix(".tmp")
        pq.write_table(table, temporary)
        os.replace(temporary, self.path)
        for part in parts:
            part.unlink()
