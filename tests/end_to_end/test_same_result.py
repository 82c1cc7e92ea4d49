"""Two processes do what one does, and 16 x 4 examples a step what 64 do: without dropout the weights agree.

In fp64, where rounding leaves 1e-15 between them after 50 steps. In fp32 it is 1e-7 to 1e-6: where a gradient is all
rounding, AdamW, which divides it by its own size, makes a step of it.
"""

import csv
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

Task = Callable[..., tuple[object, ...]]

ROOT = Path(__file__).parents[2]
STEPS = 50  # more than two epochs of either
COMMON = (
    "--config", ROOT / "configs/logger/csv.yaml", "--trainer.accelerator", "cpu", "--trainer.max_steps", STEPS,
    "--trainer.precision", "64-true", "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]",
    "--trainer.callbacks+=rank_witness.RankWitness", "--mc_dropout.num_samples", "null", "--data.eval_batch_size", 50,
)  # fmt: skip


# mlp only: begin
DIGITS = ("--config", ROOT / "configs/mlp_digits.yaml", "--model.net.dropout.mlp", 0)


@pytest.fixture
def digits() -> Task:
    return lambda size, accumulate=1: (*DIGITS, *COMMON, *batches(size, accumulate))


# mlp only: end
# gpt only: begin
TEXT = (
    "--config", ROOT / "configs/gpt_pydocs.yaml", "--model.net.dropout.residual", 0, "--model.net.num_layers", 2,
    "--model.net.num_heads", 2, "--model.net.width", 32, "--model.warmup_steps", 10, "--data.context_length", 16,
)  # fmt: skip


@pytest.fixture
def text(text_file: Path, tmp_path: Path) -> Task:
    paths = ("--data.path", text_file, "--data.cache_dir", tmp_path / "data")
    interval = "--trainer.val_check_interval"
    return lambda size, accumulate=1: (*TEXT, *paths, *COMMON, *batches(size, accumulate), interval, 25 * accumulate)


# gpt only: end
TASKS = [
    "digits",  # mlp only
    "text",  # gpt only
]


def batches(size: int, accumulate: int) -> tuple[object, ...]:
    return "--data.batch_size", size, "--trainer.accumulate_grad_batches", accumulate


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Returns the options for batches of a size, of whose gradients a step accumulates a number."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # where rank_witness is
    return request.getfixturevalue(request.param)


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def assert_close(run: Path, expected: Path) -> None:
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys()
    assert {weight.dtype for weight in ours.values()} == {torch.float64}
    assert max((weight - theirs[name]).abs().max() for name, weight in ours.items()) <= 1e-9


def indices(folder: Path, rank: int = 0) -> list[list[int]]:
    """The examples of each batch, and away with them."""
    path = folder / f"rank{rank}.pt"
    seen = [batch.tolist() for batch in torch.load(path)["indices"]]
    path.unlink()
    return seen


def logged(run: Path) -> dict[str, float]:
    """The scores of the test, as the task and `MCDropout` log them."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: float(row[name]) for row in rows for name in row if name.startswith("test/") and row[name]}


@pytest.mark.slow
def test_two_processes_do_what_one_does(task: Task, run_script: Any, start_script: Any, tmp_path: Path) -> None:
    """The same examples in the same steps, the same weights, and the same scores of a test set of odd size."""
    args = task(64)
    one = run_script("train", *args).run
    whole = indices(tmp_path)
    two = start_script("scripts/train.py", *args, "--config", ROOT / "configs/trainer/ddp_cpu.yaml").run
    first, second = (indices(tmp_path, rank) for rank in range(2))
    assert len(whole) == STEPS
    assert [[*chain(*zip(*pair, strict=True))] for pair in zip(first, second, strict=True)] == whole
    assert_close(two, one)
    scores = logged(one)
    assert {"test/accuracy", "test/nll", "test/ece"} <= scores.keys()
    assert ("test/perplexity" in scores) == ("test/bits_per_byte" in scores) == ("test/brier" not in scores)
    assert logged(two) == pytest.approx(scores, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_accumulated_gradients_do_what_a_larger_batch_does(task: Task, run_script: Any, tmp_path: Path) -> None:
    """Over epochs whose batches of 16 are no multiple of four."""
    one = run_script("train", *task(64)).run
    whole = indices(tmp_path)
    accumulated = run_script("train", *task(16, accumulate=4)).run
    quarters = indices(tmp_path)
    assert len(quarters) == 4 * len(whole)
    assert [[*chain(*quarters[i : i + 4])] for i in range(0, len(quarters), 4)] == whole
    assert_close(accumulated, one)
