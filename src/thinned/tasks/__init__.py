"""LightningModules: what is optimised and what is measured, for any net."""

from thinned.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
