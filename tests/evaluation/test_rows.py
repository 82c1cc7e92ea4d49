"""Rows of tokens and sequences against their definitions, computed from all samples at once."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.evaluation import rows as rows_module
from thinned.evaluation.rows import MCSettings, Rows, TokenStatistics, token_rows
from thinned.models import GPT, DropoutRates
from thinned.models.dropout import derive_seed

V, T, S = 11, 6, 8
ALL = DropoutRates(0.2, 0.2, 0.2, 0.2)
DETERMINISTIC = {"prediction", "confidence", "predictive_entropy", "nll", "correct", "rank"}
COLUMNS = {"index", "position", "target", *DETERMINISTIC, *(f"deterministic_{name}" for name in DETERMINISTIC)}
SEQUENCE_COLUMNS = {"index", "tokens", "deterministic_log_likelihood"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gpt(dropout: DropoutRates = ALL, layers: int = 2) -> GPT:
    """A small GPT with weights so large that its predictions differ between tokens and masks."""
    net = GPT(V, T, num_layers=layers, num_heads=2, width=16, dropout=dropout).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


class Foreign(nn.Module):
    """Logits (B, T, V) with a dropout of torch's: nothing to thin, no features, no head, no size of its vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(V, 16), nn.Dropout(0.5), nn.Linear(16, V))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def text() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Three sequences, with targets that do not count: one in the middle, the end of the second, all of none."""
    tokens, targets = torch.randint(V, (2, 3, T))
    targets[0, 2] = targets[1, 4:] = -100
    return (tokens, targets), torch.tensor([4, 0, 9])


def settings(masks: Any = "auto", samples: int = S, **options: Any) -> MCSettings:
    return MCSettings(**{"num_samples": samples, "masks": masks, "seed": 3, "sites": None, "scale": 1.0} | options)


@torch.no_grad()
def samples_of(net: nn.Module, tokens: Tensor, mc: MCSettings, first: int) -> Tensor:
    """All sampled distributions (S, B, T, V): of thinned networks, or of the net in training mode."""
    logits = []
    for sample in range(mc.num_samples):
        if isinstance(net, GPT) and mc.masks != "independent":
            logits.append(net.thin(mc.seed, sample, mc.sites, mc.scale)(tokens))
        else:
            torch.manual_seed(derive_seed(derive_seed(mc.seed, first), sample))
            logits.append(net.train()(tokens))
            net.eval()
    return torch.stack(logits).double().softmax(-1)


def by_definition(probs: Tensor, targets: Tensor, index: Tensor) -> tuple[Rows, Rows]:
    """Both kinds of rows of sampled distributions (S, B, T, V), each token and sequence by itself."""
    tokens: list[dict[str, float]] = []
    sequences: list[dict[str, float]] = []
    for b, window in enumerate(index.tolist()):
        counted = [t for t in range(T) if targets[b, t] >= 0]
        for t in counted:
            p, target = probs[:, b, t], int(targets[b, t])
            mean = p.mean(0)
            predictive, expected = -(mean * mean.log()).sum(), -(p * p.log()).sum(-1).mean()
            prediction = int(mean.argmax())
            tokens.append(
                {
                    "index": window * T + t,
                    "position": t + 1,
                    "target": target,
                    "prediction": prediction,
                    "confidence": mean[prediction],
                    "nll": -mean[target].log(),
                    "correct": prediction == target,
                    "rank": mean.sort(descending=True).indices.tolist().index(target) + 1,
                    "predictive_entropy": predictive,
                    "expected_entropy": expected,
                    "mutual_information": predictive - expected,
                }
            )
        own = torch.stack([probs[:, b, t, targets[b, t]] for t in counted], -1)  # (S, tokens that count)
        of_tokens = tokens[-len(counted) :]
        information = sum(row["mutual_information"] for row in of_tokens)
        sequences.append(
            {
                "index": window,
                "tokens": len(counted),
                "log_likelihood": own.mean(0).log().sum(),
                "mean_log_likelihood": own.log().sum(-1).mean(),
                "joint_log_likelihood": own.prod(-1).mean().log(),
                "mutual_information": information,
                "mutual_information_per_token": information / len(counted),
            }
        )
    columns = ({name: torch.tensor([row[name] for row in kind]) for name in kind[0]} for kind in (tokens, sequences))
    return tuple(columns)


def assert_agree(got: Rows, expected: Rows) -> None:
    for name, column in expected.items():
        torch.testing.assert_close(
            got[name].double(), column.double(), rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("options", [{}, {"sites": ["attention", "mlp"], "scale": 0.5}], ids=["all", "scaled sites"])
def test_rows_are_as_defined(masks: Any, options: dict[str, Any]) -> None:
    """For independent masks the reference switches the sites itself, at the scaled rates."""
    mc, ((tokens, targets), index) = settings(masks, **options), text()
    net = gpt()
    got, sequences = token_rows(net, (tokens, targets), index, mc)
    if options and masks == "independent":
        reference = gpt(DropoutRates(attention=0.1, mlp=0.1))
        reference.load_state_dict(net.state_dict())
    else:
        reference = net
    expected, of_sequences = by_definition(samples_of(reference, tokens, mc, first=4), targets, index)
    assert_agree(got, expected)
    assert_agree(sequences, of_sequences)
    with torch.no_grad():
        single, of_single = by_definition(net(tokens).double().softmax(-1)[None], targets, index)
    assert_agree(got, {f"deterministic_{name}": single[name] for name in DETERMINISTIC})
    assert_agree(sequences, {"deterministic_log_likelihood": of_single["log_likelihood"]})
    assert got.keys() == COLUMNS | {"expected_entropy", "mutual_information"}
    assert sequences.keys() == SEQUENCE_COLUMNS | of_sequences.keys()
    assert not torch.allclose(got["nll"], got["deterministic_nll"], atol=1e-2)


def test_tokens_without_a_target_have_no_row() -> None:
    batch, index = text()
    got, sequences = token_rows(gpt(), batch, index, settings())
    assert got["index"].tolist() == [24, 25, 27, 28, 29, 0, 1, 2, 3, 54, 55, 56, 57, 58, 59]
    assert got["position"].tolist() == [1, 2, 4, 5, 6, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert got["target"].tolist() == batch[1][batch[1] >= 0].tolist()
    assert sequences["tokens"].tolist() == [5, 4, 6]


@pytest.mark.parametrize("net", [gpt, Foreign])
def test_no_samples_leave_the_deterministic_network(net: Any) -> None:
    net, ((tokens, targets), index) = net().eval(), text()
    got, sequences = token_rows(net, (tokens, targets), index, None)
    assert got.keys() == COLUMNS
    assert sequences.keys() == SEQUENCE_COLUMNS
    with torch.no_grad():
        expected, of_sequences = by_definition(net(tokens).double().softmax(-1)[None], targets, index)
    for prefix in ("", "deterministic_"):
        assert_agree(got, {f"{prefix}{name}": expected[name] for name in DETERMINISTIC})
    assert_agree(sequences, {"deterministic_log_likelihood": of_sequences["log_likelihood"]})


@pytest.mark.parametrize("masks", ["auto", "independent"])
def test_net_of_another_make(masks: Any) -> None:
    net, mc, ((tokens, targets), index) = Foreign().eval(), settings(masks), text()
    got, sequences = token_rows(net, (tokens, targets), index, mc)
    expected, of_sequences = by_definition(samples_of(net, tokens, mc, first=4), targets, index)
    assert_agree(got, expected)
    assert_agree(sequences, of_sequences)
    assert (got["mutual_information"] > 1e-3).all()
    with pytest.raises(ValueError, match="net with `thin"):
        token_rows(net, (tokens, targets), index, settings("shared"))


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_dropout_of_attention_alone_is_seen(masks: Any) -> None:
    """False failure: below 1e-21; the first token's four masks would have to agree in 20 samples, for 15 tokens.

    Dropout that is an argument of the attention's function is no module that a wrapper could switch on.
    """
    batch, index = text()
    got, sequences = token_rows(gpt(DropoutRates(attention=0.5)), batch, index, settings(masks, 20))
    assert (got["mutual_information"] > 1e-4).all()
    assert (sequences["mean_log_likelihood"] < sequences["joint_log_likelihood"] - 1e-3).all()


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_equal_samples_have_no_mutual_information(masks: Any) -> None:
    """Attention drops, but of values that are 0."""
    net, (batch, index) = gpt(DropoutRates(attention=0.5)), text()
    for block in net.blocks:
        nn.init.zeros_(block.attention.qkv.weight)
    got, sequences = token_rows(net, batch, index, settings(masks))
    assert got["mutual_information"].min() >= 0
    assert got["mutual_information"].max() <= 1e-6
    single = sequences["deterministic_log_likelihood"]
    for name in ("log_likelihood", "mean_log_likelihood", "joint_log_likelihood"):
        torch.testing.assert_close(sequences[name], single, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_a_sequence_stand_in_jensens_order() -> None:
    batch, index = text()
    got, sequences = token_rows(gpt(), batch, index, settings())
    assert (sequences["mean_log_likelihood"] < sequences["joint_log_likelihood"]).all()
    assert (sequences["mean_log_likelihood"] < sequences["log_likelihood"]).all()
    sums = [part.sum().item() for part in got["mutual_information"].split([5, 4, 6])]
    assert sequences["mutual_information"].tolist() == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("samples", [None, S])
def test_parts_of_a_batch_have_the_rows_of_the_whole(samples: int | None) -> None:
    (batch, index), net = text(), gpt()
    mc = None if samples is None else settings(samples=samples)
    whole = token_rows(net, batch, index, mc)
    parts = [token_rows(net, [x[rows] for x in batch], index[rows], mc) for rows in (slice(0, 1), slice(1, 3))]
    for kind in (0, 1):
        joined = {name: torch.cat([part[kind][name] for part in parts]) for name in whole[kind]}
        assert_agree(joined, whole[kind])


@pytest.mark.parametrize(("probabilities", "logits"), [(1, 10**6), (2 * T * V, 10**6), (10**6, 1), (3 * T * V, 4 * V)])
def test_little_at_once_changes_nothing(probabilities: int, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch, index), net = text(), gpt()
    expected = token_rows(net, batch, index, settings())
    seen: list[int] = []
    sequences: list[int] = []
    net.head.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    net.norm.register_forward_hook(lambda module, args, output: sequences.append(len(args[0])))
    monkeypatch.setattr(rows_module, "PROBABILITIES_AT_ONCE", probabilities)
    monkeypatch.setattr(rows_module, "LOGITS_AT_ONCE", logits)
    got = token_rows(net, batch, index, settings())
    for kind in (0, 1):
        assert_agree(got[kind], expected[kind])
    assert max(seen) <= max(1, logits // V)
    assert max(sequences) <= max(1, probabilities // (T * V))
    assert sum(seen) == 15 * (1 + S)  # each token once a sample, and once without dropout


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """Of the features that samples made, those of one sample are alive when the next has just been made.

    Nor is there a graph, which would hold what went into them.
    """
    (batch, index), net = text(), gpt()
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        made.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in made))

    net.norm.register_forward_hook(count)
    got, sequences = token_rows(net, batch, index, settings(samples=20))
    assert len(alive) == 21
    assert max(alive) <= 2
    assert not any(column.requires_grad for column in (*got.values(), *sequences.values()))


def test_statistics_hold_the_same_after_any_number_of_samples() -> None:
    statistics, sizes = TokenStatistics(torch.randint(V, (5,)), torch.tensor([0, 0, 1, 1, 1]), 2, V), {}
    for count in range(1, 21):
        statistics.update(torch.randn(5, V), lambda x: x)
        state = [value for value in vars(statistics).values() if not isinstance(value, int)]
        assert all(isinstance(value, Tensor) for value in state)
        sizes[count] = sorted(value.untyped_storage().nbytes() for value in state)
    assert sizes[2] == sizes[20]
    assert statistics.num_samples == 20
