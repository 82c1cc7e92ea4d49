"""Copies GPT-2's published weights (Radford et al. 2019), as `transformers` reads them, into a `GPT`."""

from typing import Any

import torch
from torch import nn

from thinned.models.gpt import GPT

NAMES = {  # ours to theirs, in the order of their replacement
    "token_embedding": "wte", "position_embedding": "wpe", "blocks": "h", "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn", "attention.projection": "attn.c_proj", "mlp_norm": "ln_2", "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj", "norm": "ln_f",
}  # fmt: skip
GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def load_gpt2(net: nn.Module, path: str) -> None:
    """Loads a GPT-2, a hub id (gpt2, gpt2-medium, ...) or a folder, into a net of its shape or with fewer positions.

    Raises:
        ValueError: `transformers` is not installed, there is no such checkpoint, or the net has another shape.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        remedy = "pip install 'thinned[hf]'"
        raise ValueError(f"Expected the package transformers for model.init_from: {remedy}") from error
    try:
        source = GPT2LMHeadModel.from_pretrained(path, weights_only=True)
    except Exception as error:  # missing, truncated and foreign files fail in many ways
        got = f"{path!r} ({type(error).__name__})"
        raise ValueError(f"Expected model.init_from to be a GPT-2 of the hub or a folder, but got {got}") from error
    copy_gpt2(source, net)


@torch.no_grad()
def copy_gpt2(source: nn.Module, net: nn.Module) -> None:
    """Copies a `transformers.GPT2LMHeadModel` into a GPT; ValueError if the shapes differ."""
    if not isinstance(net, GPT):
        raise ValueError(f"Expected model.net to be a GPT for model.init_from, but got {type(net).__name__}")
    theirs: Any = source.config  # GPT-2's names for sizes
    for key, wanted in (
        ("num_layers", theirs.n_layer), ("num_heads", theirs.n_head), ("width", theirs.n_embd), ("bias", True),
        ("vocab_size", theirs.vocab_size), ("gelu", GELUS.get(theirs.activation_function, theirs.activation_function)),
    ):  # fmt: skip
        if net.init_args[key] != wanted:
            raise ValueError(f"Expected net.{key} to be {wanted}, as in model.init_from, but got {net.init_args[key]}")
    if net.context_length > theirs.n_positions or theirs.n_inner not in (None, 4 * theirs.n_embd):
        expected = f"net.context_length of at most {theirs.n_positions} and hidden layers of 4 net.width"
        got = f"{net.context_length} and {theirs.n_inner}"
        raise ValueError(f"Expected {expected}, as in model.init_from, but got {got}")
    state = source.get_submodule("transformer").state_dict()
    for name, parameter in net.named_parameters():
        for ours, its in NAMES.items():
            name = name.replace(ours, its)
        weight = state[name].t() if name.startswith("h.") else state[name]  # its linear layers are stored (in, out)
        rows = min(len(parameter), len(weight))  # our vocabulary is padded, and our positions may be fewer
        parameter[:rows] = weight[:rows]
