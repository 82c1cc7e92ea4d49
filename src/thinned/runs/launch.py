"""Tells Lightning how many devices and nodes a launcher, torchrun or srun, has started processes for.

With other numbers, Lightning 2.6.6 trains separate runs, or waits for processes that nobody has started.
"""

import os
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


def fill_in_from_launcher(trainer: Any) -> None:
    """Sets `devices` (if auto) and `num_nodes` (if 1) of a Trainer's config to what the launcher started.

    Raises:
        ValueError: The config says otherwise, or names several nodes without a launcher.
    """
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        launcher, processes = "torchrun", int(os.environ["WORLD_SIZE"])
        nodes, per_node = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        launcher, processes = "srun", int(os.environ["SLURM_NTASKS"])
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        per_node = processes // nodes
    elif trainer.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        expected = "torchrun or srun, or MASTER_ADDR and NODE_RANK in the environment of each node"
        raise ValueError(f"Expected {expected}, for trainer.num_nodes={trainer.num_nodes}, but got none of them")
    else:
        return
    if nodes * per_node != processes:
        raise ValueError(f"Expected {launcher} to start as many processes on each node, but got {processes} on {nodes}")
    for key, started, unset in (("devices", per_node, ("auto", "-1", -1)), ("num_nodes", nodes, (1,))):
        given = trainer[key]
        if given in unset:
            trainer[key] = started
        elif _count(given) != started:
            expected = f"trainer.{key} to be {started}{' or auto' * (key == 'devices')}"
            what = f"{launcher} has started {processes} processes on {nodes} nodes"
            raise ValueError(f"Expected {expected}, as {what}, but got {given}")


def _count(devices: Any) -> int:
    """Counts devices given as a number or a list, either perhaps as text."""
    if isinstance(devices, str):
        return len(devices.strip(",").split(",")) if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)
