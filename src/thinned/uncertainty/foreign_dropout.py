"""Finds the dropout of a net of another make, by passes over one batch in which its calls are watched.

Dropout is seen from evaluation mode if a module does it, or a function that is told its rate and `self.training`. An
attention that is told `dropout_p=self.p if self.training else 0` is seen in training mode alone: its module, without
its submodules, has to go there, and may do nothing else in that mode.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from thinned.models.net import Logits
from thinned.uncertainty.acting_dropout import kept_random_state, restored, seed_generators
from thinned.uncertainty.dropout_calls import Call, DropoutCalls, Site, is_dropout, rates

Output = TypeVar("Output")

ATTEMPTS = 20  # to see all layers of a net that leaves out some of them at random in training mode


@dataclass(frozen=True)
class FoundDropout:
    """What has to be done for the dropout of a net to act.

    Attributes:
        owners: Modules that go into training mode, each alone, for the sake of an attention that cannot be seen.
        sites: Calls of functions that are turned on; None if all of them are.
        off: Whether there is dropout, and all of its rates are 0: every sampled network is the deterministic one.
        resting: Modules that draw in training mode and are not known as dropout, or drop in a part of the net that runs
            in that mode alone. They stay off.
    """

    owners: frozenset[nn.Module]
    sites: frozenset[Site] | None
    off: bool
    resting: str

    def pass_of(self, evaluate: Callable[[nn.Module], Output]) -> Callable[[nn.Module], Output]:
        """Returns `evaluate` with its calls of dropout functions turned on."""

        def run(net: nn.Module) -> Output:
            with DropoutCalls(self._turns_on, None if self.sites is None else net):
                return evaluate(net)

        return run

    def _turns_on(self, call: Call) -> bool:
        return call.on or self.sites is None or call.site in self.sites


def still_output(net: nn.Module, evaluate: Callable[[nn.Module], Output]) -> tuple[Output, DropoutCalls]:
    """Runs a pass in evaluation mode; ValueError if it draws. Returns its output and its calls of dropout."""
    with _watched(net, (), lambda call: call.on) as (watched, _):
        output = evaluate(net)
    if watched.drawn:
        raise ValueError(
            f"Expected {type(net).__name__} to be deterministic in evaluation mode, but got random numbers drawn by "
            f"{_names(net, watched.drawn)}, which has to ask `self.training`"
        )
    return output, watched


@torch.no_grad()
def find_dropout(net: nn.Module, evaluate: Callable[[nn.Module], Any]) -> FoundDropout:
    """Finds the dropout of a net by two passes, and checks it by a third if some of it acts in training mode alone.

    A net that leaves out layers at random runs in training mode until each has run, `ATTEMPTS` times at most.

    Args:
        net: The net. Its modes, buffers, numbers and tensors that are attributes, and the random state are restored.
        evaluate: Runs the net on a batch; returns tensors or `Logits`.

    Raises:
        ValueError: The net draws in evaluation mode; a pass fails or writes parameters; or a module that has to go into
            training mode does something else there, too.
    """
    expected, still = still_output(net, evaluate)
    _refuse_scripts(net)
    made, acting, drawn, alone = set[Site](), Counter[Site](), set[nn.Module](), set[nn.Module]()
    for attempt in range(ATTEMPTS):
        trained = _training_pass(net, evaluate, attempt)
        made |= {call.site for call in trained.calls}
        acting |= Counter(call.site for call in trained.calls if call.acts)
        drawn |= trained.drawn
        alone |= {module for module in trained.ran - still.ran if module is not None}
        if {call.site for call in still.calls} <= made:  # else a layer was left out at random
            break
    visible = Counter(call.site for call in still.calls if call.p > 0)
    hidden = Counter({site: count for site, count in (acting - visible).items() if site[0] in still.ran})
    if hidden:
        _check_owners(net, evaluate, hidden, expected)
    sites = frozenset(site for site in visible if site in acting or site not in made or _of_torch(site[0]))
    known = [call.p for call in (*still.calls, *trained.calls)]
    known += [rate for module in net.modules() if is_dropout(module) for rate in rates(module)]
    return FoundDropout(
        owners=frozenset(module for module, _ in hidden if module is not None),
        sites=None if sites == visible.keys() else sites,
        off=bool(known) and not any(known),
        resting=_names(net, drawn | {site[0] for site in acting if site[0] in alone}),
    )


def _training_pass(net: nn.Module, evaluate: Callable[[nn.Module], Any], seed: int) -> DropoutCalls:
    """Runs a pass in which what is not of torch is in training mode, and no function drops."""
    own = [module for module in net.modules() if not is_dropout(module) and not _of_torch(module)]
    with _watched(net, own, lambda call: False) as (watched, _):
        seed_generators(seed)
        try:
            evaluate(net)
        except Exception as error:
            expectation = f"Expected {type(net).__name__} to run in training mode, in which its dropout is looked for"
            raise ValueError(f"{expectation}, but got {type(error).__name__}: {error}") from error
    return watched


@torch.no_grad()
def deterministic_output(net: nn.Module, evaluate: Callable[[nn.Module], Output]) -> Output:
    """Runs two passes in evaluation mode and returns what both of them do; ValueError if they differ."""
    (first, _), (second, _) = (still_output(net, evaluate) for _ in range(2))
    if not _close(first, second):
        name = type(net).__name__
        raise ValueError(f"Expected {name} to be deterministic in evaluation mode, but got two passes that differ")
    return second


def _check_owners(net: nn.Module, evaluate: Callable[[nn.Module], Any], hidden: Counter[Site], expected: Any) -> None:
    """Raises a ValueError if the modules of hidden calls do anything in training mode but make them."""
    owners = [module for module in net.modules() if any(module is owner for owner, _ in hidden)]
    output, failed = None, ""
    with _watched(net, owners, lambda call: False) as (watched, changed):
        numbers = _attributes(owners, (int, float))
        try:
            output = evaluate(net)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        if numbers != _attributes(owners, (int, float)):
            changed.append("a number that it keeps")
    problems = [
        failed or ("" if _close(output, expected) else "another output"),
        f"random numbers drawn by {_names(net, watched.drawn)}" if watched.drawn else "",
        f"changes of {', '.join(changed)}" if changed else "",
        "" if failed or hidden <= Counter(call.site for call in watched.calls if call.acts) else "dropout out of reach",
    ]
    if any(problems):
        raise ValueError(
            f"Expected {_names(net, owners)} to do nothing in training mode but dropout, which acts in that mode "
            f"alone, but got {', '.join(filter(None, problems))}"
        )


@contextmanager
def _watched(
    net: nn.Module, training: Collection[nn.Module], turn_on: Callable[[Call], bool]
) -> Iterator[tuple[DropoutCalls, list[str]]]:
    """Puts the given modules and no others into training mode; watches calls and draws; restores what it can.

    The list of changed buffers is filled on the way out.
    """
    attributes = _attributes(net.modules(), (int, float, Tensor))
    parameters = list(net.parameters())  # a sharded net may have others after a pass
    sums = _sums(parameters)
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # as others draw
    chosen = set(training)
    with restored(net) as changed, kept_random_state():
        for module in net.modules():
            module.training = module in chosen
        try:
            with DropoutCalls(turn_on, net) as watched:
                yield watched, changed
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002
            for module, values in attributes.items():
                vars(module).update(values)
    if not torch.equal(sums, _sums(parameters)):  # copies to restore them would take the memory of another net
        raise ValueError(f"Expected a pass of {type(net).__name__} to leave its parameters, but got others after it")


def _sums(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the sum of each parameter, (n,); of one that is sharded, the sum of this process's part."""
    local: list[Tensor] = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in parameters]
    sums = [part.detach().sum(dtype=torch.float64).cpu() for part in local if part.is_floating_point()]
    return torch.stack([torch.zeros((), dtype=torch.float64), *sums]).nan_to_num()


def _attributes(modules: Iterable[nn.Module], kinds: tuple[type, ...]) -> dict[nn.Module, dict[str, Any]]:
    """Returns the attributes of some kinds, but for the mode: counters, averages and the like."""
    return {
        module: {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name != "training"}
        for module in modules
    }


def _refuse_scripts(net: nn.Module) -> None:
    """Raises a ValueError if TorchScript, whose calls cannot be watched, has code that asks whether it trains."""
    for name, module in net.named_modules():
        asks = isinstance(module, torch.jit.ScriptModule) and "self.training" in getattr(module, "code", "")
        if asks and not is_dropout(module) and "Norm" not in module.original_name:
            got = f"TorchScript in {type(net).__name__}{name and '.' + name}, whose code reads `training`"
            raise ValueError(f"Expected dropout that can be told from other code, but got {got}: use the Python module")


def _of_torch(module: nn.Module | None) -> bool:
    return module is None or type(module).__module__.startswith("torch.")


def _names(net: nn.Module, modules: Iterable[nn.Module]) -> str:
    """Returns the classes of modules and the path of the first of each: `Attention (layers.0.attention)`."""
    paths: dict[str, str] = {}
    for path, module in net.named_modules():
        if any(module is each for each in modules):
            paths.setdefault(type(module).__name__, path)
    return ", ".join(f"{name} ({path})" if path else name for name, path in paths.items())


def _close(output: Any, expected: Any) -> bool:
    output, expected = (x.x if isinstance(x, Logits) else x for x in (output, expected))
    try:
        torch.testing.assert_close(output, expected, equal_nan=True)
    except (AssertionError, TypeError):  # TypeError: of other kinds
        return False
    return True
