"""What is kept of each prediction: a row per example, or per token of a text, and the scores of all rows.

Columns of both kinds, (N,) each: index (place in the split), target, prediction, confidence, nll, predictive_entropy
and correct, of the Monte-Carlo prediction where there is one; the same after `deterministic_` of the network without
dropout; with Monte-Carlo dropout expected_entropy and mutual_information. All in nats.

Shapes: B examples or sequences, T tokens of a sequence, K classes, V vocabulary, C features, S samples.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.dropout import derive_seed
from thinned.uncertainty.monte_carlo import Masks, mc_predict, resolve_masks, sampled_outputs
from thinned.uncertainty.scores import brier, nll, scores
from thinned.uncertainty.statistics import entropy

PROBABILITIES_AT_ONCE = 2**26  # of the mean prediction over a vocabulary: 256 MiB in fp32
LOGITS_AT_ONCE = 2**22  # of one sample: 16 MiB, which stay in the cache while they are summed up

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class MCSettings:
    """The arguments of `mc_predict` but for net and inputs."""

    num_samples: int
    masks: Masks
    seed: int
    sites: Collection[str] | None
    scale: float

    def of(self, net: nn.Module, index: Tensor) -> dict[str, Any]:
        """The arguments for some examples; their first one seeds independent masks too, lest all draw the same."""
        shared = resolve_masks(net, self.masks) == "shared"
        return vars(self) | {"seed": self.seed if shared else derive_seed(self.seed, int(index[0]))}


@torch.no_grad()
def example_rows(net: nn.Module, batch: Any, index: Tensor, mc: MCSettings | None) -> Rows:
    """The rows of a batch (inputs[, targets]), with the probabilities: probs and deterministic_probs (B, K).

    With targets also brier, the Brier score, and deterministic_brier; with Monte-Carlo dropout variation_ratio and std,
    of the predicted class's probability.
    """
    inputs, *rest = [batch] if isinstance(batch, Tensor) else batch
    targets = rest[0] if rest else None
    deterministic = torch.softmax(net(inputs).float(), dim=-1)
    rows = {"index": index} | ({} if targets is None else {"target": targets})
    of_deterministic = {f"deterministic_{name}": column for name, column in _columns(deterministic, targets).items()}
    if mc is None:
        return rows | _columns(deterministic, targets) | of_deterministic
    prediction = mc_predict(net, inputs, **mc.of(net, index))
    rows |= _columns(prediction.mean, targets)
    variance = prediction.variance.gather(-1, rows["prediction"][:, None]).squeeze(-1)
    return rows | of_deterministic | {
        "expected_entropy": prediction.expected_entropy,
        "mutual_information": prediction.mutual_information,
        "variation_ratio": prediction.variation_ratio,
        "std": variance.sqrt(),
    }  # fmt: skip


def _columns(probs: Tensor, targets: Tensor | None) -> Rows:
    confidence, prediction = probs.max(-1)
    columns = {"prediction": prediction, "confidence": confidence, "predictive_entropy": entropy(probs)}
    if targets is not None:
        columns |= {"nll": nll(probs, targets), "correct": prediction == targets, "brier": brier(probs, targets)}
    return columns | {"probs": probs}


def example_scores(rows: Mapping[str, Tensor], way: str = "") -> dict[str, float]:
    """Accuracy, NLL, ECE, AUROC of errors, AURC and Brier score of the columns whose names begin with `way`."""
    return _scores(rows, way) | {"brier": rows[f"{way}brier"].double().mean().item()}


def token_scores(rows: Mapping[str, Tensor], way: str = "") -> dict[str, float]:
    """Accuracy, NLL per token, bits per byte, ECE, AUROC of errors and AURC of the columns that begin with `way`.

    Bits per byte stand where there is a column `bytes`.
    """
    result = _scores(rows, way)
    if "bytes" in rows:
        bits = rows[f"{way}nll"].double().sum() / math.log(2)
        result["bits_per_byte"] = (bits / rows["bytes"].sum()).item()
    return result


def _scores(rows: Mapping[str, Tensor], way: str) -> dict[str, float]:
    nll, confidence, correct, uncertainty = (
        rows[f"{way}{name}"] for name in ("nll", "confidence", "correct", "predictive_entropy")
    )
    highest = uncertainty.max().clamp_min(torch.finfo(uncertainty.dtype).tiny)
    return scores(nll, confidence, correct, uncertainty / highest)  # whose order alone counts


@torch.no_grad()
def token_rows(net: nn.Module, batch: Any, index: Tensor, mc: MCSettings | None) -> tuple[Rows, Rows]:
    """The rows of a batch (tokens (B, T), targets (B, T)): one per token, and one per sequence.

    Memory does not grow with S, nor do all logits of a sample exist at once: the mean prediction of some sequences
    is held, and to it come, sample by sample, the distributions of some tokens at a time.

    Args:
        net: maps tokens to logits (B, T, V); where it has `features` and `head`, logits come in parts.
        batch: tokens, targets; a target of -100 gets no row.
        index: (B,), window of each sequence; a row's index is window * T + position.
        mc: how to sample; None for the deterministic network alone.

    Returns:
        Tokens: besides the columns of every row, position (tokens of context, 1 to T), rank of the target (1 is the
        most probable) and target. Sequences: index, tokens; log_likelihood, the sum over tokens of the log of the mean
        probability; mean_log_likelihood, the mean over samples of a sequence's; joint_log_likelihood, the log of the
        mean over samples of a sequence's probability (Malinin and Gales 2021 compare them);
        deterministic_log_likelihood; mutual_information, summed over tokens, and mutual_information_per_token.
    """
    tokens, targets = batch[0], batch[1]
    vocab_size: int = getattr(net, "vocab_size", None) or net(tokens[:1, :1]).shape[-1]
    at_once = max(1, PROBABILITIES_AT_ONCE // (vocab_size * tokens.shape[1]))
    parts = [
        _token_rows(net, some, their_targets, their_index, vocab_size, mc)
        for some, their_targets, their_index in zip(
            *(torch.split(x, at_once) for x in (tokens, targets, index)), strict=True
        )
    ]
    rows, sequences = ({name: torch.cat([p[i][name] for p in parts]) for name in parts[0][i]} for i in (0, 1))
    return rows, sequences


def _token_rows(
    net: nn.Module, tokens: Tensor, targets: Tensor, index: Tensor, vocab_size: int, mc: MCSettings | None
) -> tuple[Rows, Rows]:
    counted = targets >= 0  # (B, T)
    split = hasattr(net, "features") and hasattr(net, "head")

    def evaluate(sampled: Any) -> Tensor:
        """Features (N, C) of the N tokens that count, or their logits."""
        return (sampled.features(tokens) if split else sampled(tokens))[counted]

    def head(x: Tensor) -> Tensor:
        return (net.head(x)[..., :vocab_size] if split else x).float()  # type: ignore[operator]

    sequence, position = counted.nonzero(as_tuple=True)
    target = targets[counted]
    deterministic = TokenStatistics(target, sequence, len(tokens), vocab_size)
    deterministic.update(evaluate(net), head)
    single = deterministic.compute()
    rows = {"index": index[sequence] * tokens.shape[1] + position, "position": position + 1, "target": target}
    sequences = {"index": index, "tokens": counted.sum(1)}
    prediction = single
    if mc is not None:
        statistics = TokenStatistics(target, sequence, len(tokens), vocab_size)
        with closing(sampled_outputs(net, evaluate, **mc.of(net, index))) as outputs:
            for x in outputs:
                statistics.update(x, head)
        prediction = statistics.compute()
        information = prediction["mutual_information"]
        sequences["log_likelihood"] = statistics.by_sequence(-prediction["nll"])
        sequences["mean_log_likelihood"] = statistics.mean_log_likelihood()
        sequences["joint_log_likelihood"] = statistics.joint_log_likelihood()
        sequences["mutual_information"] = statistics.by_sequence(information)
        sequences["mutual_information_per_token"] = sequences["mutual_information"] / sequences["tokens"]
    else:
        prediction = {k: v for k, v in single.items() if k not in ("expected_entropy", "mutual_information")}
    sequences["deterministic_log_likelihood"] = deterministic.by_sequence(-single["nll"])
    kept = ("prediction", "confidence", "predictive_entropy", "nll", "correct", "rank")
    return rows | prediction | {f"deterministic_{name}": single[name] for name in kept}, sequences


class TokenStatistics:
    """Accumulates sampled next-token distributions of N tokens: their mean (N, V), and sums over samples (N,).

    Args:
        target: (N,), the token that came.
        sequence: (N,), the sequence that each token is of.
        num_sequences: B.
        vocab_size: V.
    """

    def __init__(self, target: Tensor, sequence: Tensor, num_sequences: int, vocab_size: int) -> None:
        self.target, self.sequence, self.num_sequences = target, sequence, num_sequences
        self.num_samples = 0
        self._mean = torch.zeros(len(target), vocab_size, device=target.device, dtype=torch.float32)
        self._entropy = torch.zeros(len(target), device=target.device, dtype=torch.float32)
        self._log_likelihoods: Tensor | None = None  # log sum and sum over samples, per sequence (2, B)
        self._rows = max(1, LOGITS_AT_ONCE // vocab_size)

    def update(self, x: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Adds one sample: head(x[some tokens]) are their logits (n, V)."""
        log_target = torch.empty_like(self._entropy)
        for start in range(0, len(x), self._rows):
            rows = slice(start, start + self._rows)
            log_probs = torch.log_softmax(head(x[rows]), dim=-1)  # (n, V)
            log_target[rows] = log_probs.gather(-1, self.target[rows, None]).squeeze(-1)
            probs = log_probs.exp()
            self._mean[rows].lerp_(probs, 1 / (self.num_samples + 1))
            self._entropy[rows] -= probs.mul_(log_probs.clamp_min_(torch.finfo(log_probs.dtype).min)).sum(-1)
        sums = self.by_sequence(log_target)
        if self._log_likelihoods is None:
            self._log_likelihoods = torch.stack([sums, sums])
        else:
            self._log_likelihoods[0] = torch.logaddexp(self._log_likelihoods[0], sums)
            self._log_likelihoods[1] += sums
        self.num_samples += 1

    def by_sequence(self, column: Tensor) -> Tensor:
        """Sums over the tokens of each sequence, (B,)."""
        return column.new_zeros(self.num_sequences).index_add_(0, self.sequence, column)

    def joint_log_likelihood(self) -> Tensor:
        """log 1/S sum_s p_s(sequence), (B,)."""
        assert self._log_likelihoods is not None
        return self._log_likelihoods[0] - math.log(self.num_samples)

    def mean_log_likelihood(self) -> Tensor:
        """1/S sum_s log p_s(sequence), (B,)."""
        assert self._log_likelihoods is not None
        return self._log_likelihoods[1] / self.num_samples

    def compute(self) -> Rows:
        """The columns of the mean prediction, (N,) each."""
        probs = self._mean
        confidence, prediction = probs.max(-1)
        own = probs.gather(-1, self.target[:, None])
        parts = list(zip(torch.split(probs, self._rows), torch.split(own, self._rows), strict=True))
        predictive = torch.cat([entropy(part) for part, _ in parts])
        expected = self._entropy / self.num_samples
        return {
            "prediction": prediction,
            "confidence": confidence.clamp_max(1),
            "nll": nll(probs, self.target),
            "correct": prediction == self.target,
            "rank": 1 + torch.cat([(part > own).sum(-1) for part, own in parts]),
            "predictive_entropy": predictive,
            "expected_entropy": expected,
            "mutual_information": (predictive - expected).clamp_min(0),
        }
