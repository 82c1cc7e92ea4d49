"""Reads optional attributes of a net, data module or task: a protocol lists them, with their defaults.

A name that the protocol does not list is an error, for mypy and at run time.
"""

from typing import Any, Protocol, cast


class Offers:
    """Reads the attributes that a protocol lists from an object, or else from the protocol.

    Args:
        given: Any object; None offers nothing.
        protocol: The class whose attributes are the defaults.
    """

    def __init__(self, given: object, protocol: type) -> None:
        self._given, self._protocol = given, protocol

    def __getattr__(self, name: str) -> Any:
        default = getattr(self._protocol, name)
        return getattr(self._given, name, default)


class TaskOffers(Protocol):
    """Lists the optional attributes of a LightningModule that others read, with their defaults."""

    # Maps inputs to logits; it may offer more (`NetOffers`).
    net: Any = None
    # Scores of the test split that the task logs itself, as `test/<name>`.
    test_scores: frozenset[str] = frozenset()
    # Whether the net is compiled in training, so that its activations cannot be seen.
    compile_net: bool = False


def task_offers(pl_module: object) -> TaskOffers:
    """Returns the optional attributes of a LightningModule, with the defaults for those that it lacks."""
    return cast(TaskOffers, Offers(pl_module, TaskOffers))
