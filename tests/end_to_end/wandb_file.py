"""Reads W&B's files, of which wandb 0.31.0 offers no reader."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

GLOBAL_STEP = "trainer/global_step"  # under which Lightning's WandbLogger logs the step


def newest(run: Path) -> Path:
    """The file of the latest process of a run, as W&B names folders by the second."""
    return max(run.glob("wandb/*run-*/*.wandb"))


def wandb_history(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a .wandb file, which may be cut off; a picture or table is a dict under its key."""
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *keys, last = item.nested_key or [item.key]
                place = row
                for key in keys:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            yield row


def wandb_summary(file: Path) -> dict[str, Any]:
    """The latest value of each key; that of a metric with a best value is a dict, such as {"min": 0.1}."""
    return _updated(record.summary for record in wandb_records(file) if record.WhichOneof("record_type") == "summary")


def wandb_config(file: Path) -> dict[str, Any]:
    """What the first record of the run and later ones say of its settings."""
    records = list(wandb_records(file))
    configs = (getattr(r, kind) for r in records if (kind := r.WhichOneof("record_type")) in ("run", "config"))
    return _updated(getattr(content, "config", content) for content in configs)


def _updated(contents: Iterable[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in (item for content in contents for item in content.update):
        values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return values


def wandb_records(file: Path) -> Iterator[Record]:
    """Yields the records of a .wandb file, a LevelDB log: chunks (CRC, length, kind, bytes) in blocks of 32 KiB."""
    content, start, record = file.read_bytes(), 7, b""
    while start + 7 < len(content):
        left_in_block = 2**15 - start % 2**15
        if left_in_block < 7:  # padding
            start += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, start)
        record += content[start + 7 : start + 7 + length]
        start += 7 + length
        if start > len(content):
            return
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""
