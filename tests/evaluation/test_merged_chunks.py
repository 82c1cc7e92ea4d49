"""Chunks of rows and their merging: whole, in order, each index once, and few of them in memory."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from thinned.evaluation import prediction_store
from thinned.evaluation.prediction_store import Columns, PredictionStore, first_missing, merge, table_of


def rows(index: Sequence[int]) -> dict[str, Tensor]:
    """Values that tell which index they belong to."""
    column = torch.tensor(index)
    return {
        "index": column,
        "std": column / 4,
        "correct": column % 3 == 0,
        "probs": torch.stack([column / 8, 1 - column / 8], -1),
    }


def write(directory: Path, stem: str, *chunks: Sequence[int]) -> None:
    for number, index in enumerate(chunks):
        pq.write_table(table_of(rows(index)), directory / f"{stem}-{number:06d}.parquet")


def begun(directory: Path) -> PredictionStore:
    store = PredictionStore(directory)
    store.begin({}, barrier=lambda name: None)
    return store


def in_order(directory: Path) -> list[int]:
    merge(sorted(directory.glob("*.parquet")), directory / "merged", {})
    indices: list[int] = pq.ParquetFile(directory / "merged").read(["index"])["index"].to_pylist()
    return indices


def test_ranks_and_attempts_are_merged_in_order_and_each_index_once(tmp_path: Path) -> None:
    """Two ranks were interrupted; one went on from 6, the first that is missing, and predicted 7 and 8 again."""
    write(tmp_path, "first-rank0", [0, 2], [4], [8])
    write(tmp_path, "first-rank1", [1, 3, 5], [7])
    write(tmp_path, "second", [6, 7], [8, 9], [10])
    path = tmp_path / "merged"
    merge(sorted(tmp_path.glob("*.parquet")), path, {"seed": 3})
    table = pq.read_table(path)
    assert table.column_names == ["index", "std", "correct", "probs"]
    assert [field.type for field in table.schema] == [pa.int64(), pa.float32(), pa.bool_(), pa.list_(pa.float32())]
    assert table["index"].to_pylist() == list(range(11))
    assert table["std"].to_pylist() == [i / 4 for i in range(11)]
    assert table["correct"].to_pylist() == [i % 3 == 0 for i in range(11)]
    assert table["probs"].to_pylist() == [[i / 8, 1 - i / 8] for i in range(11)]
    assert json.loads(table.schema.metadata[b"thinned"]) == {"seed": 3}


@pytest.mark.parametrize(
    "chunks",
    [
        [[9, 3, 0], [5, 8], [1, 4, 2], [7, 6, 9]],  # shuffled
        [[0, 2, 4], [6, 8, 0], [1, 3, 5], [7, 9, 1]],  # filled up with the first again, as a DistributedSampler does
        [[5], [5], [5, 6], [0, 1, 2, 3, 4], [9, 8, 7]],
        [[*range(10)]] * 3,
    ],
)
def test_rows_in_any_order_are_all_there_once(chunks: list[list[int]], tmp_path: Path) -> None:
    write(tmp_path, "rank0", *chunks)
    assert in_order(tmp_path) == list(range(10))


def test_merge_holds_few_rows_of_many(tmp_path: Path) -> None:
    """Of 3 ranks with 40 chunks of 1000 rows each, and of one that went on in the middle: what overlaps is 4 chunks."""
    chunks = [range(3 * i + rank, 3 * i + 3000, 3) for rank in range(3) for i in range(0, 40_000, 1000)]
    chunks += [range(start, start + 1000) for start in range(120_000, 240_000, 1000)]
    for number, index in enumerate(chunks):
        table = table_of({"index": torch.tensor(index), "probs": torch.rand(len(index), 25)})
        pq.write_table(table, tmp_path / f"rank0-{number:06d}.parquet")
    # A process of its own, since the most that Arrow ever held cannot be set back.
    script = (
        "import pathlib, pyarrow; from thinned.evaluation import prediction_store\n"
        "prediction_store.GROUP_BYTES = 5000 * 100\n"
        "prediction_store.merge(sorted(pathlib.Path().glob('*.parquet')), pathlib.Path('merged'), {})\n"
        "print(pyarrow.default_memory_pool().max_memory())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert pq.ParquetFile(tmp_path / "merged").read(["index"])["index"].to_pylist() == list(range(240_000))
    assert 0 < int(done.stdout) < 240_000 * 25 * 4 / 4


def test_file_does_not_depend_on_how_its_rows_were_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_store, "GROUP_BYTES", 299)  # 10 rows of 29 bytes
    write(tmp_path / "one", "rank0", *([i] for i in range(37)))
    for rank in range(2):
        write(tmp_path / "two", f"rank{rank}", range(rank, 20, 2), range(20 + rank, 37, 2))
    for name in ("one", "two"):
        merge(sorted((tmp_path / name).glob("*.parquet")), tmp_path / f"{name}.parquet", {})
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    groups = pq.read_metadata(tmp_path / "one.parquet")
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [10, 10, 10, 7]


@pytest.fixture(autouse=True)
def directories(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    ("chunks", "missing"),
    [([], 0), ([[0, 1], [2]], 3), ([[1, 2]], 0), ([[0, 2, 4], [1, 7]], 3), ([[2, 1, 0], [0, 4]], 3)],
)
def test_first_missing_index(chunks: list[list[int]], missing: int, tmp_path: Path) -> None:
    write(tmp_path, "rank0", *chunks)
    assert first_missing(sorted(tmp_path.glob("*.parquet"))) == missing


def test_chunk_is_full_by_rows_or_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun(tmp_path)
    monkeypatch.setattr(prediction_store, "CHUNK_ROWS", 5)
    store.write(rows([0, 1, 2, 3]), {})
    assert len(store.chunks("predictions")) == 0
    store.write(rows([4]), {})
    assert len(store.chunks("predictions")) == 1
    monkeypatch.setattr(prediction_store, "CHUNK_BYTES", 10_000)
    store.write({"index": torch.tensor([5]), "probs": torch.zeros(1, 2000)}, {})
    assert len(store.chunks("predictions")) == 1
    store.write({"index": torch.tensor([6]), "probs": torch.zeros(1, 2000)}, {})
    assert len(store.chunks("predictions")) == 2


def break_off(self: pq.ParquetWriter, *_: Any, **__: Any) -> None:
    """Half a file is on the disk when writing fails."""
    Path(self.where).write_bytes(b"PAR1half a fi")
    raise OSError("disk full")


def test_chunk_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun(tmp_path)
    store.write(rows([0, 1]), {})
    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetWriter, "write_table", break_off)
        with pytest.raises(OSError, match="disk full"):
            store.flush()
    assert [path.name for path in store.parts.iterdir()] == ["settings.json"]
    store.flush()  # when there is room again, nothing is lost
    assert in_order(store.parts) == [0, 1]


def test_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "two" / "predictions.parquet"
    path.write_text("of an earlier run")
    write(tmp_path / "one", "rank0", [0, 1])
    monkeypatch.setattr(pq.ParquetWriter, "write_table", break_off)
    with pytest.raises(OSError, match="disk full"):
        merge(list((tmp_path / "one").iterdir()), path, {})
    assert path.read_text() == "of an earlier run"
    assert list(path.parent.iterdir()) == [path]


def test_columns_are_read_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"  # no column of its own
    folder.mkdir()
    write(folder, "rank0", range(6))
    file = folder / "rank0-000000.parquet"
    columns = Columns(file)
    assert list(columns) == ["index", "std", "correct", "probs"]
    assert columns["std"].equal(torch.arange(6) / 4)
    assert columns["correct"].equal(torch.arange(6) % 3 == 0)
    assert columns["probs"].tolist() == pq.ParquetFile(file).read(["probs"])["probs"].to_pylist()
    assert "lr" not in columns
    with pytest.raises(KeyError):
        columns["lr"]


def test_columns_of_a_way_are_found_without_its_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"index": [0], "_mine_nll": [0.5]}), file)
    assert list(Columns(Columns(file), "_mine")) == ["index", "nll"]
    assert Columns(Columns(file), "_mine")["nll"].tolist() == [0.5]
