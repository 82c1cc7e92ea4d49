"""Shortens errors to one line that says what to change. This module does not import torch."""

import io
import logging
import os
import re
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path

SAYS_WHAT_TO_CHANGE = re.compile("Expected|Parser key|[Uu]nrecognized|Problem with|Option|Key ")
# Errors of gloo, NCCL and the store through which ranks find each other. Torch has classes for only some of them.
LOST = re.compile(r"gloo|NCCL|TCPStore|ProcessGroup|Dist(Backend|Network|Store)Error")
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {sys.base_prefix, "<"})
NOT_SAID = (  # beginnings of warnings
    # The sampler leaves out the batches already seen, but Lightning knows only loaders with a state.
    "You're resuming from a checkpoint that ended before the epoch ended",
    # The model summary gives sizes in fp32, whatever the precision.
    "Precision .* is not supported by the model summary",
    # No code changes the outputs of a sharded net in place.
    "FSDP2-wrapped module .* returned a view tensor",
    # A run that resumes with max_steps ends its last epoch again, without its metrics.
    r"`ModelCheckpoint\(monitor=.*\)` could not find the monitored key",
    # A test takes the average from the checkpoint, as it should; each process has the whole net.
    "You're using the WeightAveraging callback",
    # Lightning 2.6.6 asks isinstance(treespec, LeafSpec) in each stage: Lightning-AI/pytorch-lightning#21326
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Lightning 2.6.6 warns of every directory with checkpoints: Lightning-AI/pytorch-lightning#5209
    "Checkpoint directory .* exists and is not empty",
)
EXIT_STATUS = 128  # plus the signal's number is what shells report: 143 for SIGTERM, 130 for SIGINT


@contextmanager
def one_message() -> Iterator[None]:
    """Ends the program with one line and status 1 on any error; THINNED_TRACEBACK=1 shows the traceback instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that it cannot encode is escaped
            stream.reconfigure(errors="backslashreplace")
    for warning in NOT_SAID:
        warnings.filterwarnings("ignore", message=warning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
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


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit, so that cleanup runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(EXIT_STATUS + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def restart_in_utf8() -> None:
    """Restarts this program in Python's UTF-8 mode if it would write file names and files in another encoding."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def is_lost_rank(error: BaseException) -> bool:
    """Returns whether this error means that another rank does not answer."""
    return isinstance(error, RuntimeError) and LOST.search(f"{type(error).__name__}: {error}") is not None


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
    value = given.partition("Given value: ")[2].strip().partition("\n")[0]  # the rest is about the other subtypes
    if value and not value.startswith(("Namespace(", "NestedArg(")):
        lines.append(f"(got {value})")
    return " ".join(line for line in lines if line)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()  # Lightning 2.6.6 recommends it in each run


def _one_line(error: Exception) -> str:
    """Returns the message of an error that says what to change; adds type and origin to any other."""
    notes = getattr(error, "__notes__", [])
    if is_lost_rank(error):
        first = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]
        return ": ".join([f"Expected all ranks to answer, but got {first}", *notes])
    message = plain(str(error))
    of_settings = type(error).__name__ == "MisconfigurationException" or type(error).__module__.startswith("wandb.")
    ours = isinstance(error, ValueError) and SAYS_WHAT_TO_CHANGE.match(message)
    if isinstance(error, OSError) or of_settings or ours:
        return " ".join([message, *notes])
    if isinstance(cause := error.__cause__, Exception):  # such as an error while jsonargparse built an object
        frames = traceback.extract_tb(cause.__traceback__)
        own = bool(frames) and "jsonargparse" in frames[-1].filename
        return " ".join([message, *notes]) if own else _one_line(cause)
    described = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return " ".join([described, *notes, f"({_origin(error)}, THINNED_TRACEBACK=1 shows the traceback)"])


def _origin(error: BaseException) -> str:
    """Names the innermost line of the user's code, or else of this package, in an error's traceback."""
    # A worker of a data loader sends its traceback as text.
    lines = re.findall(r'File "(.+?)", line (\d+)', str(error))[::-1]
    lines += [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)[::-1]]
    ours = [(Path(file), line) for file, line in lines if not file.startswith(LIBRARIES)]
    own = [(f, n) for f, n in ours if not f.is_relative_to(Path(__file__).parent) and "scripts" not in f.parts]
    return next((f"{file.name}, line {line}" for file, line in own or ours), "in a library")


def _end_wandb() -> None:
    """Ends W&B's run, so that the error is printed last. If the run is deleted, W&B's advice to sync it is hidden."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    started = (Path(wandb.run.dir).parents[2] / "config.yaml").exists()
    with suppress(Exception), nullcontext() if started else redirect_stderr(io.StringIO()):
        wandb.finish(exit_code=1)
