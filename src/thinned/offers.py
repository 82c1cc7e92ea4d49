"""Optional attributes of anyone's net, data module or task: each is listed in a protocol, with its default.

A protocol is the list of doors, and `Offers` looks at an object through it. A name that the protocol does not list is
an error, for mypy and at run time.
"""

from typing import Any, Protocol, cast


class Offers:
    """The attributes that a protocol lists: those of an object if it has them, else the protocol's defaults.

    Args:
        given: anyone's object; None offers nothing.
        protocol: the class whose attributes are the defaults.
    """

    def __init__(self, given: object, protocol: type) -> None:
        self._given, self._protocol = given, protocol

    def __getattr__(self, name: str) -> Any:
        default = getattr(self._protocol, name)
        return getattr(self._given, name, default)


class TaskOffers(Protocol):
    """Attributes of a LightningModule that others look for. All are optional: these are the defaults."""

    # Maps inputs to logits; it may offer more (`NetOffers`).
    net: Any = None
    # Scores of the test split that the task logs itself, as `test/<name>`.
    test_scores: frozenset[str] = frozenset()


def task_offers(pl_module: object) -> TaskOffers:
    """The optional attributes of a LightningModule, with the defaults for those that it lacks."""
    return cast(TaskOffers, Offers(pl_module, TaskOffers))
