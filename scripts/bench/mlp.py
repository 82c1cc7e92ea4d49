"""Measures dropout and Monte-Carlo dropout of an MLP, each against the usual implementation."""

from collections.abc import Callable
from functools import partial
from itertools import product
from unittest import mock

import torch
from measuring import compare, peak_memory, repeat, show
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.models import MLP, DropoutRates
from thinned.uncertainty import KeptNetworks, kept_networks, mc_predict

WIDTHS = (1024, 1024, 1024)  # Srivastava et al. 2014 on MNIST: 784-1024-1024-1024-10


def mlp(p: float, embedding: float | None = None) -> MLP:
    rates = DropoutRates(embedding=min(p, 0.2) if embedding is None else embedding, mlp=p)
    return MLP((1, 28, 28), 10, WIDTHS, dropout=rates)


def textbook(p: float) -> nn.Sequential:
    """Returns the same network with nn.Dropout."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Dropout(min(p, 0.2))]
    for size, units in zip((784, *WIDTHS), WIDTHS, strict=False):
        layers += [nn.Linear(size, units), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 10))


def training_step(net: nn.Module, inputs: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(net(inputs), targets))
    optimizer.step()


def bench_dropout(repeats: int) -> None:
    """Measures a training step of the MLP without dropout, with ours, and with nn.Dropout."""
    steps = 20
    for batch in (128, 1024):
        inputs, targets = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))

        def side(net: nn.Module, inputs: Tensor = inputs, targets: Tensor = targets) -> Callable[[], object]:
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)  # a fitted batch has slow, denormal gradients
            return lambda: repeat(steps, lambda _: training_step(net, inputs, targets, optimizer))

        sides = {"p = 0": side(mlp(0.0))}
        for p in (0.5, 0.1):
            sides |= {f"thinned, p = {p}": side(mlp(p)), f"nn.Dropout, p = {p}": side(textbook(p))}
        show(f"Training step, batch {batch}", compare(sides, repeats), steps)


def predict_textbook(net: nn.Module, inputs: Tensor, num_samples: int) -> Tensor:
    net.train()
    with torch.no_grad():
        return torch.stack([net(inputs).softmax(-1) for _ in range(num_samples)]).mean(0)


def run_textbook(p: float, num_samples: int) -> object:
    return predict_textbook(textbook(p), torch.randn(1000, 1, 28, 28), num_samples)


def run_thinned(p: float, num_samples: int) -> object:
    return mc_predict(mlp(p).eval(), torch.randn(1000, 1, 28, 28), num_samples=num_samples)


def predict_repeated(net: nn.Module, inputs: Tensor, num_samples: int) -> Tensor:
    """Returns predictions of one batch that holds each input S times, each with its own masks."""
    net.train()
    with torch.no_grad():
        probs = net(inputs.repeat(num_samples, 1, 1, 1)).softmax(-1)
    return probs.view(num_samples, len(inputs), -1).mean(0)


def run_batch(count: int, num_samples: int, keep: bool) -> object:
    net, kept = mlp(0.5).eval(), KeptNetworks() if keep else None
    return [mc_predict(net, torch.randn(count, 1, 28, 28), num_samples=num_samples, kept=kept) for _ in range(2)]


def bench_mlp_batch(repeats: int) -> None:
    """Measures S = 50 samples for few inputs: networks in stacks, cut networks, and each input S times in one batch."""
    samples = 50
    for p, count in product((0.5, 0.1), (1, 32, 64, 128)):
        net, baseline, ours, inputs = mlp(p).eval(), textbook(p), mlp(p), torch.randn(count, 1, 28, 28)

        def predict(most: int, kept: KeptNetworks | None, net: MLP = net, inputs: Tensor = inputs) -> object:
            with mock.patch.object(kept_networks, "STACKED_INPUTS", most):
                return mc_predict(net, inputs, num_samples=samples, kept=kept)

        sides: dict[str, Callable[[], object]] = {
            "stacked": partial(predict, count, None),
            "stacked, kept": partial(predict, count, KeptNetworks()),
            "cut": partial(predict, 0, None),
            "cut, kept": partial(predict, 0, KeptNetworks()),
            "repeated inputs, nn.Dropout": partial(predict_repeated, baseline, inputs, samples),
            "repeated inputs, thinned.models.Dropout": partial(predict_repeated, ours, inputs, samples),
            "textbook": partial(predict_textbook, baseline, inputs, samples),
        }
        show(f"MLP, Monte-Carlo prediction of {count} inputs, p = {p}, S = {samples}", compare(sides, repeats))
    for count, keep in product((1, 64, 1000), (False, True)):
        peaks = ", ".join(f"{peak_memory(run_batch, count, S, keep):.0f} MiB with S = {S}" for S in (20, 200))
        print(f"peak memory, {count} inputs, {'kept' if keep else 'nothing kept'}: {peaks}")


def bench_mlp_mc(repeats: int) -> None:
    """Measures S = 50 samples for 1,000 inputs: the textbook loop against thinned networks."""
    inputs, samples = torch.randn(1000, 1, 28, 28), 50
    for p in (0.5, 0.1):
        net, baseline = mlp(p).eval(), textbook(p)
        sides: dict[str, Callable[[], object]] = {
            "thinned networks": lambda net=net: mc_predict(net, inputs, num_samples=samples),  # type: ignore[misc]
            "independent masks": lambda net=net: mc_predict(  # type: ignore[misc]
                net, inputs, num_samples=samples, masks="independent"
            ),
            "textbook": lambda net=baseline: predict_textbook(net, inputs, samples),  # type: ignore[misc]
        }
        memory = {
            "thinned networks": peak_memory(run_thinned, p, samples),
            "textbook": peak_memory(run_textbook, p, samples),
        }

        def peak(name: str, seconds: float, memory: dict[str, float] = memory) -> str:
            return f"{memory[name]:.0f} MiB" if name in memory else ""

        show(f"MLP, Monte-Carlo prediction, p = {p}, S = {samples}", compare(sides, repeats), peak=peak)
    for samples in (4, 64):
        print(f"peak memory of thinned MLPs, S = {samples}: {peak_memory(run_thinned, 0.5, samples):.0f} MiB")
