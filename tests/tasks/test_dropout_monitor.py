"""What dropout dropped in training, against masks that are written down, and training that does not notice."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thinned.models import Dropout, dropout
from thinned.models.dropout import watched
from thinned.tasks import DropoutMonitor, StepSeed
from thinned.tasks.dropout_monitor import EXAMPLES

B, H, T, STEPS = 6, 2, 3, 4


class Attention(nn.Module):
    """Probabilities that all are 1, causal, under dropout; and units, half of them 0, under dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.attention = Dropout(p, "attention")
        self.units = Dropout(p, "mlp")
        self.average = nn.BatchNorm1d(1)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.attention(torch.ones(len(x), H, T, T).tril())
        units = self.units(torch.arange(8.0).sub(3.5).relu().expand(len(x), 8))
        return self.average((self.weight * (kept.sum((1, 2, 3)) + units.sum(1)))[:, None])


class Learner(LightningModule):
    """Makes steps that depend on each mask, and keeps what was logged at each."""

    def __init__(self, p: float = 0.5, compile_net: bool = False) -> None:
        super().__init__()
        self.net, self.compile_net = Attention(p), compile_net
        self.draws: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        self.draws.append(torch.rand(1))
        return (out * batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(DropoutMonitor):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        logged = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("dropout/")}
        if logged and logged not in self.rows.values():
            self.rows[trainer.global_step] = logged


@pytest.fixture
def masks() -> Iterator[list[Tensor]]:
    """The masks that are drawn, in order."""
    drawn: list[Tensor] = []
    draw = dropout.dropout_mask

    def kept(*args: Any) -> Tensor:
        drawn.append(draw(*args))
        return drawn[-1]

    with mock.patch.object(dropout, "dropout_mask", kept):
        yield drawn


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer]) -> Callable[..., Learner]:
    def run(module: Learner, *callbacks: Any, every: int = 1, steps: int = STEPS) -> Learner:
        torch.manual_seed(0)
        data = DataLoader(TensorDataset(torch.randn(steps * B, 1)), B)
        module.net.weight.data.fill_(1)
        trainer = make_trainer(max_epochs=1, callbacks=[StepSeed(), *callbacks], log_every_n_steps=every)
        trainer.fit(module, data)
        return module

    return run


def test_shares_are_those_of_the_masks(fit: Callable[..., Learner], masks: list[Tensor]) -> None:
    """Of the first four of six examples; the units that are 0 anyway tell nothing."""
    seen = Seen()
    fit(Learner(), seen)
    assert len(masks) == 2 * STEPS
    assert list(seen.rows) == [1, 2, 3, 4]
    for row, attention, units in zip(seen.rows.values(), masks[::2], masks[1::2], strict=True):
        lost = torch.stack([(attention[:EXAMPLES, :, t, : t + 1] == 0).all(-1) for t in range(T)], -1)  # (4, H, T)
        of_head = lost.double().mean((0, 2))
        below = torch.ones(T, T).tril().bool()
        assert row == pytest.approx(
            {
                "dropout/empty_rows/layer0_head0": of_head[0].item(),
                "dropout/empty_rows/layer0_head1": of_head[1].item(),
                "dropout/empty_rows/expected": (0.5 + 0.25 + 0.125) / 3,
                "dropout/dropped/attention": (attention[:EXAMPLES, :, below] == 0).double().mean().item(),
                "dropout/dropped/mlp": (units[:EXAMPLES, 4:] == 0).double().mean().item(),
            },
            rel=1e-6,
        )


def test_empty_rows_agree_with_their_probability(fit: Callable[..., Learner]) -> None:
    """False failure: below 1e-6. A row t is empty with probability p^t: 0.3, 0.09 and 0.027."""
    seen = Seen()
    fit(Learner(0.3), seen, steps=60)
    heads = [row[f"dropout/empty_rows/layer0_head{head}"] for row in seen.rows.values() for head in range(H)]
    variance = sum(0.3**t * (1 - 0.3**t) for t in (1, 2, 3)) / 9 / EXAMPLES / len(heads)
    z = (sum(heads) / len(heads) - (0.3 + 0.09 + 0.027) / 3) / variance**0.5
    assert 2 * stats.norm.sf(abs(z)) > 1e-6
    assert seen.rows[1]["dropout/empty_rows/expected"] == pytest.approx(0.139, rel=1e-6)


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_logged_when_logs_are_due(every: int, steps: list[int], fit: Callable[..., Learner]) -> None:
    seen = Seen()
    fit(Learner(), seen, every=every)
    assert list(seen.rows) == steps


@pytest.mark.parametrize("compile_net", [False, True])
def test_training_is_the_same_bit_by_bit(compile_net: bool, fit: Callable[..., Learner]) -> None:
    """Weights, averages of batch norm and whatever is drawn after the pass, whether it is watched or probed."""
    seen = Seen()
    with mock.patch("thinned.tasks.dropout_monitor.PROBE_EVERY", 2):
        monitored = fit(Learner(compile_net=compile_net), seen)
    alone = fit(Learner())
    assert list(seen.rows) == ([2, 4] if compile_net else [1, 2, 3, 4])
    assert all(map(torch.equal, monitored.net.state_dict().values(), alone.net.state_dict().values()))
    assert monitored.draws == alone.draws


def test_probe_has_masks_of_its_own(fit: Callable[..., Learner], masks: list[Tensor]) -> None:
    """Of four examples, each time others; those of a step are the same whatever was drawn before."""
    with mock.patch("thinned.tasks.dropout_monitor.PROBE_EVERY", 2):
        fit(Learner(compile_net=True), Seen())
        probes = [mask for mask in masks if len(mask) == EXAMPLES]
        assert len(probes) == 4
        assert not torch.equal(probes[0], probes[2])
        masks.clear()
        torch.rand(5)
        fit(Learner(compile_net=True), Seen())
    assert all(map(torch.equal, probes, [mask for mask in masks if len(mask) == EXAMPLES]))


@pytest.mark.parametrize("compile_net", [False, True])
def test_net_that_drops_nothing_is_left_alone(compile_net: bool, fit: Callable[..., Learner]) -> None:
    seen = Seen()
    with mock.patch("thinned.tasks.dropout_monitor.PROBE_EVERY", 1):
        fit(Learner(0.0, compile_net), seen)
    assert seen.rows == {}


def test_nothing_is_watched_after_the_pass(fit: Callable[..., Learner]) -> None:
    """Also if it raises."""

    class Fails(Learner):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert all(part.watched for part in (self.net.attention, self.net.units))
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

        def on_before_backward(self, loss: Tensor) -> None:
            pass

    for module in (Learner(), Fails()):
        if isinstance(module, Fails):
            with pytest.raises(ZeroDivisionError):
                fit(module, DropoutMonitor())
        else:
            fit(module, DropoutMonitor())
        assert not any(part._forward_hooks for part in module.modules())
        assert not any(part.watched for part in (module.net.attention, module.net.units))


def test_watching_tells_of_each_dropout_that_acts() -> None:
    net, seen = Attention(0.5), []
    net.units.p = 0.0
    with watched(net, lambda name, *_: seen.append(name)):
        net(torch.zeros(2, 1))
        net.eval()(torch.zeros(2, 1))
    net.train()(torch.zeros(2, 1))
    assert seen == ["attention"]
