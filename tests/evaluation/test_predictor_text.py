"""The Predictor of a language model: the token that follows a text, as in the rows of the script."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from thinned.evaluation import Predictor

ROOT = Path(__file__).parents[2]
T = 32  # the context of `trained_text`
Script = Callable[..., Any]


@pytest.fixture(scope="module")
def predictor(trained_text: Any) -> Predictor:
    return Predictor.from_checkpoint(trained_text.run)


def test_a_prefix_has_the_row_of_that_token(
    trained_text: Any, predictor: Predictor, run_script: Script, tmp_path: Path
) -> None:
    text = "liquid jugs box five lazy wizards.\nthe quick dog and the fox jumps over a mix.\n" * 2
    (tmp_path / "other.txt").write_text(text)
    checkpoint = trained_text.run / "checkpoints/best.ckpt"
    run = run_script("predict", "--ckpt_path", checkpoint, "--data.path", tmp_path / "other.txt").run
    rows = {row["index"]: row for row in pq.read_table(run / "predictions.parquet").to_pylist()}
    places = [(0, 0), (0, 6), (0, T - 1), (1, 0), (2, 11), (3, T - 1)]  # window and last token of the prefix
    prefixes = [text[window * T : window * T + last + 1] for window, last in places]
    tokenizer = predictor.data.tokenizer
    for (window, last), together, prefix in zip(places, predictor(prefixes), prefixes, strict=True):
        row, alone = rows[window * T + last], predictor(prefix)
        assert row["position"] == len(prefix)
        for prediction in (together, alone):
            found = {
                "confidence": prediction.probabilities[prediction.label],
                "predictive_entropy": prediction.predictive_entropy,
                "mutual_information": prediction.mutual_information,
            }
            assert found == pytest.approx({key: row[f"mc_dropout_{key}"] for key in found}, abs=1e-6)
            assert prediction.label == tokenizer.pieces([row["mc_dropout_prediction"]])[0]
            assert prediction.num_samples == 4
            assert len(prediction.probabilities) == 10
            assert [*prediction.probabilities.values()] == sorted(prediction.probabilities.values(), reverse=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "Expected a text of 1 to 32 tokens, but got 0"),
        ("t" * 33, "Expected a text of 1 to 32 tokens, but got 33"),
        ("the \u00e9", "Expected text within the vocabulary of the tokenizer, which has .* tokens, but got '\u00e9'"),
        (b"the ", "Expected a text, a str, but got bytes"),
        (Path("words.txt"), "Expected a text, a str, but got .*Path"),
        (["the ", 3], "Expected a text, a str, but got int"),
        ([], "Expected at least one input, but got an empty list"),
    ],
)
def test_what_is_no_text_that_it_knows(predictor: Predictor, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        predictor(given)


def test_example_of_the_readme(
    trained_text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "".join((ROOT / name).read_text() for name in ("README.md", "scripts/README.md"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    example, export = (next(b for b in blocks if text in b) for text in ('predictor("the ")', "gpt.pt2"))
    names: dict[str, Any] = {}
    exec(example.replace("runs/...", str(trained_text.run)), names)
    assert capsys.readouterr().out.startswith(f"{names['prediction'].label} {{")

    net = names["predictor"].net
    names["net"] = copy.deepcopy(net)
    for parameter in names["net"].parameters():
        parameter.data.zero_()
    exec(export, names)
    tokens = torch.randint(net.vocab_size, (5, T))
    assert torch.equal(names["net"](tokens), net(tokens))
    torch.testing.assert_close(torch.export.load("gpt.pt2").module()(tokens), net(tokens), rtol=0, atol=1e-6)
