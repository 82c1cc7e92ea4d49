"""Keeps a run whole: its directory, record and checkpoints, signals, lost ranks, launchers and loggers."""

from thinned.runs.loggers import CSVLogger, WandbLogger

__all__ = ["CSVLogger", "WandbLogger"]
