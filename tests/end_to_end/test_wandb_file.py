"""The reader of W&B's files reads what W&B has written."""

from pathlib import Path

import wandb
from wandb_file import wandb_history, wandb_records


def test_wandb_history(tmp_path: Path) -> None:
    """wandb/proto/wandb_internal_pb2.py has the `Record`; its service, a binary, writes the chunks.

    The text is longer than two blocks of the file.
    """
    rows = [{"loss": 0.5, "deep": {"x": 1}}, {"text": "abcdefg" * 10_000}, {"loss": 0.25}]
    with wandb.init(dir=tmp_path, mode="offline", project="thinned") as run:
        for row in rows:
            run.log(row)
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    read = list(wandb_history(file))
    assert [{key: value for key, value in row.items() if not key.startswith("_")} for row in read] == rows
    kinds = {record.WhichOneof("record_type") for record in wandb_records(file)}
    assert {"run", "history", "exit"} <= kinds
