"""Monte-Carlo dropout at test and predict: which rows, columns, scores and files come out, and that they are right."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from thinned.evaluation import MCDropout
from thinned.evaluation.batch import in_half
from thinned.models import MLP, DropoutRates
from thinned.models.net import Logits
from thinned.uncertainty import classification_scores, mc_predict
from thinned.uncertainty.acting_dropout import Acting, of_our_make
from thinned.uncertainty.scores import nll

SCORES = [
    "accuracy", "balanced_accuracy", "nll", "brier", "ece", "adaptive_ece", "smooth_ece", "auroc_error", "aurc",
    "augrc", "coverage_at_5_risk", "risk_at_80_coverage",
]  # fmt: skip
OF_PROBS = ["brier_miscalibration", "brier_discrimination", "brier_uncertainty"]
OF_EACH_WAY = ["prediction", "confidence", "predictive_entropy", "nll", "correct", "brier", "rank", "probs"]
DETERMINISTIC = {"index", "target", *(f"deterministic_{name}" for name in OF_EACH_WAY)}
OF_SAMPLES = ["expected_entropy", "mutual_information", "variation_ratio", "std", "nll_at"]
COLUMNS = DETERMINISTIC | {f"mc_dropout_{name}" for name in OF_EACH_WAY + OF_SAMPLES}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Functional(nn.Module):
    """Whose dropout is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.relu(self.layer(x)), 0.5, self.training))


def thinnable(**rates: float) -> MLP:
    net = MLP((4,), 3, (32,), dropout=DropoutRates(**rates or {"embedding": 0.1, "mlp": 0.5}))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net.eval()


def examples(count: int = 30) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4), torch.randint(3, (count,))


def loader(*columns: Tensor, batch_size: int = 7) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*columns), batch_size)


def test_rows_are_the_prediction_of_every_example_in_order(run: Callable[..., Any]) -> None:
    (x, y), net = examples(), thinnable()
    rows = run("predict", net, loader(x, y))
    mc = mc_predict(net, x, num_samples=8, seed=3)
    assert rows.keys() == COLUMNS
    assert rows["index"].tolist() == list(range(30))
    assert rows["target"].tolist() == y.tolist()
    torch.testing.assert_close(rows["mc_dropout_probs"], mc.mean)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio"):
        torch.testing.assert_close(rows[f"mc_dropout_{name}"], getattr(mc, name), rtol=1e-5, atol=1e-6)
    predicted_class = mc.mean.argmax(-1)
    assert torch.equal(rows["mc_dropout_prediction"], predicted_class)
    torch.testing.assert_close(rows["mc_dropout_std"], mc.variance.sqrt()[torch.arange(30), predicted_class])
    torch.testing.assert_close(rows["deterministic_confidence"], net(x).softmax(-1).amax(-1))


def test_test_writes_the_rows_that_predict_does(
    run: Callable[..., Any], read_rows: Callable[..., Any], tmp_path: Path
) -> None:
    (x, y), net = examples(), thinnable()
    predicted = run("predict", net, loader(x, y))
    (tmp_path / "predictions.parquet").unlink()
    run("test", net, loader(x, y))
    tested = read_rows()
    assert list(tested) == list(predicted)
    assert all(torch.equal(tested[name], column) for name, column in predicted.items())


@pytest.mark.parametrize("net", [thinnable, Functional])
def test_columns_agree_with_each_other(net: Callable[[], nn.Module], run: Callable[..., Any]) -> None:
    rows = run("predict", net(), loader(*examples()))
    p = rows["mc_dropout_probs"]
    torch.testing.assert_close(p.sum(-1), torch.ones(30))
    torch.testing.assert_close(rows["mc_dropout_confidence"], p.amax(-1))
    torch.testing.assert_close(rows["mc_dropout_predictive_entropy"], -(p * p.log()).sum(-1))
    difference = rows["mc_dropout_predictive_entropy"] - rows["mc_dropout_expected_entropy"]
    torch.testing.assert_close(rows["mc_dropout_mutual_information"], difference, rtol=0, atol=1e-6)
    assert (rows["mc_dropout_std"] > 0).all()
    votes = rows["mc_dropout_variation_ratio"] * 8
    torch.testing.assert_close(votes, votes.round())


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_shared_masks_give_the_same_rows_in_any_batches(batch_size: int, run: Callable[..., Any]) -> None:
    (x, y), net = examples(), thinnable()
    whole, split = (run("predict", net, loader(x, y, batch_size=size)) for size in (30, batch_size))
    for name, column in whole.items():
        torch.testing.assert_close(split[name], column, rtol=1e-5, atol=1e-6)


def test_independent_masks_are_reproducible_and_differ_between_batches(run: Callable[..., Any]) -> None:
    """Four times the same batch; a seed that ignored the batch would predict it four times alike."""
    x, y = torch.randn(1, 4).expand(28, 4), torch.zeros(28, dtype=torch.int64)
    net = Functional()
    rows, again = (run("predict", net, loader(x, y)) for _ in range(2))
    assert torch.equal(rows["mc_dropout_probs"], again["mc_dropout_probs"])
    assert len(rows["mc_dropout_probs"].unique(dim=0)) == 28


def test_index_in_the_batch_decides_the_row(run: Callable[..., Any]) -> None:
    """Given in another order, and one twice."""
    (x, y), net = examples(10), thinnable()
    order = torch.tensor([9, 3, 0, 5, 8, 1, 4, 2, 7, 6, 9])
    rows = run("predict", net, loader(x[order], y[order], order, batch_size=4))
    assert rows["index"].tolist() == list(range(10))
    assert torch.equal(rows["target"], y)
    torch.testing.assert_close(rows["mc_dropout_probs"], mc_predict(net, x, num_samples=8, seed=3).mean)


@pytest.mark.parametrize("wrap", [loader, DataLoader])
def test_inputs_without_targets_can_be_predicted(wrap: Callable[..., Any], run: Callable[..., Any]) -> None:
    x, net = torch.randn(10, 4), thinnable()
    rows = run("predict", net, wrap(x, batch_size=4))
    named = ("nll", "correct", "brier", "rank")
    of_targets = {
        "target",
        "mc_dropout_nll_at",
        *(f"{way}_{name}" for way in ("mc_dropout", "deterministic") for name in named),
    }
    assert rows.keys() == COLUMNS - of_targets
    torch.testing.assert_close(rows["mc_dropout_probs"], mc_predict(net, x, num_samples=8, seed=3).mean)


def test_scores_of_both_networks(run: Callable[..., Any], tmp_path: Path) -> None:
    (x, y), net = examples(), thinnable()
    metrics = run("test", net, loader(x, y), pictures=True)
    deterministic = classification_scores(net(x).softmax(-1), y)
    dropout = classification_scores(mc_predict(net, x, num_samples=8, seed=3).mean, y)
    settings = {"num_samples": 8, "masks": "shared", "seed": 3, "sites": ["embedding", "mlp"], "scale": 1.0}
    assert {key: metrics["mc_dropout"].pop(key) for key in settings} == settings
    for way in ("deterministic", "mc_dropout"):
        recall = metrics[way].pop("recall")
        assert {int(k): of_class["n"] for k, of_class in recall.items()} == dict(enumerate(y.bincount().tolist()))
        assert mean(of_class["value"] for of_class in recall.values()) == pytest.approx(
            metrics[way]["balanced_accuracy"]
        )
    for scored, expected in ((metrics["deterministic"], deterministic), (metrics["mc_dropout"], dropout)):
        miscalibration, discrimination, uncertainty = (scored[key] for key in OF_PROBS)
        assert miscalibration - discrimination + uncertainty == pytest.approx(scored["brier"])
        assert scored == pytest.approx(expected | {key: scored[key] for key in OF_PROBS}, rel=1e-5)
    assert metrics.keys() == {"logged", "deterministic", "mc_dropout"}
    logged = {f"mc/{key}": metrics["mc_dropout"][key] for key in SCORES + OF_PROBS}
    logged |= {f"test/{key}": metrics["deterministic"][key] for key in SCORES + OF_PROBS}
    assert metrics["logged"] == pytest.approx(logged, rel=1e-5)
    drawn = {"reliability", "risk_coverage", "entropy", "mutual_information", "nll_by_samples", "confusion"}
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {f"{name}.png" for name in drawn}


def test_scores_that_the_task_logs_are_not_logged_again(
    run: Callable[..., Any], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "test_scores", frozenset({"nll", "brier"}), raising=False)
    logged = run("test", thinnable(), loader(*examples()))["logged"]
    assert logged.keys() == {f"mc/{key}" for key in SCORES + OF_PROBS} | {
        f"test/{key}" for key in {*SCORES, *OF_PROBS} - {"nll", "brier"}
    }


def test_deterministic_network_is_not_asked_again_for_what_the_test_step_returns(
    run: Callable[..., Any], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it returns is of other inputs, so that the rows tell which of the two they are of."""
    (x, y), net = examples(), thinnable()
    returned = Logits(torch.randn(30, 3))
    monkeypatch.setattr(plain, "test_step", lambda self, batch, batch_idx: returned)
    metrics = run("test", net, loader(x, y, batch_size=30))
    expected = classification_scores(returned[:].softmax(-1), y)
    assert {key: metrics["deterministic"][key] for key in SCORES} == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert metrics["deterministic"]["nll"] != pytest.approx(nll(net(x).softmax(-1), y).mean().item(), rel=1e-2)


def test_scores_count_a_repeated_example_once(run: Callable[..., Any]) -> None:
    (x, y), net, index = examples(10), thinnable(), torch.arange(13) % 10
    once, twice = (run("test", net, loader(x[i], y[i], i))["mc_dropout"] for i in (index[:10], index))
    assert [twice[key] for key in SCORES] == pytest.approx([once[key] for key in SCORES], rel=1e-5)


def test_net_with_functional_dropout_is_sampled_per_element(run: Callable[..., Any]) -> None:
    metrics = run("test", Functional(), loader(*examples()))
    assert metrics["mc_dropout"]["masks"] == "independent"
    assert metrics["mc_dropout"]["nll"] != metrics["deterministic"]["nll"]


def test_undefined_score_is_null_in_json(make_trainer: Callable[..., Trainer], plain: Any, tmp_path: Path) -> None:
    x, net = torch.randn(10, 4), thinnable()
    trainer = make_trainer(callbacks=[MCDropout(None)])
    trainer.test(plain(net), loader(x, net(x).argmax(-1)), verbose=False)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["deterministic"]["accuracy"] == 1
    assert metrics["deterministic"]["auroc_error"] is None


def test_automatic_sites_and_rates_are_those_of_lowest_validation_nll(run: Callable[..., Any], splits: Any) -> None:
    """Rates of 0.4 and 0.5: every combination is tried, then the best at other rates, below 1.

    The targets are what the net says without dropout, so that the lowest rates are best.
    """
    net, (x, y), x_all = thinnable(embedding=0.4, mlp=0.5), examples(), torch.randn(40, 4)
    y_all = net(x_all).argmax(-1)
    fitted = in_half(x_all, "fit")
    x_val, y_val = x_all[fitted], y_all[fitted]

    def validation_nll(acting: Acting) -> float:
        mean = mc_predict(net, x_val, num_samples=8, seed=3, sites=acting.sites, scale=acting.scale).mean
        return nll(mean, y_val).mean().item()

    combined = [Acting(sites) for sites in (("embedding",), ("mlp",), ("embedding", "mlp"))]
    best_sites = min(combined, key=validation_nll).sites
    assert len(best_sites) == 1  # so that the choice is not what `all` would have been
    scales = (0.25, 0.5, 2.0) if best_sites == ("embedding",) else (0.25, 0.5)
    expected = {acting: validation_nll(acting) for acting in [*combined, *(Acting(best_sites, s) for s in scales)]}
    best = min(expected, key=expected.__getitem__)

    data = splits(val=loader(x_all, y_all), test=loader(x, y))
    metrics = run("test", net, data, sites="auto")
    assert metrics["mc_dropout"]["sites_nll"] == pytest.approx(
        {str(a): value for a, value in expected.items()}, rel=1e-5
    )
    assert [*metrics["mc_dropout"]["sites_nll"].values()] == sorted(metrics["mc_dropout"]["sites_nll"].values())
    assert metrics["mc_dropout"]["sites"] == list(best.sites)
    assert metrics["mc_dropout"]["scale"] == best.scale
    assert best.scale < 1
    torch.testing.assert_close(
        run("predict", net, data, sites="auto")["mc_dropout_probs"],
        mc_predict(net, x, num_samples=8, seed=3, sites=best.sites, scale=best.scale).mean,
    )


def test_given_sites_act_alone(run: Callable[..., Any]) -> None:
    (x, y), net = examples(), thinnable()
    probs = run("predict", net, loader(x, y), sites=["embedding"])["mc_dropout_probs"]
    torch.testing.assert_close(probs, mc_predict(net, x, num_samples=8, seed=3, sites=["embedding"]).mean)


def test_no_samples_leave_the_deterministic_network(run: Callable[..., Any]) -> None:
    (x, y), net = examples(), thinnable()
    metrics = run("test", net, loader(x, y), num_samples=None)
    assert metrics.keys() == {"logged", "deterministic"}
    assert metrics["logged"].keys() == {f"test/{key}" for key in SCORES + OF_PROBS}
    rows = run("predict", net, loader(x, y), num_samples=None)
    assert rows.keys() == DETERMINISTIC
    torch.testing.assert_close(rows["deterministic_probs"], net(x).softmax(-1))


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_net_that_drops_nothing_is_refused(stage: str, run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected .* with a rate above 0"):
        run(stage, nn.Linear(4, 3), loader(*examples()))
    assert not list(tmp_path.iterdir())


def test_sites_without_dropout_are_refused_before_training(make_trainer: Callable[..., Trainer], plain: Any) -> None:
    callback = MCDropout(sites=["residual"])
    with pytest.raises(ValueError, match=r"Expected .*sites among those .*'embedding', 'mlp'.* but got .*'residual'"):
        callback.setup(make_trainer(), plain(thinnable()), "fit")


class FailsLate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Functional()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 7:
            raise RuntimeError("last batch")
        return self.body(x)


def test_failed_test_leaves_nothing(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="last batch"):
        run("test", FailsLate(), loader(*examples()))
    assert not list(tmp_path.iterdir())


def test_failed_prediction_keeps_the_rows_that_it_has(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="last batch"):
        run("predict", FailsLate(), loader(*examples()))
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.parts"]
    (chunk,) = tmp_path.glob("*/*.parquet")
    assert pq.read_table(chunk)["index"].to_pylist() == list(range(28))


def test_test_needs_targets(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected test batches .* but got inputs alone"):
        run("test", thinnable(), loader(torch.randn(10, 4)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"), [("num_samples", 1), ("masks", "both"), ("sites", "some"), ("sites", ["hidden"])]
)
def test_setting_outside_its_range_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Expected (mc_dropout\.)?{key} .*but got"):
        MCDropout(**{key: value})


def test_shared_masks_of_a_sharded_net_are_refused_before_training(plain: Any, make_trainer: Any) -> None:
    module = plain(MLP((1, 2, 2), 3, dropout=DropoutRates(mlp=0.5)))
    module._device_mesh = object()  # as a ModelParallelStrategy sets it
    with pytest.raises(ValueError, match=r"Expected mc_dropout\.masks to be auto or independent .*, but got 'shared'"):
        MCDropout(masks="shared").setup(make_trainer(), module, "fit")
    MCDropout(masks="auto").setup(make_trainer(), module, "fit")
    assert of_our_make(module)  # and is not examined
