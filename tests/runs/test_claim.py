"""Who holds a folder: a process that runs, and no copy, no process that was killed and none that is long gone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thinned.runs import claim as claims
from thinned.runs.claim import STALE, Claim, Holder, claim, release

HOLD = f"import runpy, time; c = runpy.run_path({claims.__file__!r})['Claim'](__import__('pathlib').Path('.')); "


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Another process that holds the claim of a folder until it is killed."""
    processes = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD + "print('held', flush=True); time.sleep(60)"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_running_process_holds_and_a_killed_one_does_not(
    tmp_path: Path, held: Callable[[], subprocess.Popen[str]]
) -> None:
    process = held()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"no other process writes to, but got {tmp_path}, in use by process {process.pid}"
        ):
            Claim(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="in use by"):
        Claim(tmp_path)
    process.kill()
    process.wait()
    Claim(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("copy", [shutil.copytree, lambda a, b: subprocess.run(["cp", "-a", a, b], check=True)])
def test_copy_is_not_held(copy: Callable[..., object], tmp_path: Path, held: Callable[[], object]) -> None:
    held()
    copy(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    Claim(tmp_path.with_name(f"{tmp_path.name}-copy")).release()


@pytest.mark.parametrize(("age", "is_held"), [(0, True), (STALE - 9, True), (STALE + 9, False)])
def test_process_elsewhere_holds_as_long_as_it_renews(
    age: float, is_held: bool, tmp_path: Path, held: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    held()
    monkeypatch.setattr(claims, "_machine", lambda: "another")
    (file,) = tmp_path.glob(".claim/*")
    os.utime(file, (time.time() - age, time.time() - age))
    if is_held:
        with pytest.raises(ValueError, match="in use by"):
            Claim(tmp_path)
    else:
        Claim(tmp_path).release()


def test_holder_renews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEWAL", 0.01)
    claimed = Claim(tmp_path)
    (file,) = tmp_path.glob(".claim/*")
    os.utime(file, (0, 0))
    deadline = time.monotonic() + 20
    while file.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.stat().st_mtime > 0
    claimed.release()


def test_holder_whose_folder_is_gone_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEWAL", 0.01)
    monkeypatch.setattr(claims.os, "_exit", lambda status: pytest.fail("exits"))
    claimed = Claim(tmp_path)
    shutil.rmtree(tmp_path)
    time.sleep(0.1)
    claimed.release()


def test_same_process_claims_again(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert claim(tmp_path) is claim(tmp_path / "link")
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "renamed")
    for folder in (tmp_path, tmp_path, tmp_path / "run"):
        release(folder)
    claim(tmp_path / "renamed")
    release(tmp_path / "renamed")
    assert not (tmp_path / ".claim").exists()


def test_leftovers_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / ".claim").mkdir()
    Claim(tmp_path).release()  # of a process that was killed while it released
    (tmp_path / ".claim").mkdir()
    (tmp_path / ".claim/.DS_Store").touch()
    Claim(tmp_path).release()


def test_pid_that_came_again_holds_nothing(tmp_path: Path) -> None:
    holder = Holder.of_this_process(tmp_path)
    (tmp_path / ".claim").mkdir()
    (tmp_path / ".claim" / holder._replace(pid=str(os.getppid()), start="1").name).touch()
    if Path("/proc/self/stat").exists():
        Claim(tmp_path).release()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Claim(tmp_path / "none")
