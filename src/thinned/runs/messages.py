"""Errors as one line that says what to change, with a traceback on request."""

import difflib
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn, cast

import wandb
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from thinned.runs import internals
from thinned.runs.blame import origin
from thinned.runs.double_keys import refuse_double_keys
from thinned.runs.interruption import ended_by_sigterm
from thinned.runs.lost_ranks import is_lost_rank, lost_rank_message

SAY_WHAT_TO_CHANGE = (OSError, MisconfigurationException, wandb.errors.Error)
SAYS_WHAT_TO_CHANGE = re.compile("Expected|Parser key|[Uu]nrecognized|Problem with|Option|Key ")


@contextmanager
def one_message() -> Iterator[None]:
    """Ends the program with one line and status 1 on any error; THINNED_TRACEBACK=1 shows the traceback instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode is shown as well as it goes
            stream.reconfigure(errors="backslashreplace")
    try:
        with ended_by_sigterm():
            yield
    except Exception as error:
        if os.environ.get("THINNED_TRACEBACK"):
            raise
        line = _one_line(error)
        _end_wandb()
        sys.stderr.write(f"error: {line}\n")
        sys.exit(1)


def restart_in_utf8() -> None:
    """Starts this program again in Python's UTF-8 mode if file names and files would be written in another encoding."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _one_line(error: Exception) -> str:
    """Returns the message of an error that says what to change, or else what is known of where it comes from."""
    notes = getattr(error, "__notes__", [])
    if is_lost_rank(error):
        return ": ".join([lost_rank_message(error), *notes])
    message = plain(str(error))
    if isinstance(error, SAY_WHAT_TO_CHANGE) or (isinstance(error, ValueError) and SAYS_WHAT_TO_CHANGE.match(message)):
        return " ".join([message, *notes])
    if isinstance(cause := error.__cause__, Exception):  # such as what failed while jsonargparse built an object
        frames = traceback.extract_tb(cause.__traceback__)
        own = bool(frames) and "jsonargparse" in frames[-1].filename
        return " ".join([message, *notes]) if own else _one_line(cause)
    described = f"{type(error).__name__}: {message}" if message else type(error).__name__
    where = ", ".join(part for part in (origin(error), "THINNED_TRACEBACK=1 shows the traceback") if part)
    return " ".join([described, *notes, f"({where})"])


def _end_wandb() -> None:
    """Ends W&B's run now, so that an error stands below what it prints; a run that is deleted cannot be synced."""
    if wandb.run is None:
        return
    started = (Path(wandb.run.dir).parents[2] / "config.yaml").exists()
    with suppress(Exception), nullcontext() if started else redirect_stderr(io.StringIO()):
        wandb.finish(exit_code=1)


def plain(message: str) -> str:
    """Shortens an error to one line: no jsonargparse union report; for a worker error, only its cause."""
    if re.match(r"Caught \w+ in DataLoader worker", message):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    message = re.sub(
        r'Parser key "(\w+)": Problem with given class_path \S+:\s+Parser key "', r'Parser key "\1.', message
    )
    noise = "Does not validate|Subtypes:|Errors:|- Expected a <class 'NoneType'>"
    said, _, given = message.partition("Given value type:")
    lines = [line.strip().removeprefix("- ") for line in said.splitlines() if not re.match(rf"\s*({noise})", line)]
    value = given.partition("Given value: ")[2].strip().partition("\n")[0]  # the rest is of the other subtypes
    if value and not value.startswith(("Namespace(", "NestedArg(")):
        lines.append(f"(got {value})")
    return " ".join(line for line in lines if line)


class Parser(LightningArgumentParser):
    """Raises ValueError with one line for input that does not parse, and names the key nearest to an unknown one.

    It takes no abbreviated option, no key twice, and no setting of an optimiser for one of another class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        internals.refuse_double_keys_in_yaml()
        internals.drop_settings_of_another_optimiser()

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise ValueError(f"Expected {path} to be UTF-8 text, but got {error}") from error

    def parse_string(self, content: str, path: Any = "", **kwargs: Any) -> Namespace:
        refuse_double_keys(content, str(path) or "the yaml")
        return super().parse_string(content, path, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an inner parser, whose error the outer one reports
            super().error(message, ex)
        message = plain(message)
        if unknown := re.search(r"(?:unrecognized arguments: --|[Oo]ption '|Key ')([\w.]+)", message):
            known = {name for option in re.findall(r"--([\w.]+)", self.format_help()) for name in option.split(".")}
            for class_path in re.findall(r"class_path '([\w.]+)'", message):
                known |= _parameters(cast(type, locate(class_path)))
            names = unknown[1].split(".")
            nearest = [difflib.get_close_matches(name, known, n=1) for name in names]
            message += "".join(f" (did you mean {n[0]}?)" for n in nearest if n and n[0] not in names)
        raise ValueError(message) from ex


def _parameters(class_: type) -> set[str]:
    """Names the parameters of a class, and those of the dataclasses among them."""
    parameters = inspect.signature(class_).parameters
    groups = [p.annotation for p in parameters.values() if is_dataclass(p.annotation)]
    return {*parameters, *(field.name for group in groups for field in fields(group))}
