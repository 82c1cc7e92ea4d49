"""The calls of dropout in a pass: each is seen with the module that makes it, and functions are turned on or off.

`F.dropout(x, p, training=False)` does nothing, but a `TorchFunctionMode` sees it and its rate. So dropout can act while
every module stays in evaluation mode, in which noise, counters and batch statistics rest.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
Site = tuple[nn.Module | None, Function]  # the module that makes a call, and a function or a module of dropout

RECURRENT: frozenset[Function] = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
_IN_PYTHON: tuple[Function, ...] = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.multi_head_attention_forward,
)  # fmt: skip
IN_C: tuple[Function, ...] = (
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, torch.native_dropout,
    torch.dropout_, torch.alpha_dropout_, torch.feature_dropout_, torch.feature_alpha_dropout_,
)  # fmt: skip
_OF_RECURRENT = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
# Names of the parameters in their order; torch's functions in C have no signature to inspect.
PARAMETERS: dict[Function, tuple[str, ...]] = {
    **{function: tuple(inspect.signature(function).parameters) for function in _IN_PYTHON},
    **dict.fromkeys(IN_C, ("input", "p", "train")),
    **dict.fromkeys(RECURRENT, ("input", "hx", "params", *_OF_RECURRENT, "batch_first")),
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}
_PACKED = ("data", "batch_sizes", "hx", "params", *_OF_RECURRENT)


class Call(NamedTuple):
    """A call of dropout: where, at which rate, and whether it is told to drop. A module is told by its own mode."""

    site: Site
    p: float
    on: bool

    @property
    def acts(self) -> bool:
        """Whether it drops something."""
        return self.on and self.p > 0


class DropoutCalls(TorchFunctionMode):
    """Within the block, records the calls of dropout modules and functions, and makes each function drop or not.

    Code that torch.compile has compiled runs as it was written, because a compiled graph calls no functions.

    Args:
        turn_on: Says whether a function should drop.
        net: If given, calls are told apart by its modules. Those that run are collected in `ran`, and those that draw
            random numbers in their own code in `drawn`.
    """

    def __init__(self, turn_on: Callable[[Call], bool], net: nn.Module | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.ran: set[nn.Module | None] = {None}
        self.drawn: set[nn.Module] = set()
        self._turn_on = turn_on
        self._modules = [] if net is None else [m for m in net.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._running: list[nn.Module] = []  # the last one runs

    def __enter__(self) -> "DropoutCalls":
        self._state = random_state() if self._modules else []
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would take seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(self._begin).remove)
                stack.callback(module.register_forward_hook(self._end, always_call=True).remove)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._notice_draws()
        if is_dropout(module):
            self.calls.append(Call((self._caller, module), max(rates(module), default=1.0), True))
        self.ran.add(module)
        self._running.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._notice_draws()
        if self._running[-1:] == [module]:  # another hook may have failed before it began
            self._running.pop()

    @property
    def _caller(self) -> nn.Module | None:
        return self._running[-1] if self._running else None

    def _notice_draws(self) -> None:
        if not same_state(self._state, state := random_state()):
            self._state = state
            self.drawn.update(self._running[-1:])

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PARAMETERS or (self._caller is not None and is_dropout(self._caller)):
            return func(*args, **(kwargs or {}))
        packed = func in RECURRENT and isinstance(args[3], list | tuple)
        given = {**dict(zip(_PACKED if packed else PARAMETERS[func], args, strict=False)), **(kwargs or {})}
        rate = next((name for name in ("p", "dropout_p", "dropout") if name in given), None)
        flag = next((name for name in ("training", "train") if name in given), None)
        call = Call(
            (self._caller, func),
            0.0 if rate is None else float(given[rate]),
            flag is None or bool(given[flag]),  # attention without a flag drops whenever its rate is above 0
        )
        self.calls.append(call)
        on = self._turn_on(call)
        if flag is not None:
            given[flag] = on
        elif rate is not None and not on:
            given[rate] = 0.0
        if func in RECURRENT and on:  # cuDNN would seed its dropout once in a process
            with torch.backends.cudnn.flags(enabled=False):
                return func(**given)
        return func(**given)


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is dropout by its name: one of torch's, ours, or somebody's `DropPath` or `StochasticDepth`.

    A module with submodules is none: a whole net may be called `DropoutNet`.
    """
    name = getattr(module, "original_name", type(module).__name__).lower()  # TorchScript keeps the class's name
    return ("drop" in name or "stochasticdepth" in name) and not any(True for _ in module.children())


def rates(module: nn.Module) -> list[float]:
    """Returns those attributes of a dropout module that may be its rate."""
    numbers = (value for value in vars(module).values() if isinstance(value, int | float))
    return [float(number) for number in numbers if not isinstance(number, bool) and 0 <= number < 1]


def random_state() -> list[Tensor]:
    """Returns the state of torch's random generators: of the CPU and, if there is one, of the current GPU."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpu]


def same_state(one: list[Tensor], other: list[Tensor]) -> bool:
    """Compares two states of the random generators: if they differ, something was drawn in between."""
    return all(map(torch.equal, one, other))
