"""How well each class is predicted.

Shapes: N examples, K classes.
"""

import torch
from torch import Tensor


def recall_per_class(target: Tensor, correct: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Returns the fraction of each class that is predicted as it, (K,) float64, NaN if it has no examples.

    Args:
        target: Class of each example, (N,).
        correct: Whether its prediction is right, (N,) bool.
        num_classes: K.

    Returns:
        The recalls, and the number of examples of each class, (K,) int64.

    >>> recall_per_class(torch.tensor([0, 0, 1]), torch.tensor([True, False, True]), 2)
    (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([2, 1]))
    """
    target = target.long()
    count = torch.bincount(target, minlength=num_classes)
    return torch.bincount(target, correct.double(), num_classes) / count, count


def balanced_accuracy(target: Tensor, correct: Tensor) -> Tensor:
    """Returns the mean of the recalls of all classes that have examples (Brodersen et al. 2010).

    >>> balanced_accuracy(torch.tensor([0, 0, 0, 2]), torch.tensor([True, True, True, False])).item()
    0.5
    """
    return recall_per_class(target, correct, int(target.max()) + 1)[0].nanmean()


def confusion_matrix(target: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Returns the number of examples of each class (rows) that are predicted as each class (columns), (K, K) int64."""
    return torch.bincount(target * num_classes + prediction, minlength=num_classes**2).view(num_classes, num_classes)
