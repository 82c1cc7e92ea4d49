"""Whether a CPU computes in bf16, or only emulates it: then bf16-mixed is many times slower than fp32."""

import time

import torch
from torch import Tensor

SLOW = 1.5  # times as long as in fp32


def bf16_slowdown(size: int = 384) -> float:
    """Measures how many times as long a matrix product takes on this CPU in bf16 as in fp32: 0.1 s in all."""

    def seconds(matrix: Tensor) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        return min(times)

    matrix = torch.ones(size, size)
    return seconds(matrix.bfloat16()) / seconds(matrix)
