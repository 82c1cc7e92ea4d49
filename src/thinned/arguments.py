"""Checks a command line within a second, before anything is built and without importing torch."""

import argparse
import difflib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
# The keys of a config, with which options begin. A test compares them with the parser's.
OPTIONS = {
    "trainer", "model", "data", "mc_dropout", "checkpoint", "step_seed", "finite_steps", "seed_everything",
    "experiment", "runs_dir", "run_id", "resume",
}  # fmt: skip
ACTIONS = {"help", "help_all", "print_config"}  # they need no config.
USAGE = """python scripts/train.py --config CONFIG [--config OVERLAY] [--any.key value]

  --config CONFIG --help           the keys of its model, data and Monte-Carlo dropout, with their values
  --config CONFIG --print_config   all keys, with their values
  --help_all                       all options, with what they do
"""


def check_arguments(args: Sequence[str] | None = None) -> None:
    """Checks the configs of a training and the first parts of its options; lists the configs if none is given.

    Raises:
        ValueError: A config is missing, or an option or a key of a config is unknown or doubled.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        return
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    found, rest = parser.parse_known_args(args)
    options = [re.split(r"[.=+]", option.removeprefix("--"))[0] for option in rest if option.startswith("--")]
    _refuse_unknown(options, "an option of scripts/train.py", OPTIONS | ACTIONS)
    if not found.config and {"-h", "--help"} & set(rest):
        print(f"{USAGE}\n{list_of_configs()}")
        sys.exit(0)
    asks = ACTIONS & set(options) or any(re.match(r"--[\w.]+\.help\b", option) for option in rest)
    if not (found.config or asks or {"model", "data"} <= set(options)):
        print(list_of_configs())
        raise ValueError("Expected --config with the path of a yaml, but got none")
    for path in found.config:
        if "\n" not in path and not path.startswith(("{", "-")):  # a yaml itself, or standard input
            _refuse_unknown(_read_config(Path(path)), f"keys of a training in {path}", OPTIONS)


def list_of_configs() -> str:
    """Lists the experiments and overlays in `configs`, each with the first line of its file."""
    overlays = [path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "evaluation"]
    lines = []
    for title, paths in (("Experiments", CONFIGS.glob("*.yaml")), ("Overlays", overlays)):
        lines.append(f"{title}:")
        for path in sorted(paths):
            first, *_ = path.read_text(encoding="utf-8").splitlines() or [""]
            start, said = f"  {os.path.relpath(path):<38} ", first.lstrip("# ")
            room = max(3, shutil.get_terminal_size().columns - 1 - len(start))
            lines.append(start + (said if len(said) <= room else f"{said[: room - 3]}..."))
    return "\n".join(lines)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Returns the known name nearest to a wrong one, as the end of a message; empty if none is near.

    >>> did_you_mean("max_epohcs", ["max_epochs", "max_steps"])
    ' (did you mean max_epochs?)'
    """
    nearest = difflib.get_close_matches(wrong, known, n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def no_such_yaml(option: str, path: str) -> ValueError:
    """Returns the error for a path without a file; it names the config nearest to it."""
    known = [str(config.relative_to(CONFIGS.parent)) for config in CONFIGS.rglob("*.yaml")]
    return ValueError(f"Expected --{option} with the path of a yaml, but got {path}{did_you_mean(path, known)}")


def refuse_double_keys(text: str, where: str = "the yaml") -> None:
    r"""Raises a ValueError if a mapping has a key twice: PyYAML would take the last one in silence.

    >>> refuse_double_keys("a: 1\nb:\n  c: 2\n  c: 3")
    Traceback (most recent call last):
    ValueError: Expected each key once in the yaml, but got c in line 3 and in line 4
    """
    try:
        nodes = [yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
    except yaml.YAMLError:  # the parser reports it
        return
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                nodes.append(value)
                line = key.start_mark.line + 1
                name = key.tag, str(key.value)
                if name in lines:
                    got = f"{key.value} in line {lines[name]} and in line {line}"
                    raise ValueError(f"Expected each key once in {where}, but got {got}")
                lines[name] = line


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise no_such_yaml("config", str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {path} to be UTF-8 text, but got {error}") from error
    refuse_double_keys(text, path.name)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:  # the parser reports it
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_unknown(names: Iterable[str], expected: str, known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"Expected {expected}, but got {name}{did_you_mean(name, known)}")
