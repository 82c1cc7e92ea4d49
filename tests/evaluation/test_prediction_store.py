"""The directory of a prediction under way: what is found in it after an interruption, and what is left in the end."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from thinned.evaluation import prediction_store
from thinned.evaluation.prediction_store import PredictionStore

PROVENANCE = {"seed": 3}


def examples(*index: int) -> dict[str, Tensor]:
    return {"index": torch.tensor(index), "std": torch.tensor(index) / 4}


def windows(*index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two tokens of each window, and the windows."""
    column = torch.tensor(index)
    tokens = (2 * column[:, None] + torch.arange(2)).view(-1)
    return {"index": tokens, "position": tokens % 2 + 1}, {"index": column, "tokens": torch.full_like(column, 2)}


@pytest.fixture
def files(tmp_path: Path) -> PredictionStore:
    files = PredictionStore(tmp_path / "run")
    begin(files)
    return files


def alone(value: Any) -> Any:
    """What one process broadcasts to itself."""
    return value


def begin(files: PredictionStore, provenance: dict[str, Any] = PROVENANCE) -> None:
    files.begin(provenance, barrier=lambda name: None)


def found(files: PredictionStore) -> tuple[int, dict[str, Any] | None]:
    """Where a later prediction would resume, and what had decided the rows that are there."""
    later = PredictionStore(files.directory)
    return later.find_interrupted(alone), later.interrupted


def test_nothing_is_found_where_nothing_was_interrupted(files: PredictionStore) -> None:
    another = PredictionStore(files.directory / "another")
    assert (another.find_interrupted(alone), another.interrupted) == (0, None)
    assert found(files) == (0, None)  # there is not a row


def test_rows_of_examples_are_found(files: PredictionStore) -> None:
    files.write(examples(0, 1, 2, 4), {})
    files.flush()
    (files.parts / "predictions-000-00000-000001.tmp").write_bytes(b"PAR1 half written")
    (files.parts / "sequences-000-00000-000000.tmp").write_bytes(b"PAR1 half written")
    after = PredictionStore(files.directory)
    assert after.find_interrupted(alone) == 3
    assert after.interrupted == PROVENANCE
    begin(after)
    after.write(examples(3, 4, 5), {})
    after.flush()
    after.merge({"seed": 3})
    after.discard()
    assert [path.name for path in files.directory.iterdir()] == ["predictions.parquet"]
    table = pq.read_table(files.directory / "predictions.parquet")
    assert table["index"].to_pylist() == list(range(6))
    assert table.schema.metadata[b"thinned"] == b'{"seed": 3}'


def test_text_is_counted_in_windows(files: PredictionStore) -> None:
    files.write(*windows(0, 1))
    files.write(*windows(2))
    files.flush()
    assert found(files)[0] == 3
    files.merge({})
    merged = [pq.read_table(files.directory / f"{name}.parquet") for name in ("predictions", "sequences")]
    assert [table["index"].to_pylist() for table in merged] == [list(range(6)), list(range(3))]


def test_tokens_without_their_windows_do_not_count(files: PredictionStore, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert found(files)[0] == 2
    for chunk in files.chunks("sequences"):
        chunk.unlink()
    assert found(files) == (0, PROVENANCE)


def test_rows_are_on_the_disk_when_a_chunk_is_full(files: PredictionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_store, "CHUNK_ROWS", 4)
    files.write(*windows(0))
    assert not files.chunks("predictions")
    files.write(*windows(1))
    assert [len(files.chunks(name)) for name in ("predictions", "sequences")] == [1, 1]


def test_new_beginning_removes_what_is_there(files: PredictionStore) -> None:
    files.write(examples(0), {})
    files.flush()
    begin(PredictionStore(files.directory))
    assert found(files) == (0, None)
    assert not files.chunks("predictions")


def test_chunks_that_could_not_all_be_removed_are_not_gone_on_with(
    files: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(examples(0), {})
    files.flush()
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)
    files.discard()
    assert found(files) == (0, None)


def test_kept_rows_and_a_full_disk(files: PredictionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", full)
        files.write(examples(0), {})
        files.keep()
    assert not files.parts.exists()  # without rows, nothing stays
    begin(files)
    files.write(examples(0), {})
    files.keep()
    assert found(files) == (1, PROVENANCE)


def test_other_settings_are_refused_and_nothing_is_lost(files: PredictionStore) -> None:
    files.write(examples(0, 1), {})
    files.flush()
    after = PredictionStore(files.directory)
    after.find_interrupted(alone)
    with pytest.raises(ValueError, match=r"Expected the settings of the interrupted prediction, but got seed = 4 ins"):
        begin(after, {"seed": 4})
    after.discard()  # it has not begun
    assert found(files) == (2, PROVENANCE)
