"""Scores of foreign examples: by hand, against scikit-learn, and intervals against DeLong and many data sets."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from thinned.uncertainty.detection import DETECTION, MEASURES, aupr, balanced, detection_intervals, fpr_at_95_tpr


def columns(seed: int, number: int, shift: float, tied: bool = False) -> dict[str, Tensor]:
    """Measures of independent examples, of which the uncertain ones are wrong more often."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(number, generator=generator, dtype=torch.float64) + shift
    level = (2 * level).round() / 2 if tied else level
    wrong = torch.rand(number, generator=generator) < torch.sigmoid(level - 2)
    return {"confidence": torch.sigmoid(-level), "predictive_entropy": level.exp(), "correct": ~wrong} | {
        "mutual_information": (level + torch.randn(number, generator=generator, dtype=torch.float64)).exp()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_those_of_scikit_learn(tied: bool) -> None:
    known, foreign = columns(0, 300, 0, tied), columns(1, 200, 1, tied)
    intervals, _ = detection_intervals({"a": known}, {"a": foreign}, "a")
    is_foreign = np.repeat([0, 1], [300, 200])
    failed = np.concatenate([~known["correct"].numpy(), np.ones(200, bool)])
    found = intervals["a"]
    assert found.keys() == DETECTION.keys()
    for measure in MEASURES:
        uncertainty = torch.cat([known[measure], foreign[measure]]).numpy() * (-1 if measure == "confidence" else 1)
        false, true, _ = roc_curve(is_foreign, uncertainty, drop_intermediate=False)
        order = np.argsort(uncertainty, kind="stable")
        expected = {
            "foreign_auroc": roc_auc_score(is_foreign, uncertainty),
            "foreign_aupr": average_precision_score(is_foreign, uncertainty),
            "foreign_fpr95": false[true >= 0.95].min(),
            "scod_auroc": roc_auc_score(failed, uncertainty),
        }
        if not tied:
            expected["scod_aurc"] = (failed[order].cumsum() / np.arange(1, 501)).mean()
        for name, value in expected.items():
            assert found[f"{name}_{measure}"].value == pytest.approx(value, abs=1e-6), name
            assert found[f"{name}_{measure}"].n == 500
    assert all(0 <= interval.low < interval.value < interval.high <= 1 for interval in found.values())


def test_by_hand() -> None:
    """Uncertainties 1 (known), 2 (foreign), 2 (known), 3 (foreign), and the known example at 1 is an error."""
    known = {"confidence": torch.tensor([0.9, 0.8]), "predictive_entropy": torch.tensor([1.0, 2.0])}
    foreign = {"confidence": torch.tensor([0.8, 0.7]), "predictive_entropy": torch.tensor([2.0, 3.0])}
    found, _ = detection_intervals({"a": known | {"correct": torch.tensor([False, True])}}, {"a": foreign}, "a")
    values = {name: interval.value for name, interval in found["a"].items()}
    for measure in ("confidence", "predictive_entropy"):
        assert values[f"foreign_auroc_{measure}"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
        assert values[f"foreign_aupr_{measure}"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
        assert values[f"foreign_fpr95_{measure}"] == pytest.approx(1 / 2)
        assert values[f"scod_auroc_{measure}"] == pytest.approx((0 + 0.5 + 1) / 3)
        # Coverages 1 to 4: all fail but one of the two tied ones, which comes second or third with equal probability.
        assert values[f"scod_aurc_{measure}"] == pytest.approx((1 + (1 + 1 / 2) / 2 + 2 / 3 + 3 / 4) / 4)
    assert not any(name.endswith("mutual_information") for name in values)


def test_examples_without_targets_have_no_failures() -> None:
    known, foreign = columns(0, 30, 0), columns(1, 20, 1)
    del known["correct"]
    intervals, _ = detection_intervals({"a": known}, {"a": foreign}, "a")
    assert not any(name.startswith("scod") for name in intervals["a"])
    assert "foreign_auroc_confidence" in intervals["a"]


def test_interval_of_auroc_has_delongs_variance() -> None:
    """The variance of a difference between two ways too, whose interval is normal but for its skewness."""
    known, foreign = (
        {way: columns(seed, number, shift) for way, seed in (("a", first), ("b", first + 10))}
        for first, number, shift in ((0, 400, 0.0), (1, 300, 0.7))
    )
    intervals, differences = detection_intervals(known, foreign, "a")

    def placements(way: str) -> tuple[np.ndarray, np.ndarray]:
        x, y = (part[way]["predictive_entropy"].numpy() for part in (known, foreign))
        above = y[:, None] > x
        return above.mean(0), above.mean(1)  # of known, of foreign examples

    of_known, of_foreign = zip(*map(placements, "ab"), strict=True)
    covariance = np.cov(of_known) / 400 + np.cov(of_foreign) / 300
    interval, difference = (x["foreign_auroc_predictive_entropy"] for x in (intervals["a"], differences["b"]))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(covariance[0, 0]), rel=0.03)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.03)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """Of 200 sets of 150 known and 100 foreign examples, 95 % do.

    Fewer than 173 have a probability of 1e-5 for each of the 15 scores.
    """
    known, foreign = ({"a": columns(seed, number, shift)} for seed, number, shift in ((-1, 75_000, 0), (-2, 50_000, 1)))
    truth = {name: interval.value for name, interval in detection_intervals(known, foreign, "a")[0]["a"].items()}
    hits = dict.fromkeys(truth, 0)
    for seed in range(200):
        known, foreign = ({"a": columns(2 * seed, 150, 0)}, {"a": columns(2 * seed + 1, 100, 1)})
        for name, interval in detection_intervals(known, foreign, "a")[0]["a"].items():
            hits[name] += interval.low <= truth[name] <= interval.high
    assert min(hits.values()) >= 173, hits


def test_weights_are_multiplicities() -> None:
    """Of equally many known and foreign examples, so that balancing changes nothing."""
    known, uncertainty = torch.tensor([True, False, True, False]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    weights = torch.tensor([[1, 2, 1, 0], [0, 1, 2, 1], [1, 1, 1, 1]])
    for score in (aupr, fpr_at_95_tpr):
        for row in weights:
            copies = torch.repeat_interleave(torch.arange(4), row)
            expected = score(known, uncertainty, row).item()
            assert score(known[copies], uncertainty[copies]).item() == pytest.approx(expected)
    assert balanced(known, torch.tensor([3, 1, 1, 4])).tolist() == pytest.approx([1.5, 0.4, 0.5, 1.6])


def test_groups_widen_intervals() -> None:
    """Four copies of each example, known to belong together, say as much as one."""
    known, foreign = columns(0, 200, 0), columns(1, 100, 1)
    copied = [{"a": {key: column.repeat(4) for key, column in part.items()}} for part in (known, foreign)]
    groups = torch.arange(200).repeat(4), torch.arange(100).repeat(4)
    one = detection_intervals({"a": known}, {"a": foreign}, "a")[0]["a"]["foreign_auroc_confidence"]
    four = detection_intervals(*copied, "a", groups)[0]["a"]["foreign_auroc_confidence"]
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=1e-6)
