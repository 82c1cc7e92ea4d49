"""Monte-Carlo dropout against every mask of a small net, and on nets that were not built for it."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.models import MLP, DropoutRates
from thinned.uncertainty import mc_predict, mc_samples
from thinned.uncertainty.scores import entropy


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small_net() -> MLP:
    """2-4-3 with dropout on inputs and hidden units, in float64 and evaluation mode."""
    net = MLP((2,), 3, (4,), dropout=DropoutRates(embedding=0.25, mlp=0.5)).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def every_mask(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of all 2^6 masks (64, 1, 1), and the distributions that they predict (64, B, K)."""
    (w1, b1, w2, b2), weights, probs = net.parameters(), [], []
    for keep in map(torch.tensor, product([0.0, 1.0], repeat=6)):
        weights.append(float(torch.where(keep[:2] > 0, 0.75, 0.25).prod()) / 2**4)
        hidden = F.relu(F.linear(x * keep[:2] / 0.75, w1, b1)) * keep[2:] / 0.5
        probs.append(F.linear(hidden, w2, b2).softmax(-1))
    return torch.tensor(weights, dtype=torch.float64)[:, None, None], torch.stack(probs).detach()


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_agrees_with_every_mask_of_a_small_net(masks: Any) -> None:
    """False failure: below 3e-6 per kind of masks (66 estimates, each within 5.5 standard errors).

    The standard errors are exact: the distribution of a sample is known. That of the predictive entropy, a function
    of the mean, is bounded by the sum over classes of |dH/dp| times the class's.
    """
    net, x, S = small_net(), torch.randn(6, 2, dtype=torch.float64), 2000
    w, p = every_mask(net, x)
    mc = mc_predict(net, x, num_samples=S, masks=masks)

    mean = (w * p).sum(0)
    variance = (w * (p - mean) ** 2).sum(0)
    fourth = (w * (p - mean) ** 4).sum(0)
    assert ((mc.mean - mean).abs() <= 5.5 * (variance / S).sqrt()).all()
    assert ((mc.variance - variance).abs() <= 5.5 * ((fourth - variance**2) / S).sqrt() + 2 * variance / S).all()

    expected = (w[..., 0] * entropy(p)).sum(0)
    expected_error = ((w[..., 0] * (entropy(p) - expected) ** 2).sum(0) / S).sqrt()
    predictive_error = ((mean.log() + 1).abs() * (variance / S).sqrt()).sum(-1) + 10 / S
    assert ((mc.expected_entropy - expected).abs() <= 5.5 * expected_error).all()
    assert ((mc.predictive_entropy - entropy(mean)).abs() <= 5.5 * predictive_error).all()
    information = entropy(mean) - expected
    assert ((mc.mutual_information - information).abs() <= 5.5 * (predictive_error + expected_error)).all()

    votes = (w * F.one_hot(p.argmax(-1), 3)).sum(0).amax(-1)
    assert ((mc.variation_ratio - (1 - votes)).abs() <= 5.5 * (votes * (1 - votes) / S).sqrt() + 1e-12).all()


def wide_net() -> MLP:
    return MLP((1, 4, 4), 5, (32, 32), dropout=DropoutRates(embedding=0.1, mlp=0.5)).double().eval()


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_shared_masks_predict_the_same_in_any_batch_and_order(batch_size: int) -> None:
    net, x = wide_net(), torch.randn(515, 1, 4, 4, dtype=torch.float64)
    rows = torch.randperm(515)[:: 515 // 24 if batch_size == 1 else 1]
    whole = mc_predict(net, x, num_samples=5)
    for batch in rows.split(batch_size):
        part = mc_predict(net, x[batch], num_samples=5)
        for name in ("mean", "variance", "mutual_information"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[batch], rtol=1e-12, atol=1e-12)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x.mean(1), 0.5, self.training))


def test_batch_norm_uses_its_running_statistics() -> None:
    """Inputs at the running mean become 0, whatever the batch, so that dropout has nothing to drop."""
    norm = nn.BatchNorm1d(4)
    norm.running_mean.fill_(3.0)
    net = nn.Sequential(norm, nn.Dropout(0.5), nn.Linear(4, 3))
    x = torch.full((2, 4), 3.0)
    x[1] = torch.tensor([5.0, -5.0, 9.0, 0.0])
    variance = mc_predict(net, x, num_samples=10).variance
    assert variance[0].max() == 0
    assert variance[1].min() > 0


class Failing(FunctionalDropout):
    """Fails in the second sample, after the three passes in which its dropout is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        if len(self.calls) == 5:
            raise RuntimeError("second sample")
        return super().forward(x)


def test_modes_and_random_state_are_restored_when_the_net_fails() -> None:
    net, state = Failing().eval(), torch.get_rng_state()
    net.head.train()
    with pytest.raises(RuntimeError, match="second sample"):
        mc_predict(net, torch.randn(2, 5, 4, generator=torch.Generator()), num_samples=5)
    assert (net.training, net.head.training) == (False, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_restored_when_no_more_samples_are_asked_for() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).eval()
    samples = mc_samples(net, torch.randn(2, 4))
    next(samples)
    assert [module.training for module in net] == [False, True]
    samples.close()
    assert [module.training for module in net] == [False, False]


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_rates_of_zero_sample_the_deterministic_net(masks: Any) -> None:
    net, x = MLP((2,), 3, (4,)).train(), torch.randn(5, 2)
    predicted = mc_predict(net, x, num_samples=4, masks=masks)
    torch.testing.assert_close(predicted.mean, net(x).softmax(-1))
    assert predicted.variance.max() == 0
    assert predicted.mutual_information.max() < 1e-6
    assert net.training


def test_net_that_cannot_be_thinned() -> None:
    net, x = FunctionalDropout(), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"net with `thin.* for masks=shared, but got FunctionalDropout"):
        mc_predict(net, x, masks="shared")
    with pytest.raises(ValueError, match="masks to be auto, shared or independent, but got 'both'"):
        mc_predict(net, x, masks="both")
    with pytest.raises(ValueError, match="dropout with a rate above 0 in Linear"):
        mc_predict(nn.Linear(4, 3), x)


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_fewer_than_two_samples_are_refused(count: int) -> None:
    for predict in (mc_predict, lambda *args, **options: next(mc_samples(*args, **options))):
        with pytest.raises(ValueError, match=f"num_samples to be at least 2, but got {count}"):
            predict(wide_net(), torch.zeros(1, 1, 4, 4, dtype=torch.float64), num_samples=count)


def test_independent_masks_differ_between_rows_and_shared_ones_do_not() -> None:
    net, x = wide_net(), torch.randn(1, 1, 4, 4, dtype=torch.float64).expand(8, -1, -1, -1)
    shared, independent = (next(mc_samples(net, x, masks=masks)) for masks in ("shared", "independent"))
    torch.testing.assert_close(shared, shared[:1].expand(8, 5), rtol=1e-12, atol=0)
    assert len(independent.unique(dim=0)) == 8


def test_samples_are_a_function_of_seed_and_number_alone() -> None:
    net, x = wide_net(), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    five, two = list(mc_samples(net, x, num_samples=5, seed=1)), list(mc_samples(net, x, num_samples=2, seed=1))
    assert all(map(torch.equal, five[:2], two))
    assert len({float(sample[0, 0]) for sample in five}) == 5


def test_half_precision_logits_give_single_precision_probabilities() -> None:
    net, x = wide_net().bfloat16(), torch.randn(3, 1, 4, 4).bfloat16()
    assert next(mc_samples(net, x)).dtype == torch.float32
