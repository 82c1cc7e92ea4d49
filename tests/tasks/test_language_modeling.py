"""What the language modelling task measures, optimises, loads and stores, in runs of a few steps."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thinned.models import GPT, DropoutRates
from thinned.tasks import LanguageModelingTask, language_modeling
from thinned.tasks.optimisation import warmup_cosine

MakeTrainer = Callable[..., Trainer]
SGD = partial(torch.optim.SGD, lr=0.1)
V, P = 21, 8
TOKEN_BYTES = torch.arange(V) % 4  # that of a special token is 0


def net(p: float = 0.0, **options: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": V, "context_length": P, "num_layers": 1, "num_heads": 2, "width": 8}
    gpt = GPT(**shape | {"dropout": DropoutRates(p, p, p, p)} | options)
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.5)
    return gpt


def text(count: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of so many windows, of which the first has no target in its second half, the last but one."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(V, (2, count, P), generator=generator)
    targets[0, P // 2 :] = -100
    targets[-1, 1:] = -100
    return tokens, targets


def loader(count: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*text(count)), batch_size=batch_size)


class Data(LightningDataModule):
    """Ten windows in batches of four, four and two, with a tokenizer."""

    vocab_size, context_length = V, P
    tokenizer = SimpleNamespace(token_bytes=TOKEN_BYTES)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(10, 4)

    train_dataloader = test_dataloader = predict_dataloader = val_dataloader


def by_hand(gpt: nn.Module, count: int) -> tuple[float, int, int]:
    """Sum of the losses, number of targets and of their bytes, target by target."""
    tokens, targets = text(count)
    nll, number, size = 0.0, 0, 0
    for row, wanted in zip(gpt.eval()(tokens).double().tolist(), targets.tolist(), strict=True):
        for logits, target in zip(row, wanted, strict=True):
            if target != -100:
                nll += math.log(sum(map(math.exp, logits))) - logits[target]
                number += 1
                size += int(TOKEN_BYTES[target])
    return nll, number, size


def numbers(trainer: Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_scores_are_those_of_every_target_of_the_split(stage: str, make_trainer: MakeTrainer) -> None:
    """Not means of means: batches and windows have different numbers of targets."""
    task, trainer = LanguageModelingTask(net(p=0.3)), make_trainer()
    nll, number, size = by_hand(task.net, 10)
    assert number == 10 * P - P // 2 - (P - 1)
    (trainer.validate if stage == "val" else trainer.test)(task, datamodule=Data(), verbose=False)
    expected = {
        "nll": nll / number, "perplexity": math.exp(nll / number), "bits_per_byte": nll / math.log(2) / size,
    }  # fmt: skip
    assert numbers(trainer) == pytest.approx({f"{stage}/{k}": v for k, v in expected.items()}, rel=1e-5)


def test_each_step_of_a_test_returns_its_logits_for_evaluation(
    tested: Callable[..., Any], make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The net runs once for a batch, and the losses are taken from three tokens at a time."""
    monkeypatch.setattr("thinned.models.net.LOGITS_AT_ONCE", 3 * V)
    task, passes = LanguageModelingTask(net(p=0.3)), []
    task.net.token_embedding.register_forward_hook(lambda *_: passes.append(1))
    outputs, logged = tested(task, Data())
    assert [logits.x.shape for logits in outputs] == [(4, P, 8), (4, P, 8), (2, P, 8)]
    assert len(passes) == 3
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([logits[:] for logits in outputs]), task.net.eval()(text(10)[0]))
    assert task.test_scores == {"nll", "perplexity", "bits_per_byte"}
    assert logged.keys() == {"test/nll", "test/perplexity", "test/bits_per_byte"}
    trainer = make_trainer()
    trainer.validate(task, datamodule=Data(), verbose=False)
    assert logged == pytest.approx({f"test/{k.removeprefix('val/')}": v for k, v in numbers(trainer).items()}, rel=1e-6)


def test_a_net_without_features_is_tested_whole(tested: Callable[..., Any]) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return self.net(tokens, targets)

    outputs, logged = tested(LanguageModelingTask(Whole()), Data())
    assert outputs == [None] * 3
    assert logged == pytest.approx(tested(LanguageModelingTask(net()), Data())[1], rel=1e-6)


def test_a_sharded_net_is_tested_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are gathered in `forward` alone."""
    task = LanguageModelingTask(net())
    monkeypatch.setattr(LanguageModelingTask, "device_mesh", object())
    monkeypatch.setattr(task.net, "forward", lambda tokens, targets: torch.ones(targets.shape))
    assert task.test_step(text(3), 0) is None
    assert task.scores(torch.cat(task.kept, -1))["nll"] == 1


def test_without_a_tokenizer_there_are_no_bytes(make_trainer: MakeTrainer) -> None:
    task, trainer = LanguageModelingTask(net()), make_trainer()
    trainer.validate(task, loader(10, 4), verbose=False)
    assert numbers(trainer).keys() == {"val/nll", "val/perplexity"}


def test_each_validation_stands_for_itself(make_trainer: MakeTrainer) -> None:
    task, trainer = LanguageModelingTask(net()), make_trainer()
    for count in (10, 3):
        trainer.validate(task, loader(count, 4), verbose=False)
        nll, number, _ = by_hand(task.net, count)
        assert numbers(trainer)["val/nll"] == pytest.approx(nll / number, rel=1e-5)


def test_training_loss_is_the_mean_over_the_targets_of_a_batch(make_trainer: MakeTrainer) -> None:
    task = LanguageModelingTask(net(), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(task, loader(5, 5))
    nll, number, _ = by_hand(task.net, 5)
    assert numbers(trainer) == {"train/loss": pytest.approx(nll / number, rel=1e-5)}


def test_learning_rate_and_decay_by_step(make_trainer: MakeTrainer) -> None:
    rates: list[float] = []

    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, task: Any, *_: Any) -> None:
            names = {id(p): name for name, p in task.net.named_parameters()}
            first, second = trainer.optimizers[0].param_groups
            assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0)
            assert {names[id(p)] for p in second["params"]} == {n for n in names.values() if "norm" in n or "bias" in n}
            assert len(first["params"]) + len(second["params"]) == len(names)  # the tied head is there once
            assert first["lr"] == second["lr"]
            rates.append(first["lr"])

    task = LanguageModelingTask(
        net(bias=True), partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.5), warmup_steps=2, final_lr_fraction=0.1
    )
    make_trainer(max_steps=6, callbacks=[Record()]).fit(task, datamodule=Data())
    assert rates == pytest.approx([2e-3 * warmup_cosine(step, 2, 6, 0.1) for step in range(6)])
    assert rates[:3] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3])
    assert rates[4] == pytest.approx(2e-3 * 0.55)


@pytest.mark.parametrize("broken", ["all", "one target"])
def test_a_loss_that_is_not_a_number_shows(broken: str, make_trainer: MakeTrainer) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = net(), 0

        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            losses = self.net(tokens, targets)
            losses[0, 0] = torch.nan if self.calls == 1 else losses[0, 0]
            self.calls += 1
            return losses

    wrong = Broken() if broken == "one target" else net()
    if isinstance(wrong, GPT):
        nn.init.constant_(wrong.norm.weight, torch.nan)
    trainer = make_trainer()
    trainer.validate(LanguageModelingTask(wrong), datamodule=Data(), verbose=False)
    assert {name: math.isnan(value) for name, value in numbers(trainer).items()} == {
        "val/nll": True, "val/perplexity": True, "val/bits_per_byte": True,
    }  # fmt: skip


# Weights from elsewhere


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked for of a stand-in for GPT-2, whose head knows only the first token."""
    asked: list[str] = []

    def load(gpt: GPT, path: str) -> None:
        asked.append(path)
        nn.init.zeros_(gpt.norm.weight)

    monkeypatch.setattr(language_modeling, "load_gpt2", load)
    return asked


def test_init_from_loads_before_training_alone(loaded: list[str], make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def task() -> LanguageModelingTask:
        return LanguageModelingTask(net(), partial(torch.optim.SGD, lr=0.0), init_from="somewhere")

    for stage in ("validate", "test", "predict"):
        getattr(make_trainer(), stage)(task(), datamodule=Data())
    assert loaded == []
    first, trainer = task(), make_trainer(max_steps=2, log_every_n_steps=1)
    trainer.fit(first, datamodule=Data())
    assert loaded == ["somewhere"]
    assert numbers(trainer)["train/loss"] == pytest.approx(math.log(V))  # all logits are 0
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    twin = LanguageModelingTask.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    make_trainer(max_steps=1).fit(twin, datamodule=Data())
    assert (twin.hparams["init_from"], loaded) == ("somewhere", ["somewhere"])  # the checkpoint's weights stay


def test_init_from_is_left_alone_where_training_goes_on(loaded: list[str], make_trainer: MakeTrainer) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.0)
    first, second = (
        LanguageModelingTask(net(), optimizer),
        LanguageModelingTask(net(), optimizer, init_from="somewhere"),
    )
    second.load_state_dict(first.state_dict())  # as scripts/train.py does with a checkpoint
    make_trainer(max_steps=1).fit(second, datamodule=Data())
    assert loaded == []


@pytest.mark.parametrize("first", ["validate", "test"])
def test_training_can_follow_an_evaluation(first: str, make_trainer: MakeTrainer) -> None:
    task = LanguageModelingTask(net(), partial(torch.optim.SGD, lr=0.0))
    getattr(make_trainer(), first)(task, datamodule=Data(), verbose=False)
    make_trainer(max_steps=1).fit(task, datamodule=Data())


def test_gpt2_from_a_folder_is_what_is_trained(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=P, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    source = transformers.GPT2LMHeadModel(config).eval()
    source.save_pretrained(tmp_path / "gpt2")
    task = LanguageModelingTask(
        net(bias=True, gelu="tanh"), partial(torch.optim.SGD, lr=0.0), init_from=str(tmp_path / "gpt2")
    )
    make_trainer(max_steps=1).fit(task, datamodule=Data())
    tokens = text(3)[0]
    torch.testing.assert_close(task.net.eval()(tokens), source(tokens).logits, rtol=1e-5, atol=1e-5)


# Checkpoints, predictions, and data that do not fit


def primitive(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(map(primitive, [*value, *value.values()]))
    if isinstance(value, tuple):
        return all(map(primitive, value))
    return type(value) in (int, float, str, bool, type(None))


def test_checkpoint_alone_rebuilds_the_task(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    task = LanguageModelingTask(net(0.2, bias=True, gelu="tanh"), warmup_steps=1, final_lr_fraction=0.5)
    trainer = make_trainer(max_steps=2)
    trainer.fit(task, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    stored = torch.load(tmp_path / "task.ckpt", weights_only=True)["hyper_parameters"]
    assert primitive(dict(stored))
    assert stored["net"] == {"class_path": "thinned.models.gpt.GPT", "init_args": task.net.init_args}

    torch.manual_seed(1)
    twin = LanguageModelingTask.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
    assert str(twin.net) == str(task.net)
    assert (twin.warmup_steps, twin.final_lr_fraction, twin.init_from) == (1, 0.5, None)
    assert twin.hparams == task.hparams
    tokens = text(3)[0]
    assert torch.equal(twin.net.eval()(tokens), task.net.eval()(tokens))


def test_prediction_is_the_logits_of_the_deterministic_network(make_trainer: MakeTrainer) -> None:
    task = LanguageModelingTask(net(0.5))
    predicted = torch.cat(make_trainer().predict(task, datamodule=Data()))
    torch.testing.assert_close(predicted, task.net.eval()(text(10)[0]))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vocab_size", 22, r"at least 22 tokens \(model.net.vocab_size\) for this data, but got 21"),
        ("context_length", 9, r"at least 9 positions \(model.net.context_length\) for this data, but got 8"),
    ],
)
def test_data_that_do_not_fit_the_net_are_refused(key: str, value: int, said: str, make_trainer: MakeTrainer) -> None:
    data = Data()
    setattr(data, key, value)
    with pytest.raises(ValueError, match=f"Expected {said}"):
        make_trainer().test(LanguageModelingTask(net()), data)
    setattr(data, key, value - 2)  # less than the net can hold is fine
    make_trainer().validate(LanguageModelingTask(net()), data, verbose=False)


def test_trains_a_text_that_repeats_itself(make_trainer: MakeTrainer) -> None:
    """From log 21 = 3 nats to almost none, but for the first token of a window."""
    torch.manual_seed(0)
    tokens = torch.arange(65) * 4 % V
    windows = TensorDataset(tokens[:-1].view(8, P), tokens[1:].view(8, P))
    gpt = GPT(V, P, num_layers=1, num_heads=2, width=16)
    task = LanguageModelingTask(gpt, partial(torch.optim.AdamW, lr=0.02), warmup_steps=5)
    trainer = make_trainer(max_epochs=60)
    trainer.fit(task, DataLoader(windows, 8), DataLoader(windows, 4))
    assert numbers(trainer)["val/nll"] < 0.05
