"""Predicts in several ways: with the deterministic network, and by Monte-Carlo dropout.

A way streams distributions, and their mean is its prediction. To add one, write a class and give it to
`MCDropout(ways=[...])` or `--mc_dropout.ways`: its rows, scores, tables, pictures and metrics come by themselves.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from thinned.evaluation.batch import Batch, Validation
from thinned.models.dropout import check_sites, derive_seed, sites_in
from thinned.models.net import Logits, check_logits, logits_in, net_offers
from thinned.uncertainty.acting_dropout import Acting, acting_sites, of_our_make, select_sites
from thinned.uncertainty.foreign_dropout import FoundDropout, deterministic_output, find_dropout
from thinned.uncertainty.kept_networks import KeptNetworks
from thinned.uncertainty.monte_carlo import Masks, resolve_masks, sampled_logits, sampled_outputs
from thinned.uncertainty.scores import nll
from thinned.uncertainty.statistics import MCStatistics, TokenStatistics

Sites = Literal["all", "auto"] | list[str]
SELECTION_TARGETS = 25_600  # of half of the validation split, for the choice of sites


class Way(ABC):
    """Defines a way to predict."""

    name: str  # an identifier that no other way has: before its columns, in files and in metric keys
    label: str  # what tables and pictures call it
    own_net: nn.Module | None = None  # predicts in place of the trained one, such as another checkpoint's
    nets: Sequence[nn.Module] = ()  # predict; they are on the device, in evaluation mode
    builds_on: Sequence["Way"] = ()  # learn before this one does, such as the one whose `Batch.mean` it changes

    def bind(self, trained: nn.Module) -> None:
        """Takes the trained net, before training too; ValueError if this way cannot predict with it."""
        self.nets = [self.own_net or trained]

    def examine(self, inputs: Any) -> None:
        """Sees inputs before it predicts, and before the training; ValueError if this way cannot predict them."""
        return

    def fit(self, validation: Validation) -> None:
        """Learns from held-out examples, if there is something to learn; without gradients, as in a test."""
        return

    @abstractmethod
    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        """Yields distributions of the N targets of a batch, one at a time; memory does not grow with their number."""

    def statistics_of(self, batch: Batch) -> MCStatistics | TokenStatistics:
        """Returns the statistics of what it streams; asked through `Batch.statistics`, which keeps them."""
        with closing(self.stream(batch)) as stream:  # closed on an exception, which restores the modes at once
            return batch.sum_up(stream)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its predictions, as JSON: in `metrics.json` and in the metadata of the rows."""
        return {}

    @property
    def details(self) -> str:
        """What a table says of the settings."""
        return ""

    def load_settings(self, settings: Mapping[str, Any]) -> None:
        """Takes from earlier `settings` what `fit` had learned: an interrupted prediction resumes with it."""
        return

    def metric_prefix(self, split: str) -> str:
        """Returns what stands before the `/` in the keys of this way's scores of a split, such as `mc` of `mc/nll`."""
        return self.name


class Deterministic(Way):
    """Predicts with the trained network, without dropout."""

    name, label = "deterministic", "deterministic"

    def examine(self, inputs: Any) -> None:
        """Runs a net of another make, to see that it draws nothing and returns logits."""
        (net,) = self.nets
        if not of_our_make(net):
            check_logits(net, deterministic_output(net, partial(logits_in, inputs=inputs)))

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        yield batch.output(self.nets[0])

    def metric_prefix(self, split: str) -> str:
        return split  # beside what the task logs itself


class SampledNetworks(Way):
    """Predicts by Monte-Carlo dropout: S networks sampled from the trained one. Args: see `MCDropout`."""

    name, label = "mc_dropout", "MC dropout"

    def __init__(self, num_samples: int, masks: Masks = "auto", sites: Sites = "all", seed: int = 0) -> None:
        if num_samples < 2:
            raise ValueError(f"Expected mc_dropout.num_samples to be at least 2 or null, but got {num_samples}")
        if masks not in ("auto", "shared", "independent"):
            raise ValueError(f"Expected mc_dropout.masks to be auto, shared or independent, but got {masks!r}")
        if not sites or (isinstance(sites, str) and sites not in ("all", "auto")):
            raise ValueError(f"Expected mc_dropout.sites to be all, auto or a list of sites, but got {sites!r}")
        self.num_samples, self.masks, self.seed = num_samples, masks, seed
        self.sites = sites if isinstance(sites, str) else check_sites(sites)
        self.acting = None if isinstance(self.sites, str) else Acting(self.sites)  # None: everywhere, at its rates
        self.sites_nll: dict[str, float] = {}  # with sites=auto: validation NLL of each choice, best first
        self.off = False  # whether all rates are 0, so that every sampled network is the deterministic one
        self._found: FoundDropout | None = None  # of a net of another make, as soon as it has run
        self._kept = KeptNetworks()

    def bind(self, trained: nn.Module) -> None:
        super().bind(trained)
        (net,) = self.nets
        if self.masks == "shared" and net_offers(net).thin is None:
            raise ValueError(
                f"Expected mc_dropout.masks to be auto or independent for a net that is sharded or has no `thin`, such "
                f"as this {type(net).__name__}, but got 'shared': scripts/predict.py has it on one device"
            )
        self._found, self._kept = None, KeptNetworks()  # a training needs the memory of the test before it
        if of_our_make(net) or self.sites != "all":
            try:
                sites = acting_sites(net, None if isinstance(self.sites, str) else self.sites)
            except ValueError as error:
                got = f"{error} (mc_dropout.sites {self.sites!r})"
                raise ValueError(f"{got}: name others, or set mc_dropout.num_samples to null") from None
            self._note_off(not sites)

    def examine(self, inputs: Any) -> None:
        """Finds the dropout of a net of another make, and runs a pass with it: three or four passes."""
        (net,) = self.nets
        if self.acting is not None or of_our_make(net):
            return
        evaluate = partial(logits_in, inputs=inputs)
        self._found = find_dropout(net, evaluate)
        self._note_off(self._found.off)
        if resting := self._found.resting:
            rank_zero_info(f"MC dropout leaves off what draws in training mode and is no dropout: {resting}")
        with closing(sampled_outputs(net, evaluate, found=self._found)) as outputs:
            next(outputs)

    def fit(self, validation: Validation) -> None:
        """Chooses sites and rates by the NLL of the mean prediction."""
        if self.sites != "auto" or not acting_sites(self.nets[0]):
            return

        def validation_nll(acting: Acting) -> float:
            tried = SampledNetworks(self.num_samples, self.masks, "auto", self.seed)
            tried.nets, tried.acting = self.nets, acting
            return validation.mean(lambda batch: nll(batch.mean(tried), batch.target), SELECTION_TARGETS).item()

        selection = select_sites(self.nets[0], validation_nll)
        self.acting, self.sites_nll = next(iter(selection)), {str(acting): value for acting, value in selection.items()}
        rank_zero_info(f"MC dropout at {self.acting}: lowest validation NLL, {selection[self.acting]:.4f} nats")

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        (net,) = self.nets
        sites, scale = self.acting or (None, 1.0)
        settings: dict[str, Any] = {"num_samples": self.num_samples, "sites": sites, "scale": scale, "seed": self.seed}
        settings |= {"masks": resolve_masks(net, self.masks), "found": self._found, "kept": self._kept}
        if settings["masks"] == "independent":  # seeded by the first example, or all batches would draw the same
            settings["seed"] = derive_seed(self.seed, int(batch.index[0]))
        if batch.counted is not None:
            yield from sampled_outputs(net, batch.logits, **settings)
            return
        with closing(sampled_logits(net, batch.inputs, **settings)) as parts:
            for logits in parts:
                yield from map(Logits, logits)

    def _note_off(self, off: bool) -> None:
        if off and not self.off:
            rank_zero_info("All rates of dropout are 0: MC dropout reports the deterministic network.")
        self.off = off

    @property
    def settings(self) -> dict[str, Any]:
        (net,) = self.nets
        sites, scale = self.acting or Acting(sites_in(net))
        listed = list(sites) if self.acting or self.sites == "all" else self.sites
        settings: dict[str, Any] = {"num_samples": self.num_samples, "masks": resolve_masks(net, self.masks)}
        settings |= {"seed": self.seed, "sites": listed, "scale": scale}
        return settings | ({"sites_nll": self.sites_nll} if self.sites_nll else {})

    @property
    def details(self) -> str:
        at = ", all rates 0" if self.off else f" at {self.acting}" if self.acting else ""
        return f"S = {self.num_samples}, {self.settings['masks']} masks{at}"

    def load_settings(self, settings: Mapping[str, Any]) -> None:
        if self.sites == "auto" and "sites_nll" in settings:
            self.acting, self.sites_nll = Acting(tuple(settings["sites"]), settings["scale"]), settings["sites_nll"]

    def metric_prefix(self, split: str) -> str:
        return "mc"


def standard_ways(num_samples: int | None, masks: Masks, sites: Sites, seed: int) -> list[Way]:
    """Returns the deterministic network and, unless `num_samples` is None, Monte-Carlo dropout."""
    sampled = [] if num_samples is None else [SampledNetworks(num_samples, masks, sites, seed)]
    return [Deterministic(), *sampled]


def learning_order(ways: Sequence[Way]) -> list[Way]:
    """Returns the ways and all that they build on, each after those that it builds on."""
    order: list[Way] = []
    for way in ways:
        order += [each for each in (*learning_order(way.builds_on), way) if each not in order]
    return order
