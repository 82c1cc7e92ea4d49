"""The commands of the README: what they name exists, and `make` finds its way, in any directory."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make as from a shell, though `make test` may be what runs this test."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", *arguments], cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=False
    )


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository in a directory whose name has a space."""
    folder = tmp_path / "with space"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv"):
            (folder / path.name).symlink_to(path)
    return folder


def test_readme_tells_of_the_commands() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert "make train" in lines  # mlp only
    assert "make train-gpt" in lines  # gpt only
    assert "make test" in lines


def test_files_that_the_readmes_name_exist() -> None:
    texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("[cst]*/**/README.md"))]
    named = set(re.findall(r"\b(?:configs|scripts)/[\w/]+\.(?:yaml|py|sbatch)\b", "".join(texts)))
    assert {"scripts/train.py", "scripts/predict.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@needs_make
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("train", "scripts/train.py --config configs/mlp_digits.yaml --a.b 'c d'"),  # mlp only
        ("train-gpt", "scripts/train.py --config configs/gpt_pydocs.yaml --a.b 'c d'"),  # gpt only
        ("test", "pytest"),
    ],
)
def test_make_in_a_directory_with_a_space(target: str, runs: str, copy: Path) -> None:
    done = make(copy, "-n", target, "ARGS=--a.b 'c d'")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert runs in last
    assert shlex.split(last)[-1] == "c d"
    assert "with space" not in re.sub(r"'[^']*'|\"[^\"]*\"", "", done.stdout)  # a path is quoted, or relative
    assert not (copy / ".venv").exists()  # a dry run


@needs_make
def test_make_lists_its_targets(copy: Path) -> None:
    done = make(copy)
    assert done.returncode == 0, done.stderr
    assert {line.split()[1] for line in done.stdout.splitlines()} >= {"doctor", "test"}
    assert not (copy / ".venv").exists()
