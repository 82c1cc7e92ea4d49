"""GPT-2's weights: the logits are those of `transformers`, an independent implementation."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned.models import GPT, DropoutRates
from thinned.models.gpt2_weights import copy_gpt2, load_gpt2

transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 70, "context_length": 16, "num_layers": 3, "num_heads": 4, "width": 24}


def theirs(**options: Any) -> Any:
    """A `transformers.GPT2LMHeadModel` with no parameter left at 0 or 1."""
    torch.manual_seed(0)
    shape = {"vocab_size": 70, "n_positions": 16, "n_layer": 3, "n_head": 4, "n_embd": 24}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | ends | options)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def ours(**options: Any) -> GPT:
    torch.manual_seed(1)
    return GPT(**SHAPE | {"bias": True, "gelu": "tanh"} | options).eval()


def tokens(length: int) -> Tensor:
    return torch.randint(70, (5, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("positions", [16, 11])
@pytest.mark.parametrize(("activation", "gelu"), [("gelu_new", "tanh"), ("gelu", "exact")])
def test_logits_are_those_of_transformers(activation: str, gelu: str, positions: int) -> None:
    source = theirs(activation_function=activation).double()
    net = ours(gelu=gelu, context_length=positions, dropout=DropoutRates(0.1, 0.1, 0.1, 0.1)).double()
    copy_gpt2(source, net)
    x = tokens(positions)
    torch.testing.assert_close(net(x), source(x).logits, rtol=0, atol=1e-10)
    assert net(x).std() > 0.5


@pytest.mark.parametrize("positions", [16, 11])
def test_logits_of_a_saved_checkpoint_are_those_of_transformers(positions: int, tmp_path: Path) -> None:
    source, net = theirs(), ours(context_length=positions).double()
    source.save_pretrained(tmp_path)
    load_gpt2(net, str(tmp_path))
    x = tokens(positions)
    torch.testing.assert_close(net(x), source.double()(x).logits, rtol=0, atol=1e-10)


def test_head_stays_tied_and_padded_rows_and_rates_stay_as_they_are() -> None:
    source, net = theirs(), ours(dropout=DropoutRates(mlp=0.3))
    padding = net.head.weight[70:].clone()
    copy_gpt2(source, net)
    assert net.head.weight is net.token_embedding.weight
    assert torch.equal(net.head.weight[:70], source.lm_head.weight)
    assert torch.equal(net.head.weight[70:], padding)
    assert net.blocks[0].mlp.mlp_dropout.p == 0.3
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_layers": 2}, "net.num_layers to be 3, as in model.init_from, but got 2"),
        ({"num_heads": 3}, "net.num_heads to be 4, .* but got 3"),
        ({"width": 48}, "net.width to be 24, .* but got 48"),
        ({"bias": False}, "net.bias to be True, .* but got False"),
        ({"gelu": "exact"}, "net.gelu to be tanh, .* but got exact"),
        ({"vocab_size": 71}, "net.vocab_size to be 70, .* but got 71"),
        ({"context_length": 17}, "net.context_length of at most 16 .* but got 17"),
    ],
)
def test_net_of_another_shape_is_refused_by_the_key_and_left_as_it_was(options: dict[str, Any], said: str) -> None:
    net = ours(**options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"Expected {said}"):
        copy_gpt2(theirs(), net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_checkpoint_with_other_hidden_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden layers of 4 net.width, .* and 50"):
        copy_gpt2(theirs(n_inner=50), ours())


def test_net_that_is_no_gpt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected model.net to be a GPT for model.init_from, but got Linear"):
        copy_gpt2(theirs(), torch.nn.Linear(4, 2))


@pytest.mark.parametrize("kind", ["missing", "empty", "of the hub"])
def test_lacking_checkpoint_is_refused_by_its_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    path = "gpt2" if kind == "of the hub" else str(tmp_path / kind)
    with pytest.raises(ValueError, match=rf"Expected model.init_from to be a GPT-2 .*, but got '{path}'"):
        load_gpt2(ours(), path)


def test_lacking_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"Expected the package transformers .*pip install 'thinned\[hf\]'"):
        load_gpt2(ours(), "gpt2")
