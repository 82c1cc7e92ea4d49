"""Scores how well each class is predicted. Shapes: N examples, K classes."""

import torch
from torch import Tensor

from thinned.uncertainty.weighting import totals, weights_of


def recall_per_class(
    target: Tensor, correct: Tensor, num_classes: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the weighted recall of each class, and the unweighted number of its examples.

    Targets and `correct` are (N,). Recalls are (K,) float64, NaN for a class without weight, and numbers (K,) int64.

    >>> recall_per_class(torch.tensor([0, 0, 1]), torch.tensor([True, False, True]), 2)
    (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([2, 1]))
    """
    w, target = weights_of(target, weights), target.long()
    recall = totals(w * correct.double(), target, num_classes) / totals(w, target, num_classes)
    return recall, torch.bincount(target, minlength=num_classes)


def balanced_accuracy(target: Tensor, correct: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean of the recalls of all classes that have weight (Brodersen et al. 2010), ().

    >>> balanced_accuracy(torch.tensor([0, 0, 0, 2]), torch.tensor([True, True, True, False])).item()
    0.5
    """
    num_classes = int(target.max()) + 1 if len(target) else 0
    return recall_per_class(target, correct, num_classes, weights)[0].nanmean()


def confusion_matrix(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Returns the number of examples of each class (rows) that are predicted as each class (columns), (K, K) int64.

    >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
    tensor([[1, 1],
            [0, 1]])
    """
    return torch.bincount(target * num_classes + prediction, minlength=num_classes**2).view(num_classes, num_classes)
