"""Thinned networks of a GPT, which are cut for batches of any size, and kept."""

from collections import Counter
from typing import Any

import pytest
import torch

from thinned.models import GPT, DropoutRates
from thinned.uncertainty import KeptNetworks
from thinned.uncertainty.monte_carlo import sampled_outputs


def test_networks_are_cut_once_while_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = GPT(20, 8, num_layers=1, num_heads=2, width=16, dropout=DropoutRates(0.1, 0.2, 0.3, 0.4)).double().eval()
    kept, tokens, cut, thin = KeptNetworks(), torch.randint(20, (3, 8)), Counter[int](), GPT.thin

    def counted(net: GPT, seed: int, sample: int, *settings: Any) -> GPT:
        cut[sample] += 1
        return thin(net, seed, sample, *settings)

    monkeypatch.setattr(GPT, "thin", counted)
    for round in (1, 2):  # by tied weights of the head alone
        for batch in (tokens, tokens[:1]):
            outputs = list(sampled_outputs(net, lambda net, batch=batch: net(batch), num_samples=3, kept=kept))
            expected = [thin(net, 0, sample)(batch) for sample in range(3)]
            assert all(map(torch.equal, outputs, expected))
        assert cut == dict.fromkeys(range(3), round)
        net.token_embedding.weight.data.mul_(2)
