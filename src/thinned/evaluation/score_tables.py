"""What an evaluation says, for a person and for a file: scores with intervals, and each way against the first one.

An evaluation is the content of `evaluation.json`: `ways` -> name -> `scores` -> key -> `value`, `low`, `high`, `n`, maybe
`why` (it is undefined), and for all ways but the first `difference`: `value`, `low`, `high`, `p`, `told_apart`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from thinned.uncertainty.scores import SCORES

TITLES = {"train": "Training split", "val": "Validation split", "test": "Test"}
CELL = 19  # characters of a column with its borders
WORST_CLASSES = 3
Evaluation = Mapping[str, Any]


def score_tables(evaluation: Evaluation, width: int = 80) -> list[Table]:
    """Returns tables of the headline scores, a column a way, as many of them side by side as there is room for.

    Each cell has the score, its 95 % interval, and below them the difference to the first way with its interval.
    """
    ways = evaluation["ways"]
    shown = [key for key, score in SCORES.items() if score.headline and any(key in w["scores"] for w in ways.values())]
    labels = max((len(SCORES[key].label) for key in shown), default=0) + 3
    at_once = max(1, (width - labels - 1) // CELL)
    names = list(ways)
    tables = []
    for start in range(0, len(names), at_once):
        table = Table(title_justify="left", show_lines=True)
        if not start:
            table.title = f"{TITLES.get(evaluation['split'], evaluation['split'])}, n = {evaluation['n']}"
        table.add_column("")
        for name in names[start : start + at_once]:
            table.add_column("\n".join(filter(None, (ways[name]["label"], ways[name]["details"]))), justify="right")
        for key in shown:
            of_ways = (ways[name]["scores"].get(key) for name in names[start : start + at_once])
            table.add_row(SCORES[key].label, *map(_cell, of_ways))
        for name in _worst_classes(ways[names[0]]["recall"]):
            recalls = [ways[way]["recall"][name] for way in names[start : start + at_once]]
            table.add_row(f"recall of {name}\n(n = {recalls[0]['n']})", *map(_cell, recalls))
        tables.append(table)
    return tables


def _worst_classes(recall: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return sorted(recall, key=lambda name: recall[name]["value"])[:WORST_CLASSES]


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "–" if score is None else f"–\n{score['why']}"
    lines = [f"{score['value']:.4f}", _interval(score)]
    if "difference" in score:
        difference = score["difference"]
        lines += [f"Δ {difference['value']:+.4f}{' *' if difference['told_apart'] else ''}", _interval(difference)]
    return "\n".join(filter(None, lines))


def _interval(of: Mapping[str, Any]) -> str:
    return "" if of["low"] is None else f"[{of['low']:.4f}, {of['high']:.4f}]"


def verdicts(evaluation: Evaluation) -> list[str]:
    """Returns a sentence for each way but the first: what is better, what is worse, and what the data cannot tell."""
    ways = evaluation["ways"]
    first = next(iter(ways.values()))["label"]
    sentences = []
    for way in list(ways.values())[1:]:
        better, worse, unknown = [], [], []
        for key, score in SCORES.items():
            difference = way["scores"].get(key, {}).get("difference")
            if not score.headline or difference is None:
                continue
            said, *_ = score.label.partition(",")
            name = said.rstrip(" ↑↓")
            if not difference["told_apart"]:
                unknown.append(name)
            else:
                gain = difference["value"] * (1 if score.label.endswith("↑") else -1)
                (better if gain > 0 else worse).append(f"{name} ({difference['value']:+.4f} {_interval(difference)})")
        parts = [f"{word} {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
        if unknown:
            parts.append(f"the data cannot tell {', '.join(unknown)} apart")
        sentences.append(f"{way['label']} against {first}: {'; '.join(parts)}.")
    return sentences


def score_rows(evaluation: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """Returns column names and rows of all scores: one a way and score, for `evaluation.csv` and W&B."""
    of_score, of_difference = ("value", "low", "high", "n", "why"), ("value", "low", "high", "p", "told_apart")
    columns = ["way", "score", *of_score, *(f"difference_{key}" for key in of_difference)]
    rows: list[list[Any]] = []
    for name, way in evaluation["ways"].items():
        for key, score in way["scores"].items():
            difference: Mapping[str, Any] = score.get("difference", {})
            rows.append([name, key, *(score.get(k) for k in of_score), *(difference.get(k) for k in of_difference)])
    return columns, rows


def recall_rows(evaluation: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """Returns column names and rows of the recall of each class, with a column a way."""
    recalls = {name: way["recall"] for name, way in evaluation["ways"].items()}
    counts = {name: recall["n"] for name, recall in next(iter(recalls.values())).items()}
    rows = [[name, n, *(recall[name]["value"] for recall in recalls.values())] for name, n in counts.items()]
    return ["class", "n", *recalls], rows


def plain_scores(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Returns settings and values of each way without intervals, as `metrics.json` holds them."""
    return {
        name: way["settings"]
        | {key: score["value"] for key, score in way["scores"].items()}
        | ({"recall": {k: {"value": r["value"], "n": r["n"]} for k, r in way["recall"].items()}} if way["recall"] else {})
        for name, way in evaluation["ways"].items()
    }
