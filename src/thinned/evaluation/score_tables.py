"""What an evaluation says, for a person and for a file: scores with intervals, and each way against the first one.

An evaluation is the content of `evaluation.json`: `ways` -> name -> `scores` -> key -> `value`, `low`, `high`, `n`,
maybe `why` something is null, and for all ways but the first `difference`: `value`, `low`, `high`, `p`, `told_apart`.
`sets` -> name holds an evaluation of each further set, or why it was `left_out`, see `thinned.evaluation.sets`.
"""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from thinned.uncertainty.scores import SCORES

TITLES = {"train": "Training split", "val": "Validation split", "test": "Test"}
CELL = 30  # characters of a column
WORST_CLASSES = 3
ENOUGH_SEEDS = 5
Evaluation = Mapping[str, Any]


def score_tables(evaluation: Evaluation, width: int = 80) -> list[Table]:
    """Returns tables of the headline scores, a column a way, with as many of them side by side as fit.

    Each cell has the score with its 95 % interval, and below it the difference to the first way with its own.
    """
    ways = evaluation["ways"]
    first = next(iter(ways.values()))
    shown = [key for key, score in SCORES.items() if score.headline and any(key in w["scores"] for w in ways.values())]
    labels = max((len(SCORES[key].label) for key in shown), default=0) + 2
    at_once = max(1, (width - labels) // CELL)
    tables = []
    for start in range(0, len(ways), at_once):
        group = list(ways.values())[start : start + at_once]
        table = Table("", title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        if not start:
            table.title = f"{TITLES.get(evaluation['split'], evaluation['split'])}, n = {evaluation['n']}"
        for way in group:
            table.add_column(escape("\n".join(filter(None, (way["label"], way["details"])))))
        for key in shown:
            table.add_row(SCORES[key].label, *(_cell(way["scores"].get(key)) for way in group))
        table.add_section()
        for name in sorted(first["recall"], key=lambda name: first["recall"][name]["value"])[:WORST_CLASSES]:
            recalls = [way["recall"][name] for way in group]
            table.add_row(escape(f"recall of {name}"), *map(_cell, recalls))
        tables.append(table)
    tables[-1].caption = "95 % intervals." + (
        f" Δ: difference to {first['label']} on the same examples, * p < 0.05 (Holm)." if len(ways) > 1 else ""
    )
    return tables


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "–" if score is None else f"– ({score['why']})"
    lines = [f"  {score['value']:.4f} {_interval(score)}"]
    if score.get("runs"):
        lines.append("  seeds  " + _interval(score["seeds"]))
    if "difference" in score:
        difference = score["difference"]
        star = "*" if difference["told_apart"] else " "
        lines.append(f"Δ{difference['value']:+.4f}{star}{_interval(difference)}")
    return "\n".join(lines)


def _interval(of: Mapping[str, Any]) -> str:
    return "" if of["low"] is None else f"[{of['low']:.4f}, {of['high']:.4f}]"


def verdicts(evaluation: Evaluation) -> list[str]:
    """Returns a sentence for each way but the first: what is better, what is worse, and what the data cannot tell."""
    ways = evaluation["ways"]
    first = next(iter(ways.values()))["label"]
    sentences = []
    for way in ways.values():
        nll = way["scores"].get("nll", {})
        if "seeds" in nll:
            runs = nll.get("runs", [nll["value"]])
            few = "" if len(runs) >= ENOUGH_SEEDS else ": fewer than five seeds say little of other seeds"
            sentences.append(f"NLL of {way['label']}, by seed: {', '.join(f'{run:.4f}' for run in runs)}{few}.")
    for way in list(ways.values())[1:]:
        better: list[str] = []
        worse: list[str] = []
        unknown: list[str] = []
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


def set_table(evaluation: Evaluation) -> Table | None:
    """Returns the coverage and the mean size of the prediction sets of each way; None if there are none."""
    ways = [way for way in evaluation["ways"].values() if way["coverage"]]
    if not ways:
        return None
    title = f"Prediction sets for {100 * evaluation['coverage']:g} % of targets"
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for kind in ways[0]["coverage"]:
        table.add_column(f"{kind.upper()}: coverage\nmean size", no_wrap=True)
    for way in ways:
        pairs = ((way["scores"][f"{kind}_coverage"], way["scores"][f"{kind}_size"]) for kind in way["coverage"])
        table.add_row(escape(way["label"]), *(f"{_brief(coverage)}\n{_brief(size)}" for coverage, size in pairs))
    return table


def _brief(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def missed_classes(evaluation: Evaluation) -> list[str]:
    """Returns a sentence for each way and kind of prediction sets that contain some class too rarely."""
    sentences, level = [], evaluation["coverage"]
    for way in evaluation["ways"].values():
        for kind, of_classes in way["coverage"].items():
            if missed := {name: c for name, c in of_classes.items() if c["high"] < level}:
                shown = sorted(missed, key=lambda name: missed[name]["value"])[:WORST_CLASSES]
                more = f" and {len(missed) - len(shown)} more" * (len(missed) > len(shown))
                listed = ", ".join(f"{name} in {missed[name]['value']:.2f} of {missed[name]['n']}" for name in shown)
                sentences.append(f"{kind.upper()} sets of {way['label']} contain too rarely class {listed}{more}.")
    return sentences


def score_rows(evaluation: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """Returns column names and rows of all scores: one a set, way and score, for `evaluation.csv` and W&B."""
    of_score, of_difference = ("value", "low", "high", "n", "why"), ("value", "low", "high", "p", "told_apart")
    columns = ["set", "way", "score", *of_score, *(f"difference_{key}" for key in of_difference)]
    rows: list[list[Any]] = []
    for name, of_set in {evaluation["split"]: evaluation, **evaluation.get("sets", {})}.items():
        for label, way in of_set.get("ways", {}).items():
            for key, score in way["scores"].items():
                difference: Mapping[str, Any] = score.get("difference", {})
                values = *(score.get(k) for k in of_score), *(difference.get(k) for k in of_difference)
                rows.append([name, label, key, *values])
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
        | (
            {"recall": {k: {"value": r["value"], "n": r["n"]} for k, r in way["recall"].items()}}
            if way["recall"]
            else {}
        )
        for name, way in evaluation["ways"].items()
    }
