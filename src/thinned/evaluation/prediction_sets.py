"""Calibrates conformal prediction sets of each way to predict on one half of the validation split.

Shapes: N examples, K classes, W ways.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from thinned.evaluation.batch import Batch, Validation
from thinned.evaluation.ways import Way
from thinned.models.dropout import derive_seed
from thinned.uncertainty.conformal import KINDS, Kind, class_scores, conformity, threshold, uniforms


class PredictionSets:
    """Makes sets of classes that contain the true one with a chosen probability: `thinned.uncertainty.conformal`.

    The seed is of the random numbers that decide whether a set contains a class on its edge.
    """

    def __init__(self, coverage: float, seed: int) -> None:
        if not 0 < coverage < 1:
            raise ValueError(f"Expected mc_dropout.coverage between 0 and 1, or null, but got {coverage}")
        self.coverage, self.seed = coverage, seed
        self.thresholds: dict[str, dict[Kind, float]] = {}  # by way and kind; none for text

    def calibrate(self, validation: Validation, ways: Sequence[Way]) -> None:
        """Sets the thresholds; ValueError if there are too few examples for the coverage."""
        num_classes = 0

        def scores(batch: Batch) -> Tensor:
            nonlocal num_classes
            if batch.counted is not None:
                return torch.empty(0, 1)
            u, means = uniforms(derive_seed(self.seed, "val"), batch.index), [batch.mean(way) for way in ways]
            num_classes = means[0].shape[-1]
            columns = [column for mean in means for column in conformity(mean, batch.target, u).values()]
            return torch.stack([batch.target.double(), *columns], dim=-1)  # (N, 1 + 3 W)

        targets, *columns = validation.gather(scores).unbind(-1)
        if not columns:  # of text
            return
        try:
            values = iter([threshold(column, self.coverage) for column in columns])
        except ValueError as error:
            raise ValueError(f"{error} in one half of the validation split (mc_dropout.coverage)") from None
        self.thresholds = {way.name: {kind: next(values) for kind in KINDS} for way in ways}
        if absent := [k for k in range(num_classes) if not (targets == k).any()]:  # of them nothing is known
            rank_zero_info(f"Prediction sets are calibrated without an example of the classes {absent}.")

    def columns(self, way: Way, probs: Tensor, targets: Tensor | None, index: Tensor) -> dict[str, Tensor]:
        """Returns the size of each example's sets and, with targets, whether they contain it, (N,) each, by name."""
        columns, thresholds = {}, self.thresholds.get(way.name, {})
        scores = class_scores(probs, uniforms(self.seed, index)) if thresholds else {}
        for kind, of_classes in scores.items():
            members = of_classes <= thresholds[kind]
            columns[f"{kind}_size"] = members.sum(-1)
            if targets is not None:
                columns[f"{kind}_covered"] = members.gather(-1, targets[:, None])[:, 0]
        return columns

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the sets, as JSON."""
        return {"coverage": self.coverage, "seed": self.seed, "thresholds": self.thresholds}
