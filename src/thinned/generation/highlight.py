"""Text coloured by the uncertainty of its tokens: in the terminal, and as a page of HTML that stands alone."""

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
b {{ color: #555; }}
i {{ font-style: normal; padding: 0 1rem; }}
</style>
<h1>{title}</h1>
<p>Bold: the prompt. Background: {measure} of each token, in nats:
<i style="background:{low}">0</i> to <i style="background:{high}">{top:.2f}</i> or more.
Point at a token for its figures.</p>
{samples}
"""


def measure(samples: Sequence[Sample]) -> str:
    """Returns what colours the samples: mutual information if several networks spoke, else entropy."""
    spread = any(value > 0 for sample in samples for value in sample.mutual_information)
    return "mutual_information" if spread else "entropy"


def full_scale(samples: Sequence[Sample]) -> float:
    """Returns the value with the strongest colour, in nats: the 95th percentile of all tokens."""
    name = measure(samples)
    values = sorted(value for sample in samples for value in getattr(sample, name))
    return values[int(0.95 * (len(values) - 1))] or 1.0


def highlighted(sample: Sample, measure: str, top: float) -> Text:
    """Returns the prompt in bold, then each token on a background from white (0) to orange (top nats)."""
    text = Text(sample.prompt, style="bold")
    for piece, value in zip(sample.pieces, getattr(sample, measure), strict=True):
        text.append(piece, style=f"not bold #111111 on {_colour(value / top)}")
    return text


def highlighted_page(samples: Sequence[Sample], title: str) -> str:
    """Returns a page of HTML with all samples; pointing at a token shows its entropy and mutual information."""
    name, top = measure(samples), full_scale(samples)
    parts = []
    for sample in samples:
        columns = (sample.pieces, getattr(sample, name), sample.entropy, sample.mutual_information)
        spans = [
            f'<span style="background:{_colour(value / top)}" title="entropy {e:.3f}, mutual information {i:.3f} nats">'
            f"{html.escape(piece)}</span>"
            for piece, value, e, i in zip(*columns, strict=True)
        ]
        parts.append(f"<pre><b>{html.escape(sample.prompt)}</b>{''.join(spans)}</pre>")
    return PAGE.format(
        title=html.escape(title), measure=name.replace("_", " "), top=top, low=_colour(0), high=_colour(1),
        samples="\n".join(parts),
    )  # fmt: skip


def _colour(share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(WHITE, ORANGE, strict=True))
