"""Which parts of the package may import which."""

import ast
from pathlib import Path

import pytest

import thinned

PACKAGE = Path(thinned.__file__).parent


def imported_by(file: Path) -> set[str]:
    """The modules of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("thinned.")}


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("runs", ("runs", "files")),
        ("tasks", ("tasks", "models", "uncertainty", "files")),
        ("evaluation", ("evaluation", "models", "uncertainty", "data", "files")),
        ("generation", ("generation", "models", "uncertainty", "data", "files")),
        ("data", ("data", "files")),
        ("uncertainty", ("uncertainty", "models", "files")),
        ("models", ("models", "files")),
    ],
)
def test_layer_imports_only_what_it_stands_on(folder: str, allowed: tuple[str, ...]) -> None:
    """So `cli.py` alone imports `runs`, and `runs` knows no task, evaluation or generation."""
    wrong = {
        f"{file.name}: {name}"
        for file in (PACKAGE / folder).glob("*.py")
        for name in imported_by(file)
        if name.split(".")[1] not in allowed
    }
    assert wrong == set()
