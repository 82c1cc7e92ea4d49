"""Checkpoint files: whole or absent, and the newest undamaged one found."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import thinned.runs.checkpoint_io
from thinned.files import read_checkpoint
from thinned.runs.checkpoint_io import AtomicCheckpointIO, checkpoint_to_resume


def test_newest_is_the_one_with_the_most_steps(tmp_path: Path, any_run: Any) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    checkpoint = torch.load(any_run.run / "checkpoints/last.ckpt", weights_only=True)
    for name, step in (("a", 5), ("b", 30), ("c", 4), ("last", 20)):
        torch.save(checkpoint | {"global_step": step}, folder / f"{name}.ckpt")
    assert checkpoint_to_resume(tmp_path) == folder / "b.ckpt"
    torch.save(checkpoint | {"global_step": 30}, folder / "last.ckpt")
    assert checkpoint_to_resume(tmp_path) == folder / "last.ckpt"
    assert checkpoint_to_resume(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_damaged_newest_is_passed_over(damage: str, tmp_path: Path, any_run: Any) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("best", "last"):
        shutil.copy(any_run.run / f"checkpoints/{name}.ckpt", folder)
    last = folder / "last.ckpt"
    content = bytearray(last.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.warns(UserWarning, match=r"Passed over a damaged checkpoint: .*last\.ckpt"):
        assert checkpoint_to_resume(tmp_path) == folder / "best.ckpt"
    if damage == "one bit":  # which torch does not notice
        read_checkpoint(str(last), check=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed\nat")])
def test_failed_write_keeps_the_file_before(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints/last.ckpt"
    io = AtomicCheckpointIO()

    def half(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with mock.patch("torch.save", half), pytest.raises(OSError, match="there was none yet"):
        io.save_checkpoint({"a": 1}, path)
    assert not list(path.parent.iterdir())
    io.save_checkpoint({"a": 1}, path)
    with mock.patch.object(thinned.runs.checkpoint_io.torch, "save", half):
        reason = "No space left on device" if isinstance(error, OSError) else "write failed"
        with pytest.raises(OSError, match=rf"last\.ckpt, but got {reason} \(the one before is kept\)"):
            io.save_checkpoint({"a": 2}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_content_is_on_the_disk_before_the_name_is(tmp_path: Path) -> None:
    calls = []
    with (
        mock.patch.object(os, "fsync", side_effect=lambda _: calls.append("sync")),
        mock.patch.object(os, "replace", side_effect=lambda *_: calls.append("rename")),
    ):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert calls == ["sync", "rename", "sync"]  # of the file; of its directory
