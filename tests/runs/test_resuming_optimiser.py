"""A resumed run takes the settings of its config, or refuses them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thinned.runs.resuming import ResumedOptimizer
from thinned.tasks.optimisation import warmup_cosine
from thinned.tasks.task import Task


class Squares(Task):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()


class Rates(Callback):
    """Keeps the settings with which each step is taken."""

    def __init__(self) -> None:
        self.groups: list[list[dict[str, Any]]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


@pytest.fixture
def broken(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., Trainer]:
    """Trains four of eight steps, and then the rest with other settings, from the checkpoint."""

    def run(first: Any, second: Any, *callbacks: Callback, max_epochs: int = 4, **task: Any) -> Trainer:
        data = DataLoader(torch.ones(8, 2), batch_size=4)
        trainer = make_trainer(max_epochs=4, max_steps=4)
        trainer.fit(Squares(nn.Linear(2, 1), first, 2, 0.1), data)
        trainer.save_checkpoint(tmp_path / "broken.ckpt")
        trainer = make_trainer(max_epochs=max_epochs, callbacks=[ResumedOptimizer(), *callbacks])
        settings = {"warmup_steps": 2, "final_lr_fraction": 0.1} | task
        trainer.fit(Squares(nn.Linear(2, 1), second, **settings), data, ckpt_path=tmp_path / "broken.ckpt")
        return trainer

    return run


SGD = partial(torch.optim.SGD, lr=0.4, momentum=0.9, weight_decay=0.5)


def test_resumed_run_takes_the_settings_that_it_is_given(
    broken: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    rates = Rates()
    second = partial(torch.optim.SGD, lr=0.02, momentum=0.5, weight_decay=0.25)
    with caplog.at_level("INFO"):
        trainer = broken(SGD, second, rates, max_epochs=6, warmup_steps=0, final_lr_fraction=0.5)
    assert len(rates.groups) == 8
    for step, groups in enumerate(rates.groups, 4):
        for group, decay in zip(groups, (0.25, 0), strict=True):
            assert group["lr"] == pytest.approx(0.02 * warmup_cosine(step, 0, 12, 0.5))
            assert (group["momentum"], group["weight_decay"]) == (0.5, decay)
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    assert [group["initial_lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == [0.02, 0.02]
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [0.02, 0.02]
    (said,) = [message for message in caplog.messages if "other settings" in message]
    for change in ("lr 0.02 (was 0.4)", "momentum 0.5 (was 0.9)", "weight_decay 0.25 (was 0.5)"):
        assert change in said
    assert said.count("(was 0.4)") == 1


def test_resumed_run_with_the_same_settings_is_not_changed(
    broken: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        broken(partial(torch.optim.AdamW, betas=(0.8, 0.9)), partial(torch.optim.AdamW, betas=(0.8, 0.9)))
    # The first run said four steps, so its schedule was another one: that alone is told.
    (said,) = [message for message in caplog.messages if "other settings" in message]
    assert said.count("(was") == 1
    assert "learning rate of the next step" in said


def test_state_of_another_optimiser_is_refused(broken: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match=r"Expected model\.optimizer of the class .* but got AdamW"):
        broken(SGD, torch.optim.AdamW)
