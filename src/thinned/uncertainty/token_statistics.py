"""Accumulates statistics of S sampled next-token distributions, one sample at a time.

It holds the mean distribution of each token, and sums for each sequence: memory does not grow with S. Not all logits of
a sample exist at once (see `thinned.models.net.Logits`). Malinin and Gales (2021) compare likelihoods of sequences.
Shapes: N tokens, B sequences, V vocabulary. Units: nats.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinned.models.net import Logits, few_rows
from thinned.uncertainty.scores import nll, prediction_columns
from thinned.uncertainty.statistics import disagreement, entropy


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

    def tokens(self) -> dict[str, Tensor]:
        """Returns the columns of the mean prediction, (N,) each; with two samples or more, also of their spread."""
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
        """Returns the columns of the sequences, (B,) each, from the result of `tokens`.

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
