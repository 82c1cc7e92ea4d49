"""What the tests of tasks share."""

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

Tested = tuple[list[Any], dict[str, float]]


@pytest.fixture
def tested(make_trainer: Callable[..., Trainer]) -> Callable[[LightningModule, Any], Tested]:
    """Tests a task on data; returns what its steps returned, and what it logged."""

    class Outputs(Callback):
        def on_test_batch_end(self, trainer: Trainer, task: LightningModule, output: Any, *_: Any) -> None:
            outputs.append(output)

    outputs: list[Any] = []

    def run(task: LightningModule, data: Any) -> Tested:
        outputs.clear()
        trainer = make_trainer(callbacks=[Outputs()])
        trainer.test(task, data, verbose=False)
        return list(outputs), {name: value.item() for name, value in trainer.callback_metrics.items()}

    return run
