"""Errors as one line, whatever they are and whatever the screen can show."""

import io
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

from thinned.messages import one_message

Script = Callable[..., Any]


class Broken(Dataset[int]):
    """Data whose third example cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return {0: 0, 1: 1}[index]


def said(capsys: pytest.CaptureFixture[str], error: Callable[[], Any]) -> str:
    with pytest.raises(SystemExit, match="1"), one_message():
        error()
    return capsys.readouterr().err


def raises(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "error", [ValueError("Expected a, but got b"), OSError("Expected to write c, but got Permission denied")]
)
def test_message_that_says_what_to_change_stands_alone(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, raises(error)) == f"error: {error}\n"


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (KeyError("x"), "error: KeyError: 'x' (test_messages.py, line "),
        (ValueError("too many values to unpack"), "error: ValueError: too many values to unpack (test_messages.py"),
        (MemoryError(), "error: MemoryError (test_messages.py, line "),
        (RuntimeError("first\nsecond"), "error: RuntimeError: first second (test_messages.py, line "),
    ],
)
def test_other_errors_say_where_they_are_from(error: Exception, start: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, raises(error))
    assert line.startswith(start)
    assert line.endswith("THINNED_TRACEBACK=1 shows the traceback)\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_is_named_by_its_line(num_workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, lambda: list(DataLoader(Broken(), num_workers=num_workers)))
    assert line.startswith("error: KeyError: 2 (")
    assert "test_messages.py, line 25" in line


def test_what_the_screen_cannot_encode_is_shown_as_well_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    with one_message():
        print("Käse № 3")
        sys.stdout.flush()
    assert screen.getvalue() == b"K\\xe4se \\u2116 3\n"


def test_other_packages_are_not_advertised(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "filters", [])
    with caplog.at_level("INFO"):
        Trainer(logger=False, accelerator="cpu")
        assert "litlogger" in caplog.text  # else the filter has nothing to do any more
        caplog.clear()
        with one_message():
            Trainer(logger=False, accelerator="cpu")
    assert "GPU available" in caplog.text
    assert "litlogger" not in caplog.text


# gpt only: begin
def test_program_restarts_where_names_of_files_are_not_utf8(start_script: Script) -> None:
    ascii_locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = start_script("scripts/sample.py", "--ckpt_path", "Käse.ckpt", **ascii_locale)
    assert "but got no file: K\\xe4se.ckpt" in done.error or "but got no file: Käse.ckpt" in done.error


# gpt only: end
