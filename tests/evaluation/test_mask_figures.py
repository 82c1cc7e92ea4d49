"""What pictures of masks show, read back from their artists: the masks, and what the networks used."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from thinned.evaluation.mask_figures import (
    attention_figures,  # gpt only
    empty_rows_figure,  # gpt only
    example_figure,  # mlp only
    mask_figures,
)
from thinned.models import (
    GPT,  # gpt only
    MLP,  # mlp only
    Dropout,
    DropoutRates,
)
from thinned.models.dropout import sample_masks
from thinned.models.gpt import Attention  # gpt only


def shown(axes: Axes) -> Tensor:
    """The array of a heatmap, with NaN for what it leaves blank."""
    (image,) = axes.images
    return torch.from_numpy(np.ma.filled(image.get_array().astype(float), np.nan))


# gpt only: begin
H, P, T = 2, 8, 5
RATES = DropoutRates(embedding=0.1, attention=0.5, residual=0.3, mlp=0.4)


@pytest.fixture
def gpt() -> GPT:
    return GPT(11, P, num_layers=2, num_heads=H, width=12, dropout=RATES).eval()


def test_heads_show_the_causal_half_of_their_masks(gpt: GPT) -> None:
    """Two networks, what they share, and training masks, a line of panels each; titles give what was observed."""
    figure = mask_figures(gpt, seed=3, samples=(4, 7), draws=2)["masks_attention_layer1"]
    one, other = (sample_masks(gpt, 3, sample)["blocks.1.attention.attention_dropout"] > 0 for sample in (4, 7))
    below = torch.ones(P, P).tril() > 0
    lines = [one.double(), other.double(), (one.double() + other.double()) / 2]
    for axes, mask in zip(figure.axes, [head for line in lines for head in line], strict=False):
        torch.testing.assert_close(shown(axes), mask.where(below, torch.nan), equal_nan=True, rtol=0, atol=0)
    assert len(figure.axes) == 5 * H
    assert [axes.get_ylabel() for axes in figure.axes[::H]] == [
        f"{label}\nquery" for label in ("network 4", "network 7", "together", "training 1", "training 2")
    ]
    empty = int((one[1].tril().sum(-1) == 0).sum())
    share = 1 - one[1][below].double().mean()
    assert figure.axes[1].get_title() == f"head 1: dropped {share:.3f},\n{empty} empty rows, n = 36"
    either = 1 - (one & other)[0][below].double().mean()
    assert figure.axes[2 * H].get_title().startswith(f"head 0: dropped {either:.3f},")
    assert figure.get_suptitle().startswith("Layer 1 (blocks.1.attention), site attention, p = 0.5")


def test_empty_rows_are_marked(gpt: GPT) -> None:
    figure = mask_figures(gpt)["masks_attention_layer0"]
    mask = sample_masks(gpt, 0, 0)["blocks.0.attention.attention_dropout"].tril()
    for axes, head in zip(figure.axes, mask, strict=False):
        assert axes.lines[0].get_ydata().tolist() == [t for t in range(P) if not head[t].any()]
    assert any(len(axes.lines[0].get_ydata()) for axes in figure.axes[:H])


def test_sites_of_units_show_their_masks(gpt: GPT) -> None:
    """A panel for each module, a line for each mask."""
    figures = mask_figures(gpt, draws=1)
    layers = {f"masks_attention_layer{layer}" for layer in range(2)}
    assert figures.keys() == layers | {"masks_embedding", "masks_residual", "masks_mlp"}
    one, other = (sample_masks(gpt, 0, sample)["blocks.0.mlp.mlp_dropout"] > 0 for sample in (0, 1))
    panel = figures["masks_mlp"].axes[0]
    assert shown(panel)[:3].tolist() == [one.tolist(), other.tolist(), ((one.double() + other) / 2).tolist()]
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "network 0",
        "network 1",
        "together",
        "training 1",
    ]
    dropped = [1 - mask.double().mean() for mask in (one, other, one & other)]
    said = "dropped {:.3f} and {:.3f}, by either {:.3f}".format(*dropped)
    assert panel.get_title() == f"blocks.0.mlp.mlp_dropout: p = 0.4, {said}, n = 48"
    assert len(figures["masks_residual"].axes) == 4


def test_training_masks_are_others_each_time(gpt: GPT) -> None:
    """False failure: below 1e-9 (48 units at a rate of 0.4)."""
    lines = [tuple(line) for line in shown(mask_figures(gpt, draws=3)["masks_mlp"].axes[1]).tolist()]
    assert len(set(lines)) == 6


def test_attention_before_and_after_dropout_is_what_the_network_used(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an implementation of its own: what the softmax of the thinned network's scores times its mask mixes."""
    seen: list[tuple[Tensor, Tensor]] = []
    attend = Attention.attend

    def spied(self: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = attend(self, query, key, value)
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf)
        seen.append((scores.softmax(-1)[0].double(), mixed[0].double()))
        values.append(value[0].double())
        return mixed

    values: list[Tensor] = []
    monkeypatch.setattr(Attention, "attend", spied)
    figures = attention_figures(gpt, torch.arange(T), ["a", "$b$", "c", "d", "e"], seed=2, sample=1)
    masks = sample_masks(gpt, 2, 1)
    assert list(figures) == ["prompt_layer0", "prompt_layer1"]
    for layer, (probs, mixed) in enumerate(seen):
        mask = masks[f"blocks.{layer}.attention.attention_dropout"][:, :T, :T].double()
        before, after, used = (
            torch.stack(
                [shown(axes).nan_to_num() for axes in figures[f"prompt_layer{layer}"].axes[i * H : (i + 1) * H]]
            )
            for i in range(3)
        )
        torch.testing.assert_close(before, probs, rtol=0, atol=1e-6)
        torch.testing.assert_close(after, probs * mask, rtol=0, atol=1e-6)
        torch.testing.assert_close(used @ values[layer], mixed, rtol=0, atol=1e-6)
        torch.testing.assert_close(used * 2, after, rtol=0, atol=1e-6)  # 1 / (1 - p), which is in the values
    labels = figures["prompt_layer0"].axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["a", "$b$", "c", "d", "e"]
    assert not any(label.get_parse_math() for label in labels)  # $b$ is no formula


def test_prompt_looks_at_a_pass_without_changing_it(gpt: GPT) -> None:
    tokens = torch.arange(T)
    expected = gpt.thin(0, 0)(tokens[None])
    attention_figures(gpt, tokens, "abcde")
    assert torch.equal(gpt.thin(0, 0)(tokens[None]), expected)


def test_empty_rows_stand_beside_their_probability(gpt: GPT) -> None:
    """Shares over 20 networks of two layers with two heads, counted anew; the expected mean is of 0.5^1 to 0.5^8."""
    figure = empty_rows_figure(gpt, seed=1, num_networks=20)
    (axes,) = figure.axes
    masks = [mask for s in range(20) for mask in sample_masks(gpt, 1, s, ["attention"]).values()]
    shares = [sum(int(not mask[h, t, : t + 1].any()) for mask in masks for h in range(H)) / 80 for t in range(P)]
    line, points = axes.lines[0], axes.lines[1]
    number = len(points.get_ydata())
    assert points.get_ydata().tolist() == pytest.approx(shares[:number])
    assert not any(shares[number:])
    assert line.get_ydata().tolist() == pytest.approx([0.5**t for t in range(1, number + 1)])
    assert axes.get_title().startswith(f"{sum(shares) / P:.5f} [")
    assert axes.get_title().endswith(f"expected are {(1 - 0.5**8) / 8:.5f}")


def test_prompt_needs_attention_dropout() -> None:
    net = GPT(11, P, num_layers=1, num_heads=H, width=12, dropout=DropoutRates(mlp=0.1))
    for draw in (lambda: attention_figures(net, torch.arange(T), "abcde"), lambda: empty_rows_figure(net)):
        with pytest.raises(
            ValueError, match="Expected a net with `thin` and attention dropout, but got GPT with rates"
        ):
            draw()


# gpt only: end
# mlp only: begin
def test_pixels_lie_as_in_the_image() -> None:
    """Before: the image itself. After: the same times the mask, and what is dropped in the colour of its own."""
    net = MLP((1, 4, 6), 3, [40], dropout=DropoutRates(embedding=0.5, mlp=0.5)).eval()
    image = torch.rand(1, 4, 6) + 0.1
    figure = example_figure(net, image, "Test example 7", seed=2, samples=(1, 3))
    for column, sample in enumerate((1, 3)):
        mask = sample_masks(net, 2, sample)["stages.embedding_dropout"].view(4, 6).float()
        before, after = (shown(figure.axes[2 * column + i]).float() for i in range(2))
        torch.testing.assert_close(before, image[0])
        torch.testing.assert_close(after.where(mask > 0, 0), image[0] * mask)
        lowest = figure.axes[2 * column + 1].images[0].norm.vmin
        assert (after[mask == 0] < lowest).all()
        share = f"dropped {(mask == 0).double().mean():.3f} of n = 24 active"
        assert figure.axes[2 * column + 1].get_title() == f"site embedding, p = 0.5, after\n{share}"
    hidden = shown(figure.axes[4])
    assert hidden.shape == (2, 32)
    assert int(hidden.isnan().sum()) == 24  # of 64, which 40 units fill up to


def test_patches_lie_as_in_the_image() -> None:
    net = MLP((1, 6, 9), 3, [8], width=5, patch_size=3, dropout=DropoutRates(attention=0.5)).eval()
    figure = example_figure(net, torch.rand(1, 6, 9), "Test example 7")
    mask = sample_masks(net, 0, 0)["stages.pooling.attention_dropout"].view(2, 3)
    before, after = (shown(axes) for axes in figure.axes[:2])
    assert before.shape == (2, 3)
    torch.testing.assert_close(after.where(mask > 0, 0), before * mask)
    assert before.sum() == pytest.approx(1)


def test_features_have_figures_too() -> None:
    net = MLP((5,), 3, [8], width=4, residual=True, layer_norm=True, dropout=DropoutRates(0.2, 0.0, 0.3, 0.4)).eval()
    assert mask_figures(net).keys() == {"masks_embedding", "masks_residual", "masks_mlp"}
    assert len(example_figure(net, torch.rand(5), "Test example 7").axes) == 3 * (4 + 2)


# mlp only: end
class WithoutThin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = Dropout(0.5, "mlp", (4,))


NETS: dict[str, Callable[[], nn.Module]] = {
    "WithoutThin with one without `thin`": WithoutThin,
    "GPT with rates of 0 alone": lambda: GPT(11, P, num_layers=1, num_heads=1, width=4),  # gpt only
    "MLP with rates of 0 alone": lambda: MLP((2,), 3, [4]),  # mlp only
}


@pytest.mark.parametrize("got", NETS)
def test_net_without_masks(got: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected a net with `thin` and dropout, but got {got}"):
        mask_figures(NETS[got]())
