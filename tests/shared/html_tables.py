"""What stands in the tables of an HTML page, read back from it."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page.

    Attributes:
        tables: By the id of the section and the caption: rows of cells, as texts.
        text: All that a person reads.
        tags: All tags with their attributes.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[tuple[str, str], list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._section = self._caption = ""
        self._texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open
        self.text = " ".join("".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs).get("id") or ""
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault((self._section, self._caption.strip()), []).append([])
        elif tag in ("th", "td"):
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("th", "td"):
            self._row[-1] = " ".join(self._row[-1].split())

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self._texts.append(data)
        if "caption" in self._open:
            self._caption += data
        elif "th" in self._open or "td" in self._open:
            self._row[-1] += data

    @property
    def _row(self) -> list[str]:
        return self.tables[self._section, self._caption.strip()][-1]
