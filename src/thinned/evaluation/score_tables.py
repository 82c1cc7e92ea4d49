"""Shows what an evaluation says: tables and sentences for a person, rows for a file.

An evaluation is the content of `evaluation.json`: `ways` -> name -> `scores` -> key -> `value`, `low`, `high`, `n`,
maybe `why` something is null, and for all ways but the first `difference`: `value`, `low`, `high`, `p`, `told_apart`.
`sets` -> name holds an evaluation of each further set, or why it was `left_out`, see `thinned.evaluation.sets`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thinned.data.distortion import KINDS
from thinned.uncertainty.detection import MEASURES
from thinned.uncertainty.scores import SCORES

TITLES = {"train": "Training split", "val": "Validation split", "test": "Test"}
CELL = 30  # characters of a column
SET_NAME = 14  # characters of the first column of further sets, or less
WORST_CLASSES = 3
ENOUGH_SEEDS = 5
Evaluation = Mapping[str, Any]


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Prints the scores of each way, of its prediction sets and of further sets, and last what all of them tell."""
    console.print(*score_tables(evaluation, console.width), sep="\n")
    if table := prediction_set_table(evaluation):
        console.print(table)
    console.print(*further_set_tables(evaluation, console.width), "", sep="\n")
    console.print(*verdicts(evaluation), *missed_classes(evaluation), "", sep="\n", highlight=False, markup=False)


def score_tables(evaluation: Evaluation, width: int = 80) -> list[Table]:
    """Returns tables of the headline scores, a column a way, with as many of them side by side as fit.

    Each cell has the score with its 95 % interval, and below it the difference to the first way with its own.
    """
    first, shown, tables = next(iter(evaluation["ways"].values())), headline(evaluation), []
    for group in _side_by_side(evaluation, width - max((len(SCORES[key].label) for key in shown), default=0) - 2):
        table = _table(None, ["\n".join(filter(None, (way["label"], way["details"]))) for way in group])
        for key in shown:
            table.add_row(SCORES[key].label, *(_cell(way["scores"].get(key)) for way in group))
        table.add_section()
        for name in worst_first(first["recall"])[:WORST_CLASSES]:
            table.add_row(escape(f"recall of {name}"), *(_cell(way["recall"][name]) for way in group))
        tables.append(table)
    tables[0].title = f"{TITLES.get(evaluation['split'], evaluation['split'])}, n = {evaluation['n']}"
    tables[-1].caption = "95 % intervals."
    if len(evaluation["ways"]) > 1:
        tables[-1].caption += f" Δ: difference to {first['label']} on the same examples, * p < 0.05 (Holm)."
    return tables


def headline(evaluation: Evaluation) -> list[str]:
    """Returns the keys of the scores that are shown first, if any way has them."""
    ways = evaluation["ways"].values()
    return [key for key, score in SCORES.items() if score.headline and any(key in way["scores"] for way in ways)]


def worst_first(of_classes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the names of classes by the `value` of each, the lowest first."""
    return sorted(of_classes, key=lambda name: of_classes[name]["value"])


def interval(of: Mapping[str, Any], digits: int = 4) -> str:
    """Returns the bounds of a score or a difference; nothing if they are null."""
    return "" if of["low"] is None else f"[{of['low']:z.{digits}f}, {of['high']:z.{digits}f}]"


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "–" if score is None else f"– ({score['why']})"
    lines = [f"  {score['value']:.4f} {interval(score)}"]
    if score.get("runs"):
        lines.append("  seeds  " + interval(score["seeds"]))
    if difference := score.get("difference"):
        lines.append(f"Δ{difference['value']:+.4f}{'*' if difference['told_apart'] else ' '}{interval(difference)}")
    return "\n".join(lines)


def _brief(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} {interval(score, 3)}".rstrip()


def _starred(score: Mapping[str, Any] | None) -> str:
    """Returns a score with a star if the data tell it apart from that of the first way."""
    if score is None:
        return "–"
    return _brief(score) + (" *" if score.get("difference", {}).get("told_apart") else "")


def _side_by_side(evaluation: Evaluation, width: int) -> Iterator[list[dict[str, Any]]]:
    """Yields the ways in groups of as many as fit, each with its name."""
    ways, at_once = [{"name": name, **way} for name, way in evaluation["ways"].items()], max(1, width // CELL)
    for start in range(0, len(ways), at_once):
        yield ways[start : start + at_once]


def _table(title: str | None, headers: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]] = ()) -> Table:
    left: Any = {"title_justify": "left", "caption_justify": "left"}
    table = Table("", *map(escape, headers), title=title, box=box.SIMPLE_HEAD, show_edge=False, **left)
    for name, cells in rows:
        table.add_row(escape(name), *cells)
    return table


def verdicts(evaluation: Evaluation) -> list[str]:
    """Returns a sentence for each way but the first: what is better, what is worse, and what the data cannot tell."""
    ways = evaluation["ways"]
    first, shown, sentences = next(iter(ways.values()))["label"], headline(evaluation), []
    for way in ways.values():
        nll = way["scores"].get("nll", {})
        if "seeds" in nll:
            runs = nll.get("runs", [nll["value"]])
            few = "" if len(runs) >= ENOUGH_SEEDS else ": fewer than five seeds say little of other seeds"
            sentences.append(f"NLL of {way['label']}, by seed: {', '.join(f'{run:.4f}' for run in runs)}{few}.")
    with_targets = [of_set for rows in shifted_sets(evaluation).values() for _, of_set in rows[1:]]
    shifted = [of_set for of_set in with_targets if of_set["settings"].get("distortion")]
    for key_of_way, way in list(ways.items())[1:]:
        told: dict[str, list[str]] = {"better": [], "worse": []}
        unknown = []
        for key in shown:
            difference = way["scores"].get(key, {}).get("difference")
            if difference is None:
                continue
            name, is_higher = SCORES[key].label.partition(",")[0].rstrip(" ↑↓"), difference["value"] > 0
            if not difference["told_apart"]:
                unknown.append(name)
            else:
                is_better = is_higher == SCORES[key].label.endswith("↑")
                said = f"{name} ({difference['value']:+.4f} {interval(difference)})"
                told["better" if is_better else "worse"].append(said)
        parts = [f"{word} {', '.join(names)}" for word, names in told.items() if names]
        if unknown:
            parts.append(f"the data cannot tell {', '.join(unknown)} apart")
        differences = [of_set["ways"][key_of_way]["scores"]["nll"].get("difference", {}) for of_set in shifted]
        if nlls := [difference["value"] for difference in differences if difference.get("told_apart")]:
            lower, higher = sum(nll < 0 for nll in nlls), sum(nll > 0 for nll in nlls)
            parts.append(f"on {len(shifted)} shifted sets, NLL is lower in {lower} and higher in {higher}")
        sentences.append(f"{way['label']} against {first}: {'; '.join(parts)}.")
    return sentences


def prediction_set_table(evaluation: Evaluation) -> Table | None:
    """Returns the coverage and the mean size of the prediction sets of each way; None if there are none."""
    ways = [way for way in evaluation["ways"].values() if way["coverage"]]
    if not ways:
        return None
    title = f"Prediction sets for {100 * evaluation['coverage']:g} % of targets"
    table = _table(title, [f"{kind.upper()}: coverage\nmean size" for kind in ways[0]["coverage"]])
    table.padding = (0, 1, 0, 0)
    for column in table.columns[1:]:
        column.no_wrap = True
    for way in ways:
        scores, kinds = way["scores"], way["coverage"]
        cells = (f"{_brief(scores[f'{kind}_coverage'])}\n{_brief(scores[f'{kind}_size'])}" for kind in kinds)
        table.add_row(escape(way["label"]), *cells)
    return table


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


def further_set_tables(evaluation: Evaluation, width: int = 80) -> list[Table]:
    """Returns a table for each entry of the yaml with scores, and one of what is told from the test."""
    groups, tables = list(_side_by_side(evaluation, width - SET_NAME)), []
    for title, rows in shifted_sets(evaluation).items():
        for group in groups:
            cells = []
            for name, of_set in rows:
                scores = [of_set["ways"][way["name"]]["scores"] for way in group]
                cells.append((name, [f"{of['accuracy']['value']:.3f}  {_starred(of['nll'])}" for of in scores]))
            headers = [way["label"] for way in group]
            tables.append(_table(f"\n{title}: accuracy, NLL (nats) [95 %]", headers, cells))
    for group in groups:
        told = [
            (label, [_starred(of_set["ways"][way["name"]]["scores"].get(key)) for way in group])
            for label, of_set, key in foreign_measures(evaluation)
            if any(key in of_set["ways"][way["name"]]["scores"] for way in group)
        ]
        if told:
            headers = [way["label"] for way in group]
            tables.append(_table("\nForeign, told from the test: AUROC [95 %]", headers, told))
    return tables


def missed_classes(evaluation: Evaluation) -> list[str]:
    """Returns a sentence for each way and kind of prediction sets that contain some class too rarely."""
    sentences = []
    for way in evaluation["ways"].values():
        for kind, of_classes in way["coverage"].items():
            if missed := {name: c for name, c in of_classes.items() if c["high"] < evaluation["coverage"]}:
                shown = worst_first(missed)[:WORST_CLASSES]
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
    plain = {}
    for name, way in evaluation["ways"].items():
        plain[name] = way["settings"] | {key: score["value"] for key, score in way["scores"].items()}
        if way["recall"]:
            plain[name]["recall"] = {k: {"value": of["value"], "n": of["n"]} for k, of in way["recall"].items()}
    return plain
