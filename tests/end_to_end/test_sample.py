"""scripts/sample.py on a checkpoint of scripts/train.py, and the samples at the end of training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[..., Any]


@pytest.fixture
def sample(trained_text: Any, run_script: Script) -> Script:
    """scripts/sample.py with 24 new tokens for the last checkpoint of `trained_text`."""
    checkpoint = trained_text.run / "checkpoints/last.ckpt"

    def run(*options: object) -> Any:
        given = ("--ckpt_path", checkpoint, "--prompt", "the fox", "--max_new_tokens", 24, "--num_samples", 2)
        return run_script("sample", *given, *options, COLUMNS="200")

    return run


def texts(out: str) -> list[str]:
    """What follows the rules that stand above each sample."""
    return [part.strip() for part in re.split(r"sample \d+: .*\n", out)[1:]]


def test_training_ends_with_samples(trained_text: Any) -> None:
    shown = texts(trained_text.out)
    assert len(shown) == 2
    assert all(text.startswith("the ") for text in shown)
    page = (trained_text.run / "samples.html").read_text()
    assert page.count("<span") == 2 * 20
    assert "samples.html" in trained_text.out  # among the files of the run


def test_prompt_outside_the_vocabulary_is_known_before_training(
    run_script: Script, text_file: Path, small_gpt: Any
) -> None:
    config = Path(__file__).parents[2] / "configs/gpt_pydocs.yaml"  # its prompt has a T, which the text has not
    done = run_script("train", "--config", config, *small_gpt, "--data.path", text_file)
    assert done.status == 1
    assert "but got 'T' in the prompt 'The yield statement' (trainer.callbacks.prompt)" in done.err
    assert not list(done.cwd.glob("runs/*/*"))


@pytest.mark.parametrize(
    ("options", "measure"),
    [((), "entropy"), (("--ensemble", 3), "mutual information"), (("--deterministic",), "entropy")],
)
def test_each_way_to_sample(sample: Script, options: tuple[object, ...], measure: str, tmp_path: Path) -> None:
    done = sample(*options, "--html", tmp_path / "page.html")
    assert done.status == 0, done.err
    assert f"Background: {measure} of each token" in done.out
    assert len(texts(done.out)) == 2
    assert all(text.startswith("the fox") for text in texts(done.out))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<span") == 2 * 24
    assert f"{measure} of each token" in page


def test_same_seed_same_text(sample: Script) -> None:
    first, again, other = (texts(sample("--seed", seed).out) for seed in (1, 1, 2))
    assert first == again != other


def test_deterministic_and_greedy_says_the_same_each_time(sample: Script) -> None:
    one, two = texts(sample("--deterministic", "--temperature", 0).out)
    assert one == two


def test_prompt_from_a_file(sample: Script, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a dog")
    assert all(text.startswith("a dog") for text in texts(sample("--prompt", "FILE:prompt.txt").out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "the FOX!"), "'!', 'F', 'O', 'X'"),
        (("--prompt", ""), "Expected a prompt of at least one token"),
        (("--prompt", "FILE:nowhere.txt"), "Expected --prompt FILE:nowhere.txt to be a file of UTF-8 text, but got No"),
        (("--temperature", -1), "Expected temperature to be 0 or more, but got -1.0"),
        (("--top_p", 0), "Expected top_p in (0, 1], but got 0.0"),
        (("--ensemble", 1), "Expected an ensemble of at least 2"),
        (("--num_samples", 0), "Expected num_samples and max_new_tokens to be at least 1"),
        (("--ckpt_path", "nowhere.ckpt"), "nowhere.ckpt"),
        (("--device", "nonsense"), "Expected --device"),
    ],
)
def test_bad_input(sample: Script, options: tuple[object, ...], message: str) -> None:
    assert message in sample(*options).error


def test_prompt_in_another_encoding(sample: Script, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    error = sample("--prompt", "FILE:latin.txt").error
    assert "Expected --prompt FILE:latin.txt to be a file of UTF-8 text, but got 'utf-8' codec" in error


# mlp only: begin
def test_checkpoint_of_images_is_refused(trained: Any, sample: Script) -> None:
    error = sample("--ckpt_path", trained.run / "checkpoints/last.ckpt").error
    assert "Expected ckpt_path to hold a GPT, but got MLP" in error


# mlp only: end
