"""Nets of another make in the Trainer: what is said of them before the first step, and what that costs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_modules import Functional, InTrainingAlone, Noise, OwnModule
from foreign_nets import CausalSelfAttention, in_turn, pooled
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from thinned.evaluation import MCDropout

S = 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Task(LightningModule):
    """Anyone's task: it counts its steps, and the passes of its net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.passes, self.steps, self.begun = net, [], [], False

    def on_train_start(self) -> None:
        self.begun = True

    def forward(self, x: Tensor) -> Any:
        self.passes.append(len(x))
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append(batch_idx)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(count: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 2, generator=generator), torch.randint(3, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


Fit = Callable[..., Task]


@pytest.fixture(params=[2, 0], ids=["sanity check", "no sanity check"])
def fit(request: pytest.FixtureRequest, make_trainer: Callable[..., Trainer]) -> Fit:
    """Trains a task for an epoch of three steps, with a sanity check or without one."""

    def train(task: Task, *callbacks: MCDropout) -> Task:
        trainer = make_trainer(callbacks=[*callbacks], max_epochs=1, num_sanity_val_steps=request.param)
        trainer.fit(task, loader(), loader() if request.param else None)
        return task

    return train


class AlwaysOn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


class Returns(nn.Module):
    """A net with dropout, whose logits are put into something."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = in_turn(Functional()), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: in_turn(AlwaysOn()), r"deterministic in evaluation mode, .* drawn by AlwaysOn \(net\.1\)"),
        (lambda: in_turn(Noise()), "dropout with a rate above 0 in Task, but got a pass that draws nothing"),
        (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)), r"at least 2 classes .* \(4, 1\): .* \[0, x\]"),
        (Squeezed, r"at least 2 classes from Task, but got the shape \(4,\)"),
        (lambda: nn.Sequential(in_turn(Functional()), nn.Softmax(-1)), "got probabilities .* leave out its softmax"),
        (lambda: Returns(lambda logits: {"hidden": logits}), r"logits, .* from Task, but got dict"),
        (lambda: Returns(lambda logits: None), "from Task, but got NoneType"),
    ],
)
def test_net_that_cannot_be_measured_is_refused_before_the_first_step(make: Any, said: str, fit: Fit) -> None:
    task = Task(make())
    with pytest.raises(ValueError, match=said):
        fit(task, MCDropout(S))
    assert task.steps == []


def test_sanity_check_comes_before_the_training(make_trainer: Callable[..., Trainer]) -> None:
    task = Task(in_turn(Noise()))
    with pytest.raises(ValueError, match="draws nothing"):
        make_trainer(callbacks=[MCDropout(S)], max_epochs=1).fit(task, loader(), loader())
    assert not task.begun


@pytest.mark.parametrize("num_samples", [S, None])
def test_net_that_draws_is_refused_before_any_row_is_written(num_samples: Any, run: Any, tmp_path: Any) -> None:
    for stage in ("test", "predict"):
        with pytest.raises(ValueError, match="deterministic in evaluation mode"):
            run(stage, in_turn(AlwaysOn()), loader(), num_samples=num_samples)
        assert not list(tmp_path.iterdir())


def test_examination_changes_nothing_of_the_training(fit: Fit) -> None:
    """Dropout, and batch norm that has state: the weights are those of a training without the callback."""
    trained = []
    for callbacks in ([], [MCDropout(S)]):
        torch.manual_seed(0)
        task = Task(in_turn(InTrainingAlone(), nn.BatchNorm1d(2), Noise(), nn.Dropout(0.5)).train())
        trained.append(fit(task, *callbacks))
        assert task.steps == [0, 1, 2]
    assert all(map(torch.equal, trained[0].state_dict().values(), trained[1].state_dict().values()))
    assert (len(trained[0].passes), len(trained[1].passes)) == (0, 5)


@pytest.mark.parametrize(
    ("module", "num_samples", "passes"),
    [(OwnModule, S, 4), (Functional, S, 5), (InTrainingAlone, S, 5), (Noise, None, 1)],
)
def test_number_of_passes(
    module: Any, num_samples: int | None, passes: int, fit: Fit, make_trainer: Callable[..., Trainer]
) -> None:
    """One sees that it draws nothing, two or three find its dropout, and one uses it: once a stage, over one batch."""
    task, callback = Task(in_turn(module())), MCDropout(num_samples)
    fit(task, callback)
    assert task.passes == [4] * passes
    task.passes.clear()
    make_trainer(callbacks=[callback]).test(task, loader(), verbose=False)
    assert task.passes == [4] * (passes + 3 * (1 + (num_samples or 0)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"hidden": logits.exp(), "logits": logits},
        lambda logits: Output(logits.exp(), logits),
        lambda logits: (logits, logits.exp()),
    ],
)
def test_logits_are_taken_out_of_what_a_net_returns(wrap: Any, run: Callable[..., Any]) -> None:
    net = Returns(wrap)
    expected = run("predict", net.net, loader())
    if isinstance(wrap(torch.zeros(())), tuple):
        with pytest.warns(UserWarning, match="The first of the 2 outputs of Plain is used as the logits"):
            rows = run("predict", net, loader())
    else:
        rows = run("predict", net, loader())
    assert all(torch.equal(rows[name], expected[name]) for name in expected)


def test_what_rests_is_said_once(run: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    run("predict", in_turn(Noise(), Functional()), loader())
    assert caplog.text.count("MC dropout leaves off what draws in training mode and is no dropout: Noise (net.1)") == 1


def test_rates_of_zero_are_reported_as_the_deterministic_network(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    net = in_turn(nn.Dropout(0.0))
    metrics = run("test", net, loader(60), pictures=True)
    assert metrics["mc_dropout"]["nll"] == pytest.approx(metrics["deterministic"]["nll"], rel=1e-6)
    assert metrics["logged"]["mc/accuracy"] == metrics["logged"]["test/accuracy"]
    assert caplog.text.count("All rates of dropout are 0: MC dropout reports the deterministic network.") == 1
    rows = run("predict", net, loader())
    torch.testing.assert_close(rows["mc_dropout_probs"], rows["deterministic_probs"])
    assert rows["mc_dropout_mutual_information"].max() < 1e-6
    assert rows["mc_dropout_std"].max() == 0


def test_attention_alone_gives_mutual_information(run: Callable[..., Any]) -> None:
    x, y = torch.randn(6, 5, 8), torch.arange(6) % 3
    rows = run("predict", pooled(CausalSelfAttention(flash=True)), DataLoader(TensorDataset(x, y), 4))
    assert (rows["mc_dropout_mutual_information"] > 1e-7).all()


def test_batch_of_another_kind_is_left_to_the_task(make_trainer: Callable[..., Trainer]) -> None:
    """A training batch that is a dict says nothing of what `forward` is given at test."""

    class Named(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    examples = [{"x": torch.randn(2), "y": number % 3} for number in range(8)]
    task = Named(in_turn(Functional()))
    trainer = make_trainer(callbacks=[MCDropout(S)], max_epochs=1)
    trainer.fit(task, DataLoader(examples, batch_size=4))  # type: ignore[arg-type]
    assert (task.steps, task.passes) == ([0, 1], [])


@pytest.mark.slow
def test_two_processes_examine_and_predict(
    make_trainer: Callable[..., Trainer], read_rows: Callable[..., Any], tmp_path: Path
) -> None:
    two = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
    with pytest.raises(
        ProcessRaisedException, match="ValueError: Expected Task to be deterministic in evaluation mode"
    ):
        make_trainer(callbacks=[MCDropout(S)], **two).fit(Task(in_turn(AlwaysOn())), loader(), loader())
    task = Task(in_turn(InTrainingAlone(), nn.BatchNorm1d(2)))
    trainer = make_trainer(callbacks=[MCDropout(S)], **two)
    trainer.fit(task, loader(), loader())
    trainer.test(task, loader(), verbose=False)
    rows = read_rows()
    assert rows["index"].tolist() == list(range(12))
    assert (rows["mc_dropout_mutual_information"] > 1e-7).all()
