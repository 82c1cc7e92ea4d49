"""Measures the cost of the GPT: training against other implementations, generation, Monte-Carlo dropout on tokens."""

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import compare, peak_memory, repeat, show
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.evaluation.batch import Batch
from thinned.evaluation.rows import predicted_rows
from thinned.evaluation.ways import standard_ways
from thinned.generation.sampling import Sampling, generate
from thinned.models import GPT, DropoutRates

VOCABULARY = 65


class Size(NamedTuple):
    """Holds the sizes of a GPT and its batches."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.layers} x {self.width}, context {self.context}, batch {self.batch}"


SMALL, LARGE = Size(4, 4, 128, 64, 12), Size(6, 6, 384, 256, 16)


def gpt(size: Size, p: float, mlp: float | None = None, vocab_size: int = VOCABULARY) -> GPT:
    rates = DropoutRates(p, p, p, p if mlp is None else mlp)
    return GPT(vocab_size, size.context, size.layers, size.heads, size.width, bias=True, dropout=rates)


class Logits(nn.Module):
    """Wraps another implementation, so that it is called like a GPT."""

    def __init__(self, net: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.net, self.logits = net, logits

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(self.net(tokens)).flatten(0, 1), targets.flatten())


def transformers_gpt2(size: Size, p: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=size.context, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        embd_pdrop=p, attn_pdrop=p, resid_pdrop=p, activation_function="gelu", use_cache=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return Logits(GPT2LMHeadModel(config).train(), lambda output: output.logits)


def nanogpt(size: Size, p: float, source: Path) -> nn.Module:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            module = runpy.run_path(str(source))
            config = module["GPTConfig"](size.context, VOCABULARY, size.layers, size.heads, size.width, p, True)
            self.net = module["GPT"](config)

        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            loss: Tensor = self.net(tokens, targets)[1]
            return loss

    return WithLoss()


def bench_train(repeats: int, nanogpt_source: Path | None) -> None:
    """Measures eager training steps with the same optimiser; the others drop at embedding, attention and residual."""
    for size in (SMALL, LARGE):
        tokens, targets = torch.randint(VOCABULARY, (2, size.batch, size.context))
        steps = 10 if size is SMALL else 1
        for dtype in (torch.float32, torch.bfloat16):
            nets: dict[str, nn.Module] = {"thinned, p = 0": gpt(size, 0.0)}
            nets |= {"thinned, p = 0.2": gpt(size, 0.2), "thinned, p = 0.2 but at mlp": gpt(size, 0.2, mlp=0.0)}
            for p in (0.0, 0.2):
                nets[f"transformers GPT-2, p = {p:g}"] = transformers_gpt2(size, p)
                if nanogpt_source is not None:
                    nets[f"nanoGPT, p = {p:g}"] = nanogpt(size, p, nanogpt_source)

            def side(
                net: nn.Module,
                tokens: Tensor = tokens,
                targets: Tensor = targets,
                dtype: torch.dtype = dtype,
                steps: int = steps,
            ) -> Callable[[], object]:
                optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)  # nothing is fitted

                def step(_: int) -> None:
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                        loss = net(tokens, targets).float().mean()
                    torch.autograd.backward(loss)
                    optimizer.step()

                return lambda: repeat(steps, step)

            def speed(name: str, seconds: float, count: int = tokens.numel()) -> str:
                return f"{count / seconds:,.0f}"

            results = compare({name: side(net) for name, net in nets.items()}, repeats)
            show(f"Training step, {size}, {str(dtype).removeprefix('torch.')}", results, steps, tokens_per_second=speed)


def bench_generate(repeats: int) -> None:
    """Measures the generation of 256 tokens, with and without a KV cache."""
    net, prompt = gpt(LARGE, 0.0).eval(), torch.zeros(1, 1, dtype=torch.int64)

    @torch.inference_mode()
    def without_cache() -> Tensor:
        text = prompt
        for _ in range(LARGE.context):
            text = torch.cat([text, net(text[:, -LARGE.context :])[:, -1:].argmax(-1)], dim=1)
        return text

    with_cache = partial(generate, [net], prompt, LARGE.context, Sampling(temperature=0))
    show(f"{LARGE.context} new tokens, 6 x 384", compare({"cache": with_cache, "no cache": without_cache}, repeats))


def bench_gpt_mc(repeats: int) -> None:
    """Measures a pass of a thinned GPT against a deterministic one, and S = 20 samples against the textbook loop."""
    samples = 20
    for size in (SMALL._replace(batch=64), LARGE._replace(batch=4)):
        tokens, targets = torch.randint(VOCABULARY, (2, size.batch, size.context))
        net, textbook = gpt(size, 0.2).eval(), transformers_gpt2(size, 0.2)
        thinned = net.thin(0, 0)

        def probs(net: nn.Module, tokens: Tensor = tokens) -> Tensor:
            with torch.no_grad():
                return net(tokens).softmax(-1)

        def loop(net: Any = textbook, tokens: Tensor = tokens) -> Tensor:
            with torch.no_grad():
                return torch.stack([net.net(tokens).logits.softmax(-1) for _ in range(samples)]).mean(0)

        def rows(net: GPT = net, batch: tuple[Tensor, Tensor] = (tokens, targets)) -> object:
            return run_token_rows(net, batch, samples)

        passes: dict[str, Callable[[], object]] = {
            "deterministic": lambda net=net: probs(net),  # type: ignore[misc]
            "thinned network": lambda net=thinned: probs(net),  # type: ignore[misc]
            "thinned, thin() included": lambda net=net: probs(net.thin(0, 0)),  # type: ignore[misc]
        }
        show(f"GPT, one pass, {size}, p = 0.2", compare(passes, 3 * repeats))
        sides: dict[str, Callable[[], object]] = {"thinned, with all statistics": rows, "textbook loop": loop}
        show(f"GPT, Monte-Carlo prediction, {size}, p = 0.2, S = {samples}", compare(sides, repeats))
    for samples in (4, 64):
        peak = peak_memory(large_vocabulary, samples)
        print(f"peak memory of token rows, V = 50,304, S = {samples}: {peak:.0f} MiB")


def run_token_rows(net: GPT, batch: tuple[Tensor, Tensor], num_samples: int) -> object:
    ways = standard_ways(num_samples, "shared", "all", 0)
    for way in ways:
        way.bind(net)
    return predicted_rows(Batch(batch[0], torch.arange(len(batch[0])), batch[1]), net, ways)


def large_vocabulary(num_samples: int) -> object:
    net = gpt(Size(2, 4, 128, 128, 2), 0.1, vocab_size=50_304).eval()
    tokens, targets = torch.randint(50_304, (2, 2, 128))
    return run_token_rows(net, (tokens, targets), num_samples)
