"""Adds the ways of an evaluation: ensembles of several checkpoints, and each way at its best temperature."""

from collections.abc import Generator, Mapping, Sequence
from copy import copy
from pydoc import locate
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from thinned.evaluation.batch import Batch, Validation, trained_net
from thinned.evaluation.provenance import differences, digest_of_file
from thinned.evaluation.ways import Way
from thinned.models.net import Logits
from thinned.uncertainty.statistics import MCStatistics, TokenStatistics
from thinned.uncertainty.temperature import fit_temperature, nll_at, tempered

# What the checkpoints of one ensemble may differ in, of what their data modules have kept.
INDIFFERENT = {"sketch", "path", "seed"}


class Ensemble(Way):
    """Predicts with the networks of several checkpoints together (Lakshminarayanan et al. 2017, deep ensembles).

    Its prediction is the mean of their distributions. Its `members` are ways that predict with one network each, and
    with equally many distributions; `checkpoints` say in the settings where the networks come from.
    """

    def __init__(self, members: Sequence[Way], name: str, label: str, checkpoints: Sequence[str] = ()) -> None:
        self.members = self.builds_on = members
        self.name, self.label, self.checkpoints = name, label, list(checkpoints)

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        for member in self.members:
            yield from member.stream(batch)

    def statistics_of(self, batch: Batch) -> MCStatistics | TokenStatistics:
        """Returns the statistics of all members; each is asked once, even if it is reported by itself too."""
        of_members: Sequence[Any] = [batch.statistics(member) for member in self.members]
        return type(of_members[0]).of_ensemble(of_members)

    @property
    def settings(self) -> dict[str, Any]:
        return {"checkpoints": self.checkpoints, "members": [member.settings for member in self.members]}

    @property
    def details(self) -> str:
        return f"{len(self.members)} checkpoints"


class Tempered(Way):
    """Sharpens or softens another way to predict by a temperature T (Guo et al. 2017).

    If p is the mean of the distributions that the other way streams, it predicts p ** (1 / T), normalised. T has the
    lowest NLL on validation.
    """

    def __init__(self, way: Way, temperature: float = 1.0) -> None:
        self.way, self.builds_on = way, [way]
        self.name, self.label = f"{way.name}_tempered", f"{way.label}, tempered"
        self.temperature = temperature

    def fit(self, validation: Validation) -> None:
        """Fits the temperature. Without an error in validation, any lower one would be better: then it stays 1."""
        errors = torch.zeros(())

        def mean_nll(temperatures: Sequence[float]) -> Tensor:
            nonlocal errors

            def columns(batch: Batch) -> Tensor:
                mean = batch.mean(self.way)
                wrong = (mean.argmax(-1) != batch.target).to(mean)[:, None]
                return torch.cat([nll_at(mean, batch.target, temperatures), wrong], dim=-1)

            *of_temperatures, errors = validation.mean(columns)
            return torch.stack(of_temperatures)

        self.temperature = fit_temperature(mean_nll)
        if not errors:
            self.temperature = 1.0
            rank_zero_info(f"The temperature of {self.way.label} is 1: half of the validation split has no error.")

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        yield Logits(tempered(batch.mean(self.way), self.temperature).log())

    @property
    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    @property
    def details(self) -> str:
        return f"T = {self.temperature:.3g}"

    def load_settings(self, settings: Mapping[str, Any]) -> None:
        self.temperature = settings["temperature"]


def evaluation_ways(standard: Sequence[Way], checkpoints: Mapping[str, dict[str, Any]]) -> list[Way]:
    """Returns the ways of an evaluation: the standard ones, their ensembles, and all of these at a temperature.

    The standard ways predict with the net of the first of the checkpoints, given as contents by path. A ValueError says
    that they are of other data, splits, classes or tokenizers.
    """
    (_, first), *others = checkpoints.items()
    for path, content in others:
        _refuse_other_data(path, content, first)
    nets = [net_of(path, content) for path, content in others]
    digests = [*map(digest_of_file, checkpoints)] if others else []
    ensembles: list[Way] = []
    for way in standard if others else ():
        members = [way]
        for i, net in enumerate(nets, start=2):
            members.append(copy(way))
            members[-1].name, members[-1].own_net = f"{way.name}_{i}", net
        ensembles.append(Ensemble(members, f"{way.name}_ensemble", f"ensemble of {way.label}", digests))
    untempered = [*standard, *ensembles]
    return [*untempered, *map(Tempered, untempered)]


def net_of(path: str, content: dict[str, Any]) -> nn.Module:
    """Returns the trained net of a checkpoint, on the CPU and in evaluation mode: see `trained_net`."""
    task: Any = locate(content["config"]["model"]["class_path"])
    return trained_net(task.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval())


def _refuse_other_data(path: str, content: dict[str, Any], first: dict[str, Any]) -> None:
    data = first["config"]["data"]["class_path"]
    if (other := content["config"]["data"]["class_path"]) != data:
        raise ValueError(f"Expected checkpoints of one kind of data, {data}, but got {other} in {path}")
    state = data.rpartition(".")[2]
    if changed := differences(_facts(content.get(state, {})), _facts(first.get(state, {}))):
        keys = ", ".join(change.partition(" = ")[0] for change in changed)
        raise ValueError(f"Expected checkpoints of the same data, split and names, but got another {keys} in {path}")


def _facts(state: dict[str, Any]) -> dict[str, Any]:
    split = {key: value for key, value in state.get("split", {}).items() if key not in INDIFFERENT}
    return state | {"split": split}
