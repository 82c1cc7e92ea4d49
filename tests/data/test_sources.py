"""One table says which stored name is which split."""

import pytest

from thinned.data.sources import assign_splits, split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [("Train", "train"), ("DEV", "val"), ("eval", "val"), ("valid", "val"), ("Testing", "test"), ("stress_test", None)],
)
def test_usual_names_in_any_case_are_splits_and_others_are_not(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_names_of_no_split_are_told() -> None:
    assert assign_splits(["test", "unsupervised", "train"]) == ({"test": "test", "train": "train"}, ["unsupervised"])


def test_training_comes_first() -> None:
    assert list(assign_splits(["test", "dev", "train"])[0]) == ["train", "val", "test"]


def test_two_names_of_one_split_are_refused_until_one_is_left_out() -> None:
    with pytest.raises(ValueError, match=r"one stored split for val in data.path, but got 'dev' and 'valid'"):
        assign_splits(["train", "dev", "valid"])
    assert assign_splits(["train", "dev", "valid"], ["dev"]) == ({"train": "train", "val": "valid"}, ["dev"])


def test_a_name_to_leave_out_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"data.leave_out to name stored splits \['train'\], but got 'tset'"):
        assign_splits(["train"], ["tset"])
