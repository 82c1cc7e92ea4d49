"""What tables, sentences and files say of an evaluation, read back from their cells."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from thinned.evaluation.score_tables import (
    missed_classes,
    plain_scores,
    prediction_set_table,
    recall_rows,
    score_rows,
    score_tables,
    verdicts,
)

HEADLINE = ["accuracy", "nll", "brier", "ece", "auroc_error", "aurc"]


def score(value: float | None, half: float = 0.1, **more: Any) -> dict[str, Any]:
    bounds = {"low": None, "high": None} if value is None else {"low": value - half, "high": value + half}
    return {"value": value, "n": 40} | bounds | more


def way(label: str, details: str = "", recall: Any = None, **scores: Any) -> dict[str, Any]:
    return {"label": label, "details": details, "settings": {"S": 3}, "scores": scores, "recall": recall or {}}


def apart(value: float, told: bool = True) -> dict[str, Any]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "p": 0.001 if told else 0.5, "told_apart": told}


def evaluation(*ways: dict[str, Any], split: str = "test") -> dict[str, Any]:
    return {"split": split, "n": 40, "baseline": "way0", "ways": {f"way{i}": each for i, each in enumerate(ways)}}


def cells(table: Any) -> list[list[str]]:
    return [list(column.cells) for column in table.columns]


def test_cells_hold_score_interval_and_difference() -> None:
    first = way("deterministic", nll=score(0.5), aurc=score(None, why="no prediction is wrong"), augrc=score(0.2))
    second = way("MC dropout", "S = 20", nll=score(0.4, difference=apart(-0.1)), aurc=score(0.3))
    (table,) = score_tables(evaluation(first, second))
    assert cells(table) == [
        ["NLL, nats ↓", "AURC ↓"],  # AUGRC is in the files alone
        ["  0.5000 [0.4000, 0.6000]", "– (no prediction is wrong)"],
        ["  0.4000 [0.3000, 0.5000]\nΔ-0.1000*[-0.1100, -0.0900]", "  0.3000 [0.2000, 0.4000]"],
    ]
    assert [column.header for column in table.columns] == ["", "deterministic", "MC dropout\nS = 20"]
    assert table.title == "Test, n = 40"
    assert "difference to deterministic on the same examples" in table.caption


def test_score_that_one_way_lacks_is_a_dash() -> None:
    (table,) = score_tables(evaluation(way("one", nll=score(1.0)), way("other", nll=score(2.0), brier=score(0.5))))
    assert cells(table)[1] == ["  1.0000 [0.9000, 1.1000]", "–"]


@pytest.mark.parametrize(("split", "title"), [("val", "Validation split"), ("test", "Test"), ("other", "other")])
def test_title_names_the_split(split: str, title: str) -> None:
    assert score_tables(evaluation(way("one", nll=score(1.0)), split=split))[0].title == f"{title}, n = 40"


@pytest.mark.parametrize(("width", "columns"), [(80, [2, 2, 1]), (200, [5]), (20, [1, 1, 1, 1, 1])])
def test_as_many_ways_stand_side_by_side_as_fit(width: int, columns: list[int]) -> None:
    scores = dict.fromkeys(HEADLINE, score(0.5))
    tables = score_tables(evaluation(*(way(f"way {i}", **scores) for i in range(5))), width)
    assert [len(table.columns) - 1 for table in tables] == columns
    assert [column.header for table in tables for column in table.columns[1:]] == [f"way {i}" for i in range(5)]


def test_classes_that_are_predicted_worst_follow() -> None:
    recall = {str(k): score(1 - k / 10, n=4) for k in range(6)}
    (table,) = score_tables(evaluation(way("one", nll=score(1.0), recall=recall)))
    assert cells(table)[0][1:] == ["recall of 5", "recall of 4", "recall of 3"]
    assert cells(table)[1][1] == "  0.5000 [0.4000, 0.6000]"


def test_sentences_say_what_is_better_worse_and_unknown() -> None:
    first = way("one", **dict.fromkeys(HEADLINE, score(0.5)))
    told = {"accuracy": apart(0.1), "nll": apart(-0.1), "ece": apart(0.1), "auroc_error": apart(-0.1)}
    second = way("other", **{key: score(0.5, difference=told.get(key, apart(0.1, False))) for key in HEADLINE})
    assert verdicts(evaluation(first, second)) == [
        "other against one: better accuracy (+0.1000 [0.0900, 0.1100]), NLL (-0.1000 [-0.1100, -0.0900]); "
        "worse ECE (+0.1000 [0.0900, 0.1100]), AUROC of errors (-0.1000 [-0.1100, -0.0900]); "
        "the data cannot tell Brier, AURC apart."
    ]


def test_sentences_count_the_shifted_sets_that_a_way_is_better_on() -> None:
    of_nll = [{"difference": apart(by)} for by in (-0.1, -0.2, 0.1)] + [{"difference": apart(0.1, False)}]
    of_nll.append({})  # as of a single prediction
    sets = {
        f"spin_{i}": {"entry": "spin", "severity": i, "settings": {"distortion": f"rotation:{i}"}}
        | evaluation(way("one", nll=score(1.0)), way("other", nll=score(1.0, **difference)))
        for i, difference in enumerate(of_nll)
    }
    whole = evaluation(way("one", nll=score(1.0)), way("other", nll=score(1.0, difference=apart(-0.1, False))))
    assert verdicts(whole | {"sets": sets}) == [
        "other against one: the data cannot tell NLL apart; on 5 shifted sets, NLL is lower in 2 and higher in 1."
    ]


def test_prediction_sets_have_coverage_size_and_the_classes_that_they_miss() -> None:
    of_classes = {"cat": score(0.7, 0.1), "dog": score(0.85, 0.1), "cow": score(0.6, 0.1)}
    sets = {"thr_coverage": score(0.9, 0.02), "thr_size": score(1.2, 0.1)}
    with_sets = evaluation(way("one", **sets) | {"coverage": {"thr": of_classes}}) | {"coverage": 0.9}
    table = prediction_set_table(with_sets)
    assert table is not None
    assert cells(table) == [["one"], ["0.900 [0.880, 0.920]\n1.200 [1.100, 1.300]"]]
    assert table.title == "Prediction sets for 90 % of targets"
    assert missed_classes(with_sets) == [
        "THR sets of one contain too rarely class cow in 0.60 of 40, cat in 0.70 of 40."
    ]
    assert prediction_set_table(evaluation(way("one") | {"coverage": {}})) is None


def test_files_hold_all_scores() -> None:
    first, second = way("one", augrc=score(0.2)), way("other", augrc=score(0.1, difference=apart(-0.1)))
    columns, rows = score_rows(evaluation(first, second))
    assert [dict(zip(columns, row, strict=True))["value"] for row in rows] == [0.2, 0.1]
    assert rows[0][:7] == ["test", "way0", "augrc", 0.2, pytest.approx(0.1), pytest.approx(0.3), 40]
    assert rows[0][8:] == [None] * 5
    assert rows[1][8:] == pytest.approx([-0.1, -0.11, -0.09, 0.001, True])


def test_plain_scores_have_settings_and_values() -> None:
    recall = {"cat": score(0.5)}
    assert plain_scores(evaluation(way("one", nll=score(1.0), aurc=score(None), recall=recall))) == {
        "way0": {"S": 3, "nll": 1.0, "aurc": None, "recall": {"cat": {"value": 0.5, "n": 40}}}
    }
    assert recall_rows(evaluation(way("one", recall=recall))) == (["class", "n", "way0"], [["cat", 40, 0.5]])


def test_names_are_not_taken_for_markup() -> None:
    """A class may be called [bold], and one [/b], which would be an error of the markup."""
    recall = {"[bold]odd": score(0.5), "a[/b]": score(0.6)}
    (table,) = score_tables(evaluation(way("one[/i]", nll=score(1.0), recall=recall)))
    console = Console(width=100, record=True, file=StringIO())
    console.print(table)
    shown = console.export_text()
    assert all(name in shown for name in ("one[/i]", "recall of [bold]odd", "recall of a[/b]"))
