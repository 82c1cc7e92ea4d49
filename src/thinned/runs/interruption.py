"""Ends training on SIGTERM or Ctrl-C at the next moment from which it can resume, and a rank with its launcher."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import torch
from lightning.pytorch import Trainer

from thinned.messages import EXIT_STATUS
from thinned.runs.checkpoint_io import last_checkpoint

PATIENCE = 25  # seconds from the signal to the checkpoint; a call into C or CUDA delays the signal
INTERVAL = 2.0  # seconds between checks of the launcher
FINISH = 5  # least seconds from the checkpoint to the end of the process; `wandb sync` sends the rest


class Interruption:
    """Handles SIGTERM and SIGINT for one stage of a trainer, and the death of the process that has launched a rank.

    Args:
        trainer: The trainer; its teardown restores the earlier handlers.
        graceful: True: store the first signal until `told()` polls it. False: exit at once, running cleanup.
    """

    _watches_launcher = False  # one thread does it, for all stages
    received: signal.Signals | None = None
    _deadline = 0.0  # of `time.monotonic()`
    _timer: threading.Timer | None = None

    def __init__(self, trainer: Trainer, graceful: bool) -> None:
        self._trainer, self.graceful = trainer, graceful
        is_launched = trainer.world_size > 1 and ("TORCHELASTIC_RUN_ID" in os.environ or trainer.local_rank > 0)
        if is_launched and not Interruption._watches_launcher:
            Interruption._watches_launcher = True
            threading.Thread(target=_end_with, args=(os.getppid(), trainer), daemon=True).start()

    def listen(self) -> None:
        """Replaces Lightning's handlers, which communicate between ranks. Call it once these are set."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signum == signal.SIGINT:
                os._exit(EXIT_STATUS + signum)
            return  # a launcher repeats SIGTERM while its workers end
        self.received, self._deadline = signal.Signals(signum), time.monotonic() + PATIENCE
        if self.graceful:
            self._give_up_after(PATIENCE, f"no step ended within {PATIENCE} s: checkpoints are unchanged")
        else:
            self._give_up_after(PATIENCE)
            launcher = self._trainer.strategy.launcher
            if signum == signal.SIGTERM and launcher is not None:
                launcher.kill(signum)
            if path := last_checkpoint(self._trainer):  # torchrun sends SIGTERM when another rank has died
                os.write(2, f"error: {self.received.name}: resume from {path}\n".encode())
            sys.exit(EXIT_STATUS + signum)

    def _give_up_after(self, seconds: float, why: str = "") -> None:
        self.hold()
        self._timer = threading.Timer(seconds, self._give_up, [why])
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self, why: str) -> None:
        assert self.received is not None
        if why:
            print(f"error: {self.received.name}, but {why}", file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS + self.received)

    def hold(self) -> None:
        """Cancels the time limit while a checkpoint is being written."""
        if self._timer is not None:
            self._timer.cancel()

    def told(self, trainer: Trainer) -> signal.Signals | None:
        """Returns the signal that any rank has received. All ranks must call it at the same step."""
        if trainer.world_size == 1:
            return self.received
        own = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
        signum = int(trainer.strategy.reduce(own, reduce_op="max"))
        return signal.Signals(signum) if signum else None

    def end(self, trainer: Trainer, signum: signal.Signals) -> NoReturn:
        """Ends all ranks with the signal's exit status."""
        self.received = signum
        self._give_up_after(max(FINISH, self._deadline - time.monotonic()))
        trainer.strategy.barrier("interruption")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.global_rank > 0 and environment is not None and not environment.creates_processes_externally:
            sys.exit(0)  # Lightning kills the first process, whose status counts, if another one fails
        sys.exit(EXIT_STATUS + signum)


def _end_with(launcher: int, trainer: Trainer) -> None:
    """Ends a rank whose launcher has died, and names the checkpoint to resume from; NCCL would wait for long."""
    while os.getppid() == launcher:
        time.sleep(INTERVAL)
    lost = f"Expected all ranks to answer, but got rank {trainer.global_rank} without the process that launched it"
    path = last_checkpoint(trainer)
    print(f"error: {lost}" + (f": resume from {path}" if path else ""), file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may wait in a collective for ever
