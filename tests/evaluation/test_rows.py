"""Rows of tokens and sequences against their definitions, computed from all samples at once."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.evaluation import batch as batch_module
from thinned.evaluation.batch import Batch
from thinned.evaluation.rows import Rows, predicted_rows
from thinned.evaluation.ways import SampledNetworks, Way, standard_ways
from thinned.models import GPT, DropoutRates
from thinned.models import net as net_module
from thinned.models.dropout import derive_seed
from thinned.models.net import Logits
from thinned.uncertainty.acting_dropout import Acting

V, T, S = 11, 6, 8
ALL = DropoutRates(0.2, 0.2, 0.2, 0.2)
SHARED = {"index", "position", "target", "tokens"}
OF_EACH = {"prediction", "confidence", "predictive_entropy", "nll", "correct", "rank"}
OF_SAMPLES = {"expected_entropy", "mutual_information", "nll_at"}
DETERMINISTIC = {f"deterministic_{name}" for name in OF_EACH}
COLUMNS = {"index", "position", "target"} | DETERMINISTIC | {f"mc_dropout_{name}" for name in OF_EACH | OF_SAMPLES}


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
    """Logits (B, T, V) with a dropout of torch's: nothing to thin, no features, no size of its vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(V, 16), nn.Dropout(0.5), nn.Linear(16, V))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Three sequences, with targets that do not count: one in the middle, the end of the second, all of none."""
    tokens, targets = torch.randint(V, (2, 3, T))
    targets[0, 2] = targets[1, 4:] = -100
    return tokens, targets, torch.tensor([4, 0, 9])


def bound_ways(net: nn.Module, masks: Any = "auto", samples: int | None = S, acting: Acting | None = None) -> list[Way]:
    """The standard ways to predict with a net, at the given sites and rates; everywhere if None."""
    ways = standard_ways(samples, masks, "auto" if acting else "all", seed=3)
    for way in ways:
        way.bind(net)
        way.acting = acting
    return ways


def rows_of(net: nn.Module, text: tuple[Tensor, Tensor, Tensor], *settings: Any) -> tuple[Rows, Rows]:
    """Both kinds of rows of tokens, targets and index. Settings: see `bound_ways`."""
    tokens, targets, index = text
    return predicted_rows(Batch(tokens, index, targets), net, bound_ways(net, *settings))


@torch.no_grad()
def samples_of(net: nn.Module, tokens: Tensor, masks: str, first: int, acting: Acting | None = None) -> Tensor:
    """All sampled distributions (S, B, T, V): of thinned networks, or of the net in training mode."""
    logits = []
    for sample in range(S):
        if isinstance(net, GPT) and masks != "independent":
            logits.append(net.thin(3, sample, *(acting or (None,)))(tokens))
        else:
            torch.manual_seed(derive_seed(derive_seed(3, first), sample))
            logits.append(net.train()(tokens))
            net.eval()
    return torch.stack(logits).double().softmax(-1)


def by_definition(way: str, probs: Tensor, targets: Tensor, index: Tensor) -> tuple[Rows, Rows]:
    """A way's columns of both kinds, of its distributions (S, B, T, V), each token and sequence by itself."""
    tokens: list[dict[str, Any]] = []
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
                    "nll_at": [-probs[:s, b, t, target].mean().log() for s in (1, 2, 4, 8)],
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
    if len(probs) == 1:  # which has no spread
        tokens = [{name: row[name] for name in row if name not in OF_SAMPLES} for row in tokens]
        sequences = [{name: row[name] for name in ("index", "tokens", "log_likelihood")} for row in sequences]
    columns = (
        {
            name if name in SHARED else f"{way}_{name}": torch.tensor([row[name] for row in kind], dtype=torch.float64)
            for name in kind[0]
        }
        for kind in (tokens, sequences)
    )
    return tuple(columns)


def assert_agree(got: Rows, expected: Rows) -> None:
    for name, column in expected.items():
        torch.testing.assert_close(
            got[name].double(), column.double(), rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )


def assert_same(got: tuple[Rows, Rows], expected: tuple[Rows, Rows]) -> None:
    """Both kinds of rows agree, and neither has a column that the other lacks."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert_agree(mine, theirs)


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("acting", [None, Acting(("attention", "mlp"), 0.5)], ids=["all", "scaled sites"])
def test_rows_are_as_defined(masks: Any, acting: Acting | None) -> None:
    """For independent masks the reference switches the sites itself, at the scaled rates."""
    tokens, targets, index = text()
    net = gpt()
    got, sequences = rows_of(net, (tokens, targets, index), masks, S, acting)
    if acting and masks == "independent":
        reference = gpt(DropoutRates(attention=0.1, mlp=0.1))
        reference.load_state_dict(net.state_dict())
    else:
        reference = net
    sampled = samples_of(reference, tokens, masks, first=4, acting=acting)
    expected, of_sequences = by_definition("mc_dropout", sampled, targets, index)
    assert_agree(got, expected)
    assert_agree(sequences, of_sequences)
    with torch.no_grad():
        single = net(tokens).double().softmax(-1)[None]
    expected_single, of_single = by_definition("deterministic", single, targets, index)
    assert_agree(got, expected_single)
    assert_agree(sequences, of_single)
    assert got.keys() == expected.keys() | expected_single.keys() == COLUMNS
    assert sequences.keys() == of_sequences.keys() | of_single.keys()
    assert not torch.allclose(got["mc_dropout_nll"], got["deterministic_nll"], atol=1e-2)


def test_tokens_without_a_target_have_no_row() -> None:
    tokens, targets, index = text()
    got, sequences = rows_of(gpt(), (tokens, targets, index))
    assert got["index"].tolist() == [24, 25, 27, 28, 29, 0, 1, 2, 3, 54, 55, 56, 57, 58, 59]
    assert got["position"].tolist() == [1, 2, 4, 5, 6, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert got["target"].tolist() == targets[targets >= 0].tolist()
    assert sequences["tokens"].tolist() == [5, 4, 6]
    assert sequences["index"].tolist() == [4, 0, 9]


@pytest.mark.parametrize("net", [gpt, Foreign])
def test_no_samples_leave_the_deterministic_network(net: Any) -> None:
    net, (tokens, targets, index) = net().eval(), text()
    got = rows_of(net, (tokens, targets, index), "auto", None)
    with torch.no_grad():
        expected = by_definition("deterministic", net(tokens).double().softmax(-1)[None], targets, index)
    assert_same(got, expected)
    assert got[0].keys() == {"index", "position", "target"} | DETERMINISTIC
    assert got[1].keys() == {"index", "tokens", "deterministic_log_likelihood"}


@pytest.mark.parametrize("masks", ["auto", "independent"])
def test_net_of_another_make(masks: Any) -> None:
    net, (tokens, targets, index) = Foreign().eval(), text()
    got, sequences = rows_of(net, (tokens, targets, index), masks)
    expected, of_sequences = by_definition("mc_dropout", samples_of(net, tokens, masks, first=4), targets, index)
    assert_agree(got, expected)
    assert_agree(sequences, of_sequences)
    assert (got["mc_dropout_mutual_information"] > 1e-3).all()
    with pytest.raises(ValueError, match=r"has no `thin`.* but got 'shared'"):
        rows_of(net, (tokens, targets, index), "shared")


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_dropout_of_attention_alone_is_seen(masks: Any) -> None:
    """False failure: below 1e-21; the first token's four masks would have to agree in 20 samples, for 15 tokens.

    Dropout that is an argument of the attention's function is no module that a wrapper could switch on.
    """
    got, sequences = rows_of(gpt(DropoutRates(attention=0.5)), text(), masks, 20)
    assert (got["mc_dropout_mutual_information"] > 1e-4).all()
    mean, joint = (sequences[f"mc_dropout_{name}_log_likelihood"] for name in ("mean", "joint"))
    assert (mean < joint - 1e-3).all()


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_equal_samples_have_no_mutual_information(masks: Any) -> None:
    """Attention drops, but of values that are 0."""
    net = gpt(DropoutRates(attention=0.5))
    for block in net.blocks:
        nn.init.zeros_(block.attention.qkv.weight)
    got, sequences = rows_of(net, text(), masks)
    assert got["mc_dropout_mutual_information"].min() >= 0
    assert got["mc_dropout_mutual_information"].max() <= 1e-6
    single = sequences["deterministic_log_likelihood"]
    for name in ("log_likelihood", "mean_log_likelihood", "joint_log_likelihood"):
        torch.testing.assert_close(sequences[f"mc_dropout_{name}"], single, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_a_sequence_stand_in_jensens_order() -> None:
    got, sequences = rows_of(gpt(), text())
    single, mean, joint = (sequences[f"mc_dropout_{name}log_likelihood"] for name in ("", "mean_", "joint_"))
    assert (mean < joint).all()
    assert (mean < single).all()
    sums = [part.sum().item() for part in got["mc_dropout_mutual_information"].split([5, 4, 6])]
    assert sequences["mc_dropout_mutual_information"].tolist() == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("samples", [None, S])
def test_parts_of_a_batch_have_the_rows_of_the_whole(samples: int | None) -> None:
    batch, net = text(), gpt()
    whole = rows_of(net, batch, "auto", samples)
    parts = [rows_of(net, tuple(x[rows] for x in batch), "auto", samples) for rows in (slice(0, 1), slice(1, 3))]
    joined = tuple({name: torch.cat([part[i][name] for part in parts]) for name in whole[i]} for i in (0, 1))
    assert_same(joined, whole)


@pytest.mark.parametrize(
    ("at_once", "logits"), [(0, 10**6), (1, 10**6), (2, 10**6), (10**4, 1), (3, 4 * V)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("samples", [None, S])
def test_little_at_once_changes_nothing(
    at_once: int, logits: int, samples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the means of all ways over `at_once` sequences, and less than one more; a sequence is never split.

    Each token is asked for once a sample, and once without dropout.
    """
    batch, net = text(), gpt()
    expected = rows_of(net, batch, "auto", samples)
    seen: list[int] = []
    sequences: list[int] = []
    num_ways = 1 if samples is None else 2
    monkeypatch.setattr(batch_module, "PROBABILITIES_AT_ONCE", (at_once + 1) * T * V * num_ways - 1)
    monkeypatch.setattr(net_module, "LOGITS_AT_ONCE", logits)
    net.head.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, -2).shape[0]))
    net.norm.register_forward_hook(lambda module, args, output: sequences.append(len(args[0])))
    got = rows_of(net, batch, "auto", samples)
    assert_same(got, expected)
    at_once = min(3, max(1, at_once))
    asked = 1 + (samples or 0)
    of_parts = [at_once] * (3 // at_once) + [3 % at_once] * (3 % at_once > 0)
    assert sorted(sequences) == sorted(size for size in of_parts for _ in range(asked))
    assert max(seen) <= max(1, logits // V)
    assert sum(seen) == 15 * asked


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[int]]:
    """A list that gets the size of each batch that the module is called with."""
    calls: list[int] = []
    hook = module.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("head", [False, True])
def test_output_that_is_known_is_not_asked_for_again(at_once: int, head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed over differs from what the net would say, so that the rows tell which of both they are of."""
    net, (tokens, targets, index) = gpt(), text()
    x = torch.randn(3, T, 16 if head else V)
    known = Logits(x, net.logits) if head else Logits(x)
    with torch.no_grad():
        probs = (net.logits(x) if head else x).double().softmax(-1)[None]
    monkeypatch.setattr(batch_module, "PROBABILITIES_AT_ONCE", at_once * 2 * T * V)
    batch = Batch(tokens, index, targets, (net, known))
    assert [len(part.index) for part in batch.parts(net, 2)] == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[at_once]
    with counted_calls(net.norm) as calls:
        got, sequences = predicted_rows(batch, net, bound_ways(net))
    assert sum(calls) == 3 * S  # sequences, of samples alone
    expected, of_sequences = by_definition("deterministic", probs, targets, index)
    assert_agree(got, expected)
    assert_agree(sequences, of_sequences)
    sampled, _ = by_definition("mc_dropout", samples_of(net, tokens, "shared", first=4), targets, index)
    assert_agree(got, sampled)


def test_known_output_of_examples_is_not_asked_for_again() -> None:
    net, x, known = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).eval(), torch.randn(5, 4), torch.randn(5, 3)
    batch = Batch(x, torch.arange(5), torch.arange(5) % 3, (net, Logits(known)))
    with counted_calls(net) as calls:
        rows, _ = predicted_rows(batch, net, bound_ways(net))
    assert len(calls) == 2 + S  # two passes look for the dropout
    torch.testing.assert_close(rows["deterministic_probs"], known.softmax(-1))


@pytest.mark.parametrize("at_once", [1, 3])
def test_sequence_whose_targets_do_not_count(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no tokens, alone in its part too, and is as likely as nothing said: log 1."""
    monkeypatch.setattr(batch_module, "PROBABILITIES_AT_ONCE", at_once * 2 * T * V)
    (tokens, targets, index), net = text(), gpt()
    targets[1] = -100
    got, sequences = rows_of(net, (tokens, targets, index))
    rest = torch.tensor([0, 2])
    expected, of_sequences = rows_of(net, (tokens[rest], targets[rest], index[rest]))
    assert_agree(got, expected)
    assert got["index"].tolist() == expected["index"].tolist()
    assert_agree({name: column[rest] for name, column in sequences.items()}, of_sequences)
    assert sequences["tokens"].tolist() == [5, 0, 6]
    empty = {name: column[1].item() for name, column in sequences.items() if name.endswith("log_likelihood")}
    assert empty == pytest.approx(dict.fromkeys(empty, 0), abs=1e-6)
    assert len(empty) == 4


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """Of the features that samples made, those of one sample are alive when the next has just been made.

    Nor is there a graph, which would hold what went into them.
    """
    batch, net = text(), gpt()
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        if len(output) == 3:  # a single token is asked for the number of classes
            made.append(weakref.ref(output))
            alive.append(sum(ref() is not None for ref in made))

    net.norm.register_forward_hook(count)
    got, sequences = rows_of(net, batch, "auto", 20)
    assert len(alive) == 21
    assert max(alive) <= 2
    assert not any(column.requires_grad for column in (*got.values(), *sequences.values()))


def test_modes_are_restored_as_soon_as_a_distribution_is_refused() -> None:
    """The error is still held, and with it all that was going on."""
    net, (tokens, targets, index) = Foreign().eval(), text()
    targets[0, 0] = V  # no such token
    way = SampledNetworks(S)
    way.bind(net)
    with pytest.raises(RuntimeError, match="out of bounds") as held:
        Batch(tokens, index, targets).statistics(way)
    assert not any(module.training for module in net.modules())
    assert held.value
