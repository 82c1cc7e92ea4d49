"""Text on a full or read-only disk, or that vanishes: one line that names the place, nothing lost or half-written."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[..., Any]

ROOT = Path(__file__).parents[2]


def error_of(finished: Any) -> str:
    """The one line of a failure."""
    assert finished.status == 1
    assert "Traceback" not in finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def text(small_gpt: tuple[object, ...], text_file: Path) -> tuple[object, ...]:
    """Options of a short run on text."""
    callbacks = ("--trainer.callbacks.prompt", "the ", "--trainer.callbacks.max_new_tokens", 3)
    config = ("--config", ROOT / "configs/gpt_pydocs.yaml", "--data.path", text_file, *small_gpt)
    short = ("--trainer.max_steps", 4, "--trainer.val_check_interval", 2, "--mc_dropout.num_samples", 2)
    return *config, *short, *callbacks, "--trainer.logger=false"


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the disk full when a file of this name is about to be done."""

    def set_name(name: str) -> None:
        def replace(temporary: Path, path: Path) -> None:
            if path.name == Path(name).name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(temporary, path)

        monkeypatch.setattr(os, "replace", replace)

    return set_name


class TestFullDisk:
    @pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "figures/reliability.png", "samples.html"])
    def test_of_a_run(self, name: str, text: Any, full_for: Any, run_script: Script, tmp_path: Path) -> None:
        full_for(name)
        finished = run_script("train", *text, "--data.cache_dir", tmp_path / "data", pictures=True)
        run = next((path for path in finished.new if path.name == "checkpoints"), Path()).parent
        error = error_of(finished)
        assert f"/{name}, but got No space left on device" in error
        assert not [path for path in finished.new if ".tmp" in path.name]
        if name == "config.yaml":  # before anything was trained
            assert not (tmp_path / "runs/gpt_pydocs").exists()
            return
        assert f"Expected to write {tmp_path / run / name}" in error
        kept = {path.name for path in finished.new if path.is_relative_to(run)}
        assert {"config.yaml", "best.ckpt", "last.ckpt"} <= kept
        assert Path(name).name not in kept

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting takes root")
    def test_of_tokens(self, text: Any, run_script: Script, tmp_path: Path) -> None:
        folder = tmp_path / "small"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting is not permitted")
        try:
            error = error_of(run_script("train", *text, "--data.cache_dir", folder / "data"))
            assert list((folder / "data").iterdir()) == []
        finally:
            subprocess.run(["umount", folder], check=True)
        assert "Expected to write tokens to data.cache_dir, but got " in error
        assert "No space left on device" in error
        assert str(folder / "data") in error

    def test_of_a_page(self, trained_text: Any, full_for: Any, run_script: Script, tmp_path: Path) -> None:
        full_for("page.html")
        (tmp_path / "page.html").write_text("before")
        options = ("--prompt", "the ", "--max_new_tokens", 3, "--html", tmp_path / "page.html")
        finished = run_script("sample", "--ckpt_path", trained_text.run / "checkpoints/best.ckpt", *options)
        assert f"Expected to write {tmp_path / 'page.html'}, but got No space left" in error_of(finished)
        assert finished.new == []
        assert (tmp_path / "page.html").read_text() == "before"


@pytest.mark.slow
class TestReadOnly:
    def test_cache_dir(self, read_only: Script, text: Any, tmp_path: Path) -> None:
        error = error_of(read_only("train", *text, "--data.cache_dir", "data", "--runs_dir", "own/runs"))
        assert "Expected to write tokens to data.cache_dir, but got PermissionError" in error
        assert list(tmp_path.rglob("*")) == [tmp_path / "own"]

    def test_page(self, read_only: Script, trained_text: Any, tmp_path: Path) -> None:
        options = ("--prompt", "the ", "--max_new_tokens", 3, "--html", "page.html")
        error = error_of(read_only("sample", "--ckpt_path", trained_text.run / "checkpoints/best.ckpt", *options))
        assert "Expected to write page.html, but got Permission denied" in error
        assert list(tmp_path.rglob("*")) == [tmp_path / "own"]


class TestVanishedData:
    @pytest.mark.parametrize("script", ["train", "predict"])
    def test_of_a_run_that_goes_on(
        self, script: str, text: Any, trained_text: Any, run_script: Script, tmp_path: Path
    ) -> None:
        run = shutil.copytree(trained_text.run, tmp_path / "runs/gpt_pydocs/before")
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        gone = tmp_path / "gone.txt"
        options = ("--resume" if script == "train" else "--ckpt_path", run / "checkpoints/last.ckpt")
        finished = run_script(script, *(text if script == "train" else ()), *options, "--data.path", gone)
        assert "Expected data.path to be 'pydocs', 'stdlib', a file" in error_of(finished)
        assert str(gone) in error_of(finished)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    @pytest.mark.parametrize("what", ["text", "tokens"])
    def test_while_training_does_not_matter(
        self, what: str, text: Any, text_file: Path, vanishing: Any, run_script: Script, tmp_path: Path
    ) -> None:
        copy = shutil.copy(text_file, tmp_path / "copy.txt")
        path = copy if what == "text" else tmp_path / "data"
        options = ("--data.path", copy, "--data.cache_dir", tmp_path / "data", *vanishing(path))
        finished = run_script("train", *text, *options)
        assert finished.status == 0, finished.err
        assert not Path(path).exists()

    @pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_tokens_cut_off(
        self, workers: int, text: Any, text_file: Path, vanishing: Any, run_script: Script, tmp_path: Path
    ) -> None:
        cache = ("--data.cache_dir", tmp_path / "data")
        assert run_script("train", *text, *cache).status == 0
        (file,) = (tmp_path / "data").glob("*/*.bin")
        finished = run_script("train", *text, *cache, *vanishing(file, cut=True), "--data.num_workers", workers)
        error = error_of(finished)
        assert f"but got a shorter file {file}: start again to make them again" in error
        assert run_script("train", *text, *cache).status == 0  # it looks at the size before it trains
        assert file.stat().st_size
