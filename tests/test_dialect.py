"""The prose is plain: docstrings begin with a verb, and words that make a stranger read twice are banned."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.py")])
TEXTS = sorted(
    [
        *SOURCES,
        *ROOT.glob("configs/**/*.yaml"),
        *ROOT.glob("*.md"),
        *ROOT.glob("[cst]*/**/*.md"),
        *ROOT.glob(".github/*.md"),
    ]
)
BANNED = re.compile(
    r"\b(?:goes on|go on|went on|of which|lest|for want of|whereof|thereof|hereby|albeit|anew|somebody's|anyone's)\b"
    r"|``|(?<!`)\bNone where\b",
    re.IGNORECASE,
)
# They end like verbs. "Scores of rows" is a noun, too, but "Scores rows" is a sentence.
NOUNS = re.compile(
    r"(?:Always|Arguments|Attributes|Batches|Callbacks|Checkpoints|Classes|Columns|Continuations|Does|Documents|Errors"
    r"|Examples|Files|Figures|Images|Its|Keys|Letters|Loggers|Masks|Networks|Numbers|Passes|Predictions|Seconds|Settings"
    r"|Statistics|Texts|This|Times|Tokens|Values|Ways|Windows|\w+ of)\b"
)


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields names and docstrings of a module and its public definitions; properties are named by nouns."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        name = getattr(node, "name", "the module")
        decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
        text = ast.get_docstring(node)
        if text and not name.startswith("_") and not any(each.endswith("property") for each in decorators):
            yield name, text


def begins_with_a_verb(text: str) -> bool:
    return re.match(r"[A-Z][a-z]+s\b(?!:)", text) is not None and not NOUNS.match(text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    said = [(name, text.splitlines()[0]) for name, text in docstrings(ast.parse(path.read_text()))]
    assert [f"{name}: {line}" for name, line in said if not begins_with_a_verb(line)] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_that_is_read_twice(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [f"{number}: {line.strip()}" for number, line in lines if BANNED.search(line) and "```" not in line] == []


def test_what_begins_with_a_verb() -> None:
    assert all(begins_with_a_verb(text) for text in ("Returns the mean.", "Scores rows."))
    assert not any(
        begins_with_a_verb(text) for text in ("The mean.", "Shapes: B.", "Masks that drop.", "Sums of rows.")
    )
