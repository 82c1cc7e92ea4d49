"""Colours text by the uncertainty of its tokens, for the terminal and as one HTML page."""

import html
from collections.abc import Sequence

from rich.text import Text

from thinned.generation.sampling import Sample

WHITE, ORANGE = (255, 255, 255), (232, 106, 23)
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.6 ui-monospace, monospace; max-width: 60rem; margin: 2rem auto; color: #111; background: #fff; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid #ddd; padding: 1rem 0; font: inherit; }}
</style>
<h1>{title}</h1>
<p>Bold: the prompt. Background: {measure} of each token, from 0 (white) to {top:.2f} nats or more (orange).
Point at a token for its figures.</p>
{samples}
"""


def measure(samples: Sequence[Sample]) -> str:
    """Returns what colours the samples: mutual information if there are several networks, else entropy."""
    spread = any(value > 0 for sample in samples for value in sample.mutual_information)
    return "mutual_information" if spread else "entropy"


def full_scale(samples: Sequence[Sample]) -> float:
    """Returns the value with the strongest colour, in nats: the 95th percentile of all tokens."""
    values = sorted(value for sample in samples for value in getattr(sample, measure(samples)))
    return values[int(0.95 * (len(values) - 1))] or 1.0


def highlighted(sample: Sample, measure: str, top: float) -> Text:
    """Returns the prompt in bold, then each token on a background from white (0) to orange (top nats)."""
    text = Text(sample.prompt, style="bold")
    for piece, value in zip(sample.pieces, getattr(sample, measure), strict=True):
        text.append(piece, style=f"not bold #111111 on {_colour(value / top)}")
    return text


def highlighted_page(samples: Sequence[Sample], title: str) -> str:
    """Returns a page of HTML with all samples; pointing at a token shows its entropy and mutual information."""
    name, top, parts = measure(samples), full_scale(samples), []
    for sample in samples:
        columns = zip(sample.pieces, getattr(sample, name), sample.entropy, sample.mutual_information, strict=True)
        spans = [
            f'<span style="background:{_colour(value / top)}" title="entropy {e:.3f}, mutual information {i:.3f} nats">'
            f"{html.escape(piece)}</span>"
            for piece, value, e, i in columns
        ]
        parts.append(f"<pre><b>{html.escape(sample.prompt)}</b>{''.join(spans)}</pre>")
    name, body = name.replace("_", " "), "\n".join(parts)
    return PAGE.format(title=html.escape(title), measure=name, top=top, samples=body)


def _colour(share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(WHITE, ORANGE, strict=True))
