"""What all tests share: the same start, caches of their own, small datasets in the hub's layout, runs of scripts."""

import gc
import io
import logging
import os
import random  # gpt only
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
SECRET = "zebra-crossing-0451"  # stands in the environment of every run and must stand in none of its files
# mlp only: begin
TRAINED = (
    "--config", ROOT / "configs/mlp_digits.yaml", "--data.test_fraction", 0.2,
    "--trainer.accelerator", "cpu", "--model.final_lr_fraction", 1,
    "--model.net.dropout.embedding", 0.1, "--model.net.dropout.mlp", 0.3,
)  # fmt: skip
# mlp only: end


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is imported: no key, no hub, and no caches of whoever runs the tests."""
    home = tempfile.mkdtemp(prefix="thinned-tests-")
    config.add_cleanup(partial(shutil.rmtree, home, ignore_errors=True))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HF_", "THINNED_", "PL_"))]:
        del os.environ[name]
    os.environ |= {f"WANDB_{kind}_DIR": f"{home}/wandb/{kind}" for kind in ("CONFIG", "CACHE", "DATA")}
    os.environ |= {"HF_HOME": f"{home}/huggingface", "HF_HUB_OFFLINE": "1", "NETRC": f"{home}/netrc"}
    os.environ |= {"TEST_SECRET": SECRET}
    import huggingface_hub.constants  # by now imported by Lightning, which the filters of warnings name

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_CACHE = f"{home}/huggingface/hub"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.pluginmanager.register(SameStart())  # not a fixture of this folder: doctests are tests too


class SameStart:
    """Gives every test the same start, whatever ran before it in this process: see `same_start`."""

    @pytest.fixture(autouse=True)
    def starts_the_same(self) -> Iterator[None]:
        with same_start():
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        """What several tests share is made with the same start, and changes nothing for the first of them alone."""
        if fixturedef.scope == "function":
            return (yield)
        with same_start():
            return (yield)


@contextmanager
def same_start() -> Iterator[None]:
    """Starts a block without W&B's service and with torch's seed 0, and leaves the process as it was before.

    Put back are the environment, torch's random state and settings, signal handlers, and what libraries leave replaced.
    Failures are a thread, timer or process that runs on, as it may disturb any later test, and another directory. The
    seeds of Python and numpy are left to pytest-randomly.
    """
    import torch
    from torch.utils.data import BatchSampler, DataLoader

    settings: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    ]
    # Not SIGCHLD, which torch handles from its first data loader worker on
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    settings += [(partial(signal.getsignal, number), partial(signal.signal, number)) for number in signals]
    replaced: list[tuple[Any, str]] = [(sys, "exit"), (sys, "excepthook")]  # by each W&B service
    # By Lightning 2.6.6 while it asks for a data loader, and for good where that raises
    replaced += [(c, f"__{name}__") for c in (DataLoader, BatchSampler) for name in ("init", "setattr", "delattr")]

    _end_wandb()
    directory, threads, children = os.getcwd(), set(threading.enumerate()), _children()
    found = [(read, write, read()) for read, write in settings]
    with mock.patch.dict(os.environ), torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        for owner, name in replaced:
            patch.setattr(owner, name, getattr(owner, name))
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            _end_wandb()
            for read, write, value in found:
                if read() != value:
                    write(value)
            if _children() - children:
                gc.collect()  # a data loader's workers end with it, but it may be in a cycle
            left = [f"process {pid}" for pid in _children() - children]
            for thread in set(threading.enumerate()) - threads:
                if not thread.daemon or isinstance(thread, threading.Timer):
                    thread.join(1)  # it may be about to end
                    left += [str(thread)] * thread.is_alive()
            if not os.path.samefile(".", directory):
                os.chdir(directory)
                left.append("another working directory")
    if left:
        pytest.fail(f"Expected nothing to be left behind, but got {', '.join(left)}")


def _end_wandb() -> None:
    if wandb := sys.modules.get("wandb"):
        if wandb.run:
            wandb.finish()
        wandb.teardown()  # ends the service, and takes it out of the environment


def _children() -> set[str]:
    """The pids of this process's children, where there is a /proc to ask."""
    pids: set[str] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            pids.update(path.read_text().split())
    return pids


@dataclass(frozen=True)
class Finished:
    """What a script did: its exit status, what it printed, and what is new in its working directory."""

    status: int
    out: str
    err: str
    cwd: Path
    new: list[Path]  # relative to cwd

    @property
    def run(self) -> Path:
        """The directory of its only run."""
        assert self.status == 0, self.err
        below = [path.parts for path in self.new if path.parts[0] == "runs" and len(path.parts) >= 3]
        (run,) = {Path(*parts[:3]) for parts in below if parts[1] != "wandb"}  # runs/<experiment>/<id>
        return self.cwd / run

    @property
    def error(self) -> str:
        """The one line of the failure, which has left nothing behind."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.status == 1
        assert "Traceback" not in self.err
        assert self.new in ([], [Path("runs")])
        return line


def run_script(name: str, *args: object, cwd: Path, pictures: bool = False, **environment: str) -> Finished:
    """Runs scripts/<name>.py to the end of its process, but inside this one, which saves the start of another.

    Drawing takes longer than all the rest together, so pictures are left out where nobody asks for them.
    """
    import wandb

    main = runpy.run_path(str(ROOT / f"scripts/{name}.py"))["main"]
    before, status, out, err = _files(cwd), 0, io.StringIO(), io.StringIO()
    at_exit: list[Callable[[], None]] = []
    fake_atexit = SimpleNamespace(register=lambda function, *args: at_exit.append(partial(function, *args)))
    handler = logging.StreamHandler(err)  # Lightning's own holds on to the stderr that there was at its import
    logging.getLogger("lightning.pytorch").addHandler(handler)
    with ExitStack() as stack:
        stack.callback(logging.getLogger("lightning.pytorch").removeHandler, handler)
        stack.enter_context(mock.patch("thinned.runs.directory.atexit", fake_atexit))
        if not pictures:
            for name in ("figures", "figures_of_sets"):
                stack.enter_context(mock.patch(f"thinned.evaluation.figures.{name}", return_value={}))
            stack.enter_context(mock.patch("thinned.evaluation.learning_curves.LearningCurves.on_fit_end"))
        for context in (redirect_stdout(out), redirect_stderr(err), chdir(cwd)):
            stack.enter_context(context)
        stack.enter_context(same_start())  # first to exit, so that W&B ends where it ran
        os.environ |= environment
        try:
            main([*map(str, args)])
        except SystemExit as error:
            status = int(str(error.code))
        finally:
            for function in reversed([*at_exit, wandb.finish]):
                function()
    return Finished(status, out.getvalue(), err.getvalue(), cwd, sorted(_files(cwd) - before))


def start_script(
    path: str | Path, *args: object, cwd: Path, launcher: Sequence[object] = (), **environment: str
) -> Finished:
    """Runs a script in a process of its own, or in those that `python <launcher>` starts."""
    import thinned

    before = _files(cwd)
    importable = os.pathsep.join([str(Path(thinned.__file__).parents[1]), str(ROOT / "tests/end_to_end")])
    done = subprocess.run(
        [sys.executable, *map(str, launcher), ROOT / path, *map(str, args)],
        env={**os.environ, "PYTHONPATH": importable, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Finished(done.returncode, done.stdout, done.stderr, cwd, sorted(_files(cwd) - before))


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.fixture(scope="session", name="same_start")
def bound_same_start() -> Callable[..., Any]:
    """`same_start` itself."""
    return same_start


@pytest.fixture(name="run_script")
def bound_run_script(tmp_path: Path) -> Callable[..., Finished]:
    """`run_script` in the test's own directory."""
    return partial(run_script, cwd=tmp_path)


@pytest.fixture(scope="session")
def run_script_in() -> Callable[..., Finished]:
    """`run_script` in a given directory, for what several tests share."""
    return lambda cwd, *args, **options: run_script(*args, cwd=cwd, **options)


@pytest.fixture(name="start_script")
def bound_start_script(tmp_path: Path) -> Callable[..., Finished]:
    """`start_script` in the test's own directory."""
    return partial(start_script, cwd=tmp_path)


@pytest.fixture(scope="session")
def start_script_in() -> Callable[..., Finished]:
    """`start_script` in a given directory, for what several tests share."""
    return lambda cwd, *args, **options: start_script(*args, cwd=cwd, **options)


@pytest.fixture
def free_port() -> int:
    """A port at which nobody listens: of the sockets that the system numbers, which it does not give again soon."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


# mlp only: begin
@pytest.fixture(scope="session")
def trained_args() -> tuple[object, ...]:
    """The arguments of `trained`, less the number of epochs."""
    return TRAINED


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three epochs of 19 steps on the digits, with a learning rate that stays constant after its warm-up."""
    cwd = tmp_path_factory.mktemp("trained")
    return run_script("train", *TRAINED, "--trainer.max_epochs", 3, cwd=cwd, pictures=True)


# mlp only: end
# gpt only: begin
@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14,000 characters, 29 different ones: sentences of words in an order that a seed decides."""
    pangrams = "the quick brown fox jumps over a lazy dog while five wizards box and mix liquid jugs"
    words = pangrams.split()
    order = random.Random(0)
    lines = [" ".join(order.choices(words, k=8)) + ".\n" for _ in range(350)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def small_gpt() -> tuple[object, ...]:
    """Options that make any GPT config run in a second, whatever its size and tokenizer."""
    return (
        "--model.net.num_layers", 2, "--model.net.num_heads", 2, "--model.net.width", 16, "--model.compile=false",
        "--model.warmup_steps", 0, "--data.context_length", 32, "--data.batch_size", 8, "--data.val_fraction", 0.1,
        "--data.cache_dir", "data", "--trainer.accelerator", "cpu", "--trainer.devices", 1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained_text(tmp_path_factory: pytest.TempPathFactory, text_file: Path, small_gpt: tuple[object, ...]) -> Finished:
    """Thirty steps of a small GPT with dropout on `text_file`, a validation after each ten."""
    steps = ("--trainer.max_steps", 30, "--trainer.val_check_interval", 10, "--mc_dropout.num_samples", 4)
    callbacks = ("--trainer.callbacks.prompt", "the ", "--trainer.callbacks.max_new_tokens", 20)
    config = ("--config", ROOT / "configs/gpt_pydocs.yaml", "--data.path", text_file)
    return run_script("train", *config, *small_gpt, *steps, *callbacks, cwd=tmp_path_factory.mktemp("trained_text"))


# gpt only: end
# mlp only: begin
@pytest.fixture(scope="session")
def save_images() -> Callable[..., Path]:
    """Saves 200 + 50 images of ten classes, noise that grows brighter, as MNIST is stored on the hub."""
    import datasets
    import numpy as np

    classes = datasets.ClassLabel(names=[str(name) for name in range(10)])

    def save(folder: Path, size: int = 28, leave_out: str | None = None, first_label: int = 0) -> Path:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 200), ("test", 50)):
            label = np.arange(count) % 10
            pixels = np.random.default_rng(count).integers(0, 64, (count, size, size)) + 20 * label[:, None, None]
            label[0] = first_label
            features = datasets.Features(image=datasets.Image(), label=classes)
            content = {"image": list(pixels.astype(np.uint8)), "label": label}
            dataset = datasets.Dataset.from_dict(content, features=features)
            if leave_out:
                dataset = dataset.remove_columns(leave_out)
            dataset.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
        return folder

    return save


@pytest.fixture(scope="session")
def hub_images(save_images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone of MNIST from the hub, with 250 images."""
    return save_images(tmp_path_factory.mktemp("hub_images"))


# mlp only: end
@pytest.fixture(scope="session")
def any_run(request: pytest.FixtureRequest) -> Finished:
    """A run that has ended, for tests to which it does not matter what was trained."""
    runs = [
        "trained",  # mlp only
        "trained_text",  # gpt only
    ]
    return request.getfixturevalue(runs[0])


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """A quiet Trainer on one CPU that writes below `tmp_path`; options as of `Trainer`."""
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return partial(Trainer, accelerator="cpu", devices=1, enable_progress_bar=False, default_root_dir=tmp_path, **quiet)
