"""Shows continuations of a prompt, coloured by the uncertainty of tokens: in the terminal, as one HTML page, in W&B."""

import html
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from rich.color import blend_rgb
from rich.color_triplet import ColorTriplet
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from thinned.data.module import data_offers
from thinned.files import whole_file
from thinned.generation.sampling import Sample, Sampling, prompt_tokens, sample_texts
from thinned.models.dropout import sites_in
from thinned.models.gpt import GPT
from thinned.offers import task_offers

WHITE, ORANGE = ColorTriplet(255, 255, 255), ColorTriplet(232, 106, 23)
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.6 ui-monospace, monospace; max-width: 60rem; margin: 2rem auto; color: #111; background: #fff; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid #ddd; padding: 1rem 0; font: inherit; }}
</style>
<h1>{title}</h1>
<p>Bold: the prompt. Background: {measure} of each token, from 0 (white) to {top:.2f} nats or more (orange).
Point at a token for its figures.</p>
{samples}
"""


class TextSamples(Callback):
    """Continues a prompt with the tested network after the test, as `sample_texts` does.

    Prints the continuations, writes `samples.html` to the run's directory, and logs a table `samples` to W&B.

    Args:
        prompt: Text with which each begins. `<|endoftext|>`, or an empty prompt, begins a document.
        num_samples: Number of continuations.
        ensemble: Number of thinned networks whose mean continues it; null takes one network for each continuation.
        max_new_tokens: Length of each.
        temperature: Divides the logits.
        top_k: Only the k most probable tokens can follow; null is all.
        seed: Seed of networks and tokens.
    """

    def __init__(
        self,
        prompt: str = "\n",
        num_samples: int = 2,
        ensemble: int | None = 10,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 0,
    ) -> None:
        self.prompt, self.ensemble = prompt, ensemble
        self.sample = partial(
            sample_texts, prompt=prompt, num_samples=num_samples, max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k), seed=seed,
        )  # fmt: skip

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        tokenizer = data_offers(trainer).tokenizer
        if tokenizer is not None:
            try:
                prompt_tokens(tokenizer, self.prompt)
            except ValueError as error:  # at once, not after the training
                raise ValueError(f"{error} in the prompt {self.prompt!r} (trainer.callbacks.prompt)") from None

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net, tokenizer = task_offers(pl_module).net, data_offers(trainer).tokenizer
        if not trainer.is_global_zero or trainer.fast_dev_run or tokenizer is None or not isinstance(net, GPT):  # type: ignore[attr-defined]
            return
        if pl_module.device_mesh is not None:  # this process holds only a part of the net
            rank_zero_info("No samples of a net that is sharded: scripts/sample.py takes them from its checkpoint.")
            return
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # a sample may exceed the context
            samples = self.sample(net=net, tokenizer=tokenizer, ensemble=self.ensemble if sites_in(net) else None)
        folder = Path(trainer.default_root_dir)
        content = highlighted_page(samples, f"Samples of {folder.name}")
        with whole_file(folder / "samples.html") as temporary:
            temporary.write_text(content, encoding="utf-8")
        print_samples(samples)
        columns = ["prompt", "text", "mean entropy", "mean mutual information"]
        rows = [[s.prompt, s.text, fmean(s.entropy), fmean(s.mutual_information)] for s in samples]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns, rows, step=trainer.global_step)
                import wandb

                page = {"samples_page": wandb.Html(content, inject=False)}
                logger.log_metrics(page, step=trainer.global_step)  # type: ignore[arg-type]


def print_samples(samples: Sequence[Sample]) -> None:
    """Prints the samples with a colour per token, a rule above each."""
    console = Console(highlight=False)
    name, top = colour_scale(samples)
    console.print(f"Background: {name.replace('_', ' ')} of each token, 0 (white) to {top:.2f} nats (orange).")
    for i, sample in enumerate(samples, 1):
        console.print(Rule(f"sample {i}: {fmean(getattr(sample, name)):.3f} nats a token", align="left"))
        console.print(highlighted(sample, name, top))


def colour_scale(samples: Sequence[Sample]) -> tuple[str, float]:
    """Returns what colours tokens, and the value with the strongest colour, in nats: the 95th percentile of all tokens.

    It is the mutual information if there are several networks, else the entropy.
    """
    name = "mutual_information" if any(any(sample.mutual_information) for sample in samples) else "entropy"
    values = [value for sample in samples for value in getattr(sample, name)]
    return name, float(np.percentile(values, 95, method="lower")) or 1.0


def highlighted(sample: Sample, measure: str, top: float) -> Text:
    """Returns the prompt in bold, then each token on a background from white (0) to orange (top nats)."""
    text = Text(sample.prompt, style="bold")
    for piece, value in zip(sample.pieces, getattr(sample, measure), strict=True):
        text.append(piece, style=f"not bold #111111 on {_colour(value / top)}")
    return text


def highlighted_page(samples: Sequence[Sample], title: str) -> str:
    """Returns a page of HTML with all samples; pointing at a token shows its entropy and mutual information."""
    (name, top), parts = colour_scale(samples), []
    for sample in samples:
        columns = zip(sample.pieces, getattr(sample, name), sample.entropy, sample.mutual_information, strict=True)
        spans = [
            f'<span style="background:{_colour(value / top)}" title="entropy {e:.3f}, mutual information {i:.3f} nats">'
            f"{html.escape(piece)}</span>"
            for piece, value, e, i in columns
        ]
        parts.append(f"<pre><b>{html.escape(sample.prompt)}</b>{''.join(spans)}</pre>")
    name, body = name.replace("_", " "), "\n".join(parts)
    return PAGE.format(title=html.escape(title), measure=name, top=top, samples=body)


def _colour(share: float) -> str:
    return blend_rgb(WHITE, ORANGE, min(share, 1.0)).hex
