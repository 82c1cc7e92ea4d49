"""Colours of tokens, in the terminal and as HTML."""

import re

import pytest

from thinned.generation.sampling import Sample
from thinned.generation.text_samples import colour_scale, highlighted, highlighted_page

SURE = Sample("p<", ["a", "<b>", "\n"], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0], "a<b>\n")
SPREAD = Sample("q", ["x", "y"], [1.0, 1.0], [0.5, 0.25], "xy")


def test_mutual_information_colours_where_networks_disagree_else_entropy() -> None:
    assert colour_scale([SURE])[0] == "entropy"
    assert colour_scale([SURE, SPREAD])[0] == "mutual_information"


def test_full_scale_is_the_95th_percentile_or_one_where_all_is_sure() -> None:
    values = [float(i) for i in range(101)]
    assert colour_scale([Sample("", ["a"] * 101, values, [0.0] * 101, "")])[1] == 95
    assert colour_scale([Sample("", ["a"], [0.0], [0.0], "a")])[1] == 1


def test_colour_goes_from_white_to_orange_and_no_further() -> None:
    text = highlighted(SURE, "entropy", 1.0)
    assert text.plain == "p<a<b>\n"
    colours = [re.search(r"on (#\w+)", str(span.style))[1] for span in text.spans]  # type: ignore[index]
    assert colours == ["#ffffff", "#e86a17", "#e86a17"]
    half = highlighted(SURE, "entropy", 2.0).spans[1]
    assert str(half.style).endswith("#f3b48b")  # (255 + 232) / 2, (255 + 106) / 2, (255 + 23) / 2


def test_page_escapes_text_and_tells_the_figures_of_each_token() -> None:
    page = highlighted_page([SURE], "A & B")
    assert "<title>A &amp; B</title>" in page
    assert "<b>p&lt;</b>" in page
    assert 'title="entropy 1.000, mutual information 0.000 nats">&lt;b&gt;</span>' in page
    assert "entropy of each token" in page
    assert re.findall(r"<(?:script|link|img)", page) == []  # nothing from elsewhere


@pytest.mark.parametrize("samples", [[SPREAD], [SURE, SPREAD]])
def test_page_holds_every_piece(samples: list[Sample]) -> None:
    page = highlighted_page(samples, "t")
    assert page.count("<span") == sum(len(sample.pieces) for sample in samples)
    assert "mutual information of each token" in page
