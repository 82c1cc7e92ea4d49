"""Imports Lightning in half the CPU time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from lightning_utilities.core import imports

LEFT_OUT = ("matplotlib", "scipy", "transformers")  # torchmetrics plots, calls scipy.signal, and has a BERT score


@contextmanager
def quick_imports() -> Iterator[None]:
    """Skips garbage collection, which finds nothing in modules, and what torchmetrics 1.9 imports in vain.

    In the block, torchmetrics and Lightning do not find the packages in `LEFT_OUT`. A task that plots a metric by
    `metric.plot()`, or computes the BERT score, has to import torchmetrics before.
    """
    found, available = imports.RequirementCache.__bool__, imports.package_available

    def is_met(requirement: imports.RequirementCache) -> bool:
        return not str(requirement.requirement).startswith(LEFT_OUT) and found(requirement)

    gc.disable()
    try:
        with (
            mock.patch.object(imports.RequirementCache, "__bool__", is_met),
            mock.patch.object(imports, "package_available", lambda name: name not in LEFT_OUT and available(name)),
        ):
            yield
    finally:
        gc.enable()
        gc.freeze()  # modules live as long as the process
