"""The losses of 20 steps, as recorded: an unmeant change of data, net, masks or optimiser shows.

A meant one (another recipe in the config, say) is recorded anew from the failure's message.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"
# mlp only: begin
DIGITS = ("--config", CONFIGS / "mlp_digits.yaml")
DIGITS_LOSSES = [
    2.31545, 2.32347, 2.34380, 2.30739, 2.29064, 2.28660, 2.27113, 2.23477, 2.21549, 2.17999,
    2.12630, 2.11254, 2.06994, 2.03802, 2.00792, 1.91718, 1.85514, 1.82304, 1.77667, 1.75096,
]  # fmt: skip
# mlp only: end
# gpt only: begin
TEXT = (
    "--config", CONFIGS / "gpt_pydocs.yaml", "--data.path", "numbers.txt", "--data.context_length", 32,
    "--model.net.num_layers", 2, "--model.net.num_heads", 2, "--model.net.width", 32, "--model.warmup_steps", 5,
    "--trainer.callbacks", "[]",
    *(x for site in ("embedding", "attention", "residual", "mlp") for x in (f"--model.net.dropout.{site}", 0.1)),
)  # fmt: skip
TEXT_LOSSES = [
    3.06539, 3.04512, 2.99808, 2.93892, 2.87556, 2.79985, 2.76378, 2.69400, 2.65252, 2.61198,
    2.54200, 2.52288, 2.48777, 2.45553, 2.46642, 2.37795, 2.40621, 2.37292, 2.38564, 2.38551,
]  # fmt: skip
# gpt only: end
RECORDED = [
    pytest.param(DIGITS, DIGITS_LOSSES, id="digits"),  # mlp only
    pytest.param(TEXT, TEXT_LOSSES, id="text"),  # gpt only
]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("config", "expected"), RECORDED)
def test_losses(
    config: tuple[object, ...], expected: list[float], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    # The documentation of Python is another with each of its versions.
    (tmp_path / "numbers.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    configs = (*config, "--config", CONFIGS / "logger/csv.yaml")
    steps = ("--trainer.max_steps", 20, "--trainer.log_every_n_steps", 1, "--trainer.accelerator", "cpu")
    run = run_script("train", *configs, *steps, "--mc_dropout.num_samples", "null").run
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses == pytest.approx(expected, rel=1e-4), f"recorded anew: {losses}"
