"""Defines LightningModules, and callbacks that act while they train."""

from thinned.tasks.classification import ClassificationTask
from thinned.tasks.dropout_monitor import DropoutMonitor
from thinned.tasks.finite_steps import FiniteSteps
from thinned.tasks.language_modeling import LanguageModelingTask
from thinned.tasks.step_seed import StepSeed
from thinned.tasks.throughput import Throughput

__all__ = ["ClassificationTask", "DropoutMonitor", "FiniteSteps", "LanguageModelingTask", "StepSeed", "Throughput"]
