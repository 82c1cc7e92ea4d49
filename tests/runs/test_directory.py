"""Which directory a run gets, and from which checkpoint it goes on."""

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thinned.runs import directory as runs_directory
from thinned.runs.checkpoint_io import checkpoint_to_resume
from thinned.runs.directory import enter_run, release


def find_run(directory: Path, run_id: str | None, resume: str | None, purpose: str) -> tuple[Path, Path | None]:
    """As the command line does, without the claim."""
    run, checkpoint = runs_directory.find_run(directory, run_id, resume, purpose)
    return run, checkpoint or (checkpoint_to_resume(run) if resume and not purpose else None)


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
    ],
)
def test_errors(run_id: str | None, resume: str | None, message: str, tmp_path: Path) -> None:
    directory = tmp_path / ("runs" if run_id else "none")
    with pytest.raises(ValueError, match=message):
        find_run(directory, run_id, resume, "")


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """What a process that enters runs does at its end."""
    registered: list[Callable[[], None]] = []
    fake = SimpleNamespace(register=lambda function, *args: registered.append(partial(function, *args)))
    monkeypatch.setattr(runs_directory, "atexit", fake)

    def end() -> None:
        while registered:
            registered.pop()()

    yield end
    end()


def test_new_run_needs_a_new_name(tmp_path: Path, at_exit: Callable[[], None]) -> None:
    (tmp_path / "runs/there").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"Expected a new run_id, but got that of .*there: resume it by --resume latest"
    ):
        enter_run(tmp_path / "runs/there", new=True)
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs/there"]


@pytest.mark.parametrize("new", [True, False])
def test_run_that_has_not_started_leaves_nothing(new: bool, tmp_path: Path, at_exit: Callable[[], None]) -> None:
    enter_run(tmp_path / "runs/a", new=new)
    at_exit()
    assert not (tmp_path / "runs").exists()


def test_run_that_has_started_leaves_no_claim(tmp_path: Path, at_exit: Callable[[], None]) -> None:
    enter_run(tmp_path / "runs/a", new=True)
    (tmp_path / "runs/a/config.yaml").touch()
    at_exit()
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["config.yaml"]


def test_run_that_resumed_and_failed_stays(tmp_path: Path, at_exit: Callable[[], None]) -> None:
    make_run(tmp_path / "a", 0)
    enter_run(tmp_path / "a", new=False)
    at_exit()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoints"]


def starts(run: Path, new: bool, delay: float, both: Any, results: Any) -> None:
    """A process that enters a run, and stays until the other one has tried."""
    both.wait()
    time.sleep(delay)
    try:
        enter_run(run, new)
        results.put("entered")
    except ValueError as error:
        results.put(str(error))
    both.wait()
    release(run)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("pair", range(20))
def test_of_two_starts_at_any_moments_one_enters(pair: int, tmp_path: Path) -> None:
    """Both new, both resumed, or one of each; every second pair finds the claim of a process that was killed."""
    order = random.Random(pair)
    kinds = [pair % 4 == 0 or (pair % 4 == 2 and i == 0) for i in range(2)]
    run = tmp_path / "runs/a"
    context = multiprocessing.get_context("fork")
    if not any(kinds):
        run.mkdir(parents=True)
        if pair % 8 == 1:
            killed = context.Process(target=lambda: (enter_run(run, False), os._exit(9)))
            killed.start()
            killed.join()
            assert (run / ".claim").exists()
    both, results = context.Barrier(2, timeout=30), context.SimpleQueue()
    delays = [order.choice([0, order.uniform(0, 0.02)]) for _ in kinds]
    processes = [
        context.Process(target=starts, args=(run, new, delay, both, results))
        for new, delay in zip(kinds, delays, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    got = sorted(results.get() for _ in processes if not results.empty())
    assert len(got) == 2
    assert got[1] == "entered"
    assert got[0].startswith(("Expected a new run_id, but got", "Expected a folder that no other process writes to"))
