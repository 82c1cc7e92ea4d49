"""Labels of any type become classes by name."""

from datetime import date
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, Value

from thinned.data.labels import Labels, label_column, match_names, read_labels


def read(values: list[Any], feature: Any) -> Labels:
    features = Features(label=feature)
    return read_labels(datasets.Dataset.from_dict({"label": values}, features=features), "label", "train")


ZERO_TO_TWO = [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("values", "feature", "names", "codes"),
    [
        (ZERO_TO_TWO, ClassLabel(names=["a", "b", "c"]), ["a", "b", "c"], ZERO_TO_TWO),
        ([3, 1, 2, 3], Value("int64"), ["1", "2", "3"], ZERO_TO_TWO),  # from 1 on: no class 0 that never occurs
        ([20, 0, 10, 20], Value("int16"), ["0", "10", "20"], ZERO_TO_TWO),  # with gaps
        ([2.0, 0.0, 1.0, 2.0], Value("float32"), ["0", "1", "2"], ZERO_TO_TWO),
        (["10", "2", "9", "10"], Value("string"), ["2", "9", "10"], [2, 0, 1, 2]),  # numbers as text: by value
        (["dog", "bird", "cat", "dog"], Value("large_string"), ["bird", "cat", "dog"], ZERO_TO_TWO),
        ([True, False, True], Value("bool"), ["False", "True"], [1, 0, 1]),
        ([1, -1, 1], Value("int8"), ["-1", "1"], [1, 0, 1]),  # two classes, as for a support vector machine
        ([0, -1, 1], Value("int8"), ["0", "1"], [0, -1, 1]),  # hidden
        ([None, 1, 5], Value("int64"), ["1", "5"], [-1, 0, 1]),
        ([float("nan"), 1.0, 5.0], Value("float64"), ["1", "5"], [-1, 0, 1]),
        (["", "b", None, "a"], Value("string"), ["a", "b"], [-1, 1, -1, 0]),
        ([b"10", b"9", b"", b"10"], Value("binary"), ["9", "10"], [1, 0, -1, 1]),
        ([date(2021, 5, 1), date(2020, 5, 1)], Value("date32"), ["2020-05-01", "2021-05-01"], [1, 0]),
        ([-1, -1], ClassLabel(names=["a", "b"]), ["a", "b"], [-1, -1]),
    ],
)
def test_what_people_store_is_sorted_by_value(values: list[Any], feature: Any, names: list[str], codes: Any) -> None:
    labels = read(values, feature)
    assert labels.names == names
    assert labels.codes.tolist() == codes
    assert labels.codes.dtype == np.int64


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_dataset_that_was_saved_with_a_format_has_the_same_classes(kind: str) -> None:
    stored = datasets.Dataset.from_dict({"label": [1.0, 0.0, 1.0]}).with_format(kind)
    labels = read_labels(stored, "label", "train")
    assert (labels.names, labels.codes.tolist()) == (["0", "1"], [1, 0, 1])


@pytest.mark.parametrize(
    ("values", "feature", "said"),
    [
        ([0.5, 1.0], Value("float32"), r"Expected classes in column 'label' .* but got the number 0\.5"),
        ([], Value("int64"), "but got 0 rows"),
    ],
)
def test_what_is_no_class_is_refused(values: list[Any], feature: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(values, feature)


def test_a_number_beyond_the_declared_classes_is_refused() -> None:
    features = Features(label=ClassLabel(names=["a", "b"]))
    table = datasets.table.InMemoryTable(pa.table({"label": [0, 2]}))  # a file may hold what `datasets` would not write
    with pytest.raises(ValueError, match=r"labels in \[0, 2\) .* but got 2$"):
        read_labels(datasets.Dataset(table, datasets.DatasetInfo(features=features)), "label", "train")


def test_names_have_one_unicode_form() -> None:
    composed, decomposed = "Ba\u0308r", "B\u00e4r"  # as a Mac's file system and as a keyboard write it
    assert read([composed], Value("string")).names == read([decomposed], Value("string")).names


@pytest.mark.parametrize("seed", range(20))
def test_any_permutation_and_subset_of_names_gives_the_same_classes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = [f"class {k}" for k in range(6)]
    of_examples = generator.choice(names[: generator.integers(1, 7)], 30)
    permuted = generator.permutation(names).tolist()
    stored = read([permuted.index(name) for name in of_examples], ClassLabel(names=permuted))
    assert [names[k] for k in match_names(stored, names, "test", "the checkpoint")] == of_examples.tolist()


def test_other_names_are_refused_with_both_lists() -> None:
    labels = read(["cat", "horse"], Value("string"))
    with pytest.raises(
        ValueError, match=r"the classes of the checkpoint, \[cat, dog\], .* got \[horse\] among \[cat, horse\]"
    ):
        match_names(labels, ["cat", "dog"], "train", "the checkpoint")


def test_names_that_do_not_occur_are_no_reason_to_refuse() -> None:
    labels = read([0, 0], ClassLabel(names=["cat", "unicorn"]))
    assert match_names(labels, ["dog", "cat"], "test", "the checkpoint").tolist() == [1, 1]


def test_some_missing_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a label for each example of split 'test' .* but got none for 1 of 3"):
        match_names(read([-1, 1, 0], Value("int64")), ["0", "1"], "test", "the training")


class TestColumn:
    features = Features(image=datasets.Image(), size=Value("int64"), fine=ClassLabel(names=["a"]), y=Value("string"))

    def test_the_only_one_of_classes(self) -> None:
        assert label_column(self.features, None) == "fine"

    def test_else_one_that_is_called_so(self) -> None:
        assert label_column(Features(size=Value("int64"), Target=Value("string")), None) == "Target"

    def test_or_none(self) -> None:
        assert label_column(Features(size=Value("int64")), None) is None

    def test_the_given_one_of_any_type(self) -> None:
        assert label_column(self.features, "y") == "y"

    @pytest.mark.parametrize("given", ["image", "missing"])
    def test_no_other(self, given: str) -> None:
        with pytest.raises(ValueError, match=rf"data\.label_column .*\['size', 'fine', 'y'\], but got '{given}' \(all"):
            label_column(self.features, given)

    def test_no_choice(self) -> None:
        features = Features(fine=ClassLabel(names=["a"]), coarse=ClassLabel(names=["b"]))
        with pytest.raises(ValueError, match=r"\['fine', 'coarse'\], but got None"):
            label_column(features, None)
