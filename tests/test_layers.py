"""Which parts of the package may import which, and which one may use private names of other packages."""

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


def defined_in(tree: ast.Module) -> set[str]:
    """Names of the functions, classes, variables and attributes that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def used_in(tree: ast.Module) -> set[str]:
    """Attributes that a file reads, and names that it imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    return names


def test_private_names_of_others_stand_in_one_file() -> None:
    known = {("text_sources.py", "_fingerprint")}  # datasets has no public name for what identifies a dataset
    found = set()
    for file in set(PACKAGE.rglob("*.py")) - {PACKAGE / "runs/internals.py"}:
        tree = ast.parse(file.read_text())
        names = used_in(tree) - defined_in(tree) - {"_exit"}  # which os documents
        found |= {(file.name, name) for name in names if name.startswith("_") and not name.endswith("__")}
    assert found == known
