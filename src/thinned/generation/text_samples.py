"""Continues a prompt at the end of training, coloured by uncertainty: in the terminal, as HTML, in W&B."""

import warnings
from functools import partial
from pathlib import Path
from statistics import fmean

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.rule import Rule

from thinned.data.module import data_offers
from thinned.files import whole_file
from thinned.generation.highlight import full_scale, highlighted, highlighted_page, measure
from thinned.generation.sampling import Sample, Sampling, prompt_tokens, sample_texts
from thinned.models.dropout import sites_in
from thinned.models.gpt import GPT
from thinned.offers import task_offers


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
        page = Path(trainer.default_root_dir, "samples.html")
        content = highlighted_page(samples, f"Samples of {page.parent.name}")
        with whole_file(page) as temporary:
            temporary.write_text(content, encoding="utf-8")
        print_samples(samples)
        columns = ["prompt", "text", "mean entropy", "mean mutual information"]
        rows = [[s.prompt, s.text, fmean(s.entropy), fmean(s.mutual_information)] for s in samples]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns, rows, step=trainer.global_step)
                import wandb

                html = wandb.Html(content, inject=False)
                logger.log_metrics({"samples_page": html}, step=trainer.global_step)  # type: ignore[dict-item]


def print_samples(samples: list[Sample]) -> None:
    """Prints the samples with a colour per token, a rule above each."""
    console = Console(highlight=False)
    name, top = measure(samples), full_scale(samples)
    console.print(f"Background: {name.replace('_', ' ')} of each token, 0 (white) to {top:.2f} nats (orange).")
    for i, sample in enumerate(samples, 1):
        console.print(Rule(f"sample {i}: {fmean(getattr(sample, name)):.3f} nats a token", align="left"))
        console.print(highlighted(sample, name, top))
