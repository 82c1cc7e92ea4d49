"""LightningModules: what is optimised and what is measured, for any net."""

from thinned.tasks.classification import ClassificationTask
from thinned.tasks.language_modeling import LanguageModelingTask

__all__ = ["ClassificationTask", "LanguageModelingTask"]
