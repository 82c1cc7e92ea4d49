"""Files appear whole or not at all."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from thinned import files
from thinned.files import whole_file


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/picture.png"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".png"
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("before")
    monkeypatch.setattr(files.os, call, full)
    with (
        pytest.raises(OSError, match=f"^Expected to write {path}, but got No space left on device$"),
        whole_file(path) as t,
    ):
        t.write_text("half")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad")])
def test_failure_within(error: BaseException, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write(tmp_path / "metrics.json")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file/metrics.json"
    with pytest.raises(OSError, match=f"Expected to write {path}, but got File exists"), whole_file(path):
        pytest.fail("no folder to write to")
