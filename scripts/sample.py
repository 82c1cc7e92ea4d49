#!/usr/bin/env python
"""Continues a prompt with a trained GPT, coloured by how unsure it is of each token.

python scripts/sample.py --ckpt_path runs/<experiment>/<run id>/checkpoints/best.ckpt --prompt "The yield statement"

Each continuation comes from a thinned network of its own. With --ensemble, it comes from the mean of S of them and
shows their disagreement (mutual information). With --deterministic, it is the network without dropout (entropy).
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from thinned.evaluation.predictor import Predictor
from thinned.files import whole_file
from thinned.generation.sampling import Sampling, sample_texts
from thinned.generation.text_samples import highlighted_page, print_samples
from thinned.messages import one_message, restart_in_utf8
from thinned.models import GPT


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a run with text")
    parser.add_argument(
        "--prompt",
        default="\n",
        help="text to continue, or FILE:path of a file with it; <|endoftext|> begins a document",
    )
    parser.add_argument("--num_samples", type=int, default=3, help="number of continuations (default 3)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length of each (default 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the logits; 0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=int, help="only the k most probable tokens")
    parser.add_argument("--top_p", type=float, help="only the most probable tokens with this joint probability")
    parser.add_argument("--stop", help="text that ends a continuation")
    parser.add_argument("--seed", type=int, default=0, help="seed of networks and tokens")
    parser.add_argument("--ensemble", type=int, nargs="?", const=20, metavar="S", help="mean of S networks (alone: 20)")
    parser.add_argument("--deterministic", action="store_true", help="the network without dropout")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the coloured text to FILE too")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu, cuda, cuda:1, mps (default {default})")
    return parser.parse_args(args)


def read_prompt(given: str) -> str:
    """Returns the text of --prompt; ValueError for a file that is not UTF-8 text."""
    if not given.startswith("FILE:"):
        return given
    try:
        return Path(given.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"Expected --prompt {given} to be a file of UTF-8 text, but got {why}") from error


def main(args: Sequence[str] | None = None) -> None:
    with one_message():
        options = parse(args)
        warnings.showwarning = lambda message, *_: print(f"note: {message}")
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"Expected --device to be one of this machine, but got {options.device!r}") from error
        predictor = Predictor.from_checkpoint(options.ckpt_path, device=options.device)
        net = predictor.net
        if not isinstance(net, GPT):
            raise ValueError(f"Expected ckpt_path to hold a GPT, but got {type(net).__name__}")
        tokenizer = predictor.data.tokenizer
        samples = sample_texts(
            net, tokenizer, read_prompt(options.prompt), num_samples=options.num_samples, ensemble=options.ensemble,
            deterministic=options.deterministic, max_new_tokens=options.max_new_tokens,
            sampling=Sampling(options.temperature, options.top_k, options.top_p), stop=options.stop, seed=options.seed,
        )  # fmt: skip
        if options.html is not None:
            with whole_file(options.html) as temporary:
                temporary.write_text(highlighted_page(samples, f"Samples of {options.ckpt_path}"), encoding="utf-8")
            print(f"Written: {options.html}")
        print_samples(samples)


if __name__ == "__main__":
    restart_in_utf8()
    main()
