"""Records the provenance of a prediction: what decides its rows, and nothing else."""

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import thinned
from thinned.data.module import DataOffers, data_offers
from thinned.data.order import Split
from thinned.evaluation.rows import ROW_FORMAT
from thinned.evaluation.ways import Way
from thinned.models.dropout import Dropout


def provenance(
    trainer: Trainer, task: LightningModule, checkpoint: str | None, split: Split, ways: Sequence[Way]
) -> dict[str, Any]:
    """Returns the weights, the dropout, the ways, the data and the versions of a prediction, as JSON, to all processes.

    The weights are known by the digest of the checkpoint, or by their own if there is none.
    """
    if not trainer.is_global_zero:  # it may have other shards of the weights
        return trainer.strategy.broadcast({})
    limit = trainer.limit_test_batches if trainer.testing else trainer.limit_predict_batches
    found = {
        "row_format": ROW_FORMAT,
        "checkpoint": checkpoint and digest_of_file(checkpoint),
        "weights": None if checkpoint else _digest_of_weights(task),
        "dropout": _rates(task),
        "ways": {way.name: way.settings for way in ways},
        "data": of_data(data_offers(trainer), split, limit),
        "precision": str(trainer.precision),
        "versions": {
            "thinned": thinned.__version__,
            "torch": str(torch.__version__),
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }
    return trainer.strategy.broadcast(found)


def stored_provenance(path: Path) -> dict[str, Any] | None:
    """Returns what decided the rows of a file of predictions; None if there is no such file."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(b"thinned", b"{}"))
    return found


def of_data(data: DataOffers, split: Split, limit_batches: float) -> dict[str, Any]:
    """Returns what decides the examples, as JSON, of data after `setup`."""
    return {"predict_split": split} if data.provenance is None else data.provenance(split, limit_batches)


def differences(now: dict[str, Any], then: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns each setting that differs, as `key = this instead of that`."""
    found = []
    for key in now | then:
        ours, theirs = now.get(key), then.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, "" if key == "ways" else f"{prefix}{key}.")  # named as in a config
        elif ours != theirs:
            found.append(f"{prefix}{key} = {ours} instead of {theirs}")
    return found


def measured_settings(evaluation: Path, checkpoint: str) -> dict[str, dict[str, Any]]:
    """Returns the settings of each way of an evaluation, such as a temperature, by the name of the way.

    `evaluation` is its folder or a file in it; ValueError if it has no rows, or those of another checkpoint.
    """
    file = (evaluation if evaluation.is_dir() else evaluation.parent) / "predictions.parquet"
    try:
        found = stored_provenance(file)
    except (OSError, ValueError):
        found = None
    if not found:
        raise ValueError(f"Expected an evaluation by scripts/evaluate.py, but got {evaluation} (no rows in {file})")
    if found["checkpoint"] != digest_of_file(checkpoint):
        raise ValueError(f"Expected an evaluation of {checkpoint}, but got one of another checkpoint, {evaluation}")
    ways: dict[str, dict[str, Any]] = found["ways"]
    return ways


def _rates(module: nn.Module) -> dict[str, float | list[float]]:
    """Returns the rate at each site, or all of them if its modules differ."""
    rates: dict[str, set[float]] = {}
    for dropout in module.modules():
        if isinstance(dropout, Dropout):
            rates.setdefault(dropout.site, set()).add(dropout.p)
    return {site: p.pop() if len(p) == 1 else sorted(p) for site, p in sorted(rates.items())}


def digest_of_file(path: str) -> str:
    """Returns the SHA-256 of a file or of all files in a folder, or the path if it is not on this machine."""
    files = [Path(path)] if Path(path).is_file() else sorted(file for file in Path(path).rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest() if files else path


def _digest_of_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            value = getattr(value, "to_local", lambda value=value: value)()  # of a sharded one, what is here
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
