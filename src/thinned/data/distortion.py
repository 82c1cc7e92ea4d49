"""Reads how to distort the examples of a test: a kind and a severity, such as `rotation:30`."""

import math
from collections.abc import Collection
from typing import NamedTuple, Self


class Range(NamedTuple):
    """Limits the severities of a kind of distortion, from 0 on."""

    high: float
    unit: str
    whole: bool = False  # whether they are integers


# The module of its data says what each kind does.
KINDS = {
    "rotation": Range(180, "degrees"),  # mlp only
    "translation": Range(1e6, "pixels"),  # mlp only
    "roll": Range(1e6, "pixels", whole=True),  # mlp only
    "noise": Range(1, "standard deviation"),  # mlp only
    "blur": Range(1e6, "pixels"),  # mlp only
    "contrast": Range(1, "share that is kept"),  # mlp only
    "characters": Range(1, "share that is exchanged"),  # gpt only
}
SEED = 0  # one for all, so that runs with other seeds are tested on the same examples
FORM = "data.distortion to be <kind>:<severity>"


class Distortion(NamedTuple):
    """Names a kind of distortion and its severity, in the unit of `KINDS`."""

    kind: str
    severity: float

    @classmethod
    def parse(cls, spec: str | None, kinds: Collection[str]) -> Self | None:
        """Reads `data.distortion`, <kind>:<severity> with one of the kinds of the data; None is no distortion."""
        if spec is None:
            return None
        kind, _, said = spec.partition(":")
        if kind not in kinds:
            raise ValueError(f"Expected {FORM} with a kind among {sorted(kinds)}, but got {spec!r}")
        high, _, whole = KINDS[kind]
        try:
            severity = float(said)
        except ValueError:
            severity = math.nan
        if not 0 <= severity <= high or (whole and severity % 1):
            severities = f"{'an integer severity' if whole else 'a severity'} in [0, {high:g}]"
            raise ValueError(f"Expected {FORM}, {kind} with {severities}, but got {spec!r}")
        return cls(kind, severity)
