"""Which module may import which, as the layout of src/thinned has it: one way, and nothing in a circle."""

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import thinned

ROOT = Path(__file__).parents[1]
GROUND = {"arguments", "files", "messages", "offers", "ranks"}
# A room may import from these, and from itself. cli.py and the scripts may import from all.
MAY_IMPORT = {
    "arguments": set[str](),
    "files": set[str](),
    "messages": set[str](),
    "offers": {"files"},
    "quick_imports": set[str](),
    "ranks": set[str](),
    "models": GROUND,
    "data": GROUND,
    "runs": GROUND,
    "uncertainty": {"models", *GROUND},
    "tasks": {"uncertainty", "models", "data", *GROUND},
    "evaluation": {"uncertainty", "models", "data", *GROUND},
    "generation": {"uncertainty", "models", "data", *GROUND},
}
SOURCE = Path(thinned.__file__).parent


def dotted(path: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported anywhere in a tree: `a.b` for `from a import b`, if `a.b` is a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


def room(module: str) -> str | None:
    """`models` for thinned.models.dropout; None for the package itself, and for what others have made."""
    first, *below = module.split(".")
    return below[0] if first == SOURCE.name and below else None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    here = room(module)
    if here in (None, "cli"):
        return
    assert here in MAY_IMPORT, "say in MAY_IMPORT where it stands"
    assert {room(name) for name in imported(MODULES[module])} - {None, here} <= MAY_IMPORT[here]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) in ("models", "uncertainty")))
def test_nets_and_statistics_are_pure_torch(module: str) -> None:
    libraries = {name.split(".")[0] for name in imported(MODULES[module])}
    assert libraries.isdisjoint({"lightning", "wandb", "matplotlib", "rich"})


def test_nothing_imports_in_a_circle() -> None:
    ours = {name: {other for other in imported(tree) if other in MODULES} - {name} for name, tree in MODULES.items()}
    TopologicalSorter(ours).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_is_tried(module: str) -> None:
    """But for the extras, which are imported where they are used, with an error that says how to install them."""
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = {package.split(">")[0] for extra in optional.keys() - {"dev"} for package in optional[extra]}
    tried = {name for node in ast.walk(MODULES[module]) if isinstance(node, ast.Try) for name in imported(node)}
    assert tried <= extras


def test_private_names_of_others_stand_in_one_file() -> None:
    """A name that begins with an underscore, which its file does not define itself."""
    known = {
        ("image_store", "_fingerprint"),
        ("text_sources", "_fingerprint"),
    }  # datasets has no public name for what identifies a dataset
    found = set()
    for name, tree in MODULES.items():
        nodes = list(ast.walk(tree))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {"_exit"}  # os's
        defined |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        defined |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        private = {n for n in used - defined if n.startswith("_") and not n.endswith("__")}
        found |= {(name.split(".")[-1], n) for n in private if name != f"{SOURCE.name}.runs.internals"}
    assert found <= known
