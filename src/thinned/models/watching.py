"""What dropout does in a pass: the activations that each `Dropout` and `Mask` of a net reads and returns.

Shapes: H heads, T queries, S keys.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.dropout import Dropout
from thinned.models.thinning import Mask

See = Callable[[str, nn.Module, Tensor, Tensor], None]


@contextmanager
def watched(net: nn.Module, see: See) -> Iterator[None]:
    """Calls `see(name, module, before, after)` in each pass within the block, for each dropout and mask that acts.

    Attention takes the path on which its probabilities exist, also on CUDA. Nothing is drawn, and nothing else changes.
    Compiled nets may pass by unseen.
    """
    with ExitStack() as stack:
        for name, module in net.named_modules():
            if isinstance(module, Dropout | Mask):
                stack.enter_context(module.register_forward_hook(partial(_tell, see, name)))
                stack.callback(setattr, module, "watched", False)
                module.watched = True
        yield


@torch.no_grad()
def _tell(see: See, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    if isinstance(module, Mask) or (isinstance(module, Dropout) and module.training and module.p > 0):
        see(name, module, inputs[0], output)


def empty_rows(before: Tensor, after: Tensor, p: float) -> Tensor:
    """Returns for each head how many rows of attention lost all that they had, how many should have, and all rows.

    A row with t probabilities above 0 is emptied with probability p^t. In the causal triangle the first row has one,
    and the last has them all.

    Args:
        before: Attention probabilities or ones before dropout, (..., H, T, S), or (T, S) for one head.
        after: The same after dropout.
        p: The rate.

    Returns:
        Number of empty rows, sum of p^t over all rows, number of rows: (H, 3) fp32.

    >>> ones = torch.ones(1, 2, 2).tril()
    >>> empty_rows(ones, ones * torch.tensor([0.0, 2.0]), 0.5).tolist()
    [[1.0, 0.75, 2.0]]
    """
    if before.dim() == 2:
        before, after = before[None], after[None]
    possible, kept = before.count_nonzero(-1), after.count_nonzero(-1)  # (..., H, T)
    rows = torch.stack([(kept == 0).float(), p**possible, torch.ones_like(kept, dtype=torch.float32)], dim=-1)
    return rows.view(-1, *rows.shape[-3:]).sum((0, 2))
