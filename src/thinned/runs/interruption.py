"""SIGTERM and Ctrl-C: training ends at the next moment from which it can resume, everything else at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
from lightning.pytorch import Trainer

from thinned.runs.checkpoint_io import last_checkpoint

PATIENCE = 25  # seconds, of Python: a handler waits for a call into C or CUDA to return
FINISH = 5  # seconds at least from the checkpoint to the end of the process; `wandb sync` sends what W&B could not


def exit_status(signum: int) -> int:
    """What a shell reports of a process that a signal has ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum


class Interruption:
    """Handles SIGTERM and SIGINT for one stage of a trainer.

    Args:
        trainer: whose stage it is; its teardown restores the earlier handlers.
        graceful: True: store the first signal until `told()` polls it. False: exit at once, running cleanup.
    """

    def __init__(self, trainer: Trainer, graceful: bool) -> None:
        self.signal: signal.Signals | None = None
        self.graceful = graceful
        self._trainer = trainer
        self._timer: threading.Timer | None = None
        self._told_at: float | None = None

    def listen(self) -> None:
        """Takes the place of Lightning's handlers, which communicate; to be called when these have been set."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if signum == signal.SIGINT:
                os._exit(exit_status(signum))
            return  # a launcher repeats SIGTERM while its workers end
        self.signal, self._told_at = signal.Signals(signum), time.monotonic()
        waited = f"no step ended within {PATIENCE} s: checkpoints stay as they are"
        self._give_up_after(PATIENCE, waited if self.graceful else "")
        if not self.graceful:
            launcher = self._trainer.strategy.launcher
            if signum == signal.SIGTERM and launcher is not None:
                launcher.kill(signum)
            if path := last_checkpoint(self._trainer):  # torchrun sends SIGTERM when another rank has died
                os.write(2, f"error: {self.signal.name}: resume from {path}\n".encode())
            sys.exit(exit_status(signum))

    def _give_up_after(self, seconds: float, why: str) -> None:
        self.hold()
        self._timer = threading.Timer(seconds, self._give_up, [why])
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self, why: str) -> None:
        assert self.signal is not None
        if why:
            sys.stderr.write(f"error: {self.signal.name}, but {why}\n")
            sys.stderr.flush()
        os._exit(exit_status(self.signal))

    def hold(self) -> None:
        """Cancels the time limit, as long as a checkpoint is being written."""
        if self._timer is not None:
            self._timer.cancel()

    def told(self, trainer: Trainer) -> signal.Signals | None:
        """The signal that any rank has received; all ranks must ask at the same step."""
        if trainer.world_size == 1:
            return self.signal
        received = torch.tensor(self.signal or 0, device=trainer.strategy.root_device)
        signum = int(trainer.strategy.reduce(received, reduce_op="max"))
        return signal.Signals(signum) if signum else None

    @staticmethod
    def equal_on_all_ranks(trainer: Trainer, number: int) -> bool:
        """Whether all ranks give the same number."""
        if trainer.world_size == 1:
            return True
        both = torch.tensor([number, -number], device=trainer.strategy.root_device)
        highest, lowest = trainer.strategy.reduce(both, reduce_op="max").tolist()
        return bool(highest == -lowest)

    def end(self, trainer: Trainer, signum: signal.Signals) -> NoReturn:
        """Ends all ranks with the signal's exit status."""
        self.signal = signum
        passed = time.monotonic() - self._told_at if self._told_at else PATIENCE
        self._give_up_after(max(FINISH, PATIENCE - passed), "")
        trainer.strategy.barrier("interruption")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.global_rank > 0 and environment is not None and not environment.creates_processes_externally:
            sys.exit(0)  # Lightning kills the first process, whose status counts, if another one fails
        sys.exit(exit_status(signum))


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what must be undone at an end is undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(exit_status(signum)))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
