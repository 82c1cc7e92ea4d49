"""Where a prediction comes from: what stands in the file, and that it is the same where the rows are."""

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pyarrow.parquet as pq
import pytest
import torch

import thinned
from thinned.evaluation.provenance import differences, digest_of_file

Script = Callable[..., Any]


def provenance(run: Path, name: str = "predictions") -> dict[str, Any]:
    return json.loads(pq.read_schema(run / f"{name}.parquet").metadata[b"thinned"])


@pytest.fixture(scope="module")
def checkpoint(trained: Any) -> Path:
    return trained.run / "checkpoints/best.ckpt"


def test_all_that_decides_the_rows_of_images(trained: Any, checkpoint: Path) -> None:
    facts = torch.load(checkpoint, weights_only=True)["ImageDataModule"]["split"]
    del facts["sketch"]  # of the training split
    assert provenance(trained.run) == {
        "row_format": 3,
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "weights": None,
        "dropout": {"embedding": 0.1, "mlp": 0.3},
        "ways": {
            "deterministic": {},
            "mc_dropout": {
                "num_samples": 50, "masks": "shared", "seed": 0, "sites": ["embedding", "mlp"], "scale": 1.0,
            },
        },
        "data": {
            "path": "digits", "image_column": None, "label_column": None, "leave_out": None, "image_size": None,
            "use_labels": True, "distortion": None,
            "background": "white", "val_fraction": 0.1, "test_fraction": 0.2, "split_seed": 0, "predict_split": "test",
            "seed": 0, "examples": 365, "class_names": list("0123456789"), "split": facts,
        },
        "precision": "32-true",
        "versions": {
            "thinned": thinned.__version__, "torch": torch.__version__, "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


# gpt only: begin
def test_both_files_of_text_have_it(trained_text: Any, text_file: Path) -> None:
    found = provenance(trained_text.run)
    assert found == provenance(trained_text.run, "sequences")
    assert found["data"]["path"] == str(text_file)
    assert not found["data"].keys() & {"cache_dir", "seed", "batch_size", "eval_batch_size", "num_workers"}


# gpt only: end
@pytest.mark.parametrize(
    "option", [("--data.eval_batch_size", 7), ("--data.cache_gib", 0), ("--data.cache_dir", "hashes")]
)
def test_it_is_equal_where_the_rows_are(
    option: tuple[object, ...], trained: Any, checkpoint: Path, run_script: Script
) -> None:
    assert provenance(run_script("predict", "--ckpt_path", checkpoint, *option).run) == provenance(trained.run)


def test_settings_that_differ_are_named() -> None:
    then = {"checkpoint": "a", "data": {"path": "here", "seed": 0}, "ways": {"mc_dropout": {"seed": 1}}}
    now = {"checkpoint": "a", "data": {"path": "there", "name": "new", "seed": 0}, "ways": {"deterministic": {}}}
    assert differences(now, then) == [
        "data.path = there instead of here", "data.name = new instead of None",
        "deterministic = {} instead of None", "mc_dropout = None instead of {'seed': 1}",
    ]  # fmt: skip
    assert differences(then, then) == []


def test_checkpoint_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "sharded.ckpt").mkdir()
    for name in "ba":
        (tmp_path / "sharded.ckpt" / name).write_text(f"shard {name}")
    assert digest_of_file(str(tmp_path / "sharded.ckpt")) == hashlib.sha256(b"shard ashard b").hexdigest()
    assert digest_of_file("s3://somewhere/best.ckpt") == "s3://somewhere/best.ckpt"
