"""Monte-Carlo dropout against every mask of a small net, and on nets that were not built for it."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from thinned.models import MLP, DropoutRates
from thinned.uncertainty import mc_predict, mc_samples
from thinned.uncertainty.acting_dropout import NOT_DROPOUT
from thinned.uncertainty.statistics import entropy


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


class ScaledDotProduct(FunctionalDropout):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0).mean(1))


class SelfAttention(FunctionalDropout):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Pooled(FunctionalDropout):
    """A body (B, T, 4) -> (B, T, 4), the mean over T, and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "F.dropout": FunctionalDropout,
    "nn.Dropout": lambda: Pooled(nn.Dropout(0.5)),
    "nn.Dropout2d": lambda: Pooled(nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Dropout2d(), nn.Flatten(1, 2))),
    "nn.MultiheadAttention": SelfAttention,
    "scaled_dot_product_attention": ScaledDotProduct,
    "nn.TransformerEncoderLayer": lambda: Pooled(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)),
    "batch norm": lambda: Pooled(nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5))),
    "instance norm": lambda: Pooled(nn.Sequential(nn.InstanceNorm1d(5, track_running_stats=True), nn.Dropout(0.5))),
    "spectral norm": lambda: Pooled(nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Dropout(0.5))),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_dropout_of_any_net_acts_and_nothing_else_does(name: str) -> None:
    net, x = FOREIGN[name]().eval(), torch.randn(8, 5, 4)
    next(net.children()).train()  # one mode differs
    modes, buffers = [m.training for m in net.modules()], [buffer.clone() for buffer in net.buffers()]
    state = torch.get_rng_state()
    first, again, other = (mc_predict(net, x, num_samples=6, seed=seed) for seed in (1, 1, 2))
    assert (first.variance.amax(-1) > 1e-8).all()
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(map(torch.equal, net.buffers(), buffers))


def test_every_normalisation_with_running_statistics_is_known() -> None:
    """torch/nn/modules/batchnorm.py:25 has the base of all in `torch.nn`; lazy ones become these when called."""
    base = torch.nn.modules.batchnorm._NormBase
    norms = {c for c in vars(nn).values() if isinstance(c, type) and issubclass(c, base) and "Lazy" not in c.__name__}
    assert norms == {c for c in NOT_DROPOUT if issubclass(c, base)}


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


class FunctionalBatchNorm(FunctionalDropout):
    """Whose normalisation no module scan can see."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("spread", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.batch_norm(x.mean(1), self.average, self.spread, training=self.training)[:, None])


def test_changed_buffers_are_refused_and_restored() -> None:
    net = FunctionalBatchNorm().eval()
    with pytest.raises(ValueError, match=r"dropout alone .* changed buffers: \['average', 'spread'\]"):
        mc_predict(net, torch.randn(8, 5, 4), num_samples=2)
    assert net.average.tolist() == [0] * 4
    assert net.spread.tolist() == [1] * 4
    assert not net.training


class Failing(FunctionalDropout):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("second pass")
        return super().forward(x)


def test_modes_and_random_state_are_restored_when_the_net_fails() -> None:
    net, state = Failing().eval(), torch.get_rng_state()
    net.head.train()
    with pytest.raises(RuntimeError, match="second pass"):
        mc_predict(net, torch.randn(2, 5, 4, generator=torch.Generator()), num_samples=5)
    assert (net.training, net.head.training) == (False, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_restored_when_no_more_samples_are_asked_for() -> None:
    net = FunctionalDropout().eval()
    samples = mc_samples(net, torch.randn(2, 5, 4))
    next(samples)
    assert net.training
    samples.close()
    assert not net.training


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_nothing_stochastic_is_refused(masks: Any) -> None:
    with pytest.raises(ValueError, match="dropout with a rate above 0 in MLP, but got a pass that draws nothing"):
        mc_predict(MLP((2,), 3, (4,)), torch.zeros(1, 2), masks=masks)


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
