"""Errors as one line that says what to change, with a traceback on request."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pydoc import locate
from typing import Any, NoReturn, cast

import wandb
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from thinned.runs import internals
from thinned.runs.double_keys import refuse_double_keys
from thinned.runs.interruption import ended_by_sigterm
from thinned.runs.lost_ranks import is_lost_rank, lost_rank_message


@contextmanager
def one_message() -> Iterator[None]:
    """Ends the program with one line and status 1 on bad input; THINNED_TRACEBACK=1 shows the traceback."""
    try:
        with ended_by_sigterm():
            yield
    except (ValueError, OSError, RuntimeError, MisconfigurationException, wandb.errors.Error) as error:
        lost = is_lost_rank(error)
        if os.environ.get("THINNED_TRACEBACK") or (isinstance(error, RuntimeError) and not lost):
            raise
        message, separator = (lost_rank_message(error), ": ") if lost else (str(error), " ")
        sys.stderr.write(f"error: {separator.join([plain(message), *getattr(error, '__notes__', [])])}\n")
        sys.exit(1)


def plain(message: str) -> str:
    """Shortens an error to one line: no jsonargparse union report; for a worker error, only its cause."""
    if re.match(r"Caught \w+ in DataLoader worker", message):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    noise = "Does not validate|Subtypes:|Errors:|- Expected a <class 'NoneType'>"
    said, _, given = message.partition("Given value type:")
    lines = [line.strip().removeprefix("- ") for line in said.splitlines() if not re.match(rf"\s*({noise})", line)]
    value = given.partition("Given value: ")[2].strip()
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
