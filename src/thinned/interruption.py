"""SIGTERM and Ctrl-C: a training run ends at the next point from which it can go on, everything else at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from thinned.checkpoint import last_checkpoint

PATIENCE = 25  # seconds from a signal to the end of the process, whatever it is doing


def exit_status(signum: int) -> int:
    """What a shell reports of a process that a signal has ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum


class Interruption:
    """Handles SIGTERM and SIGINT for one stage of a trainer.

    Args:
        trainer: whose stage it is; its teardown brings the handlers from before back.
        graceful: a first signal is kept until `told` is asked; else it ends the process, undoing what must be undone.
    """

    def __init__(self, trainer: Trainer, graceful: bool) -> None:
        self.signal: signal.Signals | None = None
        self.graceful = graceful
        self._trainer = trainer

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
        self.signal = signal.Signals(signum)
        timer = threading.Timer(PATIENCE, self._give_up)
        timer.daemon = True
        timer.start()
        if not self.graceful:
            launcher = self._trainer.strategy.launcher
            if signum == signal.SIGTERM and isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(signum)
            if path := last_checkpoint(self._trainer):  # torchrun sends SIGTERM when another rank has died
                os.write(2, f"error: {self.signal.name}: resume from {path}\n".encode())
            sys.exit(exit_status(signum))

    def _give_up(self) -> None:
        assert self.signal is not None
        sys.stderr.write(
            f"error: {self.signal.name}, but no step ended within {PATIENCE} s: checkpoints stay as they are\n"
        )
        sys.stderr.flush()
        os._exit(exit_status(self.signal))

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
