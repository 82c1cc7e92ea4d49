"""Entries of a yaml become sets, and what is told of them stands in tables."""

import re
from typing import Any

import pytest
from rich.console import Console

from thinned.evaluation.score_tables import further_set_tables, score_rows
from thinned.evaluation.sets import sets_of


def test_each_severity_is_a_set() -> None:
    entries = {"spin": {"distortion": "rotation", "severities": [15, 2.5], "seed": 1}, "other": {"path": "letters"}}
    sets = sets_of(entries)
    assert [(each.name, each.entry, each.severity) for each in sets] == [
        ("spin_15", "spin", 15), ("spin_2.5", "spin", 2.5), ("other", "other", None)
    ]  # fmt: skip
    assert [each.settings for each in sets] == [
        {"distortion": "rotation:15", "seed": 1}, {"distortion": "rotation:2.5", "seed": 1}, {"path": "letters"}
    ]  # fmt: skip
    assert [each.is_foreign for each in sets] == [False, False, True]
    assert "severities" in entries["spin"]


@pytest.mark.parametrize("entry", [
    {"distortion": "rotation", "severities": []},
    {"distortion": "rotation", "severities": 15},
    {"distortion": "rotation", "severities": ["mild"]},
    {"distortion": "rotation", "severities": [True]},
    {"severities": [15]},
])  # fmt: skip
def test_entry_without_severities_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected sets\.spin with a distortion and a list of its sev"):
        sets_of({"spin": entry})


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden"])
def test_name_that_no_folder_has_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"Expected names of sets that a folder can have, but got {re.escape(repr(name))}"
    ):
        sets_of({name: {"path": "letters"}})


def score(value: float, told_apart: bool | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 10}
    return found if told_apart is None else found | {"difference": {"value": 0.1, "told_apart": told_apart}}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    def ways(nll: float | None, auroc: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, star in (("deterministic", None), ("mc_dropout", True)):
            of_way = {} if nll is None else {"accuracy": score(0.9), "nll": score(nll, star)}
            of_way |= {} if auroc is None else {"foreign_auroc_predictive_entropy": score(auroc, star)}
            found[name] = {"label": name.upper(), "scores": of_way}
        return found

    spin = {"entry": "spin", "settings": {"distortion": "rotation:15"}}
    return {"split": "test", "n": 10, "ways": ways(0.1, None), "sets": {
        "spin_15": {**spin, "severity": 15, "ways": ways(0.2, None)},
        "spin_30": {**spin, "severity": 30, "ways": ways(0.3, None)},
        "letters": {"entry": "letters", "severity": None, "settings": {}, "ways": ways(None, 0.8)},
        "broken": {"entry": "broken", "severity": None, "settings": {}, "left_out": "no such file"},
    }}  # fmt: skip


def printed(evaluation: dict[str, Any], width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(*further_set_tables(evaluation, width), sep="\n")
    return [line.rstrip() for line in captured.get().splitlines() if line.strip()]


def test_table_has_severities_down_and_ways_across(evaluation: dict[str, Any]) -> None:
    lines = printed(evaluation, 80)
    title, names, _, test, mild, strong, of_foreign, _, _, letters = lines
    assert title.strip() == "spin (degrees): accuracy, NLL (nats) [95 %]"
    assert names.split() == ["DETERMINISTIC", "MC_DROPOUT"]
    assert test.split(maxsplit=1)[0] == "test"
    assert mild.split("  ")[0].strip() == "15"
    assert re.findall(r"0\.200 \[0\.190, 0\.210\]( \*)?", mild) == ["", " *"]
    assert re.findall(r"0\.300 \[0\.290, 0\.310\]( \*)?", strong) == ["", " *"]
    assert "AUROC" in of_foreign
    assert letters.split("  ")[0].strip() == "letters: entropy"
    assert re.findall(r"0\.800 \[0\.790, 0\.810\]( \*)?", letters) == ["", " *"]


def test_ways_that_do_not_fit_follow_below(evaluation: dict[str, Any]) -> None:
    lines = printed(evaluation, 50)
    assert [line.split()[0] for line in lines if "accuracy" in line] == ["spin", "spin"]


def test_rows_of_all_sets_stand_in_one_table(evaluation: dict[str, Any]) -> None:
    columns, rows = score_rows(evaluation)
    assert columns[:4] == ["set", "way", "score", "value"]
    assert [row[:4] for row in rows if row[1] == "deterministic"] == [
        ["test", "deterministic", "accuracy", 0.9], ["test", "deterministic", "nll", 0.1],
        ["spin_15", "deterministic", "accuracy", 0.9], ["spin_15", "deterministic", "nll", 0.2],
        ["spin_30", "deterministic", "accuracy", 0.9], ["spin_30", "deterministic", "nll", 0.3],
        ["letters", "deterministic", "foreign_auroc_predictive_entropy", 0.8],
    ]  # fmt: skip


@pytest.mark.parametrize("entries", [
    {"a": {"distortion": "rotation", "severities": [2, 30]}, "a_2": {"distortion": "rotation:60"}},
    {"a": {"distortion": "rotation", "severities": [10, 10]}},
    {"test": {"path": "letters"}},
    {"Val": {"path": "letters"}},
])  # fmt: skip
def test_names_of_sets_are_their_own(entries: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected sets with names of their own, which no split has"):
        sets_of(entries)
