"""What the classification task optimises, logs and stores, in runs of a few steps."""

from argparse import ArgumentError
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from thinned.models import MLP, DropoutRates
from thinned.tasks import ClassificationTask, StepSeed
from thinned.uncertainty import classification_scores

MakeTrainer = Callable[..., Trainer]
SGD = partial(torch.optim.SGD, lr=0.1)


def digits(count: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images[:count, None]).float() / 16, torch.from_numpy(data.target[:count])


def loader(x: Tensor, y: Tensor, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size)


def net(**options: Any) -> MLP:
    torch.manual_seed(0)
    return MLP((1, 8, 8), 10, **{"hidden": (32,)} | options)


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def numbers(trainer: Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_validation_and_test_log_the_same_metrics(make_trainer: MakeTrainer) -> None:
    data = loader(*digits(40), batch_size=16)
    trainer, task = make_trainer(max_epochs=1, log_every_n_steps=1), ClassificationTask(net())
    names = ["accuracy", "balanced_accuracy", "nll", "brier", "ece"]
    trainer.fit(task, data, data)
    assert numbers(trainer).keys() == {"train/loss", "train/accuracy", "train/lr", *(f"val/{name}" for name in names)}
    trainer.test(task, data, verbose=False)
    assert numbers(trainer).keys() == {f"test/{name}" for name in names}


def test_metrics_are_the_scores_of_the_whole_split(make_trainer: MakeTrainer) -> None:
    """In batches of 8, 8, 8, 8 and 5, whose plain average would be another number."""
    x, y = digits(37)
    task, trainer = ClassificationTask(net()), make_trainer()
    nn.init.normal_(task.net.stages.head.weight)
    logits = task.net.eval()(x).detach()
    expected = classification_scores(logits.softmax(-1), y)
    trainer.validate(task, loader(x, y, 8), verbose=False)
    got = numbers(trainer)
    assert got["val/nll"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert got == pytest.approx({key: expected[key.removeprefix("val/")] for key in got}, rel=1e-5)


def test_each_step_of_a_test_returns_its_logits_for_evaluation(tested: Callable[..., Any]) -> None:
    x, y = digits(20)
    task = ClassificationTask(net(dropout=DropoutRates(mlp=0.5)))
    outputs, logged = tested(task, loader(x, y, 8))
    assert [len(logits) for logits in outputs] == [8, 8, 4]
    torch.testing.assert_close(torch.cat([logits[:] for logits in outputs]), task.net.eval()(x))
    assert {f"test/{name}" for name in task.test_scores} == logged.keys()
    assert not task.test_step((x, y), 0).x.requires_grad


def test_labels_are_smoothed_in_training_alone(make_trainer: MakeTrainer) -> None:
    x, y = digits(30)
    task = ClassificationTask(net(), optimizer=partial(torch.optim.SGD, lr=0.0), label_smoothing=0.3)
    logits, data = task.net(x).detach(), loader(x, y, 30)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(task, data, data)
    plain, smooth = (F.cross_entropy(logits, y, label_smoothing=share).item() for share in (0, 0.3))
    got = numbers(trainer)
    assert got["train/loss"] == pytest.approx(smooth, rel=1e-5)
    assert got["val/nll"] == pytest.approx(plain, rel=1e-5)
    assert abs(smooth - plain) > 1e-3


def test_checkpoint_alone_rebuilds_the_task(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    x, y = digits(32)
    options = {"layer_norm": True, "width": 8, "residual": True, "patch_size": 4, "activation": "gelu"}
    rates = DropoutRates(embedding=0.1, attention=0.2, residual=0.3, mlp=0.4)
    task = ClassificationTask(net(dropout=rates, **options), optimizer=SGD, warmup_steps=1, label_smoothing=0.1)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(task, loader(x, y, 16))
    trainer.save_checkpoint(tmp_path / "task.ckpt")

    torch.manual_seed(1)
    twin = ClassificationTask.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    assert torch.equal(twin.net.eval()(x), task.net.eval()(x))
    assert str(twin.net) == str(task.net)
    assert (twin.warmup_steps, twin.label_smoothing) == (1, 0.1)
    assert twin.hparams == task.hparams


def test_checkpoint_of_a_foreign_net_is_given_the_net(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    x, y = digits(32)
    task, trainer = ClassificationTask(batch_norm_net(), optimizer=SGD), make_trainer(max_epochs=1)
    trainer.fit(task, loader(x, y, 16))
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    with pytest.raises(ArgumentError, match=r"required: module\.net"):
        ClassificationTask.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    fresh = batch_norm_net()
    assert not torch.equal(fresh.eval()(x), task.net.eval()(x))
    twin = ClassificationTask.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True, net=fresh)
    assert torch.equal(twin.net.eval()(x), task.net.eval()(x))
    assert twin.hparams == task.hparams


def test_prediction_is_the_deterministic_network(make_trainer: MakeTrainer) -> None:
    x, y = digits(20)
    task = ClassificationTask(net(dropout=DropoutRates(mlp=0.5)))
    predicted = make_trainer().predict(task, loader(x, y, 20))
    torch.testing.assert_close(predicted[0], task.net.eval()(x))


def test_overfits_one_batch(make_trainer: MakeTrainer) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    task = ClassificationTask(net(), optimizer=partial(torch.optim.AdamW, lr=0.03))
    trainer = make_trainer(max_epochs=60)
    trainer.fit(task, loader(x, y, 16))
    assert numbers(trainer)["train/loss"] < 0.01


def test_trains_a_net_with_batch_norm(make_trainer: MakeTrainer) -> None:
    x, y = digits(64)
    task = ClassificationTask(batch_norm_net(), optimizer=partial(torch.optim.SGD, lr=0.5))
    norm, trainer = task.net[2], make_trainer(max_epochs=5)
    before = F.cross_entropy(task.net(x), y).item()
    norm.reset_running_stats()
    trainer.fit(task, loader(x, y, 32), loader(x, y, 32))
    assert norm.num_batches_tracked == 10  # the passes of validation left it alone
    assert numbers(trainer)["train/loss"] < before / 2


def test_max_norm_holds_after_every_step(make_trainer: MakeTrainer) -> None:
    largest: dict[float | None, list[float]] = {None: [], 0.5: []}

    class Record(Callback):
        def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
            largest[task.net.max_norm].append(task.net.stages.linear0.weight.norm(dim=1).max().item())

    for max_norm in largest:
        task = ClassificationTask(net(max_norm=max_norm), optimizer=SGD)
        make_trainer(max_epochs=1, callbacks=[Record()]).fit(task, loader(*digits(64), 16))
    assert len(largest[0.5]) == 4
    assert max(largest[0.5]) <= 0.5 * (1 + 1e-6)
    assert min(largest[None]) > 0.5


# Recorded from this test. A change here is a change of results: of initial weights, masks, loss, schedule or optimiser.
GOLDEN = [
    2.5560997, 2.4313116, 2.5040061, 2.3248327, 2.2190332, 2.1350474, 2.1966140, 2.1335111, 2.1309621, 1.9414632,
]  # fmt: skip


def test_golden_loss_curve(make_trainer: MakeTrainer) -> None:
    """In float64, where the order of sums does not matter to five digits."""
    losses = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Trainer, task: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    task = ClassificationTask(
        net(dropout=DropoutRates(embedding=0.1, mlp=0.5), layer_norm=True, max_norm=0.6),
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        warmup_steps=3,
        label_smoothing=0.1,
    )
    trainer = make_trainer(max_epochs=2, precision="64-true", callbacks=[StepSeed(0), Record()])
    trainer.fit(task, loader(*digits(160), batch_size=32))
    assert losses == pytest.approx(GOLDEN, rel=1e-5)


@pytest.mark.parametrize(
    ("key", "found", "said"),
    [
        ("image_shape", (1, 28, 28), r"image shape \(1, 8, 8\) \(model.net.input_shape\), but got \(1, 28, 28\)"),
        ("num_classes", 7, r"num classes 10 \(model.net.num_classes\), but got 7"),
    ],
)
def test_data_that_does_not_fit_the_net_is_refused(key: str, found: Any, said: str, make_trainer: MakeTrainer) -> None:
    data = LightningDataModule.from_datasets(test_dataset=TensorDataset(*digits(4)), num_workers=0)
    setattr(data, key, found)
    data.path = "photos"
    with pytest.raises(ValueError, match=f"Expected data with {said} from data.path='photos'"):
        make_trainer().test(ClassificationTask(net()), data)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_label_smoothing_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.label_smoothing in \[0, 1\), but got {share}"):
        ClassificationTask(net(), label_smoothing=share)


def test_rank_without_examples_takes_part_in_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank may have the only examples: the others must gather too."""
    task, logged = ClassificationTask(net()), {}
    # Target, correct, confidence, NLL and Brier score of two examples
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.75], [0.25, 1.0], [0.5, 1.5]])
    monkeypatch.setattr("thinned.tasks.task.of_all_ranks", lambda own: [[other], own])
    monkeypatch.setattr(task, "log_dict", lambda scores, **_: logged.update(scores))
    task.on_validation_epoch_end()
    assert (logged["val/accuracy"], logged["val/nll"], logged["val/brier"]) == (0.5, 0.625, 1.0)


def test_training_accuracy_is_that_of_each_logged_batch(make_trainer: MakeTrainer) -> None:
    x, y = digits(48)
    task, logged = ClassificationTask(net(), optimizer=partial(torch.optim.SGD, lr=0.0)), []

    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            logged.append(numbers(trainer).get("train/accuracy"))

    trainer = make_trainer(max_epochs=1, log_every_n_steps=2, callbacks=[Record()])
    trainer.fit(task, loader(x, y, 8))
    first, second = ((task.net(x).argmax(-1) == y)[start : start + 8].float().mean().item() for start in (8, 24))
    assert logged == [None, None, first, first, second, second]
