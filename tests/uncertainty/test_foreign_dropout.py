"""Only dropout acts in nets of any make: against every mask of small ones, and in what people write."""

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import foreign_modules as made
import pytest
import torch
from foreign_nets import CausalSelfAttention, First, VisionAttention, in_turn, pooled, state
from torch import Tensor, nn

from thinned.uncertainty import mc_predict
from thinned.uncertainty.acting_dropout import is_dropout
from thinned.uncertainty.foreign_dropout import PARAMETERS, find_dropout
from thinned.uncertainty.monte_carlo import sampled_outputs

S, EXAMPLES = 6, 600


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def every_output(net: nn.Sequential, x: Tensor) -> Tensor:
    """What comes out for x (1, 2) for all masks of the sites of the net, (masks, 3)."""
    bits = [module.bits if isinstance(module, made.Site) else 0 for module in net]
    outputs = []
    for drawn in product([0.0, 2.0], repeat=sum(bits)):
        h, masks = x, torch.tensor(drawn).split(bits)
        for module, mask in zip(net, masks, strict=True):
            h = module.masked(h, mask) if isinstance(module, made.Site) else module(h)
        outputs.append(h)
    return torch.cat(outputs).detach()


def drawn_outputs(net: nn.Module, x: Tensor) -> Tensor:
    """What comes out for x, again and again in a batch that begins with an outlier, (2 * EXAMPLES, 3)."""
    batch = torch.cat([100 * x, x.expand(EXAMPLES, 2)])
    return torch.cat([output[1:] for output in sampled_outputs(net, lambda net: net(batch), num_samples=2)])


def random_net(seed: int) -> nn.Sequential:
    """Two or three sites of at most 5 bits, and three modules that do not drop, in any order."""
    order = random.Random(seed)
    sites = [kind() for kind in order.sample(made.SITES, 3)]
    while sum(site.bits for site in sites) > 5:
        sites.pop()
    modules = [*sites, *(kind() for kind in order.sample(made.OTHERS, 3))]
    order.shuffle(modules)
    return in_turn(*modules)


def assert_every_mask_is_drawn_and_nothing_else(net: nn.Sequential) -> None:
    """With n masks a site is missed with the probability n (1 - 1/n)^1200, below 1e-15 for 32."""
    x = torch.tensor([[0.8, -0.6]])
    net(x)  # spectral norm keeps the weight that it has made
    before = state(net)
    with torch.no_grad():
        drawn, every = drawn_outputs(net, x), every_output(net, x)
    distance = torch.cdist(drawn, every, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(1).max() < 1e-5  # nothing but dropout acts
    assert distance.amin(0).max() < 1e-5  # and all of it
    assert len(every.round(decimals=4).unique(dim=0)) > 1
    assert state(net) == before


@pytest.mark.parametrize("site", made.SITES)
@pytest.mark.parametrize("other", [*made.OTHERS, None])
def test_each_site_beside_each_other_module(site: Callable[[], nn.Module], other: Any) -> None:
    assert_every_mask_is_drawn_and_nothing_else(in_turn(*([other()] if other else []), site()))


@pytest.mark.parametrize("number", range(40))
def test_random_nets(number: int) -> None:
    torch.manual_seed(number)
    assert_every_mask_is_drawn_and_nothing_else(random_net(number))


@pytest.mark.parametrize("other", made.OTHERS)
def test_net_without_dropout_is_refused_whatever_else_it_does(other: Callable[[], nn.Module]) -> None:
    net = in_turn(other())
    with pytest.raises(
        ValueError, match="dropout with a rate above 0 in Sequential, but got a pass that draws nothing"
    ):
        mc_predict(net, torch.randn(4, 2), num_samples=S)


# Layers of torch, and attention as others write it


def packed_lstm() -> nn.Module:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.full((len(x),), x.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.layers(packed)[0], batch_first=True)[0]

    return Packed()


def encoder(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> nn.Module:
    layer: Any = kind(8, 2, 16, dropout=0.5, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class OwnLayer(nn.TransformerEncoderLayer):
    """Is no class of torch, and takes torch's fast path in evaluation mode."""


class OwnLSTM(nn.LSTM):
    """Is no class of torch either."""


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "nn.Dropout": lambda: nn.Dropout(0.5),
    "nn.Dropout1d": lambda: nn.Dropout1d(0.5),
    "nn.Dropout2d": lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Dropout2d(), nn.Flatten(1, 2)),
    "nn.AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "nn.FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.5),
    "nn.TransformerEncoder": encoder,
    "nn.TransformerEncoder, norm first": lambda: encoder(norm_first=True),
    "of nn.TransformerEncoderLayer": lambda: encoder(OwnLayer),
    "of nn.MultiheadAttention": lambda: First(OwnAttention(8, 2, 0.5, batch_first=True)),
    "nn.LSTM": lambda: First(nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)),
    "nn.LSTM, packed": packed_lstm,
    "of nn.LSTM": lambda: First(OwnLSTM(8, 8, 2, dropout=0.5, batch_first=True)),
    "nn.RNN": lambda: First(nn.RNN(8, 8, 2, dropout=0.5, batch_first=True)),
    "nanoGPT, flash": lambda: CausalSelfAttention(flash=True),
    "nanoGPT, by hand": lambda: CausalSelfAttention(flash=False),
    "timm": VisionAttention,
    "timm, DropPath": lambda: nn.Sequential(made.DropPath(), nn.Linear(8, 8)),
    "TorchScript": lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(5, track_running_stats=True), nn.Dropout(0.5)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_dropout_acts_with_a_seed_and_leaves_no_trace(name: str) -> None:
    net, x = pooled(FOREIGN[name]()).eval(), torch.randn(8, 5, 8)
    net.head.train()  # one mode differs
    before, random_state = state(net), torch.get_rng_state()
    assert torch.backends.mha.get_fastpath_enabled()
    first, again, other = (mc_predict(net, x, num_samples=S, seed=seed) for seed in (1, 1, 2))
    assert (first.mutual_information > 1e-7).all()
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert state(net) == before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_attention_alone_drops_in_transformers(name: str, attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 11, "attn_implementation": attention}
    if name == "GPT-2":
        sizes |= {"n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(**sizes, attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
        net = transformers.GPT2LMHeadModel(config).eval()
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        rates = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
        net = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **rates, num_labels=3)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    tokens, before = torch.randint(11, (3, 6)), state(net)
    first, again = (mc_predict(net, tokens, num_samples=S) for _ in range(2))
    in_question = first.mutual_information[:, 1:] if name == "GPT-2" else first.mutual_information
    assert (in_question > 1e-6).all()  # the first token attends to itself alone, at a weight of 0 or 2
    assert torch.equal(first.mean, again.mean)
    assert state(net) == before


def test_the_module_of_an_attention_goes_into_training_mode_alone() -> None:
    body = nn.Sequential(CausalSelfAttention(flash=True), made.Noise())
    net, x = pooled(body).eval(), torch.randn(4, 5, 8)
    found = find_dropout(net, lambda net: net(x))
    assert found.owners == {body[0]}
    assert found.resting == "Noise (body.1)"
    assert not found.off
    known = find_dropout(pooled(CausalSelfAttention(flash=False)), lambda net: net(x))
    assert not known.owners


class LeavesOutLayers(nn.Module):
    """As in LayerDrop (Fan et al. 2020): in training mode a layer is left out with a probability of 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([made.Functional(), *(made.Attention() for _ in range(7))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and torch.rand(()) < 0.5):
                x = layer(x)
        return x


def test_layers_that_are_left_out_at_random_are_waited_for() -> None:
    """One pass would meet all 8 layers with the probability 2^-8."""
    net, x = in_turn(LeavesOutLayers()), torch.randn(4, 2)
    found = find_dropout(net, lambda net: net(x))
    assert found.owners == {*net[1].layers}
    assert found.resting == "LeavesOutLayers (1)"


def test_net_that_is_called_after_dropout_is_none() -> None:
    assert not is_dropout(type("DropoutNet", (nn.Sequential,), {})(nn.Linear(2, 3)))
    assert is_dropout(type("StochasticDepth", (nn.Module,), {})())


def test_dropout_of_a_part_that_does_not_run_in_evaluation_mode_is_told() -> None:
    """The auxiliary head of GoogLeNet."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.drop = made.Functional(), made.Functional()

        def forward(self, x: Tensor) -> Any:
            return (self.drop(x), self.head(x)) if self.training else self.drop(x)

    net, x = nn.Sequential(Head()), torch.randn(4, 2)
    found = find_dropout(net, lambda net: net(x))
    assert found.owners == {net[0].drop}
    assert found.resting == "Functional (0.head)"


def test_code_that_is_compiled_runs_as_it_was_written() -> None:
    net, x = pooled(CausalSelfAttention(flash=True)).eval(), torch.randn(4, 5, 8)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    assert torch.equal(mc_predict(compiled, x, num_samples=S).mean, mc_predict(net, x, num_samples=S).mean)


class Calls(nn.Module):
    """Calls a function of dropout that is told its mode, in one of the two ways in which functions are."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor
        if "train" in PARAMETERS[self.function]:
            dropped = self.function(x.clone(), 0.5, self.training)
        else:
            dropped = self.function(x, training=self.training)
        return dropped


@pytest.mark.parametrize(
    "function",
    [f for f in PARAMETERS if {"p"} & {*PARAMETERS[f]}],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
def test_module_that_calls_a_function_is_found_and_drops(function: Callable[..., Any]) -> None:
    """That none of 64 channels is dropped has the probability 2^-64."""
    net = nn.Sequential(nn.Identity(), Calls(function))
    x = torch.ones(1, 64, *[2] * {"dropout2d": 2, "dropout3d": 3}.get(function.__name__, 1))
    found = find_dropout(net, lambda net: net(x))
    assert (found.owners, found.off) == ({net[1]}, False)
    assert not torch.equal(next(sampled_outputs(net, lambda net: net(x), found=found)), x)
