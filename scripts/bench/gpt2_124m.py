"""Calculates how long a step of configs/gpt2_124m.yaml takes on eight GPUs and more, without measuring it."""

from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from thinned.models import GPT

TOKENS = 96 * 5 * 1024  # of an optimiser step
STEPS_124M = 600_000
NANOGPT_SECONDS = 4 * 24 * 3600  # nanoGPT's README: about four days on eight A100 with 40 GB


class Device(NamedTuple):
    """Holds dense bf16 FLOP/s and NVLink bytes/s in one direction, from NVIDIA's data sheets of the SXM modules."""

    name: str
    flops: float
    nvlink: float


A100 = Device("A100", 312e12, 300e9)
H100 = Device("H100", 989e12, 450e9)

# Device, nodes, and bytes/s of a node in one direction, over all its network cards.
CLUSTERS = (
    (A100, 1, 0.0, "NVLink"),
    (H100, 1, 0.0, "NVLink"),
    (H100, 2, 8 * 50e9, "InfiniBand"),  # 400 Gb/s for each GPU, as in NVIDIA's DGX H100
    (H100, 4, 8 * 50e9, "InfiniBand"),
    (H100, 4, 12.5e9, "Ethernet"),  # 100 Gb/s for a node
)


def ring_seconds(size: float, members: int, bandwidth: float) -> float:
    """Returns the time of a ring all-reduce: each member sends 2 (N - 1) / N of the bytes (Patarasu and Yuan 2009)."""
    return 2 * (members - 1) / members * size / bandwidth


def step_seconds(
    flops: float, gradient_bytes: float, device: Device, nodes: int, between: float, mfu: float
) -> tuple[float, float]:
    """Returns the seconds of a step on nodes of eight devices: its arithmetic, and the all-reduce of its gradients.

    A ring is as slow as its slowest link: with several nodes, the network.
    """
    devices = 8 * nodes
    bandwidth = device.nvlink if nodes == 1 else min(device.nvlink, between)
    return flops / (devices * device.flops * mfu), ring_seconds(gradient_bytes, devices, bandwidth)


def calculate() -> None:
    """Prints the calculated step time of GPT-2 124M on eight devices and more."""
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
