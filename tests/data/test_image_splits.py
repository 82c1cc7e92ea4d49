"""Which stored images each split has, in training and later."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import thinned.data.image_splits as splits_module
from thinned.data.content_split import content_hash

ASKED = {"split_seed": 0, "val_fraction": 0.1, "test_fraction": 0.2}


def hashes(n: int, start: int = 0) -> np.ndarray:
    return np.array([content_hash(f"example {i}".encode()) for i in range(start, start + n)], np.uint64)


def arrange(stored: dict[str, np.ndarray], assigned: Any, asked: Any, trained: Any = None) -> Any:
    """Returns facts, and for each split the stored splits from which it comes, and the rows in all of them."""
    ends = np.cumsum([0, *map(len, stored.values())]).tolist()
    parts = {name: range(*rows) for name, rows in zip(stored, pairwise(ends), strict=True)}
    everything = np.concatenate([*stored.values()])
    rows, facts = splits_module.arrange(everything, np.zeros(len(everything), int), parts, assigned, asked, trained)
    sources = {s: tuple(name for name, part in parts.items() if {*part} & {*r.tolist()}) for s, r in rows.items()}
    return SimpleNamespace(sources=sources, rows=rows, facts=facts)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    lines: list[Any] = []
    monkeypatch.setattr("thinned.data.image_splits.rank_zero_info", lines.append)
    return lines


def test_stored_splits_stay_as_they_are() -> None:
    stored = {"train": hashes(50), "dev": hashes(5, 50), "test": hashes(7, 60)}
    arranged = arrange(stored, {"train": "train", "val": "dev", "test": "test"}, ASKED)
    assert arranged.sources == {"train": ("train",), "val": ("dev",), "test": ("test",)}
    assert {split: len(rows) for split, rows in arranged.rows.items()} == {"train": 50, "val": 5, "test": 7}


def test_facts_do_not_grow_with_the_set() -> None:
    facts = [arrange({"train": hashes(n)}, {"train": "train"}, ASKED).facts for n in (1000, 4000)]
    assert abs(len(str(facts[0])) - len(str(facts[1]))) < 10


def test_what_is_asked_later_does_not_matter(said: list[str]) -> None:
    stored, assigned = {"train": hashes(500)}, {"train": "train"}
    before = arrange(stored, assigned, ASKED)
    other = {"split_seed": 9, "val_fraction": 0.3, "test_fraction": 0.5}
    after = arrange(stored, assigned, other, before.facts)
    assert all(np.array_equal(after.rows[split], rows) for split, rows in before.rows.items())
    assert len(said) == 3
    assert "data.split_seed is 0, not 9" in said[0]


def test_a_set_that_has_grown_tests_nothing_that_was_trained_on(said: list[str]) -> None:
    before = arrange({"train": hashes(500)}, {"train": "train"}, ASKED)
    after = arrange({"train": hashes(700)}, {"train": "train"}, ASKED, before.facts)
    trained = set(hashes(500)[before.rows["train"]])
    assert not trained & {*hashes(700)[after.rows["test"]], *hashes(700)[after.rows["val"]]}
    assert said == ["data.path has other examples or labels than in training for train, val, test"]


def test_a_test_that_comes_later_is_not_used() -> None:
    before = arrange({"train": hashes(500)}, {"train": "train"}, ASKED)
    stored = {"train": hashes(500), "test": hashes(100)}
    after = arrange(stored, {"train": "train", "test": "test"}, ASKED, before.facts)
    assert after.sources["test"] == ("train",)
    assert np.array_equal(after.rows["test"], before.rows["test"])


def test_another_set_is_predicted_as_a_whole(said: list[str]) -> None:
    before = arrange({"train": hashes(500)}, {"train": "train"}, ASKED)
    after = arrange({"a": hashes(20, 500), "b": hashes(9, 600)}, {}, ASKED, before.facts)
    assert after.facts is None
    assert after.sources["test"] == ("a", "b")
    assert after.rows["test"].tolist() == list(range(29))
    assert said == ["data.path is not the set of the training, so all 29 are predicted"]


def test_a_stored_split_that_has_gone_is_refused() -> None:
    stored = {"train": hashes(50), "test": hashes(7, 60)}
    facts = arrange(stored, {"train": "train", "test": "test"}, ASKED).facts
    with pytest.raises(ValueError, match=r"stored splits of the training in data\.path, but got no 'test'"):
        arrange({"train": hashes(50)}, {"train": "train"}, ASKED, facts)


def test_examples_of_both_are_said(said: list[str]) -> None:
    stored = {"train": hashes(200), "test": hashes(40, start=190)}
    arranged = arrange(stored, {"train": "train", "test": "test"}, ASKED | {"val_fraction": 0.01})
    twice = len(set(hashes(200)[arranged.rows["train"]]) & set(stored["test"]))
    assert said == [f"{twice} of 40 examples for test are in the training split too"]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected examples for val, but got none of the 3 in split 'train'"):
        arrange({"train": hashes(3)}, {"train": "train"}, ASKED | {"val_fraction": 1e-9, "test_fraction": 0.5})


def test_a_few_shared_examples_do_not_make_it_the_same_set(said: list[str]) -> None:
    before = arrange({"train": hashes(5000)}, {"train": "train"}, ASKED)
    known = hashes(5000)[before.rows["train"]]
    few = np.sort(known)[:2]  # two of the sketch
    after = arrange({"train": np.concatenate([hashes(400, 9000), few])}, {"train": "train"}, ASKED, before.facts)
    assert len(after.rows["test"]) == 402
    assert said[-1].endswith("all 402 are predicted")
    part = arrange({"train": known[:300]}, {"train": "train"}, ASKED, before.facts)
    assert len(part.rows["train"]) == 300
    assert len(part.rows["test"]) == 0


def test_stored_splits_that_are_swapped_are_refused() -> None:
    stored = {"train": hashes(600), "test": hashes(100, 600)}
    names: Any = {"train": "train", "test": "test"}
    facts = arrange(stored, names, ASKED).facts
    with pytest.raises(
        ValueError, match=r"a stored split 'test' in data.path that was not trained on, but got one with"
    ):
        arrange({"train": stored["test"], "test": stored["train"]}, names, ASKED, facts)


def test_stored_splits_may_get_another_of_their_names(said: list[str]) -> None:
    stored = {"train": hashes(600), "test": hashes(100, 600)}
    facts = arrange(stored, {"train": "train", "test": "test"}, ASKED).facts
    renamed = {"Training": stored["train"], "testing": stored["test"]}
    after = arrange(renamed, {"train": "Training", "test": "testing"}, ASKED, facts)
    assert after.sources["test"] == ("testing",)
    assert said == []
