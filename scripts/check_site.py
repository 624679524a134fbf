"""Check a built site: every link and picture leads somewhere, no reference was left as text.

    python scripts/check_site.py site

Links to other sites are not followed. The generator checks what pages link to, too; it does not
know links out of the pages' folder, nor references in docstrings that it could not resolve.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NO_TEXT = ("script", "style", "code", "pre")
REFERENCE = re.compile(r"\[[^\]\n]+\]\[[\w.]*\]")
"""A reference as it looks where nothing was found for it."""


class Page(HTMLParser):
    """What is of interest in a page.

    Attributes:
        targets: Of links, pictures, scripts and style sheets.
        anchors: The names that links may lead to.
        text: What is read, without code.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag leads to, and its names."""
        known = dict(attrs)
        self.targets += [value for key in ("href", "src", "srcset") if (value := known.get(key))]
        self.anchors |= {value for key in ("id", "name") if (value := known.get(key))}
        if tag in NO_TEXT:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave code."""
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        """Keep text that is no code."""
        if not self._inside:
            self.text += data


@cache
def read_page(path: Path) -> Page:
    """A page, read once."""
    return Page(path.read_text(encoding="utf-8"))


def complaints(site: Path) -> Iterator[str]:
    """What is wrong with a site, one line each."""
    for path in sorted(site.rglob("*.html")):
        # The page for what isn't found is shown at any address.
        if path.name == "404.html":
            continue
        page, name = read_page(path), path.relative_to(site)
        for target in dict.fromkeys(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            at = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            at = at / "index.html" if at.is_dir() else at
            if not at.is_file() or not at.is_relative_to(site.resolve()):
                yield f"{name}: {target} leads nowhere"
            elif parts.fragment and at.suffix == ".html":
                if unquote(parts.fragment) not in read_page(at).anchors | {"__top"}:
                    yield f"{name}: {target}: there is no such place in {at.name}"
        for left in REFERENCE.findall(page.text):
            yield f"{name}: {left} was not resolved"


def main() -> None:
    """Complain, with exit code 1 if there is anything to complain about."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path, help="the folder of the built site")
    found = list(complaints(parser.parse_args().site.resolve()))
    print("\n".join(found) or "All links lead somewhere.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
