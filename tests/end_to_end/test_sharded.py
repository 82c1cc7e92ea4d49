"""A net sharded over two processes (FSDP2) is trained as a net of which each process has a copy."""

import json  # gpt only
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FSDP = (
    "--config", ROOT / "configs/trainer/fsdp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", 2,
    "--trainer.precision", "32-true",
)  # fmt: skip
DDP = ("--config", ROOT / "configs/trainer/ddp_cpu.yaml")
COMMON = (
    "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--mc_dropout.num_samples", 3,
    "--trainer.callbacks+=rank_witness.RankWitness",
)  # fmt: skip
Seen = list[dict[str, list[torch.Tensor]]]


def ranks(folder: Path) -> Seen:
    """What each process saw, and away with it."""
    paths = sorted(folder.glob("rank*.pt"))
    seen = [torch.load(path) for path in paths]
    for path in paths:
        path.unlink()
    return seen


def assert_trained_alike(sharded: Seen, copied: Seen) -> None:
    assert len(sharded) == len(copied) == 2
    for ours, theirs in zip(sharded, copied, strict=True):
        assert len(ours["masks"]) > 0
        for name in ("indices", "masks"):
            assert all(a.equal(b) for a, b in zip(ours[name], theirs[name], strict=True)), name
        assert ours["fit"] == pytest.approx(theirs["fit"], rel=1e-5)
        for a, b in zip(ours["weights"], theirs["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    first, second = (seen["masks"] for seen in sharded)
    assert not any(a.equal(b) for a, b in zip(first, second, strict=True))
    assert sharded[0]["fit"] == sharded[1]["fit"]


# gpt only: begin
@pytest.mark.slow
def test_gpt(start_script: Any, run_script: Any, text_file: Path, small_gpt: Any, tmp_path: Path) -> None:
    """Masks, weights with clipped gradients, resuming, and a checkpoint that one process predicts and samples with."""
    gpt = (
        "scripts/train.py", "--config", ROOT / "configs/gpt_pydocs.yaml", *small_gpt, "--data.path", text_file,
        "--model.net.dropout.attention", 0.1, "--model.final_lr_fraction", 1, "--trainer.gradient_clip_val", 0.1,
        "--trainer.callbacks.prompt", "the ", *COMMON,
    )  # fmt: skip
    four, two = (("--trainer.max_steps", n, "--trainer.val_check_interval", n) for n in (4, 2))
    finished = start_script(*gpt, *four, *FSDP)
    run = finished.run
    sharded = ranks(tmp_path)
    assert sharded[0]["fit"].keys() == {"fit/nll"}
    assert start_script(*gpt, *four, *DDP).status == 0
    assert_trained_alike(sharded, ranks(tmp_path))

    assert "No samples of a net that is sharded" in finished.out + finished.err
    assert json.loads((run / "metrics.json").read_text())["mc_dropout"]["masks"] == "independent"
    checkpoint = run / "checkpoints/last.ckpt"
    alone = run_script("predict", "--ckpt_path", checkpoint).run
    scores = json.loads((alone / "metrics.json").read_text())
    assert scores["mc_dropout"]["masks"] == "shared"
    theirs = json.loads((run / "metrics.json").read_text())["deterministic"]
    assert scores["deterministic"] == pytest.approx(theirs, rel=1e-4)
    samples = run_script("sample", "--ckpt_path", checkpoint, "--prompt", "the ", "--max_new_tokens", 5)
    assert samples.status == 0, samples.err

    first = start_script(*gpt, *two, *FSDP).run
    broken = first / "checkpoints/last.ckpt"
    assert torch.load(broken, weights_only=True)["global_step"] == 2
    resumed = start_script(*gpt, *four, *FSDP, "--resume", broken)
    assert resumed.status == 0, resumed.err
    ended, unbroken = (torch.load(path, weights_only=True) for path in (broken, checkpoint))
    assert ended["global_step"] == unbroken["global_step"] == 4
    assert ended["state_dict"].keys() == unbroken["state_dict"].keys()
    assert all(weight.equal(unbroken["state_dict"][name]) for name, weight in ended["state_dict"].items())


# gpt only: end
# mlp only: begin
@pytest.mark.slow
def test_mlp_with_bounded_weights(start_script: Any, tmp_path: Path) -> None:
    """Whose rows lie whole in one process or the other."""
    bound = ("--model.net.max_norm", 0.3, "--model.net.dropout.embedding", 0.1)
    mlp = ("scripts/train.py", "--config", ROOT / "configs/mlp_digits.yaml", *COMMON, *bound, "--trainer.max_steps", 5)
    assert start_script(*mlp, *FSDP).status == 0
    sharded = ranks(tmp_path)
    assert start_script(*mlp, *DDP).status == 0
    assert_trained_alike(sharded, ranks(tmp_path))
    norms = sharded[0]["weights"][0].norm(dim=1)
    assert norms.max() <= 0.3 * (1 + 1e-6)
    assert (norms > 0.3 * (1 - 1e-5)).any()  # which the bound had to hold


# mlp only: end
