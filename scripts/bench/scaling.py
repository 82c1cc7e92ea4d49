"""Measures the gain from a second process, with DDP on two cores."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from measuring import Results, compare
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F  # mlp only
from torch.nn.parallel import DistributedDataParallel

from thinned.models import (
    GPT,  # gpt only
    MLP,  # mlp only
    DropoutRates,  # mlp only
)

STEPS = 10  # at a time
UNSYNCED = ", no all-reduce"


class Problem(NamedTuple):
    """Holds a net, its loss on a batch, and the batch size of one process."""

    name: str
    net: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    batch_size: int


PROBLEMS = (
    # mlp only: begin
    Problem(
        "MLP, 784-1024-1024-1024-10, batch 128",
        lambda: MLP((1, 28, 28), 10, (1024, 1024, 1024), dropout=DropoutRates(embedding=0.2, mlp=0.5)),
        lambda size: (torch.randn(size, 1, 28, 28), torch.randint(10, (size,))),
        lambda net, x, y: F.cross_entropy(net(x), y),
        128,
    ),
    # mlp only: end
    # gpt only: begin
    Problem(
        "GPT, 4 x 128, context 64, batch 12",
        lambda: GPT(65, 64, num_layers=4, num_heads=4, width=128),
        lambda size: (torch.randint(65, (size, 64)), torch.randint(65, (size, 64))),
        lambda net, x, y: net(x, y).mean(),
        12,
    ),
    # gpt only: end
)


def bench_scaling(repeats: int) -> None:
    """Measures strong (same global batch) and weak scaling (same batch per process), with a thread on each core."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("error: Expected two cores, but got one")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, cores, folder, repeats)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("error: Expected both processes to finish, but got a failure")


def _rank(rank: int, cores: list[int], folder: str, repeats: int) -> None:
    """Runs one of the two processes. Both run the same sides in the same order; the first one shows its times."""
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for problem in PROBLEMS:
        torch.manual_seed(rank)
        alone, copy = problem.net(), problem.net()
        ddp = DistributedDataParallel(copy)
        waits: list[float] = []
        ddp.register_comm_hook(waits, _timed_all_reduce)
        whole, half = problem.batch(problem.batch_size), problem.batch(problem.batch_size // 2)
        sides = {
            "one process": _side(problem, alone, whole, active=rank == 0),
            "two, half the batch each": _side(problem, ddp, half),
            "two, half the batch each" + UNSYNCED: _side(problem, ddp, half, sync=False),
            "two, the whole batch each": _side(problem, ddp, whole),
            "two, the whole batch each" + UNSYNCED: _side(problem, ddp, whole, sync=False),
        }
        results = compare(sides, repeats)
        if rank == 0:
            seconds = sum(waits) / (2 * STEPS * (repeats + 1))  # per step
            size = sum(p.numel() * p.element_size() for p in copy.parameters())
            _show(f"{problem.name}: {size / 1e6:.1f} MB of gradients, all-reduce {1e3 * seconds:.1f} ms", results)
    dist.destroy_process_group()


def _timed_all_reduce(waits: list[float], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Runs DDP's own all-reduce and records its time from start to end."""
    start = time.perf_counter()

    def done(future: torch.futures.Future[Tensor]) -> Tensor:
        waits.append(time.perf_counter() - start)
        return future.value()

    assert dist.group.WORLD is not None
    return allreduce_hook(dist.group.WORLD, bucket).then(done)


def _side(
    problem: Problem, net: nn.Module, batch: tuple[Tensor, Tensor], *, active: bool = True, sync: bool = True
) -> Callable[[], float]:
    """Returns a function that runs training steps, which both processes begin at once."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)  # a fitted batch has slow, denormal gradients

    def run() -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(STEPS if active else 0):
            optimizer.zero_grad()
            with net.no_sync() if isinstance(net, DistributedDataParallel) and not sync else nullcontext():
                torch.autograd.backward(problem.loss(net, *batch))
            optimizer.step()
        return time.perf_counter() - start

    return run


def _show(title: str, results: Results) -> None:
    """Shows the efficiency per process: 1 if two do the same work in half the time, or twice the work."""
    table = Table("", "ms a step", "efficiency", "ms more than without all-reduce", title=title, title_justify="left")
    for name, (seconds, ratio) in results.items():
        if name.endswith(UNSYNCED):
            continue
        step = 1e3 * seconds / STEPS
        if name + UNSYNCED in results:
            work = 0.5 if "half" in name else 1.0
            more = step - 1e3 * results[name + UNSYNCED][0] / STEPS
            table.add_row(name, f"{step:.1f}", f"{work / ratio:.2f}", f"{more:.1f}")
        else:
            table.add_row(name, f"{step:.1f}", "1", "")
    Console().print(table)
