"""Measures time and memory of all scores with their intervals and differences."""

import time

import torch
from measuring import peak_memory
from torch import Tensor

from thinned.uncertainty.intervals import score_intervals
from thinned.uncertainty.scores import brier, entropy, nll

WAYS = 6


def columns(num_rows: int, way: int) -> dict[str, Tensor]:
    """Returns predictions of 10 classes by a calibrated net; each further way is more overconfident."""
    torch.manual_seed(0)
    logits = 6 * torch.randn(num_rows, 10)
    target = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    probs = ((1 + 0.1 * way) * logits).softmax(-1)
    confidence, prediction = probs.max(-1)
    return {
        "target": target,
        "probs": probs,
        "correct": prediction == target,
        "confidence": confidence,
        "nll": nll(probs, target),
        "brier": brier(probs, target),
        "predictive_entropy": entropy(probs),
    }


def run(num_rows: int, num_ways: int) -> None:
    ways = {str(way): columns(num_rows, way) for way in range(num_ways)}
    start = time.perf_counter()
    score_intervals(ways, "0")
    print(f"{num_rows:,} rows, {num_ways} ways: {time.perf_counter() - start:.1f} s", flush=True)


def bench_intervals(num_rows: int) -> None:
    """Measures six ways, whose columns of 10 classes are all in memory."""
    run(1000, WAYS)  # warms up
    print(f"peak {peak_memory(run, num_rows, WAYS if num_rows < 10**6 else 2):.0f} MiB, with the columns")
