"""Shows what an evaluation says of further sets: scores by severity, and how well foreign data are told."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from thinned.data.distortion import KINDS
from thinned.evaluation.score_tables import CELL, Evaluation
from thinned.uncertainty.detection import MEASURES

FIRST = 14  # characters of the first column, or less


def shifted_sets(evaluation: Evaluation) -> dict[str, list[tuple[str, Evaluation]]]:
    """Returns the test and the sets of each entry with targets by their severities, under its name and unit."""
    tables: dict[str, list[tuple[str, Evaluation]]] = {}
    for of_set in evaluation.get("sets", {}).values():
        if any("nll" in way["scores"] for way in of_set.get("ways", {}).values()):
            kind = str(of_set["settings"].get("distortion", "")).partition(":")[0]
            title = of_set["entry"] + (f" ({KINDS[kind].unit})" if kind in KINDS else "")
            severity = of_set["entry"] if of_set["severity"] is None else f"{of_set['severity']:g}"
            tables.setdefault(title, [(evaluation["split"], evaluation)]).append((severity, of_set))
    return tables


def foreign_measures(evaluation: Evaluation) -> list[tuple[str, Evaluation, str]]:
    """Returns the label, the set and the score of each measure by which foreign data are told from the test."""
    return [
        (f"{name}: {label}", of_set, f"foreign_auroc_{measure}")
        for name, of_set in evaluation.get("sets", {}).items()
        for measure, label in MEASURES.items()
        if any(f"foreign_auroc_{measure}" in way["scores"] for way in of_set.get("ways", {}).values())
    ]


def set_tables(evaluation: Evaluation, width: int = 80) -> list[Table]:
    """Returns a table for each entry of the yaml with scores, and one of what is told from the test.

    They have a column a way, with as many of them side by side as fit. A star is a difference to the first way that
    the data tell apart.
    """
    ways, tables = list(evaluation["ways"]), list[Table]()
    at_once = max(1, (width - FIRST) // CELL)
    groups = [ways[start : start + at_once] for start in range(0, len(ways), at_once)]
    for title, rows in shifted_sets(evaluation).items():
        for group in groups:
            cells = [(name, [_scores(of_set["ways"][way]["scores"]) for way in group]) for name, of_set in rows]
            tables.append(_table(f"{title}: accuracy, NLL (nats) [95 %]", evaluation, group, cells))
    for group in groups:
        told = [
            (label, [_auroc(of_set["ways"][way]["scores"], key) for way in group])
            for label, of_set, key in foreign_measures(evaluation)
            if any(key in of_set["ways"][way]["scores"] for way in group)
        ]
        if told:
            tables.append(_table("Foreign, told from the test: AUROC [95 %]", evaluation, group, told))
    return tables


def _table(title: str, evaluation: Evaluation, ways: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> Table:
    labels = (escape(evaluation["ways"][way]["label"]) for way in ways)
    table = Table("", *labels, title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for name, cells in rows:
        table.add_row(escape(name), *cells)
    return table


def _scores(scores: Mapping[str, Any]) -> str:
    return f"{scores['accuracy']['value']:.3f}  {_cell(scores['nll'])}"


def _auroc(scores: Mapping[str, Any], key: str) -> str:
    score = scores.get(key)
    return "–" if score is None else _cell(score)


def _cell(score: Mapping[str, Any]) -> str:
    interval = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
    star = " *" if score.get("difference", {}).get("told_apart") else ""
    return f"{score['value']:.3f}{interval}{star}"
