"""A key given twice is found at any depth, and nothing else is."""

import random
from typing import Any

import pytest
import yaml

from thinned.runs.double_keys import refuse_double_keys


def config(order: random.Random, depth: int = 0) -> Any:
    """A nested config of mappings, lists and leaves."""
    if depth == 4 or order.random() < 0.2:
        return order.choice([None, 1, 0.5, True, "a: b", [1, {"x": 2}]])
    keys = order.sample("abcdefgh", order.randint(1, 4))
    return {key: config(order, depth + 1) for key in keys}


@pytest.mark.parametrize("seed", range(50))
def test_one_doubled_line_of_any_config_is_found(seed: int) -> None:
    """The line of a key is put once more before the lines of its siblings, with another value."""
    order = random.Random(seed)
    text = yaml.safe_dump({"first": config(order), "second": config(order)}, sort_keys=False)
    refuse_double_keys(text)
    lines = text.splitlines()
    numbers = [i for i, line in enumerate(lines) if line.rstrip()[0:1] and ":" in line and "- " not in line]
    chosen = order.choice([i for i in numbers if lines[i].lstrip()[0] in "abcdefghfs"])
    key = lines[chosen].partition(":")[0]
    doubled = "\n".join([*lines[:chosen], f"{key}: 5", *lines[chosen:]])
    with pytest.raises(ValueError, match=f"got {key.strip()} in line {chosen + 1} and in line {chosen + 2}"):
        refuse_double_keys(doubled)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1}\nc: {<<: *x, b: 2}",
        "[{a: 1}, {a: 2}]",
        "1: a\n'1': b",
        "just text",
        "",
        "a: [",
        "{a: {a: {a: 1}}}",
    ],
)
def test_what_is_no_double_is_let_pass(text: str) -> None:
    refuse_double_keys(text)
