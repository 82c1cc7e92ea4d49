"""Rows of examples: what each way says of them, and the view of one way's columns."""

import math
from collections.abc import Generator

import pytest
import torch
from torch import Tensor, nn

from thinned.evaluation.batch import Batch
from thinned.evaluation.prediction_store import Columns
from thinned.evaluation.rows import predicted_rows
from thinned.evaluation.ways import SampledNetworks, Way, standard_ways
from thinned.models import MLP, DropoutRates
from thinned.models.net import Logits
from thinned.uncertainty import classification_scores, mc_predict
from thinned.uncertainty.scores import scores

K, S = 3, 6
OF_EACH = {"prediction", "confidence", "predictive_entropy", "nll", "correct", "brier", "rank", "probs"}
OF_SAMPLES = {"expected_entropy", "mutual_information", "variation_ratio", "std", "nll_at"}
OF_TARGETS = {"nll", "correct", "brier", "rank", "nll_at"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mlp() -> MLP:
    net = MLP((4,), K, (32,), dropout=DropoutRates(embedding=0.1, mlp=0.5)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def columns_of(way: str, names: set[str]) -> set[str]:
    return {f"{way}_{name}" for name in names}


def rows_of(
    net: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    first: int = 0,
    num_samples: int | None = S,
    more_ways: tuple[Way, ...] = (),
) -> dict[str, Tensor]:
    """The rows of examples from index `first` on; they are no sequences."""
    ways = [*standard_ways(num_samples, "auto", "all", seed=3), *more_ways]
    for way in ways:
        way.bind(net)
    rows, sequences = predicted_rows(Batch(x, torch.arange(first, first + len(x)), y), net, ways)
    assert not sequences
    return rows


def assert_describe(rows: dict[str, Tensor], way: str, probs: Tensor, targets: Tensor) -> None:
    """The columns of the way are those of predictions (N, K)."""
    torch.testing.assert_close(rows[f"{way}_probs"], probs)
    torch.testing.assert_close(rows[f"{way}_confidence"], probs.amax(-1))
    torch.testing.assert_close(rows[f"{way}_predictive_entropy"], -(probs * probs.log()).sum(-1))
    torch.testing.assert_close(rows[f"{way}_nll"], -probs[torch.arange(len(probs)), targets].log())
    target_probs = nn.functional.one_hot(targets, K)
    torch.testing.assert_close(rows[f"{way}_brier"], ((probs - target_probs) ** 2).sum(-1))
    order = probs.argsort(descending=True)
    assert rows[f"{way}_rank"].tolist() == [1 + order[i].tolist().index(y) for i, y in enumerate(targets.tolist())]
    assert rows[f"{way}_prediction"].equal(probs.argmax(-1))
    assert rows[f"{way}_correct"].equal(probs.argmax(-1) == targets)


def test_rows_describe_both_predictions() -> None:
    net, x, y = mlp(), torch.randn(20, 4), torch.randint(K, (20,))
    rows = rows_of(net, x, y, first=5)
    mc = mc_predict(net, x, num_samples=S, seed=3)
    assert_describe(rows, "mc_dropout", mc.mean, y)
    assert_describe(rows, "deterministic", net(x).softmax(-1), y)
    own = columns_of("mc_dropout", OF_EACH | OF_SAMPLES) | columns_of("deterministic", OF_EACH)
    assert rows.keys() == {"index", "target", *own}
    assert rows["index"].tolist() == list(range(5, 25))
    assert rows["target"].equal(y)
    for name in ("expected_entropy", "mutual_information", "variation_ratio"):
        torch.testing.assert_close(rows[f"mc_dropout_{name}"], getattr(mc, name))
    torch.testing.assert_close(rows["mc_dropout_std"], mc.variance[torch.arange(20), mc.mean.argmax(-1)].sqrt())
    # So that neither stands for the other:
    assert not torch.allclose(rows["mc_dropout_nll"], rows["deterministic_nll"], atol=0.1)
    assert not any(column.requires_grad for column in rows.values())


def test_no_samples_leave_the_deterministic_network() -> None:
    net, x, y = mlp(), torch.randn(20, 4), torch.randint(K, (20,))
    rows = rows_of(net, x, y, num_samples=None)
    assert_describe(rows, "deterministic", net(x).softmax(-1), y)
    assert rows.keys() == {"index", "target", *columns_of("deterministic", OF_EACH)}


def test_without_targets_nothing_is_said_of_them() -> None:
    net, x = mlp(), torch.randn(20, 4)
    rows = rows_of(net, x)
    known = OF_EACH - OF_TARGETS
    own = columns_of("mc_dropout", known | OF_SAMPLES - OF_TARGETS) | columns_of("deterministic", known)
    assert rows.keys() == {"index", *own}
    torch.testing.assert_close(rows["mc_dropout_probs"], mc_predict(net, x, num_samples=S, seed=3).mean)
    torch.testing.assert_close(rows["deterministic_probs"], net(x).softmax(-1))


@pytest.mark.parametrize("same", [True, False])
def test_first_index_seeds_independent_masks(same: bool) -> None:
    """Two batches of equal inputs draw other masks, but a batch the same each time."""
    net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, K)).eval(), torch.randn(20, 4)
    first, second = (rows_of(net, x, first=i) for i in (0, 0 if same else 20))
    assert torch.equal(first["mc_dropout_probs"], second["mc_dropout_probs"]) == same
    assert first["deterministic_probs"].equal(second["deterministic_probs"])


def test_scores_of_examples_are_those_of_their_probabilities() -> None:
    net, x, y = mlp(), torch.randn(40, 4), torch.randint(K, (40,))
    rows = rows_of(net, x, y)
    probs = {"mc_dropout": mc_predict(net, x, num_samples=S, seed=3).mean, "deterministic": net(x).softmax(-1)}
    for way, predicted in probs.items():
        expected = classification_scores(predicted, y)
        got = scores(Columns(rows, way))
        parts = [got.pop(f"brier_{part}") for part in ("miscalibration", "discrimination", "uncertainty")]
        assert got == pytest.approx(expected, rel=1e-6)
        assert parts[0] - parts[1] + parts[2] == pytest.approx(expected["brier"], rel=1e-6)


class Tempered(Way):
    """The trained network at several temperatures: a distribution for each."""

    name, label = "tempered", "tempered"

    def __init__(self, *temperatures: float) -> None:
        self.temperatures = temperatures

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        for temperature in self.temperatures:
            yield Logits(batch.output(self.nets[0])[:] / temperature)


def test_way_that_streams_one_distribution_has_no_spread() -> None:
    net, x, y = mlp(), torch.randn(20, 4), torch.randint(K, (20,))
    rows = rows_of(net, x, y, more_ways=(Tempered(4.0),))
    assert_describe(rows, "tempered", (net(x) / 4).softmax(-1), y)
    assert {name for name in rows if name.startswith("tempered")} == columns_of("tempered", OF_EACH)


def test_way_that_streams_two_distributions_has_their_spread() -> None:
    """Without dropout: the columns come from what is streamed, not from what the way is."""
    net, x, y = mlp(), torch.randn(20, 4), torch.randint(K, (20,))
    rows = rows_of(net, x, y, num_samples=None, more_ways=(Tempered(1.0, 4.0),))
    p, q = net(x).softmax(-1), (net(x) / 4).softmax(-1)
    mean = (p + q) / 2
    assert_describe(rows, "tempered", mean, y)
    assert {name for name in rows if name.startswith("tempered")} == columns_of("tempered", OF_EACH | OF_SAMPLES)
    expected_entropy = -((p * p.log()).sum(-1) + (q * q.log()).sum(-1)) / 2
    torch.testing.assert_close(rows["tempered_expected_entropy"], expected_entropy)
    information = -(mean * mean.log()).sum(-1) - expected_entropy
    torch.testing.assert_close(rows["tempered_mutual_information"], information, rtol=1e-5, atol=1e-6)
    std = (p - q).abs()[torch.arange(20), mean.argmax(-1)] / math.sqrt(2)
    torch.testing.assert_close(rows["tempered_std"], std, rtol=1e-4, atol=1e-6)
    assert rows["tempered_variation_ratio"].tolist() == [0] * 20  # no temperature changes the order


def test_two_ways_of_one_kind_have_columns_of_their_own() -> None:
    net, x, y = mlp(), torch.randn(20, 4), torch.randint(K, (20,))
    other = SampledNetworks(S, sites=["mlp"], seed=8)
    other.name = "mlp_alone"
    rows = rows_of(net, x, y, more_ways=(other,))
    assert_describe(rows, "mc_dropout", mc_predict(net, x, num_samples=S, seed=3).mean, y)
    assert_describe(rows, "mlp_alone", mc_predict(net, x, num_samples=S, seed=8, sites=["mlp"]).mean, y)
