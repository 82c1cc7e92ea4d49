"""Pickles that others have made are never run: not as weights, nor as data."""

import json  # gpt only
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch  # gpt only

Script = Callable[..., Any]

CONFIGS = Path(__file__).parents[2] / "configs"


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def attacked(tmp_path: Path) -> Path:
    return tmp_path / "attacked"


@pytest.fixture(autouse=True)
def attack_fails(attacked: Path) -> Any:
    """What would come of it, and afterwards, that it did not."""
    pickle.loads(pickle.dumps(Attack(attacked)))
    attacked.rmdir()
    yield
    assert not attacked.exists()


def error_of(finished: Any) -> str:
    assert finished.status == 1
    assert "Traceback" not in finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "config",
    [
        "mlp_digits.yaml",  # mlp only
        "gpt_pydocs.yaml",  # gpt only
    ],
)
@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.pt", "train.arrow", "train.parquet", "train.npy"])
def test_data(name: str, config: str, attacked: Path, run_script: Script, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps({"image": [Attack(attacked)], "text": [Attack(attacked)]}))
    options = ("--config", CONFIGS / config, "--trainer.accelerator", "cpu", "--trainer.logger=false")
    assert "data.path" in error_of(run_script("train", *options, "--data.path", folder))


# gpt only: begin
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_to_start_from(
    legacy: bool, attacked: Path, run_script: Script, small_gpt: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 29}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    weights = {"transformer.wte.weight": torch.zeros(29, 16), "extra": Attack(attacked)}
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    options = (
        "--data.path",
        text_file,
        "--model.init_from",
        folder,
        "--trainer.logger=false",
        "--trainer.callbacks=null",
    )
    finished = run_script("train", "--config", CONFIGS / "gpt_pydocs.yaml", *small_gpt, *options)
    assert "Expected model.init_from to be a GPT-2 of the hub or a folder, but got " in error_of(finished)


def test_sampling(attacked: Path, run_script: Script, trained_text: Any, tmp_path: Path) -> None:
    stored = torch.load(trained_text.run / "checkpoints/best.ckpt", weights_only=True)
    torch.save({**stored, "extra": Attack(attacked)}, tmp_path / "best.ckpt")
    finished = run_script("sample", "--ckpt_path", tmp_path / "best.ckpt")
    assert "Expected a checkpoint of scripts/train.py, but got a file with other" in error_of(finished)


# gpt only: end
