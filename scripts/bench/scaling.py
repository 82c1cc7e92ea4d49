"""What a second process brings (measured, DDP on two cores), and what eight GPUs and more would (calculated)."""

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
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from thinned.models import GPT, MLP, DropoutRates

STEPS = 10  # at a time
UNSYNCED = ", no all-reduce"


class Problem(NamedTuple):
    """A net, a loss of it on a batch, and the size of the batch of one process."""

    name: str
    net: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    batch_size: int


PROBLEMS = (
    Problem(
        "MLP, 784-1024-1024-1024-10, batch 128",
        lambda: MLP((1, 28, 28), 10, (1024, 1024, 1024), dropout=DropoutRates(embedding=0.2, mlp=0.5)),
        lambda size: (torch.randn(size, 1, 28, 28), torch.randint(10, (size,))),
        lambda net, x, y: F.cross_entropy(net(x), y),
        128,
    ),
    Problem(
        "GPT, 4 x 128, context 64, batch 12",
        lambda: GPT(65, 64, num_layers=4, num_heads=4, width=128),
        lambda size: (torch.randint(65, (size, 64)), torch.randint(65, (size, 64))),
        lambda net, x, y: net(x, y).mean(),
        12,
    ),
)


def bench_scaling(repeats: int) -> None:
    """Strong scaling (the same global batch) and weak (the same batch per process), one thread on a core each."""
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
    calculate()


def _rank(rank: int, cores: list[int], folder: str, repeats: int) -> None:
    """One of the two processes. Both run the same sides in the same order; the first one's times are shown."""
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
            seconds = sum(waits) / (2 * STEPS * (repeats + 1))  # of a step
            size = sum(p.numel() * p.element_size() for p in copy.parameters())
            _show(f"{problem.name}: {size / 1e6:.1f} MB of gradients, all-reduce {1e3 * seconds:.1f} ms", results)
    dist.destroy_process_group()


def _timed_all_reduce(waits: list[float], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's own all-reduce, which notes the time from its start to its end."""
    start = time.perf_counter()

    def done(future: torch.futures.Future[Tensor]) -> Tensor:
        waits.append(time.perf_counter() - start)
        return future.value()

    assert dist.group.WORLD is not None
    return allreduce_hook(dist.group.WORLD, bucket).then(done)


def _side(
    problem: Problem, net: nn.Module, batch: tuple[Tensor, Tensor], *, active: bool = True, sync: bool = True
) -> Callable[[], float]:
    """Training steps, begun by both processes at once."""
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
    """The efficiency is that of each process: 1 where two do the work of one in half the time, or twice the work."""
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


# Calculation: configs/gpt2_124m.yaml.
TOKENS = 96 * 5 * 1024  # of an optimiser step
STEPS_124M = 600_000
NANOGPT_SECONDS = 4 * 24 * 3600  # nanoGPT's README: about four days on eight A100 with 40 GB


class Device(NamedTuple):
    """Dense bf16 FLOP/s and NVLink bytes/s in one direction, of NVIDIA's data sheets of the SXM modules."""

    name: str
    flops: float
    nvlink: float


A100 = Device("A100", 312e12, 300e9)
H100 = Device("H100", 989e12, 450e9)

# Devices on a node, nodes, and bytes/s between nodes in one direction: of a node, over all its network cards.
CLUSTERS = (
    (A100, 1, 0.0, "NVLink"),
    (H100, 1, 0.0, "NVLink"),
    (H100, 2, 8 * 50e9, "InfiniBand"),  # 400 Gb/s for each GPU, as in NVIDIA's DGX H100
    (H100, 4, 8 * 50e9, "InfiniBand"),
    (H100, 4, 12.5e9, "Ethernet"),  # 100 Gb/s for a node
)


def ring_seconds(size: float, members: int, bandwidth: float) -> float:
    """Time of a ring all-reduce: each member sends 2 (N - 1) / N of the bytes (Patarasu and Yuan 2009)."""
    return 2 * (members - 1) / members * size / bandwidth


def step_seconds(
    flops: float, gradient_bytes: float, device: Device, nodes: int, between: float, mfu: float
) -> tuple[float, float]:
    """Seconds of the arithmetic of a step on nodes of eight devices, and of the all-reduce of its gradients.

    A ring is as slow as its slowest link: the node's share of the network where there are several nodes.
    """
    devices = 8 * nodes
    bandwidth = device.nvlink if nodes == 1 else min(device.nvlink, between)
    return flops / (devices * device.flops * mfu), ring_seconds(gradient_bytes, devices, bandwidth)


def calculate() -> None:
    """Prints the step time of GPT-2 124M on eight devices and more: calculated, not measured."""
    with torch.device("meta"):
        net = GPT(50_257, 1024, num_layers=12, num_heads=12, width=768)
    flops = net.flops_per_token() * TOKENS
    gradient_bytes = 4.0 * sum(p.numel() for p in net.parameters())
    mfu = flops / (NANOGPT_SECONDS / STEPS_124M) / (8 * A100.flops)
    columns = ("devices", "network", "arithmetic, ms", "all-reduce, ms", "step, ms", "600,000 steps, days")
    table = Table(*columns, title="GPT-2 124M: a calculation, not a measurement", title_justify="left")
    for device, nodes, between, network in CLUSTERS:
        compute, reduce = step_seconds(flops, gradient_bytes, device, nodes, between, mfu)
        exposed = max(0.0, reduce - compute * 2 / 3 / 5)  # what the backward pass of the last of 5 batches hides
        hidden, whole = compute + exposed, compute + reduce
        days = [seconds * STEPS_124M / 86_400 for seconds in (hidden, whole)]
        table.add_row(
            f"{8 * nodes} {device.name}", network, f"{1e3 * compute:.0f}", f"{1e3 * reduce:.1f}",
            f"{1e3 * hidden:.0f} to {1e3 * whole:.0f}", f"{days[0]:.2f} to {days[1]:.2f}",
        )  # fmt: skip
    Console().print(table)
    print(
        f"{net.flops_per_token() / 1e9:.3f} GFLOP a token x {TOKENS:,} tokens a step; {gradient_bytes / 1e6:.0f} MB of "
        f"gradients in fp32, once a step; MFU {mfu:.3f}, that of nanoGPT's four days on eight A100; "
        "the all-reduce hidden behind the last backward pass, or not at all."
    )
