"""What shifts the examples of a test, as a setting names it: a kind and a severity, such as `rotation:30`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The severities of a kind of distortion.

    Args:
        high: The largest.
        unit: What they count.
        whole: Whether they are integers.
    """

    high: float
    unit: str
    whole: bool = False


# What each kind does, the module of its data says.
KINDS = {
    "rotation": Range(180, "degrees"),  # mlp only
    "translation": Range(math.inf, "pixels"),  # mlp only
    "roll": Range(math.inf, "pixels", whole=True),  # mlp only
    "noise": Range(1, "standard deviation"),  # mlp only
    "blur": Range(math.inf, "pixels"),  # mlp only
    "contrast": Range(1, "share that is kept"),  # mlp only
    "characters": Range(1, "share that is exchanged"),  # gpt only
}


@dataclass(frozen=True)
class Distortion:
    """What is done to examples, and how much of it, in the unit of `KINDS`."""

    kind: str
    severity: float

    @classmethod
    def parse(cls, spec: str | None, kinds: Collection[str]) -> Distortion | None:
        """Reads `data.distortion`; None is none.

        Args:
            spec: `<kind>:<severity>`.
            kinds: Those of the kinds that the data know.

        Raises:
            ValueError: It is not of this form, or the severity is out of range.
        """
        if spec is None:
            return None
        kind, _, said = spec.partition(":")
        try:
            severity = float(said)
        except ValueError:
            severity = math.nan
        if kind not in kinds or math.isnan(severity):
            raise ValueError(
                f"Expected data.distortion to be <kind>:<severity> with a kind among {sorted(kinds)}, but got {spec!r}"
            )
        allowed = KINDS[kind]
        if not 0 <= severity <= min(allowed.high, 1e6) or (allowed.whole and severity % 1):
            integers = "an integer " * allowed.whole
            at_most = "at least 0" if allowed.high == math.inf else f"in [0, {allowed.high:g}]"
            raise ValueError(f"Expected data.distortion {kind} with a severity {integers}{at_most}, but got {spec!r}")
        return cls(kind, severity)
