"""scripts/masks.py on checkpoints of both kinds: its files, and the one line for what it cannot draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def written(done: Any, folder: str) -> list[str]:
    """Names of the pictures, each of which is a PNG and an SVG."""
    assert done.status == 0, done.err
    paths = sorted((done.cwd / folder).iterdir())
    names = sorted({path.stem for path in paths})
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    return names


# gpt only: begin
@pytest.fixture(scope="session")
def text_run(run_script_in: Script, text_file: Path, small_gpt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of a GPT of one layer that drops attention, and tells how much."""
    net = ("--model.net.num_layers", 1, "--model.net.dropout.attention", 0.4)
    options = (*net, "--mc_dropout.num_samples", "null", "--trainer.callbacks=[]")
    steps = ("--trainer.max_steps", 1, "--trainer.val_check_interval", 1, "--trainer.log_every_n_steps", 1)
    config = ("--config", ROOT / "configs/gpt_pydocs.yaml", "--config", ROOT / "configs/logger/csv.yaml")
    cwd = tmp_path_factory.mktemp("text_run")
    return run_script_in(cwd, "train", *config, *small_gpt, "--data.path", text_file, *options, *steps).run


def test_masks_of_text(text_run: Path, run_script: Script) -> None:
    """Of a run's folder, whose log has a column for each head."""
    done = run_script("masks", "--ckpt_path", text_run, "--prompt", "the fox", "--out", "here")
    assert written(done, "here") == ["empty_rows", "masks_attention_layer0", "masks_residual", "prompt_layer0"]
    header = (text_run / "metrics.csv").read_text().splitlines()[0].split(",")
    heads = [f"dropout/empty_rows/layer0_head{head}" for head in (0, 1)]
    sites = [f"dropout/dropped/{site}" for site in ("attention", "residual")]
    expected = [*sites, "dropout/empty_rows/expected", *heads]
    assert [key for key in header if key.startswith("dropout/")] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "the FOX"), "Expected text within the vocabulary of the tokenizer, which has 29 tokens, but got"),
        (("--prompt", "the " * 9), "Expected --prompt of at most 32 tokens (net.context_length), but got 36"),
        (("--prompt", ""), "Expected a prompt of at least one token"),
        (("--index", 3), "Expected --prompt for a checkpoint of text, but got --index"),
        (("--out", "/dev/null"), "Expected to write /dev/null/masks_attention_layer0.svg, but got"),
    ],
)
def test_bad_input_for_text(options: Any, message: str, text_run: Path, run_script: Script) -> None:
    assert message in run_script("masks", "--ckpt_path", text_run / "checkpoints/last.ckpt", *options).error


def test_prompt_for_a_network_that_drops_no_attention(trained_text: Any, run_script: Script) -> None:
    done = run_script("masks", "--ckpt_path", trained_text.run, "--prompt", "the fox")
    assert "Expected a net with `thin` and attention dropout, but got GPT with rates of 0 alone" in done.error


# gpt only: end
# mlp only: begin
def test_masks_of_images(trained: Any, run_script: Script) -> None:
    done = run_script("masks", "--ckpt_path", trained.run, "--index", 7, "--samples", 2, 5, "--seed", 1)
    assert written(done, "masks") == ["example", "masks_embedding", "masks_mlp"]
    assert "network 5" in (done.cwd / "masks/masks_mlp.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--index", 365), "Expected --index in [0, 365) (test split), but got 365"),
        (("--index", -1), "Expected --index in [0, 365) (test split), but got -1"),
        (("--prompt", "the fox"), "Expected --index for a checkpoint of images, but got --prompt"),
        (("--ckpt_path", "nowhere"), "Expected a checkpoint of scripts/train.py, but got no file: nowhere"),
    ],
)
def test_bad_input_for_images(options: Any, message: str, trained: Any, run_script: Script) -> None:
    assert message in run_script("masks", "--ckpt_path", trained.run, *options).error


# mlp only: end
