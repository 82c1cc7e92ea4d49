"""Ensembles, temperature and prediction sets: each equals what is computed by hand from the networks."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.evaluation.batch import Batch, Validation, in_half
from thinned.evaluation.further_ways import Ensemble, Tempered
from thinned.evaluation.prediction_sets import PredictionSets
from thinned.evaluation.rows import predicted_rows
from thinned.evaluation.ways import Deterministic, SampledNetworks, Way
from thinned.models.dropout import Dropout, derive_seed
from thinned.uncertainty import mc_predict
from thinned.uncertainty.conformal import conformity, threshold, uniforms
from thinned.uncertainty.scores import entropy, nll

K, S, N = 4, 5, 30


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def net_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), Dropout(0.5, "mlp"), nn.Linear(16, K)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


NETS = [net_of(seed) for seed in range(3)]


def examples(count: int = N) -> tuple[Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randn(count, 3), torch.randint(K, (count,))


def ensemble(make: Callable[[], Way]) -> Ensemble:
    """The three networks; the first is the trained one."""
    members = [make() for _ in NETS]
    for i, (member, net) in enumerate(zip(members, NETS, strict=True)):
        member.name, member.own_net = f"member{i}", net if i else None
        member.bind(NETS[0])
    return Ensemble(members, "together", "together")


def rows_of(*ways: Way, sets: PredictionSets | None = None) -> dict[str, Tensor]:
    x, y = examples()
    return predicted_rows(Batch(x, torch.arange(N), y), NETS[0], ways, sets)[0]


def test_ensemble_of_networks_is_their_mean() -> None:
    rows = rows_of(ensemble(Deterministic))
    probs = torch.stack([net(examples()[0]).softmax(-1) for net in NETS])
    torch.testing.assert_close(rows["together_probs"], probs.mean(0))
    information = entropy(probs.mean(0)) - entropy(probs).mean(0)
    torch.testing.assert_close(rows["together_mutual_information"], information, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows["together_mutual_information_between"], information, rtol=1e-4, atol=1e-6)
    assert rows["together_variance_within"].tolist() == [0] * N  # a network without dropout is one sample


def test_ensemble_of_sampled_networks_tells_variance_within_and_between_members() -> None:
    rows = rows_of(ensemble(lambda: SampledNetworks(S, seed=3)))
    alone = [mc_predict(net, examples()[0], num_samples=S, seed=derive_seed(3, 0)) for net in NETS]
    means = torch.stack([prediction.mean for prediction in alone])
    torch.testing.assert_close(rows["together_probs"], means.mean(0))
    chosen = means.mean(0).argmax(-1)[:, None]

    def of_chosen(column: Tensor) -> Tensor:
        return column.gather(-1, chosen)[:, 0]

    within = torch.stack([prediction.variance for prediction in alone]).mean(0) * (S - 1) / S
    between = means.var(0, correction=0)
    torch.testing.assert_close(rows["together_variance_within"], of_chosen(within), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows["together_variance_between"], of_chosen(between), rtol=1e-4, atol=1e-6)
    of_all = of_chosen(within + between) * 3 * S / (3 * S - 1)
    torch.testing.assert_close(rows["together_std"], of_all.sqrt(), rtol=1e-4, atol=1e-6)
    expected = torch.stack([prediction.expected_entropy for prediction in alone]).mean(0)
    torch.testing.assert_close(rows["together_expected_entropy"], expected)


def test_member_that_is_reported_itself_runs_once() -> None:
    way, calls = Deterministic(), []
    other = Deterministic()
    other.name, other.own_net = "other", NETS[1]
    for each in (way, other):
        each.bind(NETS[0])
    hook = NETS[0].register_forward_hook(lambda *args: calls.append(1))
    rows_of(way, Ensemble([way, other], "both", "both"))
    hook.remove()
    assert len(calls) == 1


def validation_of(*batches: Batch) -> Validation:
    def all_batches() -> Iterable[Iterable[Batch]]:
        return ([Batch(b.inputs, b.index, b.targets)] for b in batches)

    return Validation(all_batches, lambda total: total)


def test_temperature_is_the_one_of_lowest_validation_nll() -> None:
    """Targets come from the network's own distribution at T = 2, so that a temperature of about 2 is best."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    probs = NETS[0](x).softmax(-1).detach()
    softer = (probs.log() / 2).softmax(-1)
    y = torch.multinomial(softer, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    deterministic = Deterministic()
    deterministic.bind(NETS[0])
    way = Tempered(deterministic)
    way.fit(validation_of(Batch(x[:2500], torch.arange(2500), y[:2500]), Batch(x[2500:], torch.arange(1500), y[2500:])))

    def mean_nll(temperature: float) -> float:
        return nll((probs.double().log() / temperature).softmax(-1), y).mean().item()

    best = min((1.5 + 0.001 * i for i in range(1000)), key=mean_nll)
    assert way.temperature == pytest.approx(best, rel=0.006)
    assert mean_nll(way.temperature) < mean_nll(1)
    rows = rows_of(way)
    expected = (NETS[0](examples()[0]).log_softmax(-1) / way.temperature).softmax(-1)
    torch.testing.assert_close(rows["deterministic_tempered_probs"], expected)
    assert "deterministic_tempered_mutual_information" not in rows
    again = Tempered(deterministic)
    again.load_settings(way.settings)
    assert again.temperature == way.temperature


def test_temperature_is_1_if_no_error_tells_of_it() -> None:
    """Each lower temperature would have a lower NLL on such a validation split, down to certainty."""
    x = torch.randn(40, 3)
    way = Tempered(Deterministic())
    way.way.bind(NETS[0])
    target = NETS[0](x).argmax(-1)
    way.fit(validation_of(Batch(x, torch.arange(40), target)))
    assert way.temperature == 1
    target[0] = (target[0] + 1) % K
    way.fit(validation_of(Batch(x, torch.arange(40), target)))
    assert way.temperature != 1


def test_halves_are_a_function_of_the_content() -> None:
    """Of 1,000 examples either half has fewer than 430 with a probability below 1e-5."""
    x = torch.randn(1000, 3)
    fit = in_half(x, "fit")
    assert fit.equal(~in_half(x, "calibrate"))
    order = torch.randperm(1000)
    assert in_half(x[order], "fit").equal(fit[order])
    assert 430 < fit.sum() < 570


def test_void_part_counts_for_nothing() -> None:
    """A process may have no example of a half in a batch, but runs a net that is sharded as often as the others."""
    x, y = examples(2)
    void = Batch(100 * x[:1], torch.arange(1), y[:1])
    void.is_void = True
    counted = Batch(x, torch.arange(2), y)
    validation = Validation(lambda: [[void], [counted]], lambda total: total)
    assert validation.mean(lambda batch: batch.inputs[:, 0]) == x[:, 0].mean()
    assert validation.gather(lambda batch: batch.inputs).equal(x)
    with pytest.raises(ValueError, match="Expected a validation split of two examples or more"):
        Validation(lambda: [[void]], lambda total: total).mean(lambda batch: batch.inputs)


def test_prediction_sets_hold_the_classes_below_a_threshold_of_calibration() -> None:
    ways: list[Way] = [Deterministic(), SampledNetworks(S, seed=3)]
    for way in ways:
        way.bind(NETS[0])
    x, y = torch.randn(40, 3), torch.randint(K, (40,))
    sets = PredictionSets(0.75, seed=5)
    sets.calibrate(
        validation_of(Batch(x[:15], torch.arange(15), y[:15]), Batch(x[15:], torch.arange(15, 40), y[15:])), ways
    )
    u = uniforms(derive_seed(5, "val"), torch.arange(40))
    parts = [mc_predict(NETS[0], x[a:b], num_samples=S, seed=derive_seed(3, a)).mean for a, b in ((0, 15), (15, 40))]
    means = [NETS[0](x).softmax(-1), torch.cat(parts)]
    for way, mean in zip(ways, means, strict=True):
        of_kinds = conformity(mean, y, u)
        expected = {kind: threshold(scores, 0.75) for kind, scores in of_kinds.items()}
        assert sets.thresholds[way.name] == pytest.approx(expected, abs=1e-6)

    rows, (x, y) = rows_of(*ways, sets=sets), examples()
    mean, u = NETS[0](x).softmax(-1), uniforms(5, torch.arange(N))
    for kind, limit in sets.thresholds["deterministic"].items():
        scores = torch.stack([conformity(mean, torch.full((N,), k), u)[kind] for k in range(K)], dim=-1)
        assert rows[f"deterministic_{kind}_size"].tolist() == (scores <= limit).sum(-1).tolist()
        covered = (scores <= limit)[torch.arange(N), y]
        assert rows[f"deterministic_{kind}_covered"].tolist() == covered.tolist()


@pytest.mark.parametrize(("count", "coverage", "said"), [
    (8, 0.9, r"at least 9 calibration examples for coverage 0.9, but got 8 \(at most coverage 8/9 is possible\)"),
    (0, 0.9, "at least 9 calibration examples"),
])  # fmt: skip
def test_too_few_calibration_examples_are_refused(count: int, coverage: float, said: str) -> None:
    way = Deterministic()
    way.bind(NETS[0])
    x, y = examples(max(1, count))
    batch = Batch(x, torch.arange(len(x)), y)
    batch.is_void = not count
    with pytest.raises(ValueError, match=f"Expected {said}.* in one half of the validation split"):
        PredictionSets(coverage, 0).calibrate(Validation(lambda: [[batch]], lambda total: total), [way])


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1.0, math.nan])
def test_coverage_outside_its_range_is_refused(coverage: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected mc_dropout\.coverage between 0 and 1"):
        PredictionSets(coverage, 0)


def test_absent_class_is_named(caplog: pytest.LogCaptureFixture) -> None:
    way = Deterministic()
    way.bind(NETS[0])
    x, _ = examples()
    with caplog.at_level("INFO"):
        batch = Batch(x, torch.arange(N), torch.arange(N) % 2)
        PredictionSets(0.9, 0).calibrate(Validation(lambda: [[batch]], lambda total: total), [way])
    assert "without an example of the classes [2, 3]" in caplog.text
