"""What shifts the examples of a test, as a setting names it: a kind and a severity, such as `rotation:30`."""

import math
from collections.abc import Collection
from typing import NamedTuple, Self


class Range(NamedTuple):
    """The severities of a kind of distortion, from 0 on."""

    high: float
    unit: str
    whole: bool = False  # whether they are integers


# What each kind does, the module of its data says.
KINDS = {
    "rotation": Range(180, "degrees"),  # mlp only
    "translation": Range(1e6, "pixels"),  # mlp only
    "roll": Range(1e6, "pixels", whole=True),  # mlp only
    "noise": Range(1, "standard deviation"),  # mlp only
    "blur": Range(1e6, "pixels"),  # mlp only
    "contrast": Range(1, "share that is kept"),  # mlp only
    "characters": Range(1, "share that is exchanged"),  # gpt only
}


class Distortion(NamedTuple):
    """What is done to examples, and how much of it, in the unit of `KINDS`."""

    kind: str
    severity: float

    @classmethod
    def parse(cls, spec: str | None, kinds: Collection[str]) -> Self | None:
        """Reads `data.distortion`, <kind>:<severity> with one of the kinds that the data know; None is none.

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
        high, _, whole = KINDS[kind]
        if not 0 <= severity <= high or (whole and severity % 1):
            severities = "an integer severity" if whole else "a severity"
            raise ValueError(f"Expected data.distortion {kind} with {severities} in [0, {high:g}], but got {spec!r}")
        return cls(kind, severity)
