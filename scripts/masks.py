#!/usr/bin/env python
"""Draws the masks of a checkpoint's thinned networks, and their effect on a prompt or an image, as PNG and SVG.

python scripts/masks.py --ckpt_path runs/<experiment>/<run id> [--index 7 | --prompt "The yield statement"]

The masks of a network depend on --seed and its number alone. Beside them it shows the masks of training,
which are drawn again for each example or token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any  # mlp only

import torch  # gpt only
from matplotlib.figure import Figure
from torch import nn

from thinned.data import Tokenizer  # gpt only
from thinned.evaluation.figures import save
from thinned.evaluation.mask_figures import (
    attention_figures,  # gpt only
    empty_rows_figure,  # gpt only
    example_figure,  # mlp only
    mask_figures,
)
from thinned.evaluation.predictor import Predictor
from thinned.generation.sampling import prompt_tokens  # gpt only
from thinned.messages import one_message, restart_in_utf8
from thinned.models.net import net_offers


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ckpt_path", required=True, type=Path, help="checkpoint of a run, or its folder")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--index", type=int, help="example of the test split, for a checkpoint of images")
    given.add_argument("--prompt", help="text that the networks attend over, for a checkpoint of text")
    parser.add_argument("--samples", type=int, nargs=2, default=(0, 1), metavar="S", help="two networks (default 0 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the networks (default 0)")
    parser.add_argument("--out", type=Path, default=Path("masks"), metavar="FOLDER", help="folder to write to")
    return parser.parse_args(args)


# gpt only: begin
def draw_prompt(net: nn.Module, tokenizer: Tokenizer, given: argparse.Namespace) -> dict[str, Figure]:
    """Returns the figures of --prompt; ValueError if it exceeds the vocabulary or the context."""
    tokens, most = prompt_tokens(tokenizer, given.prompt), int(net.context_length)  # type: ignore[arg-type]
    if len(tokens) > most:
        raise ValueError(f"Expected --prompt of at most {most} tokens (net.context_length), but got {len(tokens)}")
    labels = [repr(piece)[1:-1] for piece in tokenizer.pieces(tokens)]
    return attention_figures(net, torch.tensor(tokens), labels, given.seed, given.samples[0])


# gpt only: end
# mlp only: begin
def draw_example(net: nn.Module, data: Any, given: argparse.Namespace) -> Figure:
    """Returns the figure of --index; ValueError if the test split has no such example."""
    data.setup("predict")
    if not 0 <= given.index < data.num_examples("test"):
        raise ValueError(f"Expected --index in [0, {data.num_examples('test')}) (test split), but got {given.index}")
    image, target = data.batches("test", training=False)[0, [given.index]][:2]
    is_a = "" if target is None else f", class {data.class_names[int(target)]}"
    return example_figure(net, image[0], f"Test example {given.index}{is_a}", given.seed, given.samples)


# mlp only: end
def main(args: Sequence[str] | None = None) -> None:
    with one_message():
        given = parse(args)
        predictor = Predictor.from_checkpoint(given.ckpt_path)
        net, data = predictor.net, predictor.data
        text = net_offers(net).vocab_size is not None
        if (given.index if text else given.prompt) is not None:
            kinds = ("--prompt", "text", "--index") if text else ("--index", "images", "--prompt")
            raise ValueError("Expected {} for a checkpoint of {}, but got {}".format(*kinds))
        figures = mask_figures(net, given.seed, tuple(given.samples))
        # gpt only: begin
        if "masks_attention_layer0" in figures:
            figures["empty_rows"] = empty_rows_figure(net, given.seed)
        if given.prompt is not None:
            figures |= draw_prompt(net, data.tokenizer, given)
        # gpt only: end
        # mlp only: begin
        if given.index is not None:
            figures["example"] = draw_example(net, data, given)
        # mlp only: end
        for name, figure in figures.items():
            save(figure, given.out, name)
            print(f"Written: {given.out / name}.png, .svg")


if __name__ == "__main__":
    restart_in_utf8()
    main()
