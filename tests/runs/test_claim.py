"""Who holds a folder: a process that runs, and no copy of the folder, no process that was killed, no worker of one."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from thinned.runs.directory import claim, release

HOLD = "from pathlib import Path; from thinned.runs.directory import claim; import os, time; claim(Path('.')); "


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another process that holds the claim of a folder until it is killed."""
    processes = []

    def start(then: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD + then + "print('held', flush=True); time.sleep(60)"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_running_process_holds_and_a_killed_one_does_not(
    tmp_path: Path, held: Callable[..., subprocess.Popen[str]]
) -> None:
    process = held()
    for signum in (signal.SIGCONT, signal.SIGSTOP):
        os.kill(process.pid, signum)
        with pytest.raises(ValueError, match=f"no other process writes to, but got {tmp_path}"):
            claim(tmp_path)
    process.kill()
    process.wait()
    claim(tmp_path)
    release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_worker_that_outlives_its_process_holds_nothing(
    tmp_path: Path, held: Callable[..., subprocess.Popen[str]]
) -> None:
    process = held("os.fork() or time.sleep(60); ")
    process.kill()
    process.wait()
    claim(tmp_path)
    release(tmp_path)


@pytest.mark.parametrize("copy", [shutil.copytree, lambda a, b: subprocess.run(["cp", "-a", a, b], check=True)])
def test_copy_is_not_held(copy: Callable[..., object], tmp_path: Path, held: Callable[..., object]) -> None:
    held()
    other = tmp_path.with_name(f"{tmp_path.name}-copy")
    copy(tmp_path, other)
    claim(other)
    release(other)
    assert list(other.iterdir()) == []


def test_same_process_claims_again(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    claim(tmp_path)
    claim(tmp_path / "link")
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "renamed")
    for folder in (tmp_path, tmp_path, tmp_path / "run"):
        release(folder)
    claim(tmp_path / "renamed")
    release(tmp_path / "renamed")
    assert not list(tmp_path.rglob(".claim"))


def test_folder_that_is_gone_is_released(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    release(tmp_path / "run")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        claim(tmp_path / "none")
