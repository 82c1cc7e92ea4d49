"""How a script that cannot go on ends: with one line and a status, and a traceback on request."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import wandb
from lightning.fabric.utilities.exceptions import MisconfigurationException

from thinned.runs.interruption import ended_by_sigterm
from thinned.runs.lost_ranks import is_lost_rank, lost_rank_message


@contextmanager
def one_message() -> Iterator[None]:
    """Ends the program with one line and status 1 on bad input; THINNED_TRACEBACK=1 shows where it arose."""
    try:
        with ended_by_sigterm():
            yield
    except (ValueError, OSError, RuntimeError, MisconfigurationException, wandb.errors.Error) as error:
        lost = is_lost_rank(error)
        if os.environ.get("THINNED_TRACEBACK") or (isinstance(error, RuntimeError) and not lost):
            raise
        message = lost_rank_message(error) if lost else " ".join([str(error), *getattr(error, "__notes__", [])])
        sys.stderr.write(f"error: {plain(message)}\n")
        sys.exit(1)


def plain(message: str) -> str:
    """One line: of jsonargparse without its report on the members of a union, of a data loader worker the cause."""
    if re.match(r"Caught \w+ in DataLoader worker", message):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    noise = "Does not validate|Subtypes:|Errors:|- Expected a <class 'NoneType'>"
    said, _, given = message.partition("Given value type:")
    lines = [line.strip().removeprefix("- ") for line in said.splitlines() if not re.match(rf"\s*({noise})", line)]
    value = given.partition("Given value: ")[2].strip()
    if value and not value.startswith(("Namespace(", "NestedArg(")):
        lines.append(f"(got {value})")
    return " ".join(line for line in lines if line)
