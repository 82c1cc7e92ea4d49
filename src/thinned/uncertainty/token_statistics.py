"""Statistics of S sampled next-token distributions, accumulated one sample at a time.

Of each token the mean distribution is held, and of each sequence sums: memory does not grow with S. Nor do all logits
of a sample exist at once (see `thinned.models.net.Logits`). Malinin and Gales (2021) compare the likelihoods of a
sequence. Shapes: N tokens, B sequences, V vocabulary. Units: nats.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinned.models import net
from thinned.models.net import Logits
from thinned.uncertainty.scores import nll
from thinned.uncertainty.statistics import entropy


class TokenStatistics:
    """Accumulates sampled distributions of N tokens.

    Args:
        target: The token that came, (N,).
        sequence: The sequence of each token, in [0, B), (N,).
        num_sequences: B.
    """

    def __init__(self, target: Tensor, sequence: Tensor, num_sequences: int) -> None:
        self.target, self.sequence, self.num_sequences = target, sequence, num_sequences
        self.num_samples = 0
        self.mean = torch.empty(0)  # (N, V) after the first sample
        self._entropy = torch.zeros(len(target), device=target.device)
        zeros = torch.zeros(num_sequences, device=target.device)
        self._log_likelihoods = torch.stack([zeros - math.inf, zeros])  # log sum and sum over samples (2, B)
        self.nll_at: dict[int, Tensor] = {}  # of the mean of the first 1, 2, 4, ... samples, (N,) each
        self.members: Sequence[TokenStatistics] = ()  # of an ensemble; else empty

    @classmethod
    def of_ensemble(cls, members: "Sequence[TokenStatistics]") -> "TokenStatistics":
        """Returns the statistics of the samples of all members, which have equally many, together."""
        first, M = members[0], len(members)
        joined = cls(first.target, first.sequence, first.num_sequences)
        joined.members, joined.num_samples = members, sum(member.num_samples for member in members)
        joined.mean = first.mean / M
        for member in members:
            if member is not first:
                joined.mean.add_(member.mean, alpha=1 / M)
            joined._entropy += member._entropy
            log_sum, total = member._log_likelihoods
            joined._log_likelihoods[0] = torch.logaddexp(joined._log_likelihoods[0], log_sum)
            joined._log_likelihoods[1] += total
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
            self._entropy[rows] -= probs.mul_(log_probs.clamp_min_(torch.finfo(log_probs.dtype).min)).sum(-1)
        sums = self._by_sequence(log_target)
        self._log_likelihoods[0] = torch.logaddexp(self._log_likelihoods[0], sums)
        self._log_likelihoods[1] += sums
        self.num_samples += 1
        if self.num_samples.bit_count() == 1:  # a power of two
            self.nll_at[self.num_samples] = nll(self.mean, self.target)

    def _by_sequence(self, column: Tensor) -> Tensor:
        """Adds up the tokens of each sequence, (B,)."""
        return column.new_zeros(self.num_sequences).index_add_(0, self.sequence, column)

    def tokens(self) -> dict[str, Tensor]:
        """Returns the columns of the mean prediction, (N,) each; with two samples or more, of their spread too."""
        probs = self.mean
        confidence, prediction = probs.max(-1)
        own = probs.gather(-1, self.target[:, None])
        predictive = self._predictive_entropy()
        columns = {
            "prediction": prediction,
            "confidence": confidence.clamp_max(1),
            "nll": nll(probs, self.target),
            "correct": prediction == self.target,
            "rank": 1 + torch.cat([(p > q).sum(-1) for p, q in zip(_few(probs), _few(own, probs), strict=True)]),
            "predictive_entropy": predictive,
        }
        if self.num_samples > 1:
            expected = self._entropy / self.num_samples
            columns["expected_entropy"] = expected
            columns["mutual_information"] = (predictive - expected).clamp_min(0)
            if self.nll_at:
                columns["nll_at"] = torch.stack(list(self.nll_at.values()), dim=-1)
        if self.members:
            of_members = torch.stack([member._predictive_entropy() for member in self.members])
            columns["mutual_information_between"] = (predictive - of_members.mean(0)).clamp_min(0)
        return columns

    def _predictive_entropy(self) -> Tensor:
        return torch.cat([entropy(part) for part in _few(self.mean)])

    def sequences(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the columns of the sequences, (B,) each.

        Args:
            tokens: What `tokens` returned.

        Returns:
            log_likelihood: sum over tokens of the log of the mean probability. With two samples or more also
            mean_log_likelihood, 1/S sum_s log p_s(sequence); joint_log_likelihood, log 1/S sum_s p_s(sequence);
            mutual_information, summed over tokens, and mutual_information_per_token.
        """
        columns = {"log_likelihood": self._by_sequence(-tokens["nll"])}
        if self.num_samples > 1:
            information = self._by_sequence(tokens["mutual_information"])
            number = self._by_sequence(torch.ones_like(tokens["nll"]))
            columns["mean_log_likelihood"] = self._log_likelihoods[1] / self.num_samples
            columns["joint_log_likelihood"] = self._log_likelihoods[0] - math.log(self.num_samples)
            columns["mutual_information"] = information
            columns["mutual_information_per_token"] = information / number
        return columns


def _few(rows: Tensor, like: Tensor | None = None) -> Sequence[Tensor]:
    """Splits rows so that few distributions over the vocabulary are computed with at once."""
    return torch.split(rows, max(1, net.LOGITS_AT_ONCE // (rows if like is None else like).shape[-1]))
