"""Dead links are errors: every link, picture and anchor of the built site leads somewhere. ``check.py SITE``"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.elsewhere: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        link = found.get("src") or found.get("href")
        if link:
            self.links.append(link)
        if tag in ("script", "img", "iframe") or (tag == "link" and found.get("rel") == "stylesheet"):
            self.elsewhere += [link] if link and urlsplit(link).netloc else []


def faults(site: Path) -> list[str]:
    """Dead links, and files that a reader's browser would fetch from another site."""
    pages = {file: Page(file.read_text()) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}
    found = []
    for file, page in pages.items():
        found += [f"{file.relative_to(site)} fetches {link}" for link in page.elsewhere]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target /= "index.html"
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors | {"__top"}):
                found.append(f"{file.relative_to(site)} links to {link}")
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1]).resolve()
    wrong = faults(site)
    count = len(list(site.rglob("*.html")))
    print("\n".join(wrong) or f"{count} pages: every link leads somewhere, and nothing is fetched from elsewhere")
    sys.exit(bool(wrong) or count < 40)
