"""A checkpoint as a function of what a person has: images or texts to predictions.

Shapes: B inputs, T tokens of a text, K classes or tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from thinned.data.module import DataOffers
from thinned.evaluation.batch import Batch
from thinned.evaluation.ensembles import net_of
from thinned.evaluation.provenance import measured_settings
from thinned.evaluation.rows import example_columns
from thinned.evaluation.ways import Deterministic, SampledNetworks, Tempered, Way
from thinned.files import read_checkpoint
from thinned.models.dropout import sites_in
from thinned.models.net import net_offers
from thinned.offers import Offers, task_offers
from thinned.uncertainty.statistics import entropy
from thinned.uncertainty.token_statistics import TokenStatistics

TOKENS = 10  # the most probable ones, of a vocabulary of maybe 50,000
AT_ONCE = 64  # inputs in a batch


@dataclass(frozen=True)
class Prediction:
    """What a trained network says of the class of an image, or of the token that follows a text.

    Attributes:
        label: The most probable class or token.
        probabilities: By class, or by the text of the ten most probable tokens; the highest first.
        predictive_entropy: H[p] of all classes or tokens, at the temperature of the evaluation, in nats.
        mutual_information: What the S sampled networks disagree on, before any temperature, in nats; 0 if S is 1.
        num_samples: S; 1 for the deterministic network.
    """

    label: str
    probabilities: dict[str, float]
    predictive_entropy: float
    mutual_information: float
    num_samples: int


class Predictor:
    """Predicts with the ways and rules of `scripts/predict.py`: see `from_checkpoint`.

    Args:
        net: The trained net, on its device.
        data: Its data module, with the state of the checkpoint.
        way: Predicts with the net.
        temperature: Acts on the mean of the way's distributions; None leaves it as it is.
    """

    def __init__(self, net: nn.Module, data: Any, way: Way, temperature: float | None = None) -> None:
        self.net, self.data, self.way, self.final_way = net.eval(), data, way, way
        self.way.bind(net)
        if temperature is not None:
            self.final_way = Tempered(way)
            self.final_way.load_state_dict({"temperature": temperature})
        self._class_names, self._tokenizer = (
            getattr(Offers(data, DataOffers), n) for n in ("class_names", "tokenizer")
        )
        self._examined = False

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, evaluation: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> "Predictor":
        """Returns the predictor of a checkpoint, which holds net, data settings, tokenizer and class names.

        Args:
            path: A checkpoint of scripts/train.py, or the folder of its run, whose best one is taken.
            evaluation: Folder of an evaluation of this checkpoint, or its evaluation.json. S, masks, sites, seed and
                temperature are those that it has measured. None takes the config's, all sites for auto, and no
                temperature.
            device: Where to compute.

        Raises:
            ValueError: There is no such checkpoint, or no evaluation of it.
        """
        path = str(Path(path, "checkpoints/best.ckpt") if Path(path).is_dir() else path)
        content = read_checkpoint(path)
        config = content["config"]
        data_class: Any = locate(config["data"]["class_path"])
        data = data_class(**config["data"]["init_args"])
        data.load_state_dict(content[data_class.__qualname__])
        net = net_of(path, content).to(device)
        if evaluation is None:
            return cls(net, data, _way(config["mc_dropout"]))
        settings = measured_settings(Path(evaluation), path)
        name = "mc_dropout" if "mc_dropout" in settings else "deterministic"
        temperature = settings.get(f"{name}_tempered", {}).get("temperature")
        return cls(net, data, _way(settings[name], sites_in(net)), temperature)

    @torch.no_grad()
    def __call__(self, given: Any) -> Any:
        """Predicts the class of an image, or the token that follows a text.

        Args:
            given: An image (see `thinned.data.pixels.image_of`), a text, or a list of either.

        Returns:
            A `Prediction`, or a list of them for a list.

        Raises:
            ValueError: The network cannot take this.
        """
        several = isinstance(given, list | tuple)
        examples = [self.data.input_of(each) for each in (given if several else [given])]
        if not examples:
            raise ValueError("Expected one input or more, but got an empty list")
        parts = [examples[start : start + AT_ONCE] for start in range(0, len(examples), AT_ONCE)]
        predictions = [prediction for part in parts for prediction in self._predict(part)]
        return predictions if several else predictions[0]

    def _predict(self, examples: list[Tensor]) -> list[Prediction]:
        batch = self._batch(examples)
        if not self._examined:
            self.way.examine(batch.inputs)
            self._examined = True
        statistics, probs = batch.statistics(self.way), batch.mean(self.final_way)  # (B, K)
        of_text = isinstance(statistics, TokenStatistics)
        columns = statistics.tokens() if of_text else example_columns(statistics, None)
        information = columns.get("mutual_information", torch.zeros(len(probs))).tolist()
        highest, classes = probs.topk(min(TOKENS, probs.shape[1]) if of_text else probs.shape[1])
        predictions = []
        for names, p, *uncertainty in zip(classes, highest, entropy(probs).tolist(), information, strict=True):
            named = list(zip(self._names(names.tolist()), p.tolist(), strict=True))
            probabilities = dict(named) | dict(reversed(named))  # of tokens with the same text, the most probable
            predictions.append(Prediction(named[0][0], probabilities, *uncertainty, statistics.num_samples))
        return predictions

    def _batch(self, examples: list[Tensor]) -> Batch:
        """Returns examples as a batch. Of a text, the token after the last one alone counts."""
        device, index = next(self.net.parameters()).device, torch.arange(len(examples))
        if self._tokenizer is not None:
            inputs = pad_sequence(examples, batch_first=True)  # (B, T), of which no token sees what follows it
            targets = torch.full_like(inputs, -100)
            targets[index, torch.tensor([len(tokens) - 1 for tokens in examples])] = 0
            return Batch(inputs.to(device), index, targets.to(device))
        shape = net_offers(task_offers(self.net).net or self.net).input_shape or examples[0].shape
        if other := {tuple(example.shape) for example in examples} - {tuple(shape)}:
            raise ValueError(f"Expected inputs of the shape {tuple(shape)}, but got {other.pop()}")
        return Batch(torch.stack(examples).to(device), index, None)

    def _names(self, classes: list[int]) -> list[str]:
        if self._tokenizer is not None:
            return self._tokenizer.pieces(classes)
        return [self._class_names[k] if self._class_names else str(k) for k in classes]


def _way(settings: Mapping[str, Any], all_sites: Sequence[str] = ()) -> Way:
    """Returns the way to predict by the settings of a config, or by those that an evaluation has written."""
    if settings.get("num_samples") is None:
        return Deterministic()
    was_chosen = "sites_nll" in settings
    sites = "all" if settings["sites"] in ("auto", list(all_sites)) else settings["sites"]
    way = SampledNetworks(settings["num_samples"], settings["masks"], "auto" if was_chosen else sites, settings["seed"])
    if was_chosen:
        way.load_state_dict({"selection": [[settings["sites"], settings["scale"], 0.0]]})
    return way
