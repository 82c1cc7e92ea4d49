"""Bad input ends a script with one line that names the setting and the value, and leaves nothing behind.

`Finished.error` is that line; it asserts exit status 1, no traceback, and a working directory as it was before.
"""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Script = Callable[..., Any]

DIGITS = Path(__file__).parents[2] / "configs/mlp_digits.yaml"
BASE = ("--config", DIGITS, "--trainer.accelerator", "cpu")
RATES = "model.init_args.net.init_args.dropout"


def nested(key: str, value: str) -> str:
    """The yaml of a dotted key."""
    head, _, rest = key.partition(".")
    return f"{{{head}: {nested(rest, value)}}}" if rest else f"{{{head}: {value}}}"


SETTINGS = [
    (f"{RATES}.mlp", "1.5", ["dropout.mlp", "1.5"]),
    (f"{RATES}.mlp", "-0.1", ["dropout.mlp", "-0.1"]),
    (f"{RATES}.mlp", ".nan", ["dropout.mlp", "nan"]),
    (f"{RATES}.attention", "0.1", ["dropout.attention", "0.1"]),  # this net has none
    (f"{RATES}.atention", "0.1", ["atention", "did you mean attention?"]),
    ("mc_dropout.sites", "[mpl]", ["sites", "mpl", "embedding", "attention", "residual"]),
    ("mc_dropout.sites", "[attention]", ["mc_dropout.sites", "attention"]),  # this net has none
    ("mc_dropout.num_samples", "1", ["mc_dropout.num_samples", "1"]),
    ("mc_dropout.masks", "some", ["mc_dropout.masks", "some"]),
    ("experimnt", "digits", ["experimnt", "did you mean experiment?"]),
    ("trainer.max_epohcs", "3", ["max_epohcs", "did you mean max_epochs?"]),
    ("trainer.max_epochs", "many", ["trainer.max_epochs", "many"]),
    ("data.init_args.bath_size", "3", ["bath_size", "did you mean batch_size?"]),
    ("model.init_args.warmup", "3", ["warmup", "did you mean warmup_steps?"]),
    ("model.init_args.net.init_args.hiden", "[3]", ["hiden", "did you mean hidden?"]),
    ("model.init_args.net.class_path", "thinned.models.MPL", ["net", "thinned.models.MPL"]),
    ("data.init_args.path", "/no/such/folder", ["data.path", "/no/such/folder"]),
    ("data.init_args.path", "nobody/nothing", ["data.path", "nobody/nothing"]),
    ("data.init_args.batch_size", "0", ["data.batch_size", "0"]),
    ("trainer.devices", "0", ["trainer", "0"]),
    ("trainer.strategy", "foo", ["trainer.strategy=foo", "invalid strategy name"]),
    ("seed_everything", "-3", ["Expected seed_everything in [0, 4294967296), but got -3"]),
    ("seed_everything", "true", ["Expected seed_everything in [0, 4294967296), but got True"]),
    ("trainer.default_root_dir", "/elsewhere", ["trainer.default_root_dir to be left to runs_dir", "/elsewhere"]),
    ("checkpoint.dirpath", "/elsewhere", ["checkpoint.dirpath to be left to runs_dir", "/elsewhere"]),
    ("trainer.logger.init_args.id", "mine", ["trainer.logger.id to be left to runs_dir", "mine"]),
    ("model.init_args.net.init_args.dropout", "{mlp: 0.1, mlp: 0.2}", ["Expected each key once", "mlp in line 1"]),
]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.max_ep", "unrecognized arguments: --trainer.max_ep 1"),
        ("--exper", "Expected an option of scripts/train.py, but got exper"),
        ("--trainer.log", "unrecognized arguments: --trainer.log 1"),
    ],
)
def test_abbreviated_option_is_refused(option: str, said: str, run_script: Script) -> None:
    assert said in run_script("train", *BASE, option, "1").error


@pytest.mark.parametrize(
    "callback", ["EarlyStoping", "lightning.pytorch.callbacks.EarlyStoping", "[{class_path: EarlyStoping}]"]
)
def test_callback_that_is_not_there_gets_the_nearest_name(callback: str, run_script: Script) -> None:
    error = run_script("train", *BASE, f"--trainer.callbacks={callback}").error
    assert "trainer.callbacks" in error
    assert "EarlyStoping (did you mean EarlyStopping?)" in error


def test_overlay_in_another_encoding(run_script: Script, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("experiment: Käse".encode("latin-1"))
    error = run_script("train", *BASE, "--config", tmp_path / "latin.yaml").error
    assert "latin.yaml to be UTF-8 text, but got 'utf-8' codec can't decode byte 0xe4" in error


def test_key_twice_in_an_overlay(run_script: Script, tmp_path: Path) -> None:
    (tmp_path / "overlay.yaml").write_text("trainer:\n  max_epochs: 1\nmodel: {}\ntrainer:\n  max_steps: 2\n")
    error = run_script("train", *BASE, "--config", tmp_path / "overlay.yaml").error
    assert "Expected each key once in overlay.yaml, but got trainer in line 1 and in line 4" in error


@pytest.mark.parametrize("given", ["command line", "yaml"])
@pytest.mark.parametrize(("key", "value", "expected"), SETTINGS, ids=[f"{key}={value}" for key, value, _ in SETTINGS])
def test_setting(given: str, key: str, value: str, expected: list[str], run_script: Script, tmp_path: Path) -> None:
    if given == "yaml":
        (tmp_path / "overlay.yaml").write_text(nested(key, value))
        option = ["--config", tmp_path / "overlay.yaml"]
    else:
        option = [f"--{key}={value.lstrip('.') if value == '.nan' else value}"]
    error = run_script("train", *BASE, *option).error
    for text in expected:
        assert text in error


def test_missing_config(start_script: Script) -> None:
    error = start_script("scripts/train.py", "--config", "configs/mlp_digit.yaml").error
    assert "but got configs/mlp_digit.yaml (did you mean " in error
    assert error.endswith("configs/mlp_digits.yaml?)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_devices(run_script: Script) -> None:
    error = run_script("train", *BASE, "--trainer.accelerator", "gpu", "--trainer.devices", 3).error
    assert "trainer.accelerator=gpu, trainer.devices=3" in error


def test_runs_dir_below_a_file(run_script: Script, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    error = run_script("train", *BASE, "--runs_dir", tmp_path / "file/runs").error
    assert "runs_dir" in error
    assert str(tmp_path / "file/runs") in error
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"leave_out": "image"}, ["data.image_column", "['label']"]),
        ({"leave_out": "label"}, ["data.label_column", "['image']"]),
        ({"first_label": -1}, ["a label for each example", "none for 1 of", "data.path"]),
    ],
    ids=["no images", "no labels", "label -1"],
)
def test_dataset(
    change: dict[str, Any], expected: list[str], save_images: Script, run_script: Script, tmp_path: Path
) -> None:
    folder = save_images(tmp_path / "images", **{"size": 8} | change)
    error = run_script("train", *BASE, "--data.path", folder).error
    for text in expected:
        assert text in error


def test_predicting_images_of_another_size(
    trained: Any, save_images: Script, run_script: Script, tmp_path: Path
) -> None:
    folder = save_images(tmp_path / "images", size=9)
    args = ("--ckpt_path", trained.run / "checkpoints/best.ckpt", "--data.path", folder)
    for split in ("test", "val"):
        error = run_script("predict", *args, "--data.predict_split", split).error
        for text in ("(1, 8, 8)", "(1, 9, 9)", "data.path", str(folder)):
            assert text in error


def test_predicting_with_another_net(trained: Any, run_script: Script) -> None:
    checkpoint = trained.run / "checkpoints/best.ckpt"
    error = run_script("predict", "--ckpt_path", checkpoint, "--model.net.hidden", "[5]").error
    assert "Expected a model that fits the checkpoint" in error


def test_resuming_another_net(trained: Any, run_script: Script, tmp_path: Path) -> None:
    run = shutil.copytree(trained.run, tmp_path / "runs/mlp_digits/before")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    resume = ("--resume", run / "checkpoints/last.ckpt", "--data.test_fraction", 0.2)
    error = run_script("train", *BASE, *resume, "--model.net.hidden", "[5]").error
    assert "Expected a model that fits the checkpoint" in error
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


class Attack:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_attack_works(tmp_path: Path) -> None:
    """Else the next tests would prove nothing."""
    pickle.loads(pickle.dumps(Attack(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


def write_checkpoint(kind: str, path: Path, original: Path) -> None:
    path.parent.mkdir(parents=True)
    content = original.read_bytes()
    attack = Attack(path.with_name("touched"))
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "without its end":
        path.write_bytes(content[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("epoch: 3")
    elif kind == "weights of another project":
        torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict(), "epoch": 3}, path)
    elif kind == "config of another project":
        torch.save({"state_dict": {}, "config": {"layers": 3}}, path)
    elif kind == "a whole module":
        torch.save(torch.nn.Linear(3, 2), path)
    elif kind == "a plain pickle with an attack":
        path.write_bytes(pickle.dumps({"config": {}, "state_dict": attack}, protocol=2))  # torch's own
    elif kind == "an attack":
        torch.save({**torch.load(original, weights_only=True), "extra": attack}, path)


KINDS = [
    "missing", "empty", "text", "truncated", "without its end", "weights of another project",
    "config of another project", "a whole module", "an attack", "a plain pickle with an attack",
]  # fmt: skip


@pytest.mark.parametrize("script", ["predict", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind: str, script: str, trained: Any, run_script: Script, tmp_path: Path) -> None:
    path = tmp_path / "some/checkpoints/best.ckpt"
    if kind != "missing":
        write_checkpoint(kind, path, trained.run / "checkpoints/best.ckpt")
    args = (*BASE, "--resume") if script == "train" else ("--ckpt_path",)
    error = run_script(script, *args, path).error
    assert error.startswith("error: Expected a checkpoint of scripts/train.py, but got ")
    assert str(path) in error
    assert not path.with_name("touched").exists()


def test_attack_by_a_process_of_its_own(trained: Any, start_script: Script, tmp_path: Path) -> None:
    path = tmp_path / "some/checkpoints/best.ckpt"
    write_checkpoint("an attack", path, trained.run / "checkpoints/best.ckpt")
    finished = start_script("scripts/predict.py", "--ckpt_path", path)
    assert "other objects than tensors and primitives" in finished.error
    assert finished.err.count("\n") == 1  # the message and nothing else
    assert not path.with_name("touched").exists()


def test_no_checkpoint_named(run_script: Script) -> None:
    assert "--ckpt_path" in run_script("predict", "--data.predict_split", "val").error
