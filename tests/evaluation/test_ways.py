"""Ways to predict: what they are asked, in which order they learn, from what, and what they keep of it."""

import json
import weakref
from collections.abc import Callable, Generator, Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.evaluation import ways as ways_module
from thinned.evaluation.batch import Batch, Validation
from thinned.evaluation.rows import predicted_rows
from thinned.evaluation.ways import Deterministic, SampledNetworks, Way, learning_order, standard_ways
from thinned.models import MLP, DropoutRates
from thinned.models.net import Logits
from thinned.uncertainty import mc_predict
from thinned.uncertainty.acting_dropout import Acting
from thinned.uncertainty.scores import nll

K, S = 3, 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mlp(**rates: float) -> MLP:
    net = MLP((4,), K, (32,), dropout=DropoutRates(**rates or {"embedding": 0.1, "mlp": 0.5})).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def sampled(net: nn.Module, **settings: Any) -> SampledNetworks:
    way = SampledNetworks(**{"num_samples": S, "seed": 3} | settings)
    way.bind(net)
    return way


def batch_of(count: int, first: int = 0) -> Batch:
    return Batch(torch.randn(count, 4), torch.arange(first, first + count), torch.randint(K, (count,)))


# Statistics of a batch


class Counted(Way):
    """Says what it is told, and counts how often it is asked."""

    name, label = "counted", "counted"

    def __init__(self, *logits: Tensor) -> None:
        self.logits, self.asked = logits, 0

    def stream(self, batch: Batch) -> Generator[Logits, None, None]:
        self.asked += 1
        for logits in self.logits:
            yield Logits(logits)


def test_way_is_asked_once_for_a_batch() -> None:
    batch, way, other = batch_of(5), Counted(torch.zeros(5, K), torch.randn(5, K)), Counted(torch.zeros(5, K))
    mean = (torch.full((5, K), 1 / K) + way.logits[1].softmax(-1)) / 2
    for _ in range(2):
        torch.testing.assert_close(batch.mean(way), mean)
        torch.testing.assert_close(batch.mean(other), torch.full((5, K), 1 / K))
    assert batch.statistics(way).num_samples == 2
    rows, _ = predicted_rows(batch, mlp(), [way])
    torch.testing.assert_close(rows["counted_probs"], mean)
    assert (way.asked, other.asked) == (1, 1)
    batch_of(5).statistics(way)
    assert way.asked == 2  # another batch


def test_way_that_builds_on_another_does_not_ask_it_again() -> None:
    """The second way squares the mean of the first, whose samples the rows need too."""

    class Squared(Way):
        name, label = "squared", "squared"

        def __init__(self, base: Way) -> None:
            self.builds_on = [base]

        def stream(self, batch: Batch) -> Generator[Logits, None, None]:
            yield Logits(batch.mean(self.builds_on[0]).square().log())

    base = Counted(torch.randn(5, K), torch.randn(5, K))
    rows, _ = predicted_rows(batch_of(5), mlp(), [Squared(base), base])
    assert base.asked == 1
    squares = rows["counted_probs"].square()
    torch.testing.assert_close(rows["squared_probs"], squares / squares.sum(-1, keepdim=True))


def test_prediction_that_fails_restores_the_modes_at_once() -> None:
    """The second sample is of another shape; the error is still held, and with it all that was going on."""
    calls = []

    class Shrinks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            classes = 3 if len(calls) < 5 else 2  # its dropout is found by three passes
            return nn.functional.dropout(x, 0.5, self.training)[:, :classes]

    net = Shrinks().eval()
    with pytest.raises(RuntimeError, match="equal size") as held:
        batch_of(5).statistics(sampled(net))
    assert not net.training
    assert held.value


# Held-out examples


def held_out(*values: list[float]) -> tuple[Callable[[], Iterator[Batch]], list[int]]:
    """Batches, one value a part, whose inputs are the values, and the sizes of those that were asked for."""
    asked: list[int] = []

    def batches() -> Iterator[list[Batch]]:
        for of_batch in values:
            asked.append(len(of_batch))
            yield [Batch(torch.tensor([value]), torch.zeros(1), torch.zeros(1)) for value in of_batch]

    return batches, asked


def of_one_process(x: Tensor) -> Tensor:
    return x.clone()


def test_mean_counts_each_target_once_whatever_its_batch() -> None:
    """Of six numbers, 66 / 6; the mean of the means of the batches would be 32 / 3."""
    batches, _ = held_out([1.0], [2.0, 3.0, 4.0], [20.0, 36.0])
    validation = Validation(batches, of_one_process)
    assert validation.mean(lambda batch: batch.inputs).item() == 11.0
    by_class = validation.mean(lambda batch: torch.stack([batch.inputs, -2 * batch.inputs], -1))
    assert by_class.tolist() == [11.0, -22.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_mean_of_numbers_of_any_kind(dtype: torch.dtype) -> None:
    """Three ones in each four of 4,000 numbers, whose count half precisions do not hold."""
    batches, _ = held_out(*[[1.0, 1.0, 0.0, 1.0]] * 1000)
    mean = Validation(batches, of_one_process).mean(lambda batch: batch.inputs.to(dtype))
    assert mean.item() == 0.75


@pytest.mark.parametrize(
    ("enough", "sizes", "mean"),
    [(1, [1], 1), (2, [1, 3], 2.5), (4, [1, 3], 2.5), (5, [1, 3, 2], 11), (1000, [1, 3, 2], 11)],
)
def test_enough_targets_are_whole_batches(enough: int, sizes: list[int], mean: float) -> None:
    batches, asked = held_out([1.0], [2.0, 3.0, 4.0], [20.0, 36.0])
    assert Validation(batches, of_one_process).mean(lambda batch: batch.inputs, enough).item() == mean
    assert asked == sizes


def test_mean_holds_no_graph() -> None:
    batches, _ = held_out([1.0, 2.0])
    weight = torch.ones((), requires_grad=True)
    assert not Validation(batches, of_one_process).mean(lambda batch: weight * batch.inputs).requires_grad


@pytest.mark.parametrize(("enough", "number", "mean"), [(3, 1, 5.0), (4, 2, 4.0), (7, 2, 4.0), (8, 3, 3.0)])
def test_mean_of_two_processes_is_over_the_targets_of_both(enough: int, number: int, mean: float) -> None:
    """Two threads stand for the processes: a sum waits for both, so that it fails if one asks more often.

    After each batch of both there are 3, 7 and 10 targets, whose sums are 15, 28 and 30. A batch has as many parts as
    targets, so that the processes have other numbers of parts.
    """
    meeting, held = Barrier(2, timeout=20), {}
    batches = {0: held_out([5.0], [4.0, 4.0, 5.0], [0.0]), 1: held_out([4.0, 6.0], [0.0], [1.0, 1.0])}
    means: dict[int, float] = {}

    def process(rank: int) -> None:
        def total(x: Tensor) -> Tensor:
            held[rank] = x.clone()
            meeting.wait()
            summed = held[0] + held[1]
            meeting.wait()
            return summed

        validation = Validation(batches[rank][0], total)
        means[rank] = validation.mean(lambda batch: batch.inputs, enough).item()

    threads = [Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert means == {0: pytest.approx(mean), 1: pytest.approx(mean)}
    assert [len(asked) for _, asked in batches.values()] == [number, number]


# The order in which ways learn


def named(name: str, *builds_on: Way) -> Way:
    way = Deterministic()
    way.name, way.builds_on = name, builds_on
    return way


def test_way_learns_after_those_that_it_builds_on() -> None:
    """A diamond: two build on one, and a fourth on both. The fifth stands alone."""
    base = named("base")
    left, right = named("left", base), named("right", base)
    top, alone = named("top", right, left), named("alone")
    assert [way.name for way in learning_order([top, alone])] == ["base", "right", "left", "top", "alone"]
    assert [way.name for way in learning_order([alone, left, base, top])] == ["alone", "base", "left", "right", "top"]
    assert learning_order([base, base, alone]) == [base, alone]
    assert learning_order([]) == []


# Settings and what is learned


def test_standard_ways() -> None:
    deterministic, dropout = standard_ways(S, "independent", ["mlp"], 8)
    assert isinstance(deterministic, Deterministic)
    assert isinstance(dropout, SampledNetworks)
    assert (dropout.num_samples, dropout.masks, dropout.sites, dropout.seed) == (S, "independent", ("mlp",), 8)
    assert [way.name for way in standard_ways(None, "auto", "all", 0)] == ["deterministic"]
    assert [way.metric_prefix("val") for way in (deterministic, dropout, Counted())] == ["val", "mc", "counted"]


ALL = {"num_samples": S, "masks": "shared", "seed": 3, "sites": ["embedding", "mlp"], "scale": 1.0}
CHOSEN = {"sites": ["mlp"], "scale": 0.25, "sites_nll": {"mlp × 0.25": 0.5, "mlp": 0.75, "embedding+mlp": 1.5}}


@pytest.mark.parametrize(
    ("given", "changed", "details"),
    [
        ({}, {}, "S = 6, shared masks"),
        ({"masks": "independent"}, {"masks": "independent"}, "S = 6, independent masks"),
        ({"sites": ["mlp", "embedding"]}, {}, "S = 6, shared masks at embedding+mlp"),
        ({"sites": ["mlp"]}, {"sites": ["mlp"]}, "S = 6, shared masks at mlp"),
        ({"sites": "auto"}, {"sites": "auto"}, "S = 6, shared masks"),
    ],
)
def test_settings(given: dict[str, Any], changed: dict[str, Any], details: str) -> None:
    """The sites of a net at which it drops, those that are given, or auto as long as none are chosen."""
    way = sampled(mlp(), **given)
    assert way.settings == ALL | changed
    assert json.loads(json.dumps(way.settings)) == way.settings
    assert way.details == details


def test_settings_name_the_sites_that_were_chosen() -> None:
    way = sampled(mlp(), sites="auto")
    way.load_settings(CHOSEN)
    assert way.settings == ALL | CHOSEN
    assert way.details == "S = 6, shared masks at mlp × 0.25"


def validation_of(*batches: Batch) -> Validation:
    """New batches each time, as a loader has them."""
    return Validation(lambda: ([Batch(b.inputs, b.index, b.targets)] for b in batches), of_one_process)


def fitted(net: nn.Module, **settings: Any) -> tuple[SampledNetworks, list[Batch]]:
    way, batches = sampled(net, sites="auto", **settings), [batch_of(9), batch_of(4, 9)]
    with torch.no_grad():
        for batch in batches:
            batch.targets = net(batch.inputs).argmax(-1)  # so that the lowest rates are best
    way.fit(validation_of(*batches))
    return way, batches


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_sites_are_chosen_by_the_nll_of_the_mean_prediction(masks: Any) -> None:
    """Each choice is scored as it predicts, over both batches; the best one predicts from then on."""
    net = mlp(embedding=0.3, mlp=0.5)
    way, batches = fitted(net, masks=masks)
    assert len(way.sites_nll) in (5, 6, 7)
    assert next(iter(way.sites_nll)) == str(way.acting)
    for said, value in way.sites_nll.items():
        sites, _, scale = said.partition(" × ")
        acting = Acting(tuple(sites.split("+")), float(scale or 1))
        scored = sampled(net, masks=masks)
        scored.acting = acting
        own = torch.cat([nll(Batch(b.inputs, b.index, b.targets).mean(scored), b.targets) for b in batches])
        assert value == pytest.approx(own.mean().item(), rel=1e-5)
        if masks == "shared":
            mean = torch.cat(
                [
                    mc_predict(net, b.inputs, num_samples=S, seed=3, sites=acting.sites, scale=acting.scale).mean
                    for b in batches
                ]
            )
            by_definition = nll(mean, torch.cat([b.targets for b in batches])).mean().item()
            assert value == pytest.approx(by_definition, rel=1e-5)
    assert [*way.sites_nll.values()] == sorted(way.sites_nll.values())
    assert way.acting is not None
    assert way.acting.scale < 1


@pytest.mark.parametrize("sites", ["all", ["mlp"]])
def test_nothing_is_learned_of_sites_that_are_given(sites: Any) -> None:
    def fail() -> Iterator[Batch]:
        raise AssertionError("asked for held-out examples")

    way = sampled(mlp(), sites=sites)
    way.fit(Validation(fail, of_one_process))
    assert way.sites_nll == {}


def test_bounded_number_of_targets_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch, whose targets are impossible, is not asked for."""
    monkeypatch.setattr(ways_module, "SELECTION_TARGETS", 9)
    net, first, second = mlp(), batch_of(9), batch_of(4, 9)
    second.targets = torch.full((4,), K)
    way = sampled(net, sites="auto")
    way.fit(validation_of(first, second))
    mean = mc_predict(net, first.inputs, num_samples=S, seed=3, sites=["mlp"]).mean
    assert way.sites_nll["mlp"] == pytest.approx(nll(mean, first.targets).mean().item(), rel=1e-5)


def test_what_is_learned_comes_back_from_json() -> None:
    net = mlp(embedding=0.3, mlp=0.5)
    way, _ = fitted(net)
    twin = sampled(net, sites="auto")
    twin.load_settings(json.loads(json.dumps(way.settings)))
    assert twin.settings == way.settings
    assert [*twin.sites_nll] == [*way.sites_nll]  # in this order
    batch = batch_of(20)
    torch.testing.assert_close(batch.mean(twin), batch.mean(way), rtol=0, atol=0)
    assert not torch.allclose(batch.mean(twin), batch.mean(sampled(net)), atol=1e-3)


@pytest.mark.parametrize("sites", ["all", ["embedding", "mlp"]])
def test_sites_that_are_given_stay_whatever_was_learned(sites: Any) -> None:
    way = sampled(mlp(), sites=sites)
    way.load_settings(CHOSEN)
    assert way.settings == ALL


def test_trained_network_learns_nothing() -> None:
    way = Deterministic()
    way.load_settings(json.loads(json.dumps(way.settings)))
    assert (way.settings, way.details) == ({}, "")


# What cannot be


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_samples": -1}, "num_samples to be at least 2 or null, but got -1"),
        ({"num_samples": 0}, "num_samples to be at least 2 or null, but got 0"),
        ({"num_samples": 1}, "num_samples to be at least 2 or null, but got 1"),
        ({"masks": "both"}, "masks to be auto, shared or independent, but got 'both'"),
        ({"sites": "some"}, "sites to be all, auto or a list of sites, but got 'some'"),
        ({"sites": ["mlp", "hidden"]}, r"sites among .*, but got \['hidden'\]"),
    ],
)
def test_setting_outside_its_range_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"Expected .*{said}"):
        SampledNetworks(**{"num_samples": S} | given)


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("sites", ["all", "auto", ["mlp"], ["mlp", "embedding"]])
def test_rates_of_zero_report_the_deterministic_network(
    sites: Any, masks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    net, batch = MLP((4,), K, (32,)).eval(), batch_of(5)
    way = sampled(net, sites=sites, masks=masks)
    way.bind(net)  # of the next stage
    assert caplog.text.count("All rates of dropout are 0: MC dropout reports the deterministic network.") == 1
    way.fit(validation_of(batch))
    assert way.sites_nll == {}
    statistics = batch.statistics(way)
    torch.testing.assert_close(statistics.mean, net(batch.inputs).softmax(-1))
    assert statistics.num_samples == S
    assert statistics.compute().variance.max() == 0
    assert way.details == f"S = 6, {masks} masks, all rates 0"
    assert json.loads(json.dumps(way.settings)) == way.settings


def test_site_that_the_net_lacks_is_refused_before_training() -> None:
    """And one whose rate is 0 is not."""
    net = mlp(mlp=0.5)
    with pytest.raises(ValueError, match=r"MLP, \['embedding', 'mlp'\], but got \['residual'\] .*num_samples to null"):
        SampledNetworks(S, sites=["residual"]).bind(net)
    way, batch = sampled(net, sites=["mlp", "embedding"]), batch_of(5)
    torch.testing.assert_close(batch.mean(way), batch.mean(sampled(net, sites=["mlp"])), rtol=0, atol=0)


@pytest.mark.parametrize("sites", ["auto", ["mlp"]])
def test_net_without_sites_is_refused_before_training(sites: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected .* Linear.* but got .*num_samples to null"):
        SampledNetworks(S, sites=sites).bind(nn.Linear(4, K))


def test_shared_masks_need_a_net_that_can_be_thinned() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, K))
    with pytest.raises(ValueError, match=r"has no `thin`, such as this Sequential, but got 'shared'"):
        SampledNetworks(S, "shared").bind(net)
    for masks in ("auto", "independent"):
        assert sampled(net, masks=masks).settings["masks"] == "independent"


def test_net_of_another_make_that_drops_nothing_is_refused_when_it_predicts() -> None:
    """Whether it draws is known when it runs."""
    way = sampled(nn.Linear(4, K))
    with pytest.raises(ValueError, match="rate above 0 in Linear"):
        batch_of(3).statistics(way)


# Networks over batches


def test_networks_are_cut_once_in_a_stage_and_forgotten_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    net, cut, thin = mlp(), list[int](), MLP.thin

    def counted(net: MLP, seed: int, sample: int, *settings: Any) -> nn.Module:
        cut.append(sample)
        return thin(net, seed, sample, *settings)

    monkeypatch.setattr(MLP, "thin", counted)
    way = sampled(net)
    batches = [batch_of(100), batch_of(80, 100), batch_of(3, 180)]
    for batch in batches:
        torch.testing.assert_close(batch.mean(way), mc_predict(net, batch.inputs, num_samples=S, seed=3).mean)
    assert sorted(cut) == sorted([*range(S)] * 3)  # the way's, and those of two calls of `mc_predict`
    first = weakref.ref(way._kept)
    way.bind(net)
    assert first() is None
