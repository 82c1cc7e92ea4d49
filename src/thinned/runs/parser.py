"""Parses configs and options: its errors are one line, and its help shows the values of a config."""

import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pydoc import locate
from typing import Any, NoReturn, cast

import docstring_parser
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from thinned.arguments import did_you_mean, no_such_yaml
from thinned.messages import plain
from thinned.runs import internals

CHOSEN = (Callback, Logger, LightningDataModule, LightningModule, nn.Module, Optimizer)  # by a config, by class path


class Parser(LightningArgumentParser):
    """Raises a ValueError of one line for input that does not parse, with the key nearest to an unknown one.

    It takes no abbreviated option, no key twice, and no setting of an optimiser for one of another class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        internals.refuse_double_keys_in_yaml()
        internals.drop_settings_of_another_optimiser()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the outer parser reports the error of an inner one
            super().error(message, ex)
        message = plain(message)
        no_class = r"class_path '([\w.]+)': (?:module|No module)|Expected a dot import path string: ([\w.]+)"
        if unknown := re.search(r"(?:unrecognized arguments: --|[Oo]ption '|Key ')([\w.]+)", message):
            known = {name for option in re.findall(r"--([\w.]+)", self.format_help()) for name in option.split(".")}
            for class_path in re.findall(r"class_path '([\w.]+)'", message):
                known |= _parameters(cast(type, locate(class_path)))
            message += "".join(did_you_mean(name, known) for name in unknown[1].split(".") if name not in known)
        elif wrong_class := re.search(no_class, message):
            path = wrong_class[1] or wrong_class[2]
            classes = {each.__name__ for base in CHOSEN for each in _subclasses(base)}
            key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
            nearest = did_you_mean(path.rpartition(".")[2], classes)
            message = f"Expected {key} with the path of a class, but got {path}{nearest}"
        elif wrong_path := re.match(r'Parser key "(\w+)": Expected a path but (.+?) either not accessible', message):
            raise no_such_yaml(*wrong_path.groups()) from ex
        raise ValueError(message) from ex


def parse_or_help(
    parser: LightningArgumentParser, args: Sequence[str], classes: Mapping[str, type | None]
) -> Namespace:
    """Parses a command line. `--help` prints some settings with their values instead, `--help_all` all options.

    `classes` has the keys of the settings that `--help` prints, with the class of each; None if the config names it.
    """
    asked = {"-h", "--help", "--help_all"} & set(args)
    if "--help_all" in asked:
        parser.parse_args(["--help"])
    config = parser.parse_args([arg for arg in args if arg not in asked])
    if asked:
        columns = shutil.get_terminal_size().columns - 1
        for line in (line for key, of in classes.items() for line in _lines(config[key], key, of=of)):
            print(line if len(line) <= columns else f"{line[: columns - 3]}...")
        parser.exit()
    return config


def _lines(setting: Any, key: str, said: str = "", of: type | None = None) -> Iterator[str]:
    """Yields an option for each setting below a key, with its value and its description."""
    comment = f"  # {said}" if said else ""
    if not isinstance(setting, Namespace):
        yield f"--{key} {setting if isinstance(setting, str) else json.dumps(setting, default=str)}{comment}"
        return
    if "class_path" in setting:
        yield f"--{key} {setting.class_path}{comment}"
        of, setting = cast(type, locate(setting.class_path)), setting.get("init_args") or Namespace()  # type: ignore[no-untyped-call]
    descriptions = _descriptions(of) if of else {}
    for name, value in vars(setting).items():
        yield from _lines(value, f"{key}.{name}", descriptions.get(name, ""))


def _descriptions(of: type) -> dict[str, str]:
    """Returns the first sentence about each parameter in the docstrings of a class and its bases."""
    docs: dict[str, str] = {}
    for each in reversed(of.__mro__):
        for parameter in docstring_parser.parse(each.__doc__ or "").params:
            described = " ".join((parameter.description or "").split()).split(". ")[0]
            docs |= {name: described for name in parameter.arg_name.split(", ") if not described.startswith("As in")}
    return docs


def _subclasses(of: type[Any]) -> Iterator[type[Any]]:
    for each in of.__subclasses__():
        yield each
        yield from _subclasses(each)


def _parameters(class_: type) -> set[str]:
    """Names the parameters of a class and its bases, and those of the dataclasses among them."""
    parameters = [p for each in class_.__mro__ for p in inspect.signature(each).parameters.values()]
    groups = [p.annotation for p in parameters if is_dataclass(p.annotation)]
    return {p.name for p in parameters} | {field.name for group in groups for field in fields(group)}
