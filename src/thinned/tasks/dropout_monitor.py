"""Watches what dropout drops in training: units per site, and rows of attention that lose everything."""

from collections import defaultdict
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from thinned.models.dropout import SITES, Dropout, derive_seed, sites_in, watched
from thinned.offers import task_offers
from thinned.ranks import of_all_ranks
from thinned.uncertainty.acting_dropout import only_dropout_active, seeded

EXAMPLES = 4  # of a batch are looked at; more cost more than they tell
PROBE_EVERY = 10  # logged steps


class DropoutMonitor(Callback):
    """Logs shares of what dropout drops, at the steps that are logged.

    `dropout/dropped/<site>` is the share of the units other than 0 that a site has dropped. A row of attention with t
    probabilities above 0 loses them all with probability p^t. `dropout/empty_rows/layer<l>_head<h>` is the share of
    such rows, and `dropout/empty_rows/expected` the one that p^t predicts for all heads. Each process watches the first
    four examples of its batch.

    On a CPU it watches the training pass itself. Fused attention and compiled nets show no mask. At every tenth logged
    step, it then runs the examples once more: without gradients, with only dropout in training mode, and with a random
    state of their own. This callback does not change the training by one bit.
    """

    def __init__(self) -> None:
        self._watch = ExitStack()
        self._counts: dict[str, Any] = defaultdict(int)  # units dropped and all, by site; rows, by name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = task_offers(pl_module).net
        self._net: nn.Module = pl_module if net is None else net
        self._dropouts = {name: m for name, m in self._net.named_modules() if isinstance(m, Dropout)}
        self._compiled = task_offers(pl_module).compile_net

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._watch.close()
        self._counts.clear()
        step, every = trainer.global_step + 1, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or not any(module.p > 0 for module in self._dropouts.values()):
            return
        if pl_module.device.type == "cpu" and not self._compiled:
            self._watch.enter_context(watched(self._net, self._see))
        elif step % (PROBE_EVERY * every) == 0:
            with trainer.precision_plugin.forward_context():
                self._probe(batch[0][:EXAMPLES], derive_seed("dropout monitor", trainer.global_rank, step))
            self._log(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._watch.close()  # Checkpointed activations are computed again in the backward pass.
        self._log(trainer, pl_module)

    def on_exception(self, *_: Any) -> None:
        self._watch.close()

    def on_train_end(self, *_: Any) -> None:
        self._watch.close()

    @torch.no_grad()
    def _probe(self, inputs: Any, seed: int) -> None:
        net = self._net
        eager = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        with seeded(seed), eager, only_dropout_active(net, sites_in(net)), watched(net, self._see):
            net(inputs)

    def _see(self, name: str, module: nn.Module, before: Tensor, after: Tensor) -> None:
        assert isinstance(module, Dropout), "Expected a net that is no thinned one"
        before, after = before[:EXAMPLES], after[:EXAMPLES]
        possible, kept = before.count_nonzero(), after.count_nonzero()
        self._counts[module.site] += torch.stack([possible - kept, possible])
        if module.site == "attention":
            self._counts[f"rows of {name}"] += empty_rows(before, after, module.p)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the shares of all processes together: Lightning would reduce each by itself."""
        if not self._counts:
            return
        of_ranks = of_all_ranks({name: counts.cpu() for name, counts in self._counts.items()})
        self._counts.clear()
        sums = {name: torch.stack([of_rank[name] for of_rank in of_ranks]).sum(0) for name in of_ranks[0]}
        shares = {f"dropped/{site}": sums[site][0] / sums[site][1].clamp_min(1) for site in SITES if site in sums}
        layers = [f"rows of {name}" for name, module in self._dropouts.items() if module.site == "attention"]
        if heads := {layer: sums[rows] for layer, rows in enumerate(layers) if rows in sums}:
            for layer, of_layer in heads.items():
                for head, (empty, _, rows) in enumerate(of_layer):
                    shares[f"empty_rows/layer{layer}_head{head}"] = empty / rows
            _, expected, rows = torch.cat([*heads.values()]).sum(0)
            shares["empty_rows/expected"] = expected / rows
        pl_module.log_dict({f"dropout/{name}": float(share) for name, share in shares.items()}, batch_size=1)


def empty_rows(before: Tensor, after: Tensor, p: float) -> Tensor:
    """Returns the numbers of rows of each head that lost everything, that should have, and of all rows: (H, 3).

    Args:
        before: Attention probabilities, or ones, before dropout: (B, H, T, S), or (B, S) for one head.
        after: The same after dropout.
        p: The rate.

    >>> ones = torch.ones(1, 1, 2, 2).tril()
    >>> empty_rows(ones, ones * torch.tensor([0.0, 2.0]), 0.5).tolist()
    [[1.0, 0.75, 2.0]]
    """
    if before.dim() == 2:
        before, after = before[:, None, None], after[:, None, None]
    possible, kept = before.count_nonzero(-1), after.count_nonzero(-1)  # (B, H, T)
    return torch.stack([(kept == 0).float(), p**possible, torch.ones_like(kept).float()], dim=-1).sum((0, 2))
