"""Makes a checkpoint a function of images or texts. Shapes: B inputs, T tokens of a text, K classes or tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from thinned.data.module import DataOffers
from thinned.evaluation.batch import Batch
from thinned.evaluation.further_ways import Tempered, net_of
from thinned.evaluation.provenance import measured_settings
from thinned.evaluation.ways import Deterministic, SampledNetworks, Way
from thinned.files import checkpoint_file, read_checkpoint
from thinned.models.dropout import sites_in
from thinned.models.net import net_offers
from thinned.offers import Offers, task_offers
from thinned.uncertainty.scores import entropy

TOKENS = 10  # the most probable ones, of a vocabulary of maybe 50,000
AT_ONCE = 64  # inputs in a batch


@dataclass(frozen=True)
class Prediction:
    """Says what a trained network predicts: the class of an image, or the token that follows a text."""

    label: str  # the most probable class or token
    probabilities: dict[str, float]  # of all classes by name, or of the ten most probable tokens; the highest first
    predictive_entropy: float  # H[p] over all classes or tokens, in nats
    mutual_information: float  # what the S networks disagree on, in nats, before any temperature; 0 for S = 1
    num_samples: int  # S; 1 for the deterministic network


class Predictor:
    """Predicts as `scripts/predict.py` does, one input or a list of them: see `from_checkpoint`."""

    def __init__(self, net: nn.Module, data: Any, way: Way, temperature: float | None = None) -> None:
        self.net, self.data, self.way = net.eval(), data, way
        way.bind(net)
        self.reported = way if temperature is None else Tempered(way, temperature)
        self._tokenizer = Offers(data, DataOffers).tokenizer  # None for images
        self._examined = False

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, evaluation: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> "Predictor":
        """Returns the predictor of a checkpoint; ValueError if there is none, or `evaluation` is not of it.

        Args:
            path: A checkpoint of scripts/train.py, or the folder of its run, whose best one is taken.
            evaluation: Folder of an evaluation or a prediction of this checkpoint, or a file in it: its S, masks,
                sites, seed and, of an evaluation, temperature are used. None takes the config's, without a temperature,
                and all sites for auto.
            device: Where to compute.
        """
        path = checkpoint_file(path)
        content = read_checkpoint(path)
        data_class: Any = locate(content["config"]["data"]["class_path"])
        data = data_class(**content["config"]["data"]["init_args"])
        data.load_state_dict(content[data_class.__qualname__])
        net = net_of(path, content).to(device)
        if evaluation is None:
            return cls(net, data, _way(net, content["config"]["mc_dropout"]))
        measured = measured_settings(Path(evaluation), path)
        name = "mc_dropout" if "mc_dropout" in measured else "deterministic"
        return cls(net, data, _way(net, measured[name]), measured.get(f"{name}_tempered", {}).get("temperature"))

    @torch.no_grad()
    def __call__(self, given: Any) -> Any:
        """Returns a `Prediction` of an image or a text, or a list of them for a list; ValueError if it takes no such.

        An input is what `input_of` of the data module takes.
        """
        examples = [self.data.input_of(each) for each in (given if isinstance(given, list) else [given])]
        if not examples:
            raise ValueError("Expected at least one input, but got an empty list")
        parts = (examples[start : start + AT_ONCE] for start in range(0, len(examples), AT_ONCE))
        predictions = [prediction for part in parts for prediction in self._predict(self._batch(part))]
        return predictions if isinstance(given, list) else predictions[0]

    def _batch(self, examples: list[Tensor]) -> Batch:
        """Returns examples as a batch. Of a text, the token after the last one alone counts."""
        device, index = next(self.net.parameters()).device, torch.arange(len(examples))
        if self._tokenizer is not None:
            inputs = pad_sequence(examples, batch_first=True)  # (B, T); attention is causal, so padding changes nothing
            targets = torch.full_like(inputs, -100)
            targets[index, torch.tensor([len(tokens) - 1 for tokens in examples])] = 0
            return Batch(inputs.to(device), index, targets.to(device))
        shape = tuple(net_offers(task_offers(self.net).net or self.net).input_shape or examples[0].shape)
        if other := {tuple(example.shape) for example in examples} - {shape}:
            raise ValueError(f"Expected inputs of the shape {shape}, but got {other.pop()}")
        return Batch(torch.stack(examples).to(device), index, None)

    def _predict(self, batch: Batch) -> list[Prediction]:
        if not self._examined:
            self.way.examine(batch.inputs)
            self._examined = True
        statistics, probs = batch.statistics(self.way), batch.mean(self.reported)  # (B, K)
        information = statistics.columns().get("mutual_information", torch.zeros(len(probs)))
        highest = probs.topk(min(TOKENS, probs.shape[1]) if self._tokenizer else probs.shape[1])
        predictions = []
        for p, k, h, mi in zip(*highest, entropy(probs).tolist(), information.tolist(), strict=True):
            names = self._tokenizer.pieces(k.tolist()) if self._tokenizer else [self.data.class_names[i] for i in k]
            named = list(zip(names, p.tolist(), strict=True))
            probabilities = dict(named) | dict(reversed(named))  # of tokens with the same text, the most probable
            predictions.append(Prediction(named[0][0], probabilities, h, mi, statistics.num_samples))
        return predictions


def _way(net: nn.Module, settings: Mapping[str, Any]) -> Way:
    """Returns the way to predict by the settings of a config, or by those that an evaluation has written."""
    if settings.get("num_samples") is None:
        return Deterministic()
    S, masks, sites, seed = (settings[key] for key in ("num_samples", "masks", "sites", "seed"))
    if "sites_nll" in settings:
        sites = "auto"
    elif sites == "auto" or ("scale" in settings and sites == [*sites_in(net)]):  # an evaluation lists them
        sites = "all"
    way = SampledNetworks(S, masks, sites, seed)
    way.load_settings(settings)
    return way
