"""Accumulates statistics of S sampled predictive distributions, of examples or of tokens; memory does not grow with S.

Mean and variance follow Welford (1962), and for several samples at once Chan, Golub and LeVeque (1983). Entropies are
those of Gal (2016, section 3.3) and Smith and Gal (2018), likelihoods of sequences those of Malinin and Gales (2021).

Shapes: B examples (any leading shape) or sequences, N tokens, K classes, V vocabulary. Units: nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinned.models.net import Logits, few_rows
from thinned.uncertainty.scores import brier, entropy, nll, prediction_columns


@dataclass(frozen=True)
class MCPrediction:
    """Holds what S samples p_1 .. p_S of a predictive distribution say about each example.

    Attributes:
        mean: (B, K), the prediction: p = 1/S sum_s p_s.
        variance: (B, K), of each class's probability: 1/(S - 1) sum_s (p_s - p)^2.
        predictive_entropy: (B,), H[p]: the total uncertainty, in nats.
        expected_entropy: (B,), 1/S sum_s H[p_s]: the uncertainty within each sample (aleatoric), in nats.
        mutual_information: (B,), H[p] - 1/S sum_s H[p_s] >= 0: the disagreement of the samples (epistemic), in
            nats. It is never above log S, and too small by about the factor 1 - 1/S.
        variation_ratio: (B,), the share of samples whose most probable class is not the most voted one.
        num_samples: S.
    """

    mean: Tensor
    variance: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor
    num_samples: int


def disagreement(of_mean: Tensor, mean: Tensor) -> Tensor:
    """Returns the mutual information H[p] - 1/S sum_s H[p_s], in nats; 0 if it is only rounding.

    Otherwise noise would rank equal samples.

    >>> disagreement(torch.tensor([0.7, 0.5]), torch.tensor([0.2, 0.5 - 1e-7]))
    tensor([0.5000, 0.0000])
    """
    information = of_mean - mean
    rounding = 8 * torch.finfo(of_mean.dtype).eps * of_mean.clamp_min(1)
    return information.where(information > rounding, 0)


class MCStatistics:
    """Accumulates samples. `mean` (B, K) is the mean of those so far.

    Args:
        target: The class of each example, (B,), if it is known.

    Attributes:
        nll_at: NLL of the mean of the first s samples, (B,) in nats, by s = 1, 2, 4, ...; empty without a target.
        members: The statistics of each member of an ensemble, with equally many samples; else empty.

    >>> statistics = MCStatistics()
    >>> statistics.update_all(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))  # two samples of one example
    >>> statistics.compute().mutual_information  # log 2: each sample is sure, and they contradict each other
    tensor([0.6931])
    """

    def __init__(self, target: Tensor | None = None) -> None:
        self.num_samples = 0
        self.nll_at: dict[int, Tensor] = {}
        self.target, self._of_target = target, torch.empty(0)  # the sum over samples of its probability
        self.members: Sequence[MCStatistics] = ()
        self.mean = self._entropy = torch.empty(0)  # means over samples
        self._squares = self._votes = torch.empty(0)  # sums

    def update_all(self, probs: Tensor) -> None:
        """Adds n samples: probs (n, B, K), which sum to 1 over K. Half precisions are accumulated in fp32."""
        probs = probs if probs.dtype == torch.float64 else probs.float()
        if self.num_samples == 0:
            self.mean, self._squares, self._votes = (torch.zeros_like(probs[0]) for _ in range(3))
            self._entropy, self._of_target = (torch.zeros_like(probs[0, ..., 0]) for _ in range(2))
        before, n = self.num_samples, len(probs)
        self.num_samples += n
        mean = probs[0] + (probs - probs[0]).mean(0)  # of equal samples, exactly the sample
        delta = mean - self.mean
        self._squares += delta.square() * (before * n / self.num_samples) + (probs - mean).square().sum(0)
        self.mean += delta * (n / self.num_samples)
        self._entropy += (entropy(probs) - self._entropy).sum(0) / self.num_samples
        votes = probs.argmax(-1).movedim(0, -1)  # (B, n)
        self._votes.scatter_add_(-1, votes, torch.ones_like(votes, dtype=probs.dtype))
        if self.target is not None:
            of_target = probs.gather(-1, self.target.expand(probs.shape[:-1])[..., None]).squeeze(-1)
            sums = self._of_target + of_target.cumsum(0)  # (n, B)
            self._of_target = sums[-1].clone()
            for s in range(before + 1, self.num_samples + 1):
                if s.bit_count() == 1:  # a power of two
                    self.nll_at[s] = -(sums[s - before - 1] / s).clamp_min(torch.finfo(sums.dtype).tiny).log()

    @classmethod
    def of_ensemble(cls, members: "Sequence[MCStatistics]") -> "MCStatistics":
        """Returns the statistics of the samples of all members together."""
        joined = cls(members[0].target)
        joined.members, joined.num_samples = members, sum(member.num_samples for member in members)
        joined.mean = torch.stack([member.mean for member in members]).mean(0)
        joined._entropy = torch.stack([member._entropy for member in members]).mean(0)
        joined._votes = torch.stack([member._votes for member in members]).sum(0)
        between, within = joined.variances()
        joined._squares = joined.num_samples * (within + between)
        return joined

    def variances(self) -> tuple[Tensor, Tensor]:
        """Returns the variance of the members' means, and the mean variance of a member's samples, (B, K) each.

        1/M sum_m (p_m - p)^2 and 1/M sum_m 1/S sum_s (p_ms - p_m)^2 add up to 1/(M S) sum_ms (p_ms - p)^2.
        """
        between = torch.stack([member.mean for member in self.members]).var(0, correction=0)
        return between, torch.stack([member._squares for member in self.members]).sum(0) / self.num_samples

    def compute(self) -> MCPrediction:
        """Returns the prediction; ValueError with fewer than two samples, which have no spread."""
        if self.num_samples < 2:
            raise ValueError(f"Expected num_samples to be at least 2, but got {self.num_samples}")
        predictive, expected = entropy(self.mean), self._entropy
        return MCPrediction(
            mean=self.mean,
            variance=self._squares / (self.num_samples - 1),
            predictive_entropy=predictive,
            expected_entropy=expected,
            mutual_information=disagreement(predictive, expected),
            variation_ratio=1 - self._votes.amax(-1) / self.num_samples,
            num_samples=self.num_samples,
        )

    def columns(self) -> dict[str, Tensor]:
        """Returns the columns of the mean prediction, (B,) each and probs (B, K), and of the spread of its samples."""
        columns = prediction_columns(self.mean, self.target)
        predicted = columns["prediction"][:, None]
        if self.target is not None:
            columns["brier"] = brier(self.mean, self.target)
        if self.num_samples > 1:
            spread = self.compute()
            columns["expected_entropy"] = spread.expected_entropy
            columns["mutual_information"] = spread.mutual_information
            columns["variation_ratio"] = spread.variation_ratio
            columns["std"] = spread.variance.gather(-1, predicted).squeeze(-1).sqrt()
            if self.nll_at:
                columns["nll_at"] = torch.stack(list(self.nll_at.values()), dim=-1)
        if self.members:
            of_members = torch.stack([entropy(member.mean) for member in self.members]).mean(0)
            columns["mutual_information_between"] = disagreement(columns["predictive_entropy"], of_members)
            for name, variance in zip(("variance_between", "variance_within"), self.variances(), strict=True):
                columns[name] = variance.gather(-1, predicted).squeeze(-1)
        return columns | {"probs": self.mean}


class TokenStatistics:
    """Accumulates sampled distributions of N tokens, with targets (N,) in sequences (N,) numbered from 0 to B - 1."""

    def __init__(self, target: Tensor, sequence: Tensor, num_sequences: int) -> None:
        self.target, self.sequence, self.num_sequences = target, sequence, num_sequences
        self.num_samples = 0
        self.mean = torch.empty(0)  # (N, V) after the first sample
        self._entropy = torch.zeros(len(target), device=target.device)
        self._sum = torch.zeros(num_sequences, device=target.device)  # of the samples' log-likelihoods, (B,)
        self._log_sum = self._sum - math.inf  # of their likelihoods, (B,)
        self.nll_at: dict[int, Tensor] = {}  # of the mean of the first 1, 2, 4, ... samples, (N,) each
        self.members: Sequence[TokenStatistics] = ()  # of an ensemble; else empty

    @classmethod
    def of_ensemble(cls, members: "Sequence[TokenStatistics]") -> "TokenStatistics":
        """Returns the statistics of all samples of the members, which have equally many."""
        joined = cls(members[0].target, members[0].sequence, members[0].num_sequences)
        joined.members, joined.mean = members, torch.zeros_like(members[0].mean)
        for member in members:
            joined.num_samples += member.num_samples
            joined.mean.add_(member.mean, alpha=1 / len(members))
            joined._entropy += member._entropy / len(members)
            joined._sum += member._sum
            joined._log_sum = torch.logaddexp(joined._log_sum, member._log_sum)
        return joined

    def update(self, logits: Logits) -> None:
        """Adds one sample."""
        log_target = torch.empty_like(self._entropy)
        for rows, log_probs in logits.log_probs():  # (n, V)
            if self.num_samples == 0 and rows.start == 0:
                self.mean = log_probs.new_zeros(len(self.target), log_probs.shape[-1])
            log_target[rows] = log_probs.gather(-1, self.target[rows, None]).squeeze(-1)
            probs = log_probs.exp()
            self.mean[rows].lerp_(probs, 1 / (self.num_samples + 1))
            plogp = probs.mul_(log_probs.clamp_min_(torch.finfo(log_probs.dtype).min))
            mean = self._entropy[rows]
            mean -= (plogp.sum(-1) + mean) / (self.num_samples + 1)  # of equal samples, exactly the sample's
        log_likelihood = self._by_sequence(log_target)
        self._sum += log_likelihood
        self._log_sum = torch.logaddexp(self._log_sum, log_likelihood)
        self.num_samples += 1
        if self.num_samples.bit_count() == 1:  # a power of two
            self.nll_at[self.num_samples] = nll(self.mean, self.target)

    def _by_sequence(self, column: Tensor) -> Tensor:
        """Adds up the tokens of each sequence, (B,)."""
        return column.new_zeros(self.num_sequences).index_add_(0, self.sequence, column)

    def columns(self) -> dict[str, Tensor]:
        """Returns the columns of the mean prediction, (N,) each, and of the spread of its samples."""
        few = [*few_rows(*self.mean.shape)]
        parts = [prediction_columns(self.mean[rows], self.target[rows]) for rows in few]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.num_samples > 1:
            columns["expected_entropy"] = self._entropy
            columns["mutual_information"] = disagreement(columns["predictive_entropy"], columns["expected_entropy"])
            if self.nll_at:
                columns["nll_at"] = torch.stack(list(self.nll_at.values()), dim=-1)
        if self.members:
            of_members = torch.stack([torch.cat([entropy(m.mean[rows]) for rows in few]) for m in self.members])
            columns["mutual_information_between"] = disagreement(columns["predictive_entropy"], of_members.mean(0))
        return columns

    def sequences(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the columns of the sequences, (B,) each, from those of the tokens.

        Returns:
            log_likelihood: sum over tokens of the log of the mean probability. With two samples or more also
            mean_log_likelihood, 1/S sum_s log p_s(sequence); joint_log_likelihood, log 1/S sum_s p_s(sequence);
            mutual_information, summed over tokens, and mutual_information_per_token.
        """
        columns = {"log_likelihood": self._by_sequence(-tokens["nll"])}
        if self.num_samples > 1:
            information = self._by_sequence(tokens["mutual_information"])
            columns["mean_log_likelihood"] = self._sum / self.num_samples
            columns["joint_log_likelihood"] = self._log_sum - math.log(self.num_samples)
            columns["mutual_information"] = information
            number = torch.bincount(self.sequence, minlength=self.num_sequences)
            columns["mutual_information_per_token"] = information / number
        return columns
