"""Watches what dropout drops in training: units per site, and rows of attention that lose everything."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from thinned.models.dropout import derive_seed, sites_in, watched
from thinned.offers import task_offers
from thinned.uncertainty.acting_dropout import kept_random_state, only_dropout_active, seed_generators

EXAMPLES = 2  # of a batch are looked at; more cost more than they tell
PROBE_EVERY = 10  # logged steps, on a GPU: a small batch takes it almost as long as a large one


class DropoutMonitor(Callback):
    """Logs shares of what dropout drops, at the steps that are logged, or on a GPU at every tenth of them.

    `dropout/dropped/<site>` is the share of the units other than 0 that a site has dropped. A row of attention with t
    probabilities above 0 loses them all with probability p^t. `dropout/empty_rows/layer<l>_head<h>` is the share of
    such rows, and `dropout/empty_rows/expected` what p^t says of all heads.

    The first two examples of each process pass through the net once more, without gradients, with dropout alone in
    training mode and a random state of their own. Training is the same, bit by bit, as without this callback.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        offers = task_offers(pl_module)
        net: nn.Module = pl_module if offers.net is None else offers.net
        step, every = trainer.global_step + 1, trainer.log_every_n_steps  # type: ignore[attr-defined]
        every *= 1 if pl_module.device.type == "cpu" else PROBE_EVERY
        sites = sites_in(net)
        if not every or step % every or not sites:
            return
        counts: dict[str, Any] = {}  # dropped and all, by site
        rows: list[Tensor] = []  # of attention, by layer: (H, 3) each

        def see(name: str, module: Any, before: Tensor, after: Tensor) -> None:
            possible, kept = before.count_nonzero(), after.count_nonzero()
            counts[module.site] = counts.get(module.site, 0) + torch.stack([possible - kept, possible])
            if module.site == "attention":
                rows.append(empty_rows(before, after, module.p))

        precision = trainer.precision_plugin.forward_context()
        eager = torch.compiler.set_stance("force_eager") if offers.compile_net else nullcontext()
        alone = only_dropout_active(net, sites)
        with torch.no_grad(), precision, eager, kept_random_state(), alone, watched(net, see):
            seed_generators(derive_seed("dropout monitor", trainer.global_rank, step))
            net(batch[0][:EXAMPLES])

        parts = [*counts.values(), *rows]
        flat = torch.cat([part.flatten() for part in parts])  # Lightning would reduce each by itself
        sums = trainer.strategy.reduce(flat, reduce_op="sum").cpu().split([part.numel() for part in parts])
        of_sites, layers = sums[: len(counts)], [part.view(-1, 3) for part in sums[len(counts) :]]
        shares = {f"dropped/{site}": n / units.clamp_min(1) for site, (n, units) in zip(counts, of_sites, strict=True)}
        for layer, heads in enumerate(layers):
            for head, (empty, _, number) in enumerate(heads):
                shares[f"empty_rows/layer{layer}_head{head}"] = empty / number
        if layers:
            _, expected, number = torch.cat(layers).sum(0)
            shares["empty_rows/expected"] = expected / number
        pl_module.log_dict({f"dropout/{name}": float(share) for name, share in shares.items()}, batch_size=1)


def empty_rows(before: Tensor, after: Tensor, p: float) -> Tensor:
    """Returns for each head how many rows of attention lost all that they had, how many should have, and all: (H, 3).

    Args:
        before: Attention probabilities or ones before dropout, (B, H, T, S), or (B, S) for one head.
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
