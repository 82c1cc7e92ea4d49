"""Rows of examples, and the scores of rows of either kind."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.evaluation.rows import MCSettings, example_rows, example_scores, token_scores
from thinned.models import MLP, DropoutRates
from thinned.uncertainty import classification_scores, mc_predict

K, S = 3, 6
OF_EACH = {"prediction", "confidence", "predictive_entropy", "nll", "correct", "brier", "probs"}
OF_SAMPLES = {"expected_entropy", "mutual_information", "variation_ratio", "std"}
SETTINGS = MCSettings(num_samples=S, masks="auto", seed=3, sites=None, scale=1.0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mlp() -> MLP:
    net = MLP((4,), K, (32,), dropout=DropoutRates(embedding=0.1, mlp=0.5)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def assert_describe(rows: dict[str, Tensor], prefix: str, probs: Tensor, targets: Tensor) -> None:
    """The columns that begin with the prefix are those of predictions (N, K)."""
    torch.testing.assert_close(rows[f"{prefix}probs"], probs)
    torch.testing.assert_close(rows[f"{prefix}confidence"], probs.amax(-1))
    torch.testing.assert_close(rows[f"{prefix}predictive_entropy"], -(probs * probs.log()).sum(-1))
    torch.testing.assert_close(rows[f"{prefix}nll"], -probs[torch.arange(len(probs)), targets].log())
    target_probs = nn.functional.one_hot(targets, K)
    torch.testing.assert_close(rows[f"{prefix}brier"], ((probs - target_probs) ** 2).sum(-1))
    assert rows[f"{prefix}prediction"].equal(probs.argmax(-1))
    assert rows[f"{prefix}correct"].equal(probs.argmax(-1) == targets)


def test_rows_describe_both_predictions() -> None:
    net, x, y = mlp(), torch.randn(20, 4), torch.randint(K, (20,))
    rows = example_rows(net, (x, y), torch.arange(5, 25), SETTINGS)
    mc = mc_predict(net, x, num_samples=S, seed=3)
    assert_describe(rows, "", mc.mean, y)
    assert_describe(rows, "deterministic_", net(x).softmax(-1), y)
    assert rows.keys() == {"index", "target", *OF_EACH, *OF_SAMPLES, *(f"deterministic_{name}" for name in OF_EACH)}
    assert rows["index"].tolist() == list(range(5, 25))
    assert rows["target"].equal(y)
    for name in ("expected_entropy", "mutual_information", "variation_ratio"):
        torch.testing.assert_close(rows[name], getattr(mc, name))
    torch.testing.assert_close(rows["std"], mc.variance[torch.arange(20), mc.mean.argmax(-1)].sqrt())
    assert not torch.allclose(rows["nll"], rows["deterministic_nll"], atol=0.1)  # so that neither stands for the other


def test_no_samples_leave_the_deterministic_network() -> None:
    net, x, y = mlp(), torch.randn(20, 4), torch.randint(K, (20,))
    rows = example_rows(net, (x, y), torch.arange(20), None)
    for prefix in ("", "deterministic_"):
        assert_describe(rows, prefix, net(x).softmax(-1), y)
    assert rows.keys() == {"index", "target", *OF_EACH, *(f"deterministic_{name}" for name in OF_EACH)}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x]], ids=["tensor", "list"])
def test_without_targets_nothing_is_said_of_them(wrap: Any) -> None:
    net, x = mlp(), torch.randn(20, 4)
    rows = example_rows(net, wrap(x), torch.arange(20), SETTINGS)
    known = OF_EACH - {"nll", "correct", "brier"}
    assert rows.keys() == {"index", *known, *OF_SAMPLES, *(f"deterministic_{name}" for name in known)}
    torch.testing.assert_close(rows["probs"], mc_predict(net, x, num_samples=S, seed=3).mean)


@pytest.mark.parametrize("same", [True, False])
def test_first_index_seeds_independent_masks(same: bool) -> None:
    """Two batches of equal inputs draw other masks, but a batch the same each time."""
    net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, K)).eval(), torch.randn(20, 4)
    first, second = (example_rows(net, x, torch.arange(i, i + 20), SETTINGS) for i in (0, 0 if same else 20))
    assert torch.equal(first["probs"], second["probs"]) == same
    assert first["deterministic_probs"].equal(second["deterministic_probs"])


def test_scores_of_examples_are_those_of_their_probabilities() -> None:
    net, x, y = mlp(), torch.randn(40, 4), torch.randint(K, (40,))
    rows = example_rows(net, (x, y), torch.arange(40), SETTINGS)
    for way, probs in (("", mc_predict(net, x, num_samples=S, seed=3).mean), ("deterministic_", net(x).softmax(-1))):
        assert example_scores(rows, way) == pytest.approx(classification_scores(probs, y), rel=1e-6)


def tokens() -> dict[str, Tensor]:
    """Four tokens of a vocabulary of 16, the second wrong, of 1 + 3 + 0 + 2 bytes."""
    entropies = torch.tensor([0.1, 0.7, 0.8, 0.2]) * math.log(16)
    of_samples = {
        "nll": torch.tensor([0.1, 2.0, 0.5, 0.2]),
        "confidence": torch.tensor([0.9, 0.7, 0.6, 0.85]),
        "correct": torch.tensor([True, False, True, True]),
        "predictive_entropy": entropies,
    }
    single = {"nll": of_samples["nll"] + 1, "confidence": of_samples["confidence"], "predictive_entropy": entropies}
    single["correct"] = torch.zeros(4, dtype=torch.bool)
    rows = {"bytes": torch.tensor([1, 3, 0, 2]), "target": torch.tensor([4, 5, 6, 7])}
    return rows | of_samples | {f"deterministic_{name}": column for name, column in single.items()}


def test_scores_of_tokens_by_hand() -> None:
    expected = {
        "accuracy": 3 / 4,
        "nll": 2.8 / 4,
        "ece": (0.1 + 0.7 + 0.4 + 0.15) / 4,
        "auroc_error": 2 / 3,
        "aurc": (0 + 0 + 1 / 3 + 1 / 4) / 4,
        "bits_per_byte": 2.8 / math.log(2) / 6,
    }
    assert token_scores(tokens()) == pytest.approx(expected, abs=1e-6)


def test_scores_of_the_chosen_columns() -> None:
    found = token_scores(tokens(), "deterministic_")
    assert math.isnan(found.pop("auroc_error"))  # all are errors
    expected = {"accuracy": 0, "nll": 6.8 / 4, "ece": 3.05 / 4, "aurc": 1, "bits_per_byte": 6.8 / math.log(2) / 6}
    assert found == pytest.approx(expected, abs=1e-6)


def test_bits_per_byte_need_bytes() -> None:
    rows = tokens()
    del rows["bytes"]
    assert token_scores(rows).keys() == {"accuracy", "nll", "ece", "auroc_error", "aurc"}
