"""A strict reader of the pages we write: well-formed, nothing outside, every picture told in words."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}
KNOWN = {
    *(
        "html",
        "head",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "h1",
        "h2",
        "p",
        "ul",
        "li",
    ),
    *(
        "a",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
        "picture",
        "figcaption",
        "pre",
        "code",
    ),
    *VOID,
}


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        text: all visible text.
        images: (alt, SVG for light paper) of every picture; dark: SVG for dark paper.
        links: targets of links.
        ids: of elements.
        rows: cells of every row of every table.
        titles: of sections.
    """

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.images: list[tuple[str, bytes]] = []
        self.dark: list[bytes] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id stands twice"
        for link in self.links:
            assert link.startswith("#") and link[1:] in self.ids, f"a link to {link}"
        assert len(self.dark) == len(self.images)

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in KNOWN, f"<{tag}> has no place in a report"
        values = dict(attrs)
        assert len(values) == len(attrs)
        for key, value in attrs:
            assert not key.startswith("on"), f"<{tag} {key}> is a script"
            assert key in ("src", "srcset", "content") or "://" not in (value or ""), f"<{tag} {key}={value}>"
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "a":
            self.links.append(values["href"] or "")
        if tag == "img":
            assert values.get("alt"), "a picture without words"
            self.images.append((values["alt"] or "", _svg(values["src"])))
        if tag == "source":
            assert values["media"] == "(prefers-color-scheme: dark)"
            self.dark.append(_svg(values["srcset"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.titles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.titles[-1] += data


def _svg(uri: str | None) -> bytes:
    """The picture of a data URI: well-formed, and with nothing from outside or that runs."""
    prefix = "data:image/svg+xml;base64,"
    assert uri is not None and uri.startswith(prefix), f"{str(uri)[:60]} is not inlined"
    content = base64.b64decode(uri.removeprefix(prefix), validate=True)
    for element in ElementTree.fromstring(content).iter():
        assert not element.tag.endswith(("script", "foreignObject"))
        for key, value in element.attrib.items():
            if key.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,")), value[:60]
    return content
