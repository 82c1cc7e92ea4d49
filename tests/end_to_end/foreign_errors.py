"""Objects of a person's own that fail in the ways in which code fails: with any error, at any moment."""

from typing import Any

from lightning.pytorch import Callback
from torch import Tensor, nn


def fail(error: str) -> None:
    """Raises an error of this kind, as a slip does."""
    slips = {
        "AttributeError": lambda: None.size,  # type: ignore[attr-defined]
        "KeyError": lambda: {}["missing"],
        "TypeError": lambda: 1 + "1",  # type: ignore[operator]
        "IndexError": lambda: [][3],
        "OverflowError": lambda: int(float("inf")),
        "ZeroDivisionError": lambda: 1 / 0,
        "UnicodeEncodeError": lambda: "ä".encode("ascii"),
        "ValueError": lambda: int("many"),
        "RuntimeError": lambda: nn.Linear(2, 2)(Tensor([1])),
        "AssertionError": lambda: (_ for _ in ()).throw(AssertionError()),
    }
    slips[error]()


class FailingCallback(Callback):
    """Fails when a hook is called."""

    def __init__(self, error: str, hook: str) -> None:
        setattr(self, hook, lambda *_, **__: fail(error))


class FailingNet(nn.Module):
    """Fails in its forward pass, or when it is built."""

    def __init__(self, error: str, built: bool = True) -> None:
        super().__init__()
        self.error, self.linear = error, nn.Linear(64, 10)
        if not built:
            fail(error)

    def forward(self, x: Tensor) -> Any:
        self.linear(x.flatten(1))
        fail(self.error)
