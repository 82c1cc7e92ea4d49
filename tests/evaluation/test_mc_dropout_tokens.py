"""Monte-Carlo dropout of text: a row per token, a row per sequence, their scores, and the choice of sites."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thinned.evaluation import batch as batch_module
from thinned.evaluation import ways as ways_module
from thinned.evaluation.batch import Batch, in_half
from thinned.evaluation.prediction_store import Columns
from thinned.evaluation.rows import predicted_rows
from thinned.evaluation.ways import standard_ways
from thinned.models import GPT, DropoutRates
from thinned.uncertainty.acting_dropout import Acting
from thinned.uncertainty.scores import scores

V, T, S = 11, 6, 8
BYTES = torch.arange(V) % 4  # of each token
TOKENIZER = SimpleNamespace(token_bytes=BYTES)
SCORES = {
    "accuracy", "top_5", "nll", "perplexity", "ece", "adaptive_ece", "smooth_ece", "auroc_error", "aurc", "augrc",
    "coverage_at_5_risk", "risk_at_80_coverage",
}  # fmt: skip
FILES = {"predictions.parquet", "sequences.parquet", "metrics.json", "evaluation.json", "evaluation.csv"}
Text = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gpt(*rates: float) -> GPT:
    net = GPT(V, T, num_layers=1, num_heads=2, width=16, dropout=DropoutRates(*rates or [0.2] * 4)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


class Foreign(nn.Module):
    """Logits (B, T, V) by a net that says nothing of its vocabulary and cannot be thinned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(V, 16), nn.Dropout(0.5), nn.Linear(16, V))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def windows(count: int = 7, net: nn.Module | None = None) -> Text:
    """Tokens, targets (what a net says, or any) of which the last few do not count, and the index."""
    tokens, targets = torch.randint(V, (2, count, T))
    if net is not None:
        targets = net(tokens).argmax(-1)
    targets[-1, 2:] = -100
    return tokens, targets, torch.arange(count)


def loader(*columns: Tensor, batch_size: int = 3) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*columns), batch_size)


def rows_of(
    net: nn.Module, text: Text, acting: Acting | None = None, masks: Any = "auto", samples: int | None = S
) -> tuple[Any, Any]:
    """Both kinds of rows, of all windows as one batch."""
    ways = standard_ways(samples, masks, "auto" if acting else "all", seed=3)
    for way in ways:
        way.bind(net)
        if acting:
            way.acting = acting
    tokens, targets, index = text
    return predicted_rows(Batch(tokens, index, targets), net, ways)


def assert_rows(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        torch.testing.assert_close(
            got[name], column, rtol=1e-5, atol=1e-5, check_dtype=False, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_test_writes_a_row_per_token_and_sequence(
    run: Callable[..., Any], read_rows: Callable[..., Any], splits: Any, tmp_path: Path
) -> None:
    """Windows come in another order than theirs, and one twice."""
    net, text = gpt(), windows()
    order = torch.tensor([5, 2, 6, 0, 1, 3, 4, 5])
    run("test", net, splits(loader(*text), loader(*(column[order] for column in text)), TOKENIZER), pictures=True)
    tokens, sequences = rows_of(net, text)
    assert tokens["index"].tolist() == list(range(6 * T + 2))
    assert_rows(read_rows(), tokens | {"bytes": BYTES[tokens["target"]]})
    assert_rows(read_rows("sequences"), sequences)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"figures"}
    drawn = {"reliability", "risk_coverage", "entropy", "mutual_information", "nll_by_samples"}
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {f"{name}.png" for name in drawn}


def test_scores_are_those_of_the_rows(run: Callable[..., Any], splits: Any) -> None:
    net, text = gpt(), windows()
    metrics = run("test", net, splits(loader(*text), loader(*text), TOKENIZER))
    rows = rows_of(net, text)[0]
    rows["bytes"] = BYTES[rows["target"]]
    dropout, single = (scores(Columns(rows, way)) for way in ("mc_dropout", "deterministic"))
    assert dropout["bits_per_byte"] == pytest.approx(
        dropout["nll"] / math.log(2) / rows["bytes"].double().mean().item()
    )
    assert (metrics["mc_dropout"]["masks"], metrics["mc_dropout"]["num_samples"]) == ("shared", S)
    assert {key: metrics["mc_dropout"][key] for key in dropout} == pytest.approx(dropout, rel=1e-5)
    assert metrics["deterministic"] == pytest.approx(single, rel=1e-5)
    logged = {f"mc/{key}": dropout[key] for key in SCORES | {"bits_per_byte"}}
    logged |= {f"test/{key}": single[key] for key in SCORES | {"bits_per_byte"}}
    assert metrics["logged"] == pytest.approx(logged, rel=1e-5)
    assert dropout["nll"] != pytest.approx(single["nll"], rel=1e-3)


def test_data_without_a_tokenizer_have_no_bits_per_byte(
    run: Callable[..., Any], read_rows: Callable[..., Any], splits: Any
) -> None:
    net, text = gpt(), windows()
    metrics = run("test", net, splits(loader(*text), loader(*text)))
    assert metrics["deterministic"].keys() == SCORES
    assert "bytes" not in read_rows()


def test_predict_writes_the_rows_that_test_does(
    run: Callable[..., Any], read_rows: Callable[..., Any], tmp_path: Path
) -> None:
    net, text = gpt(), windows()
    tested = run("test", net, loader(*text)), read_rows(), read_rows("sequences")
    scored = json.loads((tmp_path / "metrics.json").read_text())
    for path in tmp_path.iterdir():
        path.unlink()
    run("predict", net, loader(*text))
    assert json.loads((tmp_path / "metrics.json").read_text()) == scored
    for name, expected in zip(("predictions", "sequences"), tested[1:], strict=True):
        got = read_rows(name)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], column) for key, column in expected.items())
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_index_is_counted_where_batches_have_none(run: Callable[..., Any], read_rows: Callable[..., Any]) -> None:
    net, text = gpt(), windows()
    run("test", net, loader(*text[:2]))
    assert_rows(read_rows(), rows_of(net, text)[0])


def test_no_samples_leave_the_deterministic_network(run: Callable[..., Any], read_rows: Callable[..., Any]) -> None:
    net, text = gpt(0, 0, 0, 0), windows()
    metrics = run("test", net, loader(*text), num_samples=None)
    assert metrics.keys() == {"logged", "deterministic"}
    assert metrics["logged"].keys() == {f"test/{key}" for key in SCORES}
    tokens, sequences = rows_of(net, text, samples=None)
    assert_rows(read_rows(), tokens)
    assert_rows(read_rows("sequences"), sequences)
    assert metrics["deterministic"] == pytest.approx(scores(Columns(tokens, "deterministic")), rel=1e-5)


def test_net_of_another_make(run: Callable[..., Any], read_rows: Callable[..., Any]) -> None:
    """Masks are drawn per element, by a seed of each batch's first window."""
    net, text = Foreign().eval(), windows(6)
    metrics = run("test", net, loader(*text))
    assert metrics["mc_dropout"]["masks"] == "independent"
    parts = [rows_of(net, tuple(column[rows] for column in text))[0] for rows in (slice(0, 3), slice(3, 6))]
    expected = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert_rows(read_rows(), expected)
    assert metrics["deterministic"] == pytest.approx(scores(Columns(expected, "deterministic")), rel=1e-5)


def everything(inputs: Tensor, half: str) -> Tensor:
    return torch.ones(len(inputs), dtype=torch.bool)


def validation_nll(net: nn.Module, val: Text) -> Callable[[Acting], float]:
    return lambda acting: rows_of(net, val, acting)[0]["mc_dropout_nll"].mean().item()


def test_automatic_sites_and_rates_are_those_of_lowest_validation_nll(
    run: Callable[..., Any], read_rows: Callable[..., Any], splits: Any
) -> None:
    """With rates of 0.3 and 0.45 at two sites: three combinations, and the best at a quarter, half and double.

    The targets are what the net says without dropout, so that the lowest rates are best.
    """
    net, test = gpt(0.3, 0, 0, 0.45), windows()
    val = windows(9, net)
    nll = validation_nll(net, tuple(column[in_half(val[0], "fit")] for column in val))
    combined = [Acting(sites) for sites in (("embedding",), ("mlp",), ("embedding", "mlp"))]
    sites = min(combined, key=nll).sites
    expected = {acting: nll(acting) for acting in [*combined, *(Acting(sites, s) for s in (0.25, 0.5, 2.0))]}
    best = min(expected, key=expected.__getitem__)
    metrics = run("test", net, splits(loader(*val), loader(*test)), sites="auto")
    assert metrics["mc_dropout"]["sites_nll"] == pytest.approx(
        {str(acting): value for acting, value in expected.items()}, rel=1e-5
    )
    assert next(iter(metrics["mc_dropout"]["sites_nll"])) == str(best)
    assert (metrics["mc_dropout"]["sites"], metrics["mc_dropout"]["scale"]) == (list(best.sites), best.scale)
    assert best.scale != 1
    assert_rows(read_rows(), rows_of(net, test, best)[0])


@pytest.mark.parametrize(("bound", "batches"), [(1, 1), (18, 1), (19, 2), (36, 2), (37, 3), (10**6, 3)])
def test_choice_of_sites_sees_a_bounded_number_of_targets(
    bound: int, batches: int, run: Callable[..., Any], splits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole batches until the bound is reached, of 18, 18 and 2 targets."""
    monkeypatch.setattr(batch_module, "in_half", everything)
    monkeypatch.setattr(ways_module, "SELECTION_TARGETS", bound)
    net, test, val = gpt(0, 0, 0.2, 0), windows(2), windows()
    metrics = run("test", net, splits(loader(*val), loader(*test)), sites="auto")
    nll = validation_nll(net, tuple(column[: 3 * batches] for column in val))
    assert metrics["mc_dropout"]["sites_nll"]["residual"] == pytest.approx(nll(Acting(("residual",))), rel=1e-5)


def test_choice_of_sites_with_independent_masks(
    run: Callable[..., Any], splits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window of a batch seeds its masks; a site that does not act may have any rate."""
    monkeypatch.setattr(batch_module, "in_half", everything)
    net, test = gpt(0.05, 0, 0, 0.9), windows(2)
    val = windows(7, net)
    metrics = run("test", net, splits(loader(*val), loader(*test)), sites="auto", masks="independent")
    assert metrics["mc_dropout"]["sites"] == ["embedding"]
    assert "embedding × 2" in metrics["mc_dropout"]["sites_nll"]
    parts = [tuple(column[rows] for column in val) for rows in (slice(0, 3), slice(3, 6), slice(6, 7))]
    nll = torch.cat([rows_of(net, part, Acting(("mlp",)), masks="independent")[0]["mc_dropout_nll"] for part in parts])
    assert metrics["mc_dropout"]["sites_nll"]["mlp"] == pytest.approx(nll.mean().item(), rel=1e-5)
