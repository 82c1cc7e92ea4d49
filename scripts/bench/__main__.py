#!/usr/bin/env python
"""Measures what dropout, Monte-Carlo dropout and the Trainer cost, each against a baseline in the same run.

    python scripts/bench NAME [--repeats 7]     --help lists the names

All sides run in turn. Times are medians over the repeats, and ratios are medians of the ratios of each turn.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path  # gpt only

import torch
from gpt import bench_generate, bench_gpt_mc, bench_train  # gpt only
from gpt2_124m import calculate  # gpt only
from intervals import bench_intervals
from mlp import bench_dropout, bench_mlp_batch, bench_mlp_mc  # mlp only
from prediction import bench_predict  # mlp only
from scaling import bench_scaling
from start import bench_start  # mlp only
from step import bench_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benches: dict[str, Callable[[int], None]] = {
        "dropout": bench_dropout,  # mlp only
        "mc_mlp": bench_mlp_mc,  # mlp only
        "mc_batch": bench_mlp_batch,  # mlp only
        "start": bench_start,  # mlp only
        "step_mlp": lambda repeats: bench_step(repeats, "mlp_digits", 400),  # mlp only
        "step_gpt": lambda repeats: bench_step(repeats, "gpt_pydocs", 60),  # gpt only
        "predict": lambda _: bench_predict(),  # once: it takes minutes  # mlp only
        "train": lambda repeats: bench_train(repeats, arguments.nanogpt),  # gpt only
        "mc_gpt": bench_gpt_mc,  # gpt only
        "generate": bench_generate,  # gpt only
        "gpt2_124m": lambda _: calculate(),  # gpt only
        "scaling": bench_scaling,
        "intervals": lambda _: bench_intervals(arguments.rows),
    }
    parser.add_argument("bench", choices=benches)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=10_000, help="number of predictions, in `intervals`")
    parser.add_argument("--nanogpt", type=Path, help="nanoGPT's model.py, to measure against in `train`")  # gpt only
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # Lightning advises loaders and loggers, which are left out on purpose
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}")
    benches[arguments.bench](arguments.repeats)


if __name__ == "__main__":
    main()
