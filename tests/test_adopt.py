"""The template under another name, whole and without either half: nothing that stays names what is gone."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NAME = "my_project"
HALVES = ["gpt", "mlp"]

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="git lists the files of the template"
)


def run(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command there, with the package that is there."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "GIT_", "PYTEST_"))}
    env |= {"PYTHONPATH": f"{folder}/src", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)


def git(folder: Path, *arguments: object) -> str:
    author = ("-c", "user.name=Anyone", "-c", "user.email=anyone@example.org")
    done = run(folder, "git", *author, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def adopt(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "scripts/adopt.py", *arguments)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the files of this one as they lie here, committed or not."""
    folder = tmp_path_factory.mktemp("template")
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--no-verify", "--message", "The template")
    return folder


@pytest.fixture
def copy(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "copy")


class Adopted(NamedTuple):
    """The template before and after."""

    before: Path
    after: Path

    @property
    def gone(self) -> list[Path]:
        """The files that were removed, relative to the template."""
        names = [Path(name) for name in git(self.before, "ls-files").splitlines()]
        return [path for path in names if not (self.after / str(path).replace("src/thinned", f"src/{NAME}")).exists()]

    def sources(self, pattern: str = "**/*") -> dict[Path, str]:
        """The text of the files that are left, or of those among them that match."""
        paths = [path for path in self.after.glob(pattern) if path.is_file() and ".git" not in path.parts]
        return {path.relative_to(self.after): path.read_text() for path in paths if path.suffix != ".png"}


@pytest.fixture(scope="session", params=[None, *HALVES], ids=["renamed", "without gpt", "without mlp"])
def adopted(request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Adopted:
    """The template after `adopt.py NAME`, and with `--without` either half."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("adopted") / "copy")
    done = adopt(folder, NAME, *(["--without", request.param] if request.param else []))
    assert done.returncode == 0, done.stderr
    assert "make lint test" in done.stdout
    return Adopted(template, folder)


def exported(folder: Path) -> set[str]:
    """What the packages list in `__all__`."""
    lists = [
        re.search(r"__all__ = (\[.*?\])", path.read_text(), re.DOTALL) for path in folder.glob("src/**/__init__.py")
    ]
    return {name for found in lists if found for name in ast.literal_eval(found[1])}


def defined(folder: Path, pattern: str, kind: type[ast.ClassDef] | type[ast.FunctionDef]) -> list[Any]:
    """The classes or functions in some files."""
    trees = [ast.parse(path.read_text()) for path in folder.glob(pattern)]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)]


def fixtures(folder: Path) -> set[str]:
    """What tests find in a conftest.py."""
    return {node.name for node in defined(folder, "tests/**/conftest.py", ast.FunctionDef) if node.decorator_list}


def targets(folder: Path) -> set[str]:
    """Commands with make."""
    found = re.findall(r"^([a-z-]+):", (folder / "Makefile").read_text(), re.MULTILINE)
    return {f"make {target}" for target in found}


def test_what_is_gone_is_not_named(adopted: Adopted) -> None:
    gone = {find: find(adopted.before) - find(adopted.after) for find in (exported, fixtures, targets)}
    names = gone[exported] | gone[targets]
    names -= {node.name for node in defined(adopted.after, "tests/**/*.py", ast.ClassDef)}  # another of that name
    for path in adopted.gone:
        names.add(path.stem if path.parts[0] == "configs" else "/".join(path.parts[-2:]))
        if path.parts[0] == "src":
            module = ".".join([NAME, *path.with_suffix("").parts[2:]]).removesuffix(".__init__")
            names.add(module)
    word = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?![\w-])")
    found = {f"{path}: {name}" for path, text in adopted.sources().items() for name in word.findall(text)}
    for path, text in adopted.sources("tests/**/*.py").items():
        nodes = [*ast.walk(ast.parse(text))]
        used = {node.arg for node in nodes if isinstance(node, ast.arg)}
        used |= {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        found |= {f"{path}: {name}" for name in used & gone[fixtures] - own}
    assert sorted(found) == [], "add the file to PARTS in scripts/adopt.py, or mark its lines"


def test_imports_find_what_they_name(adopted: Adopted) -> None:
    sources = adopted.sources("**/*.py")
    modules = {".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__"): ast.parse(source)
               for path, source in sources.items() if path.parts[0] == "src"}  # fmt: skip
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                missing = {alias.name for alias in node.names if alias.name.split(".")[0] == NAME} - modules.keys()
                assert not missing, path
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == NAME:
                assert node.module in modules, path
                words = set(re.findall(r"\w+", ast.unparse(modules[node.module])))
                submodules = {name.rpartition(".")[2] for name in modules if name.rpartition(".")[0] == node.module}
                assert {alias.name for alias in node.names} <= words | submodules, path


def test_old_name_is_left_in_english_alone(adopted: Adopted) -> None:
    as_a_name = re.compile(
        r"(?:import |from |/|project: |^# )thinned\b(?! net)|['\"]thinned['\"]|THINNED|Thinned[A-Z]", re.MULTILINE
    )
    found = {f"{path}: {match}" for path, text in adopted.sources().items() for match in as_a_name.findall(text)}
    assert found == set()
    assert "thinned network" in adopted.sources()[Path("README.md")]
    project = tomllib.loads((adopted.after / "pyproject.toml").read_text())["project"]
    assert project["name"] == NAME
    assert ("hf" in project["optional-dependencies"]) == (f"{NAME}[hf]" in project["optional-dependencies"]["dev"])


def test_nothing_is_left_of_the_script_and_its_marks(adopted: Adopted) -> None:
    marked = [path for path, text in adopted.sources().items() if re.search(r"(gpt|mlp|template) only\b|adopt", text)]
    assert marked == []
    assert [path for path in adopted.after.rglob("*") if path.is_dir() and not any(path.iterdir())
            and ".git" not in path.parts] == []  # fmt: skip


def test_it_compiles_and_is_tidy(adopted: Adopted, tmp_path: Path) -> None:
    tree = shutil.copytree(adopted.after, tmp_path / "tree", ignore=shutil.ignore_patterns(".git"))
    compiled = run(tree, sys.executable, "-m", "compileall", "-q", "src", "scripts", "tests")
    assert compiled.returncode == 0, compiled.stdout
    for command in (("check", "."), ("format", "--diff", ".")):
        tidied = run(tree, sys.executable, "-m", "ruff", *command)
        assert tidied.returncode == 0, tidied.stdout


@pytest.mark.parametrize("half", HALVES)
def test_every_pattern_matches_a_file(half: str, template: Path) -> None:
    patterns = runpy.run_path(str(ROOT / "scripts/adopt.py"))["PARTS"][half].split()
    assert [pattern for pattern in patterns if not any(template.glob(pattern))] == []


def assert_refused(done: subprocess.CompletedProcess[str], folder: Path, expected: str) -> None:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Expected ")
    assert ", but got " in line
    assert expected in line
    assert git(folder, "status", "--porcelain") == ""


@pytest.mark.parametrize("name", ["1st", "my-project", "class", "mein_größtes", "_mine", "a.b", ""])
def test_name_that_cannot_be_imported_or_installed(name: str, copy: Path) -> None:
    assert_refused(adopt(copy, name), copy, f"but got {name!r}")


@pytest.mark.parametrize("name", ["json", "torch", "thinned", "train", "scikit_learn"])
def test_name_that_is_taken(name: str, copy: Path) -> None:
    assert_refused(adopt(copy, name), copy, f"but got {name!r}, which is a package or module already")


def test_tree_with_changes(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    before = git(copy, "status", "--porcelain")
    done = adopt(copy, NAME)
    assert done.returncode == 1
    assert (
        done.stderr == "error: Expected a git tree without changes, so that you can undo mine, but got '?? notes.txt'\n"
    )
    assert git(copy, "status", "--porcelain") == before


def test_elsewhere_than_in_the_root(copy: Path) -> None:
    done = run(copy / "scripts", sys.executable, "adopt.py", NAME)
    assert_refused(done, copy, f"Expected to run in the root of the template thinned, but got {copy / 'scripts'}")


@pytest.fixture(scope="session")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mypy found out of others' packages, for all variants."""
    return tmp_path_factory.mktemp("mypy")


NAMED = (
    "tests/runs",
    "tests/evaluation",
    "tests/end_to_end/test_commands.py",
    "tests/end_to_end/test_run_directory.py",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "tests", "experiment"),
    [
        (None, NAMED, "mlp_digits"),  # the rest does not depend on the name
        ("gpt", ("src", "tests"), "mlp_digits"),
        ("mlp", ("src", "tests"), "gpt_pydocs"),
    ],
)
def test_lint_tests_and_training(
    without: str | None, tests: tuple[str, ...], experiment: str, copy: Path, mypy_cache: Path
) -> None:
    """What `make lint test train` do, with the packages of this interpreter."""
    python = copy / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    adopted = adopt(copy, NAME, *(["--without", without] if without else []))
    assert adopted.returncode == 0, adopted.stderr
    assert "make format" not in adopted.stdout  # ruff was there

    def succeeds(*arguments: object) -> str:
        done = run(copy, python, *arguments, OMP_NUM_THREADS="1", MYPY_CACHE_DIR=str(mypy_cache))
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return done.stdout

    succeeds("-m", "ruff", "check", ".")
    succeeds("-m", "ruff", "format", "--check", ".")
    succeeds("-m", "mypy")
    succeeds("-m", "pytest", *tests, "-m", "not slow", "--numprocesses", 2, "--dist", "worksteal")
    few = ("--config", "configs/debug/fast.yaml", "--trainer.accelerator", "cpu", "--trainer.max_steps", 3)
    samples = ("--trainer.callbacks.max_new_tokens", 3) if experiment == "gpt_pydocs" else ()
    printed = succeeds("scripts/train.py", "--config", f"configs/{experiment}.yaml", *few, *samples)
    assert "S = 3, shared masks" in printed
    assert len([*copy.glob(f"runs/{experiment}/*/predictions.parquet")]) == 1
