"""What an object offers is seen through a list: its own value, else the default; what is not listed is an error."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from thinned.data.module import DataOffers
from thinned.offers import Offers, TaskOffers, task_offers


class Doors:
    path: str | None = None
    classes: int = 10


@pytest.mark.parametrize(("given", "expected"), [(None, 10), (object(), 10), (SimpleNamespace(classes=3), 3)])
def test_an_offered_value_else_the_default(given: object, expected: int) -> None:
    assert Offers(given, Doors).classes == expected


def test_a_name_that_is_not_listed_is_an_error_even_if_the_object_has_it() -> None:
    with pytest.raises(AttributeError, match="lenght"):
        _ = Offers(SimpleNamespace(lenght=3), Doors).lenght


def test_a_property_that_is_not_there_yet_has_the_default() -> None:
    class BeforeSetup:
        @property
        def classes(self) -> int:
            return self.found  # type: ignore[attr-defined]

    assert Offers(BeforeSetup(), Doors).classes == 10


def test_a_class_is_asked_without_building_it() -> None:
    class Data:
        def __init__(self) -> None:
            raise AssertionError("built")

        def net_arguments(self, names: Collection[str]) -> dict[str, Any]:
            return {}

    assert Offers(Data, DataOffers).net_arguments is Data.net_arguments
    assert Offers(object, DataOffers).net_arguments is None


def test_doors_of_a_task() -> None:
    with_net, foreign = task_offers(SimpleNamespace(net="net", test_scores={"nll"})), task_offers(object())
    assert (with_net.net, with_net.test_scores) == ("net", {"nll"})
    assert (foreign.net, foreign.test_scores) == (TaskOffers.net, frozenset())
