"""Scores the uncertainty of each way while a net is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thinned.evaluation.batch import Batch, of_all_processes
from thinned.evaluation.rows import predicted_rows
from thinned.evaluation.ways import Way
from thinned.uncertainty.calibration import ece

COLUMNS = ("nll", "confidence", "correct", "mutual_information")  # kept of each target


class ValidationScores:
    """Scores the ways at every so many validations of a training, but not those that the task scores itself."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"Expected mc_dropout.validate_every to be at least 1 or null, but got {every}")
        self.every, self.count = every, 0
        self._kept: dict[str, list[Tensor]] = {}  # by the prefix of a way, (N, columns)

    def add(self, batch: Any, trained: nn.Module, ways: Sequence[Way]) -> None:
        """Predicts a batch of (inputs, targets, ...), if this validation is scored."""
        if (self.count + 1) % self.every or batch[1] is None:
            return
        inputs, targets, *rest = batch
        index = rest[0] if rest else torch.arange(len(targets), device=targets.device)
        scored = {prefix: way for way in ways if (prefix := way.metric_prefix("val")) != "val"}
        rows, _ = predicted_rows(Batch(inputs, index, targets), trained, list(scored.values()))
        for prefix, way in scored.items():
            columns = [rows[f"{way.name}_{key}"].float() for key in COLUMNS if f"{way.name}_{key}" in rows]
            self._kept.setdefault(prefix, []).append(torch.stack(columns, dim=-1).cpu())

    def end(self) -> dict[str, float]:
        """Ends a validation, and returns what is to be logged of it: the same in all processes."""
        self.count += 1
        logged: dict[str, float] = {}
        for prefix, kept in self._kept.items():
            nll, confidence, correct, *information = of_all_processes(torch.cat(kept)).T.contiguous()
            logged[f"val/{prefix}_nll"] = nll.double().mean().item()
            logged[f"val/{prefix}_ece"] = ece(confidence, correct.bool()).item()
            if information:  # one distribution has none
                logged[f"val/{prefix}_mutual_information"] = information[0].double().mean().item()
        self._kept = {}
        return logged
