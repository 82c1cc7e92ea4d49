"""Measures speed and memory of scripts/predict.py by the number of examples and of processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
from measuring import peak_memory
from rich.console import Console
from rich.table import Table

from thinned.data import ImageDataModule

ROOT = Path(__file__).parents[2]
SIZES = (10_000, 100_000)
SAMPLES = 5


def save_images(folder: Path, count: int) -> None:
    """Saves images of 28 x 28 pixels in ten classes: `count` for the test, and 1,000 for training."""
    datasets.disable_progress_bars()
    classes = datasets.ClassLabel(names=[str(label) for label in range(10)])
    features = datasets.Features(image=datasets.Image(), label=classes)
    draws = np.random.default_rng(0)

    def split(size: int) -> datasets.Dataset:
        label = np.arange(size) % 10
        pixels = 25 * label[:, None, None] + draws.integers(0, 2, (size, 28, 28))  # PNG compresses them well
        return datasets.Dataset.from_dict({"image": list(pixels.astype(np.uint8)), "label": label}, features=features)

    datasets.DatasetDict({"train": split(1000), "test": split(count)}).save_to_disk(folder)


def read_all(path: str) -> None:
    """Reads the data as a prediction does before it begins."""
    data = ImageDataModule(path)
    data.setup()
    for _ in data.test_dataloader():
        pass


def run(folder: Path, *arguments: object) -> float:
    """Runs a script; returns the peak resident size in MiB of the largest of its processes."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit((folder / "log").read_text())
    return usage.ru_maxrss / 1024


def seconds(folder: Path) -> float:
    """Returns the time from the first batch of the latest run to its scores, by the files that it writes."""
    config = max(folder.glob("runs/*/*-predict/config.yaml"), key=lambda path: path.stat().st_mtime)
    return config.with_name("metrics.json").stat().st_mtime - config.stat().st_mtime


def bench_predict() -> None:
    """Measures examples per second and memory for 10,000 and 100,000 examples, in one and two processes."""
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.accelerator=cpu")
    table = Table("processes", "examples", "examples/s", "peak MiB, of any process", "data alone, MiB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {size: folder / f"images{size}" for size in SIZES}
        for size, path in data.items():
            peak_memory(save_images, path, size)  # in its own process, so that this one stays small
        alone = {size: peak_memory(read_all, str(path)) for size, path in data.items()}
        net = ("--model.net.input_shape", "[1,28,28]", "--model.net.hidden", "[128]", "--data.path", data[SIZES[0]])
        steps = ("--trainer.max_steps", 50, "--trainer.limit_test_batches", 1, *quiet, "--mc_dropout.num_samples=null")
        run(folder, ROOT / "scripts/train.py", "--config", ROOT / "configs/mlp_digits.yaml", *net, *steps)
        (checkpoint,) = folder.glob("runs/*/*/checkpoints/best.ckpt")
        launched: dict[int, tuple[object, ...]] = {
            1: (ROOT / "scripts/predict.py",),
            2: ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "scripts/predict.py"),
        }
        overlay: dict[int, tuple[object, ...]] = {1: (), 2: ("--config", ROOT / "configs/trainer/ddp_cpu.yaml")}
        for processes, how in launched.items():
            for size, path in data.items():
                options = ("--ckpt_path", checkpoint, "--data.path", path, "--mc_dropout.num_samples", SAMPLES)
                peak = run(folder, *how, *options, *quiet, *overlay[processes])
                rate = size / seconds(folder)
                table.add_row(str(processes), f"{size:,}", f"{rate:,.0f}", f"{peak:.0f}", f"{alone[size]:.0f}")
    table.title = f"predict.py, 784-128-10, S = {SAMPLES}, one thread each"
    Console().print(table)
