"""The directory of a prediction under way: what is found in it after an interruption, and what is left in the end."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from thinned.evaluation import row_chunks
from thinned.evaluation.prediction_store import PredictionFiles

SETTINGS = {"provenance": {"seed": 3}, "attempt": 0}


def examples(*index: int) -> dict[str, Tensor]:
    return {"index": torch.tensor(index), "std": torch.tensor(index) / 4}


def windows(*index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two tokens of each window, and the windows."""
    column = torch.tensor(index)
    tokens = (2 * column[:, None] + torch.arange(2)).view(-1)
    return {"index": tokens, "position": tokens % 2 + 1}, {"index": column, "tokens": torch.full_like(column, 2)}


@pytest.fixture
def files(tmp_path: Path) -> PredictionFiles:
    files = PredictionFiles(tmp_path / "run")
    files.begin(SETTINGS, anew=True)
    return files


def test_nothing_is_found_where_nothing_was_interrupted(files: PredictionFiles) -> None:
    assert PredictionFiles(files.directory / "another").interrupted() is None
    assert files.interrupted() is None  # there is not a row


def test_rows_of_examples_are_found(files: PredictionFiles) -> None:
    files.write(examples(0, 1, 2, 4), {})
    files.flush()
    (files.parts / "predictions-000-00000-000001.tmp").write_bytes(b"PAR1 half written")
    (files.parts / "sequences-000-00000-000000.tmp").write_bytes(b"PAR1 half written")
    after = PredictionFiles(files.directory, attempt=1)
    assert after.interrupted() == SETTINGS
    assert after.first_missing() == 3
    after.begin(SETTINGS, anew=False)
    after.write(examples(3, 4, 5), {})
    after.flush()
    after.merge({"seed": 3})
    after.discard()
    assert [path.name for path in files.directory.iterdir()] == ["predictions.parquet"]
    table = pq.read_table(files.directory / "predictions.parquet")
    assert table["index"].to_pylist() == list(range(6))
    assert table.schema.metadata[b"thinned"] == b'{"seed": 3}'


def test_text_is_counted_in_windows(files: PredictionFiles) -> None:
    files.write(*windows(0, 1))
    files.write(*windows(2))
    files.flush()
    assert files.first_missing() == 3
    files.merge({})
    merged = [pq.read_table(files.directory / f"{name}.parquet") for name in ("predictions", "sequences")]
    assert [table["index"].to_pylist() for table in merged] == [list(range(6)), list(range(3))]


def test_tokens_without_their_windows_do_not_count(files: PredictionFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the files, the tokens are on the disk, and not the other way round."""
    files.write(*windows(0, 1))
    files.flush()
    write_table = pq.write_table

    def killed(table: Any, path: Path, **options: Any) -> None:
        if path.name.startswith(".sequences"):
            raise KeyboardInterrupt
        write_table(table, path, **options)

    monkeypatch.setattr(pq, "write_table", killed)
    files.write(*windows(2))
    with pytest.raises(KeyboardInterrupt):
        files.flush()
    assert len(files.chunks("predictions")) == 2
    assert files.first_missing() == 2
    for chunk in files.chunks("sequences"):
        chunk.unlink()
    assert files.first_missing() == 0


def test_rows_are_on_the_disk_when_a_chunk_is_full(files: PredictionFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK_ROWS", 4)
    files.write(*windows(0))
    assert not files.chunks("predictions")
    files.write(*windows(1))
    assert [len(files.chunks(name)) for name in ("predictions", "sequences")] == [1, 1]


def test_new_beginning_removes_what_is_there(files: PredictionFiles) -> None:
    files.write(examples(0), {})
    files.flush()
    files.begin(SETTINGS, anew=True)
    assert files.interrupted() is None
    assert not files.chunks("predictions")


def test_chunks_that_could_not_all_be_removed_are_not_gone_on_with(
    files: PredictionFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(examples(0), {})
    files.flush()
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)
    files.discard()
    assert files.interrupted() is None


def test_kept_rows_and_a_full_disk(files: PredictionFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        files.write(examples(0), {})
        files.keep()
    assert not files.parts.exists()  # without rows, nothing stays
    files.begin(SETTINGS, anew=True)
    files.keep()
    assert files.interrupted() == SETTINGS
    assert files.first_missing() == 1
