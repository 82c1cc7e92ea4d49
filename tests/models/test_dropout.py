"""Dropout by its definition: what is dropped, how often, and as a function of which seed."""

import os
import subprocess
import sys

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.models import SITES, Dropout, DropoutRates
from thinned.models.dropout import check_sites, derive_seed, dropout_mask, sample_masks, sites_in

RATES = [0.1, 0.25, 0.5, 0.9]  # 0.25 and 0.5 are drawn with 8 bits, the others with 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def kept(mask: Tensor) -> Tensor:
    return (mask != 0).double()


@pytest.mark.parametrize("p", RATES)
def test_kept_elements_are_divided_by_the_keep_probability(p: float) -> None:
    x = torch.randn(1000, dtype=torch.float64)
    y = Dropout(p, "mlp")(x)
    assert 0 < kept(y).sum() < 1000
    torch.testing.assert_close(y[y != 0], x[y != 0] / (1 - p), rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [0.002, *RATES])
def test_share_of_dropped_elements_is_p(p: float) -> None:
    """False failure: 1e-6 per rate (exact binomial test)."""
    dropped = int((Dropout(p, "mlp")(torch.ones(99_991)) == 0).sum())
    assert stats.binomtest(dropped, 99_991, p).pvalue > 1e-6


@pytest.mark.parametrize("p", RATES)
def test_mean_of_training_output_is_evaluation_output(p: float) -> None:
    """False failure: below 4e-7 per rate (8 means of 4,000 draws, each within 5.5 standard errors)."""
    x, dropout = torch.linspace(-2, 3, 8, dtype=torch.float64), Dropout(p, "mlp")
    mean = torch.stack([dropout(x) for _ in range(4000)]).mean(0)
    standard_error = x.abs() * (p / (1 - p) / 4000) ** 0.5
    assert ((mean - dropout.eval()(x)).abs() < 5.5 * standard_error).all()


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_elements_and_calls_are_independent(p: float) -> None:
    """False failure: below 3e-7 per rate (seven correlations of 200,000 pairs, each within 5.5 standard errors)."""
    first, second = (kept(Dropout(p, "mlp")(torch.ones(200_000))) for _ in range(2))
    pairs = [(first, second), *((first[lag:], first[:-lag]) for lag in (1, 2, 4, 7, 8, 64))]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) * len(a) ** 0.5 < 5.5


@pytest.mark.parametrize("p", RATES)
def test_same_distribution_as_torch(p: float) -> None:
    """False failure: 1e-6 per rate (two-sample Kolmogorov-Smirnov test of a weighted sum)."""
    weights = torch.randn(32)
    ours, theirs = Dropout(p, "mlp")(torch.ones(4000, 32)), F.dropout(torch.ones(4000, 32), p)
    assert stats.ks_2samp((ours @ weights).numpy(), (theirs @ weights).numpy()).pvalue > 1e-6


@pytest.mark.parametrize("count", [1, 3, 7, 9])
@pytest.mark.parametrize("p", [0.3, 0.5])
def test_every_element_drops_where_a_word_is_not_filled(count: int, p: float) -> None:
    """False failure: below 1e-5 per case (a binomial test per element)."""
    dropout, x = Dropout(p, "mlp"), torch.ones(count)
    dropped = sum(1 - kept(dropout(x)) for _ in range(1000))
    assert all(stats.binomtest(int(n), 1000, p).pvalue > 1e-6 for n in dropped)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_backward_uses_the_mask_of_forward(p: float) -> None:
    x = torch.randn(1000, requires_grad=True)
    y = Dropout(p, "mlp")(x)
    y.sum().backward()
    assert torch.equal(x.grad * x, y)


def test_each_forward_and_each_layer_draws_its_own_mask() -> None:
    """False failure: 3 * 2^-1000."""
    a, b, x = Dropout(0.5, "mlp"), Dropout(0.5, "mlp"), torch.ones(1000)
    masks = [a(x), a(x), b(x)]
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_mask_is_a_function_of_the_global_seed() -> None:
    """False failure: 2^-100."""

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Dropout(0.5, "mlp")(torch.ones(100))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_identity_in_evaluation_and_without_a_rate() -> None:
    x = torch.randn(10)
    assert Dropout(0.5, "mlp").eval()(x) is x
    assert Dropout(0.0, "mlp")(x) is x


def test_rate_of_one_gives_zeros_and_no_gradient() -> None:
    x = torch.randn(10, requires_grad=True)
    y = Dropout(1.0, "mlp")(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(10))
    assert torch.equal(x.grad, torch.zeros(10))
    assert torch.equal(dropout_mask((10,), 1.0), torch.zeros(10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    y = Dropout(0.3, "mlp")(torch.ones(100, dtype=dtype))
    scale = torch.tensor(1 / 0.7, dtype=torch.float64).to(dtype).item()
    assert y.dtype == dtype
    assert set(y.tolist()) == {0.0, scale}


def test_compiled_dropout_still_drops() -> None:
    """False failure: 1e-6 (binomial test); equal masks, 2^-10000. The compiled code is what any backend is given."""
    compiled, x = torch.compile(Dropout(0.3, "mlp"), backend="aot_eager", fullgraph=True), torch.ones(10_000)
    first, second = compiled(x), compiled(x)
    assert stats.binomtest(int((first == 0).sum()), 10_000, 0.3).pvalue > 1e-6
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True, None])
@pytest.mark.parametrize("site", SITES)
def test_anything_but_a_probability_is_refused_by_the_name_of_its_site(p: float, site: str) -> None:
    for make in (lambda: Dropout(p, site), lambda: DropoutRates(**{site: p})):
        with pytest.raises(ValueError, match=rf"dropout\.{site} to be a probability in \[0, 1\], but got"):
            make()


def test_sites_come_in_canonical_order_and_others_are_refused() -> None:
    assert check_sites(["mlp", "attention"]) == ("attention", "mlp")
    with pytest.raises(ValueError, match=r"but got \['hidden'\]"):
        Dropout(0.5, "hidden")
    with pytest.raises(ValueError, match="Expected sites among"):
        check_sites("mlp")


def test_dropout_holds_no_state() -> None:
    assert not Dropout(0.5, "mlp").state_dict()
    assert str(Dropout(0.5, "mlp")) == "Dropout(p=0.5, site=mlp)"


def test_sites_of_a_net_are_those_with_a_rate() -> None:
    net = nn.Sequential(Dropout(0.1, "mlp"), Dropout(0, "residual"), nn.Sequential(Dropout(0.5, "embedding")))
    assert sites_in(net) == ("embedding", "mlp")


NET = nn.ModuleDict(
    {"a": Dropout(0.5, "mlp", (12,)), "b": Dropout(0.5, "mlp", (12,)), "c": Dropout(0.3, "residual", (2, 6))}
)


def test_sampled_masks_are_a_function_of_seed_sample_and_name() -> None:
    """False failure: 2^-12 a pair for another seed, excluded by the seeds chosen here."""
    masks = sample_masks(NET, 0, 0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = sample_masks(NET, 0, 0, ["residual"])
    assert masks.keys() == {"a", "b", "c"}
    assert again.keys() == {"c"}
    assert torch.equal(masks["c"], again["c"])
    others = [masks["b"], sample_masks(NET, 1, 0)["a"], sample_masks(NET, 0, 1)["a"]]
    assert not any(torch.equal(masks["a"], other) for other in others)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_masks_are_float64_and_need_a_shape() -> None:
    assert sample_masks(NET, 0, 0)["a"].dtype == torch.float64
    with pytest.raises(AssertionError, match="shape of the mask of b"):
        sample_masks(nn.ModuleDict({"a": NET["a"], "b": Dropout(0.5, "mlp")}), 0, 0)


def test_derived_seeds_are_known_and_keep_parts_apart() -> None:
    # The first 8 bytes of BLAKE2b, little end first, halved: `printf 0/1/stages.mlp_dropout0 | b2sum -l 64`.
    expected = int.from_bytes(bytes.fromhex("7b073fdeb0ba59a6"), "little") // 2
    assert derive_seed(0, 1, "stages.mlp_dropout0") == expected == 5993408576014484413
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert all(0 <= derive_seed(i) < 2**63 for i in range(1000))


def test_masks_are_equal_in_every_process() -> None:
    code = (
        "from torch import nn; from thinned.models.dropout import *;"
        "net = nn.ModuleDict({'a': Dropout(0.5, 'mlp', (12,))});"
        "print(derive_seed(7, 'x'), *sample_masks(net, 0, 3)['a'].int().tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == "2818651468479842428 0 2 2 2 2 0 2 2 2 2 2 0"
