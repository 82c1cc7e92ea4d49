"""Finds the modules of a foreign net to put into training mode, so that its dropout acts and nothing else does.

`is_dropout` knows modules of dropout. Other modules call a dropout function (`F.dropout`, attention with a rate) or, in
training mode alone, a dropout module. A pass in training mode finds them: a `TorchFunctionMode` sees such calls, and
keeps them from dropping. Another pass checks that these modules do nothing else in training mode.
"""

import inspect
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from thinned.uncertainty.acting_dropout import is_dropout, random_state, restored, seeded

Output = TypeVar("Output")
Function = Callable[..., Any]

ATTEMPTS = 20  # to see all layers of a net that skips some at random in training mode
_IN_PYTHON: tuple[Function, ...] = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.multi_head_attention_forward,
)  # fmt: skip
_IN_C: tuple[Function, ...] = (torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout)
PARAMETERS: dict[Function, tuple[str, ...]] = {  # in their order; functions in C have no signature to inspect
    **{function: tuple(inspect.signature(function).parameters) for function in _IN_PYTHON},
    **dict.fromkeys(_IN_C, ("input", "p", "train")),
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}


@dataclass(frozen=True)
class FoundDropout:
    """Says which modules have to be in training mode for the dropout of a net to act.

    Attributes:
        owners: Modules to put into training mode, each without its submodules, beside those that are dropout.
        off: Whether there is dropout but all of its rates are 0: every sampled network is the deterministic one.
        resting: Modules that stay off: they draw in training mode but are not known as dropout, or drop in a part that
            runs in that mode alone.
    """

    owners: frozenset[nn.Module] = frozenset()
    off: bool = False
    resting: str = ""


class _Watch(TorchFunctionMode):
    """Keeps functions from dropping, and collects what runs, what draws, and calls of dropout."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.ran, self.drawn, self.rates = {net}, set[nn.Module](), list[float]()
        self.calls = set[tuple[nn.Module, Any]]()  # a module, and the function or module of dropout that it calls
        self._running = [net]  # the last one runs; `evaluate` may call other methods of the net than `forward`

    def run(
        self, evaluate: Callable[[nn.Module], Output], training: Collection[nn.Module] = (), seed: int = 0
    ) -> Output:
        """Runs a pass with the given modules in training mode, and no others."""
        with restored(self.net), seeded(seed), ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # a compiled graph calls no functions
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._state = random_state()
            for module in self.net.modules():
                module.training = module in training
                if not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_pre_hook(self._begin).remove)
                    stack.callback(module.register_forward_hook(self._end, always_call=True).remove)
            stack.enter_context(self)
            return evaluate(self.net)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._notice_draws()
        if is_dropout(module):
            self.calls.add((self._running[-1], module))
        self.ran.add(module)
        self._running.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._notice_draws()
        del self._running[-1]

    def _notice_draws(self) -> None:
        if not torch.equal(self._state, state := random_state()):
            self._state = state
            self.drawn.add(self._running[-1])

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PARAMETERS or is_dropout(self._running[-1]):
            return func(*args, **(kwargs or {}))
        given = dict(zip(PARAMETERS[func], args, strict=False)) | (kwargs or {})
        name = "p" if "p" in given else "dropout_p"
        self.rates.append(float(given.get(name, 0)))
        if self.rates[-1] > 0 and given.get("training", given.get("train", True)):  # attention has no such flag
            self.calls.add((self._running[-1], func))
        return func(**given | {name: 0.0})


@torch.no_grad()
def deterministic_output(net: nn.Module, evaluate: Callable[[nn.Module], Output], watch: Any = None) -> Output:
    """Runs a pass in evaluation mode and returns its output; ValueError if it draws."""
    watch = watch or _Watch(net)
    output: Output = watch.run(evaluate)
    if drawing := watch.drawn | {caller for caller, called in watch.calls if not isinstance(called, nn.Module)}:
        raise ValueError(
            f"Expected {type(net).__name__} to be deterministic in evaluation mode, but got random numbers drawn by "
            f"{_names(net, drawing)}, which has to ask `self.training`"
        )
    return output


@torch.no_grad()
def find_dropout(net: nn.Module, evaluate: Callable[[nn.Module], Any]) -> FoundDropout:
    """Finds the dropout of a net by two passes, and checks it by a third if some of it is called by other modules.

    `evaluate` runs the net on a batch and returns a tensor. If the net skips layers at random, it runs in training mode
    until each has run, at most `ATTEMPTS` times. It restores modes, buffers, attributes that are numbers or
    tensors, and the random state.

    Raises:
        ValueError: The net draws in evaluation mode; it cannot run in training mode; or a module that calls dropout
            does something else in that mode, too.
    """
    still, trained, check = _Watch(net), _Watch(net), _Watch(net)
    expected = deterministic_output(net, evaluate, still)
    for path, module in net.named_modules():
        asks = isinstance(module, torch.jit.ScriptModule) and "self.training" in getattr(module, "code", "")
        if asks and not is_dropout(module) and "Norm" not in str(module.original_name):
            got = f"TorchScript in {type(net).__name__}.{path}, whose code reads `training`"
            raise ValueError(f"Expected dropout that can be told from other code, but got {got}: use the Python module")
    own = {module for module in net.modules() if not is_dropout(module) and not _of_torch(module)}
    for attempt in range(ATTEMPTS):
        try:
            trained.run(evaluate, own, attempt)
        except Exception as error:
            expectation = f"Expected {type(net).__name__} to run in training mode, in which its dropout is looked for"
            raise ValueError(f"{expectation}, but got {type(error).__name__}: {error}") from error
        if all(map(_of_torch, still.ran - trained.ran)):  # else a layer was left out at random
            break
    calls = {call for call in trained.calls - still.calls if call[0] in still.ran}
    owners = frozenset(caller for caller, _ in calls)
    if owners:
        try:
            torch.testing.assert_close(check.run(evaluate, owners), expected, equal_nan=True, msg="another output")
            got = f"random numbers drawn by {_names(net, check.drawn)}" if check.drawn else ""
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        if got or not calls <= check.calls:
            expectation = f"Expected {_names(net, owners)} to do nothing in training mode but dropout"
            raise ValueError(f"{expectation}, but got {got or 'dropout out of reach'}: use a module such as nn.Dropout")
    numbers = [number for module in net.modules() if is_dropout(module) for number in vars(module).values()]
    rates = [p for p in numbers if isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p < 1]
    rates += trained.rates
    alone = {caller for caller, _ in trained.calls if caller not in still.ran}
    return FoundDropout(owners, bool(rates) and not any(rates), _names(net, trained.drawn | alone))


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _names(net: nn.Module, modules: Collection[nn.Module]) -> str:
    """Returns the classes of modules and the path of the first of each: `Attention (layers.0.attention)`."""
    paths: dict[str, str] = {}
    for path, module in net.named_modules():
        if module in modules:
            paths.setdefault(type(module).__name__, path)
    return ", ".join(f"{name} ({path})" if path else name for name, path in paths.items())
