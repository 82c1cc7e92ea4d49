"""What is wrong with a command line is said before torch is imported; the values of a config are shown on request."""

import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import thinned
from thinned.arguments import ACTIONS, OPTIONS, list_of_configs, refuse_double_keys

ROOT = Path(__file__).parents[1]
Script = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "error: Expected --config with the path of a yaml, but got none"),
        (("--config", "missing.yaml"), "error: Expected --config with the path of a yaml, but got missing.yaml"),
        (
            ("--config", "doubled.yaml"),
            "error: Expected each key once in doubled.yaml, but got seed_everything in ",
        ),
        (("--config", "foreign.yaml"), "error: Expected keys of a training in foreign.yaml, but got trianer (did you "),
        (("--trianer.devices", "2"), "error: Expected an option of scripts/train.py, but got trianer (did you mean "),
    ],
)
def test_errors_that_need_no_class_take_no_time(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """Below 3 CPU seconds: 0.1 without torch, which alone takes more than one."""
    (tmp_path / "doubled.yaml").write_text("seed_everything: 1\nseed_everything: 2\n")
    (tmp_path / "foreign.yaml").write_text("trianer: {devices: 2}\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(thinned.__file__).parents[1])},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.splitlines()[-1].startswith(said)
    assert done.returncode == 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_without_a_config_the_configs_are_listed(run_script: Script) -> None:
    done = run_script("train")
    listed = {Path(line.split()[0]).name for line in done.out.splitlines() if line.startswith("  ")}
    assert {path.name for path in ROOT.glob("configs/*.yaml")} < listed
    assert done.status == 1
    assert all(len(line) < 80 for line in list_of_configs().splitlines())


def test_known_options_are_those_of_the_parser(run_script: Script) -> None:
    options = set(re.findall(r"^  (?:-\w(?: \w+)?, )?--(\w+)", run_script("train", "--help_all").out, re.MULTILINE))
    assert options == (OPTIONS | ACTIONS | {"config"}) - {"help_all", "step_seed"}  # the latter is linked to the seed


# mlp only: begin
def test_help_with_a_config_shows_its_values(run_script: Script) -> None:
    done = run_script("train", "--config", ROOT / "configs/mlp_digits.yaml", "--mc_dropout.masks", "shared", "--help")
    lines = done.out.splitlines()
    assert done.status == 0
    assert done.new == []
    assert "--data.batch_size 64  # Size of a training batch, over all processes." in lines
    assert "--model.net.dropout.mlp 0.2" in lines
    assert "--mc_dropout.num_samples 50  # S, at least 2" in lines
    assert any(line.startswith("--mc_dropout.masks shared  # ") for line in lines)
    assert len(lines) <= 100
    assert all(len(line) < 80 for line in lines)


# mlp only: end
def config(order: random.Random, depth: int = 0) -> Any:
    """A nested config of mappings, lists and leaves."""
    if depth == 4 or order.random() < 0.2:
        return order.choice([None, 1, 0.5, True, "a: b", [1, {"x": 2}]])
    keys = order.sample("abcdefgh", order.randint(1, 4))
    return {key: config(order, depth + 1) for key in keys}


@pytest.mark.parametrize("seed", range(50))
def test_one_doubled_line_of_any_config_is_found(seed: int) -> None:
    """The line of a key is put once more before the lines of its siblings, with another value."""
    order = random.Random(seed)
    text = yaml.safe_dump({"first": config(order), "second": config(order)}, sort_keys=False)
    refuse_double_keys(text)
    lines = text.splitlines()
    numbers = [i for i, line in enumerate(lines) if line.rstrip()[0:1] and ":" in line and "- " not in line]
    chosen = order.choice([i for i in numbers if lines[i].lstrip()[0] in "abcdefghfs"])
    key = lines[chosen].partition(":")[0]
    doubled = "\n".join([*lines[:chosen], f"{key}: 5", *lines[chosen:]])
    with pytest.raises(ValueError, match=f"got {key.strip()} in line {chosen + 1} and in line {chosen + 2}"):
        refuse_double_keys(doubled)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1}\nc: {<<: *x, b: 2}",
        "[{a: 1}, {a: 2}]",
        "1: a\n'1': b",
        "just text",
        "",
        "a: [",
        "{a: {a: {a: 1}}}",
    ],
)
def test_what_is_no_double_is_let_pass(text: str) -> None:
    refuse_double_keys(text)
