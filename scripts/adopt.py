#!/usr/bin/env python3
"""Makes the template your own: gives the package your name, and removes the half that you do not need.

    python3 scripts/adopt.py my_project [--without gpt | --without mlp]

It needs git and Python; nothing has to be installed. Three rules say what goes with a half:

- Its own files are listed in `PARTS`.
- In a file that both halves share, a comment marks a line, `# gpt only`, or the lines between `# gpt only: begin` and
  `# gpt only: end`. In Markdown the comment is `<!-- gpt only -->`.
- An `__init__.py` loses the imports from modules that are gone, and their names in `__all__`.

`template only` marks what always goes: this script, its test, and what was measured with the template.
"""

import argparse
import importlib.util
import keyword
import re
import subprocess
import sys
from pathlib import Path

OLD = "thinned"

# A folder stands for all files in it. tests/test_adopt.py fails if a file that stays names a removed one.
PARTS = {
    "gpt": """
        configs/gpt*.yaml  configs/evaluation/text_shifts.yaml
        scripts/bench/gpt*.py  scripts/sample.py
        src/thinned/data/text*.py  src/thinned/data/token*.py
        src/thinned/generation
        src/thinned/models/gpt*.py
        src/thinned/tasks/language_modeling.py
        tests/**/test_*gpt*.py  tests/**/test_*text*.py  tests/**/test_*token*.py
        tests/end_to_end/test_sample.py
        tests/evaluation/test_rows.py
        tests/generation
        tests/tasks/test_language_modeling.py
    """,
    "mlp": """
        configs/mlp*.yaml  configs/evaluation/image_shifts.yaml  configs/evaluation/ovadia_mnist.yaml
        scripts/bench/mlp.py  scripts/bench/prediction.py  scripts/bench/start.py
        src/thinned/data/image*.py  src/thinned/data/labels.py  src/thinned/data/pixels.py
        src/thinned/models/mlp.py
        src/thinned/tasks/classification.py
        tests/**/test_*digits*.py  tests/**/test_*image*.py  tests/**/test_*mlp*.py
        tests/data/test_labels.py  tests/data/test_pixels.py
        tests/end_to_end/test_bad_input.py
        tests/end_to_end/test_batches_and_processes.py
        tests/end_to_end/test_checkpoint_alone.py
        tests/end_to_end/test_dead_rank.py
        tests/end_to_end/test_evaluate.py  tests/end_to_end/test_evaluate_sets.py
        tests/end_to_end/test_interruption.py
        tests/end_to_end/test_launchers.py
        tests/end_to_end/test_messages.py
        tests/end_to_end/test_nonfinite.py
        tests/end_to_end/test_recipe.py
        tests/end_to_end/test_resumed_settings.py
        tests/end_to_end/test_run_directory.py
        tests/end_to_end/test_wandb_and_csv.py
        tests/end_to_end/test_wandb_unreachable.py
        tests/evaluation/test_example_rows.py  tests/evaluation/test_ways.py
        tests/evaluation/test_interrupted_prediction.py
        tests/evaluation/test_mc_dropout.py
        tests/evaluation/test_predictor.py
        tests/evaluation/test_provenance.py  tests/evaluation/test_sets.py
        tests/tasks/test_classification.py
        tests/test_without_runs.py
        tests/uncertainty/test_monte_carlo.py
        tests/uncertainty/test_selection.py  tests/uncertainty/test_sites.py
        tests/uncertainty/test_kept_networks.py
    """,
    "template": ".github/images/severity.png  scripts/adopt.py  tests/test_adopt.py",
}

MARK = re.compile(r"[ \t]*(?:#|<!--) (gpt|mlp|template) only(?:: (begin|end))?(?: -->)?(?=[ \t|]*$)", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of your package, such as my_project")
    parser.add_argument("--without", choices=["gpt", "mlp"], help="the half to remove: networks, data, task and tests")
    options = parser.parse_args()
    if problem := obstacle(options.name):
        sys.exit(f"error: {problem}")

    removed_parts = {"template", options.without} - {None}
    files = [Path(name) for name in git("ls-files", "-z").split("\0") if name]
    removed = removed_files(files, removed_parts)
    for path in sorted(set(files) - removed):
        rewrite(path, removed_parts, removed, options.name)
    git("rm", "--quiet", "--", *map(str, removed))
    Path("src", OLD).rename(Path("src", options.name))
    tidied = run_ruff()

    print(f"Named the package {options.name}, in src/{options.name}. Removed {len(removed)} files:")
    print("\n".join(f"  {path}" for path in sorted(removed)))
    print("\nNext:")
    if not tidied:
        print("  make format      # wraps the lines whose length the new name has changed")
    print(f"  make lint test\n  git add -A && git commit -m 'Adopt the template as {options.name}'")
    print("What the README says is still about the template, and LICENSE names its authors. Both are yours to edit.")


def obstacle(name: str) -> str | None:
    """Returns why the template cannot be adopted under this name here; None if it can."""
    pyproject = Path("pyproject.toml")
    if not (pyproject.is_file() and f'name = "{OLD}"' in pyproject.read_text() and Path("src", OLD).is_dir()):
        return f"Expected to run in the root of the template {OLD}, but got {Path.cwd()}"
    if not re.fullmatch(r"[A-Za-z](\w*[A-Za-z0-9])?", name, re.ASCII) or keyword.iskeyword(name):
        return f"Expected NAME to be a Python identifier, of ASCII letters, digits and inner _, but got {name!r}"
    pinned = re.findall(r"^([\w-]+)==", Path("constraints.txt").read_text(), re.MULTILINE)
    if Path("src", name).exists() or importlib.util.find_spec(name) or name.lower().replace("_", "-") in pinned:
        return f"Expected NAME to be free, but got {name!r}, which is a package or module already"
    try:
        changes = git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"Expected a git repository, so that you can undo every change, but got {error}"
    if changes:
        return f"Expected a git tree without changes, so that you can undo mine, but got {changes.splitlines()[0]!r}"
    return None


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, encoding="utf-8").stdout


def removed_files(files: list[Path], parts: set[str]) -> set[Path]:
    matched = {path for part in parts for pattern in PARTS[part].split() for path in Path().glob(pattern)}
    return {file for file in files if not matched.isdisjoint([file, *file.parents])}


def rewrite(path: Path, removed_parts: set[str], removed: set[Path], name: str) -> None:
    """Rewrites a file under the new name, without the lines of removed parts."""
    try:
        before = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a picture
        return
    text = without_marked_lines(before, removed_parts)
    if path.name == "__init__.py":
        text = without_exports(text, removed)
    if path.name != "LICENSE":  # its notice has to stay
        text = renamed(text, name)
    if text != before:
        path.write_text(text, encoding="utf-8")


def without_marked_lines(text: str, removed_parts: set[str]) -> str:
    """Drops the lines that are marked for one of the parts, and all marks."""
    if not MARK.search(text):
        return text
    kept: list[str] = []
    block = None
    skip_blank = False  # after a mark that had blank lines on both sides
    for line in text.splitlines():
        mark = MARK.search(line)
        if mark and mark[2]:
            block = mark[1] if mark[2] == "begin" else None
            skip_blank = bool(kept) and not kept[-1]
        elif line or not skip_blank:
            skip_blank = False
            if block not in removed_parts and not (mark and mark[1] in removed_parts):
                kept.append(MARK.sub("", line))
    return "\n".join(kept).rstrip("\n") + "\n"


def without_exports(text: str, removed: set[Path]) -> str:
    """Drops the imports from removed modules, and what they brought from `__all__`."""
    for statement in re.finditer(r"^from ([\w.]+) import (\([^)]*\)|.*)\n", text, re.MULTILINE):
        if Path("src", *statement[1].split(".")).with_suffix(".py") in removed:
            text = text.replace(statement[0], "")
            for export in re.findall(r"\w+", statement[2]):
                text = re.sub(rf'"{export}",\s*|,\s*"{export}"(?=\])', "", text)
    return text


def renamed(text: str, name: str) -> str:
    """Replaces the old name where it names the project, not where it is an English word (a thinned network)."""
    modules = "|".join(path.stem for path in Path("src", OLD).iterdir())
    named = rf"""
        \b{OLD}(?=\.(?:{modules}|__\w+__)\b)            # thinned.models
        | (?<=import\ ){OLD}\b | (?<=from\ ){OLD}(?=\ import)
        | (?<=src/){OLD}\b
        | (?<=["']){OLD}(?=["'\[\\-])                   # "thinned", 'thinned[hf]', "thinned-tests"
        | (?<=project:\ ){OLD}\b | (?<=job-name=){OLD}\b
        | (?<=^\#\ ){OLD}$ | (?<=The\ ){OLD}(?=\ authors)
    """
    text = re.sub(named, name, text, flags=re.VERBOSE | re.MULTILINE)
    text = text.replace(f"{OLD.upper()}_", f"{name.upper()}_")  # environment variables
    return text.replace(f"{OLD.title()}CLI", "".join(part.title() for part in name.split("_")) + "CLI")


def run_ruff() -> bool:
    """Orders imports and wraps lines as `make format` does; returns False if .venv has no ruff."""
    ruff = [".venv/bin/python", "-m", "ruff"]
    try:
        subprocess.run([*ruff, "check", "--fix", "."], capture_output=True)
        return subprocess.run([*ruff, "format", "."], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main()
