"""The calls of torch's dropout functions in a pass: each is seen with the module that makes it, and turned on or off.

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
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
Site = tuple[nn.Module | None, Function]  # where a call is made, as far as it can be told from another pass

RECURRENT: frozenset[Function] = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
_IN_PYTHON: tuple[Function, ...] = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.multi_head_attention_forward,
)  # fmt: skip
_IN_C: tuple[Function, ...] = (
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, torch.native_dropout,
    torch.dropout_, torch.alpha_dropout_, torch.feature_dropout_, torch.feature_alpha_dropout_,
)  # fmt: skip
_OF_RECURRENT = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
# Names of the parameters in their order; torch's functions in C have no signature to inspect.
PARAMETERS: dict[Function, tuple[str, ...]] = {
    **{function: tuple(inspect.signature(function).parameters) for function in _IN_PYTHON},
    **dict.fromkeys(_IN_C, ("input", "p", "train")),
    **dict.fromkeys(RECURRENT, ("input", "hx", "params", *_OF_RECURRENT, "batch_first")),
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}
_PACKED = ("data", "batch_sizes", "hx", "params", *_OF_RECURRENT)


class Call(NamedTuple):
    """A call of a dropout function: by which module, at which rate, and whether it is told to drop."""

    module: nn.Module | None
    function: Function
    p: float
    on: bool

    @property
    def site(self) -> Site:
        """The module and the function."""
        return self.module, self.function

    @property
    def acts(self) -> bool:
        """Whether it drops something."""
        return self.on and self.p > 0


class DropoutCalls(TorchFunctionMode):
    """Within the block, records the calls of dropout functions, and makes each of them drop or not.

    Code that torch.compile has compiled runs as it was written, because a compiled graph calls no functions.

    Args:
        turn_on: Says whether a call should drop. By default it does as it is told.
        watch_draws: Whether to collect in `drawn` the modules that draw random numbers in their own code.
    """

    def __init__(self, turn_on: Callable[[Call], bool] = lambda call: call.on, watch_draws: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.drawn: set[nn.Module] = set()
        self._turn_on, self._watch_draws = turn_on, watch_draws
        self._running: list[nn.Module] = []  # the last one runs

    def __enter__(self) -> "DropoutCalls":
        self._state = random_state() if self._watch_draws else []
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would take seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for handle in (
                register_module_forward_pre_hook(self._begin),
                register_module_forward_hook(self._end, always_call=True),
            ):
                stack.callback(handle.remove)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._notice_draws()
        self._running.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._notice_draws()
        self._running.pop()

    def _notice_draws(self) -> None:
        if self._watch_draws and not same_state(self._state, state := random_state()):
            self._state = state
            self.drawn.update(self._running[-1:])

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PARAMETERS:
            return func(*args, **(kwargs or {}))
        packed = func in RECURRENT and isinstance(args[3], list | tuple)
        given = {**dict(zip(_PACKED if packed else PARAMETERS[func], args, strict=False)), **(kwargs or {})}
        rate = next((name for name in ("p", "dropout_p", "dropout") if name in given), None)
        flag = next((name for name in ("training", "train") if name in given), None)
        call = Call(
            self._running[-1] if self._running else None,
            func,
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


def random_state() -> list[Tensor]:
    """Returns the state of torch's random generators: of the CPU and, if there is one, of the current GPU."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpu]


def same_state(one: list[Tensor], other: list[Tensor]) -> bool:
    """Compares two states of the random generators: if they differ, something was drawn in between."""
    return all(map(torch.equal, one, other))
