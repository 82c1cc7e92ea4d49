"""report.html, read back: every score with its interval, nothing that is run or fetched, legible in a browser."""

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from html_tables import Page

from thinned.evaluation.figures import CAPTIONS
from thinned.evaluation.html_report import (
    EmbeddedFigure,
    embedded_figures,
    html_report,
    natural_width,
    write_html_report,
)
from thinned.uncertainty.detection import DETECTION
from thinned.uncertainty.scores import SCORES

RUN = Path("runs/digits/first")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome", "chrome"))), "")
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP6DwABBQECz6AuzQAAAABJRU5ErkJggg=="
)


def shown(value: float, digits: int = 4, sign: str = "") -> str:
    """A number as a cell has it."""
    return f"{value:{sign}z.{digits}f}".replace("-", "−")


def cell(score: dict[str, Any]) -> str:
    """A score as a cell of the table of all scores has it."""
    if score["value"] is None:
        return f"– {score['why']}"
    text = f"{shown(score['value'])} [{shown(score['low'])}, {shown(score['high'])}]"
    if "difference" in score:
        of = score["difference"]
        text += f" Δ {shown(of['value'], sign='+')} [{shown(of['low'])}, {shown(of['high'])}]"
        text += "*" if of["told_apart"] else ""
    return text


def scores_of(keys: Any, differ: bool) -> dict[str, Any]:
    """Scores that are all different, and told apart from the first way or not."""
    found = {}
    for key in keys:
        value = round(torch.rand(()).item(), 6)
        found[key] = {"value": value, "low": value - 0.1, "high": value + 0.2, "n": 40}
        if differ:
            by = value - 0.5
            told = {"value": by, "low": by - 0.01, "high": by + 0.02, "p": 0.03, "told_apart": value > 0.3}
            found[key]["difference"] = told
    return found


def described(n: int, keys: Any, names: list[str], coverage: float | None = None) -> dict[str, Any]:
    ways = {}
    for way, label in (("deterministic", "deterministic"), ("mc_dropout", "MC dropout")):
        of_classes = {k: {"value": 0.1 * i, "low": 0.05, "high": 0.95, "n": 4} for i, k in enumerate(names)}
        ways[way] = {
            "label": label, "details": "", "settings": {}, "scores": scores_of(keys, way != "deterministic"),
            "recall": of_classes, "coverage": {} if coverage is None else {"thr": of_classes},
        }  # fmt: skip
    return {"split": "test", "n": n, "baseline": "deterministic", "coverage": coverage, "ways": ways}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    """Of two ways on the test, a shift at two severities, foreign data, and a set that is left out."""
    whole = described(40, SCORES, ["cat", "dog", "cow"], coverage=0.9)
    whole["ways"]["deterministic"]["scores"]["aurc"] |= {"value": None, "low": None, "high": None, "why": "all right"}
    spin = {"entry": "spin", "settings": {"distortion": "of_mine:15"}}
    whole["sets"] = {
        "spin_15": spin | {"severity": 15} | described(30, SCORES, ["cat"]),
        "spin_30": spin | {"severity": 30} | described(30, SCORES, ["cat"]),
        "letters": {"entry": "letters", "severity": None, "settings": {}} | described(20, DETECTION, []),
        "gone": {"entry": "gone", "severity": None, "settings": {}, "left_out": "there is no such folder"},
    }
    return whole


def page_of(evaluation: dict[str, Any], **more: Any) -> Page:
    return Page(html_report(evaluation, RUN, **more))


def test_every_score_stands_in_a_cell_with_its_interval(evaluation: dict[str, Any]) -> None:
    page, labels = page_of(evaluation), SCORES | DETECTION
    sets = {"test": evaluation} | {k: v for k, v in evaluation["sets"].items() if "ways" in v}
    assert {caption for section, caption in page.tables if section == "all-scores"} == sets.keys()
    number = 0
    for name, of_set in sets.items():
        header, *rows = page.tables["all-scores", name]
        assert header == ["score", "deterministic", "MC dropout"]
        cells = {row[0]: row[1:] for row in rows}
        for column, way in enumerate(of_set["ways"].values()):
            for key, score in way["scores"].items():
                assert cells[labels[key].label][column] == cell(score)
                number += 1
    assert number == 2 * (3 * len(SCORES) + len(DETECTION))


def test_recall_and_coverage_of_every_class_stand_in_a_cell(evaluation: dict[str, Any]) -> None:
    tables = page_of(evaluation).tables
    bounds = "[0.0500, 0.9500]"
    worst_first = [[name, "4", *[f"0.{i}000 {bounds}"] * 2] for i, name in enumerate(("cat", "dog", "cow"))]
    assert tables["classes", "Worst first"][1:] == worst_first
    assert tables["prediction-sets", "Coverage of THR, by class"][1:] == worst_first
    many = described(40, SCORES, [f"class {k}" for k in range(25)])
    tables = page_of(many).tables
    listed = [row[0] for key in ("Worst first", "Next") for row in tables["classes", key][1:]]
    assert listed == [f"class {k}" for k in range(25)]


def test_headline_shows_first_what_counts(evaluation: dict[str, Any]) -> None:
    header, *rows = page_of(evaluation).tables["scores", "Test, n = 40"]
    assert header == ["score", "deterministic", "MC dropout"]
    assert [row[0] for row in rows] == [score.label for score in SCORES.values() if score.headline]
    (aurc,) = [row for row in rows if row[0] == "AURC ↓"]
    assert aurc[1] == "– all right"


def test_further_sets_stand_by_severity(evaluation: dict[str, Any]) -> None:
    tables = page_of(evaluation).tables
    rows = tables["further-sets", "spin"][2:]
    assert [row[0] for row in rows] == ["test", "15", "30"]
    scores = evaluation["sets"]["spin_30"]["ways"]["mc_dropout"]["scores"]
    for shown_cell, key in zip(rows[2][3:], ("accuracy", "nll"), strict=True):
        star = "*" * scores[key]["difference"]["told_apart"]
        bounds = ", ".join(shown(scores[key][k], 3) for k in ("low", "high"))
        assert shown_cell == f"{shown(scores[key]['value'], 3)}{star} [{bounds}]"
    told = tables["further-sets", "Foreign data, told from the test: AUROC"]
    assert [row[0] for row in told[1:]] == [
        f"letters: {label}" for label in ("maximum probability", "entropy", "mutual information")
    ]
    value = evaluation["sets"]["letters"]["ways"]["deterministic"]["scores"]["foreign_auroc_confidence"]["value"]
    assert told[1][1].startswith(shown(value, 3))


def test_sentences_come_first(evaluation: dict[str, Any]) -> None:
    page = page_of(evaluation)
    verdict, missing = page.text.index("MC dropout against deterministic: "), page.text.index("Set gone is left out: ")
    assert verdict < missing < page.text.index("95 % intervals in brackets")
    assert "Lowest recall: class cat 0.000, dog 0.100, cow 0.200 (deterministic; MC dropout)." in page.text
    of_letters = evaluation["sets"]["letters"]["ways"]["mc_dropout"]["scores"]["foreign_auroc_predictive_entropy"]
    for low, said in ((0.6, "Best at"), (0.4, "Nothing is known to beat chance at")):
        of_letters |= {"value": 1.3, "low": low, "high": 0.9}
        told = f"{said} telling letters from the test: entropy of MC dropout, AUROC 1.300 [{low:.3f}, 0.900]."
        assert told in page_of(evaluation).text


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", "a & b", '"quoted"', "{{ 7 * 7 }}"])
def test_what_a_person_has_named_is_text(word: str, evaluation: dict[str, Any]) -> None:
    named = described(40, SCORES, [word], coverage=0.9)
    named["ways"]["mc_dropout"]["label"] = word
    named["sets"] = {"of": evaluation["sets"]["spin_15"] | {"entry": word}, "gone": {"left_out": word}}
    figures = [EmbeddedFigure(word, PIXEL, 10)]
    text = html_report(named, RUN / word, config=f"a: '{word}'", facts={"Command": word}, figures=figures, files=[word])
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.tables["classes", "Worst first"][1][0] == word
    assert page.tables["classes", "Worst first"][0][3] == word
    assert {"alt": word}.items() <= next(attributes for tag, attributes in page.tags if tag == "img").items()


def test_page_asks_for_nothing(evaluation: dict[str, Any]) -> None:
    text = html_report(evaluation, RUN, figures=[EmbeddedFigure("a dot", PIXEL, 10)])
    for tag, attributes in Page(text).tags:
        for key, value in attributes.items():
            if key in ("src", "href", "srcset", "action", "data", "poster", "background"):
                assert str(value).startswith(("data:", "#")), (tag, key)
    assert not re.search(r"url\(|@import|https?:", text)


def test_page_can_be_listened_to(evaluation: dict[str, Any]) -> None:
    """Headings in their order, a caption for each table, scopes for its heads, words for each figure."""
    page = Page(html_report(evaluation, RUN, figures=[EmbeddedFigure("a dot", PIXEL, 10)]))
    assert ("html", {"lang": "en"}) in page.tags
    headings = [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings == ["h1"] + ["h2"] * (len(headings) - 1)
    assert all(caption for _, caption in page.tables)
    scopes = {attributes.get("scope") for tag, attributes in page.tags if tag == "th"}
    assert scopes == {"col", "colgroup", "row"}
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    scrolled = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert all(attributes.get("tabindex") == "0" and attributes.get("aria-label") for attributes in scrolled)


@pytest.mark.parametrize(("names", "keys", "more"), [
    (["cat"], list(SCORES), {"classes"}),  # examples
    ([], ["accuracy", "top_5", "nll", "perplexity", "ece"], set()),  # tokens, which have no prediction sets
])  # fmt: skip
def test_page_has_the_sections_that_its_links_name(names: list[str], keys: list[str], more: set[str]) -> None:
    page = page_of(described(40, keys, names) | {"coverage": 0.9})
    sections = {attributes.get("id") for tag, attributes in page.tags if tag == "section"} - {None}
    assert sections == {"scores", "all-scores", "run"} | more
    assert {attributes["href"] for tag, attributes in page.tags if tag == "a"} == {f"#{name}" for name in sections}


def test_one_way_on_one_example() -> None:
    alone = described(1, ["accuracy", "nll"], [])
    del alone["ways"]["mc_dropout"]
    alone["ways"]["deterministic"]["scores"]["nll"] |= {"low": None, "high": None, "why": "there is one prediction"}
    page = page_of(alone)
    value = alone["ways"]["deterministic"]["scores"]["nll"]["value"]
    assert page.tables["scores", "Test, n = 1"][2] == ["NLL, nats ↓", f"{shown(value)} there is one prediction"]
    assert "Δ" not in page.text


def test_colours_have_enough_contrast(evaluation: dict[str, Any]) -> None:
    """4.5 to 1, as WCAG 2.2 asks of text in AA, in light and in dark."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    schemes = re.findall(r":root \{([^}]*)\}", html_report(evaluation, RUN))
    assert len(schemes) == 2
    for scheme in schemes:
        colours = {name: luminance(value) for name, value in re.findall(r"--(\w+): #(\w{6})", scheme)}
        for name in ("ink", "quiet", "better", "worse"):
            low, high = sorted((colours[name], colours["page"]))
            assert (high + 0.05) / (low + 0.05) > 4.5, name


@pytest.fixture
def trainer() -> Any:
    device = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=device, world_size=2, precision="32-true")


def test_written_file_says_what_was_run(
    evaluation: dict[str, Any], trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "digits/first"
    (run / "figures").mkdir(parents=True)
    (run / "config.yaml").write_text("data: {init_args: {path: digits}}\n")
    (run / "figures/reliability.svg").write_bytes(b"longer than the other" * 9)
    (run / "figures/reliability.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8) + (300).to_bytes(4, "big") + bytes(9))
    monkeypatch.setattr("sys.argv", ["scripts/evaluate.py", "--ckpt_path", "a run"])
    write_html_report(trainer, run, run, evaluation)
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "python scripts/evaluate.py --ckpt_path 'a run'" in page.text
    assert "CPU, 2 processes, precision 32-true" in page.text
    assert "data: {init_args: {path: digits}}" in page.text
    assert page.text.endswith("config.yaml figures/reliability.png figures/reliability.svg")
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == CAPTIONS["reliability"]
    assert image["style"] == "--width: 192px"  # 300 pixels, 150 an inch, 96 CSS pixels an inch
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_width_of_an_svg_is_in_points(tmp_path: Path) -> None:
    assert natural_width(b'<?xml version="1.0"?>\n<svg height="9pt" width="72pt" viewBox="0 0 72 9">') == 96
    assert embedded_figures([tmp_path]) == []


def measured(text: str, width: int, scheme: str, folder: Path) -> dict[str, Any]:
    """Opens a page in Chromium, in a frame of a width, and returns what it then is."""
    style = f"border: 0; width: {width}px; height: 844px; color-scheme: {scheme}"
    script = """
        const page = frame.contentWindow, root = page.document.documentElement;
        const wide = [...page.document.querySelectorAll("body *")].filter(e =>
            !e.closest(".scroll, pre") && e.getBoundingClientRect().right > page.innerWidth + 0.5);
        document.title = JSON.stringify({
            inner: page.innerWidth, scroll: root.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 99)),
            colour: page.getComputedStyle(page.document.body).backgroundColor,
            images: [...page.document.images].map(i => i.naturalWidth),
            requests: page.performance.getEntriesByType("resource").map(e => e.name.slice(0, 99)),
        });"""
    (folder / "frame.html").write_text(
        f'<!DOCTYPE html><html style="color-scheme: {scheme}"><meta charset="utf-8"><iframe id="frame" style="{style}" '
        f"onload='{html.escape(script)}' srcdoc=\"{html.escape(text)}\"></iframe>"
    )
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", "--hide-scrollbars", "--dump-dom",
    ]  # fmt: skip
    command = [CHROMIUM, *options, (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*)</title>", done.stdout)
    assert title, done.stderr
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


@pytest.fixture
def in_browser(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    if not CHROMIUM:
        pytest.skip("needs Chromium, such as Debian's packages chromium or chromium-headless-shell")
    return lambda text, width, scheme="light": measured(text, width, scheme, tmp_path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_as_wide_as_its_window(
    width: int, scheme: str, in_browser: Callable[..., dict[str, Any]], evaluation: dict[str, Any]
) -> None:
    """With long names, a wide figure and everything folded out."""
    evaluation["ways"] |= {f"way{i}": evaluation["ways"]["mc_dropout"] for i in range(3)}
    for of_set in evaluation["sets"].values():
        if "ways" in of_set:
            of_set["ways"] |= {f"way{i}": of_set["ways"]["mc_dropout"] for i in range(3)}
    long = "x" * 300
    figures = [EmbeddedFigure(long, PIXEL, 2000)]
    text = html_report(evaluation, RUN / long, f"a: {long}", {"Command": long}, figures, files=[long])
    found = in_browser(text.replace("<details>", "<details open>"), width, scheme)
    assert (found["inner"], found["scroll"]) == (width, width)
    assert found["wide"] == []
    assert found["images"] == [1]
    assert [name for name in found["requests"] if not name.startswith("data:")] == []
    lightness = math.fsum(map(int, re.findall(r"\d+", found["colour"])[:3])) / 3
    assert (lightness > 200) == (scheme == "light")


def test_browser_would_see_what_is_wrong(in_browser: Callable[..., dict[str, Any]], evaluation: dict[str, Any]) -> None:
    text = html_report(evaluation, RUN)
    wide = '<div style="width: 999px">wide</div><img src="http://nowhere.invalid/a.png">'
    found = in_browser(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("<main>", f"<main>{wide}"), 390)
    assert found["scroll"] > 390
    assert len(found["wide"]) == 1
    assert found["requests"] == ["http://nowhere.invalid/a.png"]
