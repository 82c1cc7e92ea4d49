"""Every yaml below configs/ does what it is for: experiments run, overlays reach the run. A new file is found here."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch  # mlp only
import yaml

from thinned.data.distortion import KINDS
from thinned.evaluation.sets import sets_of

Script = Callable[..., Any]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))
HAVE_THEIR_OWN = {CONFIGS / "trainer/ddp_cpu.yaml", *CONFIGS.glob("evaluation/*.yaml")}  # tests
OVERLAYS = sorted(set(CONFIGS.glob("**/*.yaml")) - set(EXPERIMENTS) - HAVE_THEIR_OWN)
ON_GPU = [path for path in OVERLAYS if "accelerator: gpu" in path.read_text()]
DIGITS = CONFIGS / "mlp_digits.yaml"  # mlp only
CPU = ("--trainer.accelerator", "cpu", "--trainer.devices", 1)


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def leaves(content: Any, *keys: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from leaves(value, *keys, key)
    else:
        yield keys, content


def assert_scores(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    rows = pq.read_table(run / "predictions.parquet").to_pydict()
    way = "mc_dropout" if "mc_dropout" in metrics else "deterministic"
    losses = rows[f"{way}_nll"]
    if f"{way}_probs" in rows:
        probs = [-math.log(p[t]) for p, t in zip(rows[f"{way}_probs"], rows["target"], strict=True)]
        assert probs == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert metrics[way]["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# gpt only: begin
@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint like GPT-2's, of the size of `small_gpt`."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def for_text(text_file: Path, small_gpt: Any, request: pytest.FixtureRequest) -> Callable[..., list[object]]:
    """Returns the options with which an experiment on text takes a second."""

    def options(data: dict[str, Any], model: dict[str, Any]) -> list[object]:
        short = ["--trainer.max_epochs", -1, "--trainer.max_steps", 3, "--trainer.val_check_interval", 1]
        found = [*small_gpt, *short, "--trainer.callbacks.prompt", "the", "--trainer.callbacks.max_new_tokens", 3]
        if "/" in data["path"]:  # on the hub
            found += ["--data.path", text_file]
        if "/" in data["tokenizer"]:
            found += ["--data.tokenizer", "bpe:300"]
        if "init_from" in model:
            sizes = ("--model.net.vocab_size", 300, "--model.net.context_length", 32)
            found += ["--model.init_from", request.getfixturevalue("gpt2"), *sizes]
        return found

    return options


# gpt only: end
# mlp only: begin
@pytest.fixture
def for_images(hub_images: Path) -> Callable[..., list[object]]:
    """Returns the options with which an experiment on images needs no hub."""
    return lambda data, model: ["--data.path", hub_images] if "/" in data["path"] else []


# mlp only: end
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name)
def test_experiment_runs(experiment: Path, run_script: Script, request: pytest.FixtureRequest) -> None:
    content = yaml.safe_load(experiment.read_text())
    data, model = content["data"]["init_args"], content["model"]["init_args"]
    options_for = request.getfixturevalue("for_text" if "tokenizer" in data else "for_images")
    options: list[object] = ["--config", CONFIGS / "debug/fast.yaml", *CPU, *options_for(data, model)]
    if content["mc_dropout"]["num_samples"] is None:  # nothing drops
        options += ["--mc_dropout.num_samples", "null"]
    run = run_script("train", "--config", experiment, *options).run
    assert run.parent.name == experiment.stem  # `experiment` is called as its file is
    assert_scores(run)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("evaluation/*.yaml")), ids=name)
def test_sets_of_the_configs_can_be_built(path: Path) -> None:
    sets = sets_of(yaml.safe_load(path.read_text()))
    kinds = {each.settings["distortion"].partition(":")[0] for each in sets if "distortion" in each.settings}
    assert kinds <= KINDS.keys()
    assert any(each.is_foreign for each in sets)
    if path.stem == "ovadia_mnist":  # mlp only
        assert len(sets) == 12 + 13 + 1  # mlp only


# mlp only: begin
@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_overlay_reaches_the_run(overlay: Path, run_script: Script, start_script: Script) -> None:
    if overlay in ON_GPU and not torch.cuda.is_available():
        pytest.skip("there is no GPU; the next test sees the overlay refused")
    content = yaml.safe_load(overlay.read_text())
    if content.get("trainer", {}).get("num_nodes", 1) > 1:
        pytest.skip("there is one node; test_launchers.py has two")
    few = {"max_epochs": 1, "limit_train_batches": 2, "check_val_every_n_epoch": 1, "log_every_n_steps": 1}
    options = [f"--trainer.{key}={value}" for key, value in few.items()]
    if overlay not in ON_GPU and "accelerator" not in content.get("trainer", {}):
        options += map(str, CPU)
    if "strategy" in content.get("trainer", {}):  # starts further processes
        finished = start_script("scripts/train.py", "--config", DIGITS, "--config", overlay, *options)
    else:
        finished = run_script("train", "--config", DIGITS, "--config", overlay, *options)
    config = yaml.safe_load((finished.run / "config.yaml").read_text())
    changed = {("trainer", key) for key in few} | {("trainer", "logger", "init_args", "save_dir")}
    asked = {keys: value for keys, value in leaves(content) if keys not in changed}
    got = dict(leaves(config))
    assert {keys: got.get(keys) for keys in asked} == asked
    assert_scores(finished.run)


@pytest.mark.parametrize("overlay", ON_GPU, ids=name)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_overlay_is_refused_without_gpu(overlay: Path, run_script: Script) -> None:
    error = run_script("train", "--config", DIGITS, "--config", overlay, MASTER_ADDR="localhost").error
    assert "trainer.accelerator=gpu" in error


def test_fast_sees_every_stage_but_little_of_it(run_script: Script) -> None:
    overlay = ("--config", CONFIGS / "debug/fast.yaml", "--data.eval_batch_size", 10, *CPU)
    run = run_script("train", "--config", DIGITS, *overlay).run
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert pq.read_table(run / "predictions.parquet").num_rows == 20
    assert json.loads((run / "metrics.json").read_text())["mc_dropout"]["num_samples"] == 3


def test_overfit_overfits(run_script: Script) -> None:
    overlays = ("--config", CONFIGS / "debug/overfit.yaml", "--config", CONFIGS / "logger/csv.yaml")
    run = run_script("train", "--config", DIGITS, *overlays, *CPU, "--trainer.enable_progress_bar=false").run
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("train/loss")]) for row in rows[1:] if row[rows[0].index("train/loss")]]
    assert losses[0] > 2
    assert losses[-1] < 1e-3


# mlp only: end
