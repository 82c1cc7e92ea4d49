"""Gathers what the processes of a run have found."""

from typing import Any

import torch


def of_all_ranks(own: Any) -> list[Any]:
    """Returns the values of all ranks, by rank. Tensors may differ in shape, and should be on the CPU."""
    if not torch.distributed.is_initialized():
        return [own]
    objects: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(objects, own)
    return objects
