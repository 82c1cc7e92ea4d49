"""Which directory a run gets, and from which checkpoint it goes on."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from thinned.runs.directory import find_run


def make_run(path: Path, age: int, *checkpoints: Path) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    for checkpoint in checkpoints:
        shutil.copy(checkpoint, path / "checkpoints")
    for folder in (path, path / "checkpoints"):
        os.utime(folder, (1e9 - age, 1e9 - age))
    return path


def test_new_runs_are_named_by_time_or_by_id(tmp_path: Path) -> None:
    first, second = (find_run(tmp_path, None, None, "")[0] for _ in range(2))
    assert first != second
    assert first.parent == tmp_path
    assert find_run(tmp_path, "mine", None, "") == (tmp_path / "mine", None)
    assert find_run(tmp_path, "mine", None, "predict") == (tmp_path / "mine-predict", None)


def test_latest_is_the_run_that_changed_last(tmp_path: Path, any_run: Any) -> None:
    last = any_run.run / "checkpoints/last.ckpt"
    make_run(tmp_path / "b", 20, last)
    new = make_run(tmp_path / "a", 10, last)
    prediction = make_run(tmp_path / "c-predict", 0)
    assert find_run(tmp_path, None, "latest", "") == (new, new / "checkpoints/last.ckpt")
    assert find_run(tmp_path, None, "latest", "predict") == (prediction, None)
    assert find_run(tmp_path, "b", "latest", "")[0] == tmp_path / "b"
    shutil.copy(last, tmp_path / "b/checkpoints/new.ckpt")
    assert find_run(tmp_path, None, "latest", "")[0] == tmp_path / "b"


def test_run_or_checkpoint_by_its_path(tmp_path: Path, any_run: Any) -> None:
    run = make_run(tmp_path / "a", 0, *(any_run.run / f"checkpoints/{name}.ckpt" for name in ("best", "last")))
    assert find_run(tmp_path / "elsewhere", None, str(run), "") == (run, run / "checkpoints/last.ckpt")
    best = run / "checkpoints/best.ckpt"
    assert find_run(tmp_path / "elsewhere", None, str(best), "") == (run, best)


def test_damaged_checkpoint_by_its_path(tmp_path: Path, any_run: Any) -> None:
    run = make_run(tmp_path / "a", 0, any_run.run / "checkpoints/last.ckpt")
    damaged = bytearray((run / "checkpoints/last.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 1  # among the weights
    (run / "checkpoints/last.ckpt").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"Expected a checkpoint of .*, but got a truncated or foreign file"):
        find_run(tmp_path, None, str(run / "checkpoints/last.ckpt"), "")
    with (
        pytest.warns(UserWarning, match="Passed over a damaged checkpoint"),
        pytest.raises(ValueError, match="Expected a checkpoint to resume from, but got damaged ones alone"),
    ):
        find_run(tmp_path, None, str(run), "")


def test_run_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0)
    assert find_run(tmp_path, None, "latest", "") == (run, None)
    assert find_run(tmp_path, "new", "latest", "") == (tmp_path / "new", None)


@pytest.mark.parametrize(
    ("run_id", "resume", "message"),
    [
        (None, "latest", "Expected a run to resume, but got none in"),
        (None, "nowhere", "Expected resume to be latest, a run, or a checkpoint of one, but got nowhere"),
        (None, ".", "Expected resume to be latest, a run, or a checkpoint of one, but got ."),
        (None, "file.ckpt", "Expected resume to be latest, a run, or a checkpoint in it"),
        ("../up", None, "Expected run_id to be the name of a directory"),
        ("there", None, "Expected a new run_id, but got that of"),
    ],
)
def test_errors(run_id: str | None, resume: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "runs/there").mkdir(parents=True)
    directory = tmp_path / ("runs" if run_id else "none")
    with pytest.raises(ValueError, match=message):
        find_run(directory, run_id, resume, "")
