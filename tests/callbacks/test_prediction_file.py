"""The file of predictions: whole, in order, and each example once."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from thinned.callbacks.prediction_file import PredictionFile


def rows(*index: int) -> dict[str, Tensor]:
    """Values that tell which index they belong to."""
    column = torch.tensor(index)
    return {"index": column, "std": column / 4, "probs": torch.stack([column / 8, 1 - column / 8], -1)}


def write(path: Path, rank: int, *batches: dict[str, Tensor]) -> PredictionFile:
    file = PredictionFile(path, rank)
    for batch in batches:
        file.write(batch)
    file.close()
    return file


def test_ranks_are_merged_in_order_and_each_index_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.parquet"
    first = write(path, 0, rows(0, 2), rows(4))
    write(path, 1, rows(3, 1), rows(0))  # the last fills up a batch
    assert not path.exists()
    first.merge(world_size=2)
    table = pq.read_table(path)
    assert table.column_names == ["index", "std", "probs"]
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["std"].to_pylist() == [0, 0.25, 0.5, 0.75, 1]
    assert table["probs"].to_pylist() == [[i / 8, 1 - i / 8] for i in range(5)]
    assert [field.type for field in table.schema] == [pa.int64(), pa.float32(), pa.list_(pa.float32())]
    assert list(path.parent.iterdir()) == [path]


def test_rank_without_rows_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    file = write(path, 0, rows(0))
    write(path, 1)
    file.merge(world_size=2)
    assert pq.read_table(path)["index"].to_pylist() == [0]


def test_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "predictions.parquet"
    path.write_text("of an earlier run")
    file = write(path, 0, rows(0, 1))

    def break_off(table: pa.Table, where: Path) -> None:
        Path(where).write_text("half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", break_off)
    with pytest.raises(OSError, match="disk full"):
        file.merge(world_size=1)
    assert path.read_text() == "of an earlier run"


def test_discarded_rows_leave_nothing(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "predictions.parquet", 0)
    file.write(rows(0, 1))
    assert list(tmp_path.iterdir())
    file.discard()
    assert not list(tmp_path.iterdir())
    file.discard()  # again, as after an exception in another place
