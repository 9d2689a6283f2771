"""Take plots out of a study's page, for pages that link to pictures. Usage: figures.py REPORT.html [TO]."""

from __future__ import annotations

import base64
import sys
from html.parser import HTMLParser
from pathlib import Path

WANTED = {
    "effects-kid.png": "Effects on KID",
    "effects-rfid.png": "Effects on rFID",
    "rfid-against-kid.png": "rFID against KID",
    "validation-loss.png": "Validation loss",
    "spectra.png": "Power by spatial frequency",
}
"""The file of each picture, and how its description begins."""


class Pictures(HTMLParser):
    """Saves the pictures of a page that are wanted."""

    def __init__(self, to: Path) -> None:
        super().__init__()
        self.to = to

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Save an image whose description begins as one of those that are wanted."""
        found = dict(attrs)
        for name, begin in WANTED.items():
            if tag == "img" and (found.get("alt") or "").startswith(begin):
                (self.to / name).write_bytes(base64.b64decode((found["src"] or "").partition(",")[2]))


if __name__ == "__main__":
    page = Path(sys.argv[1])
    Pictures(Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).resolve().parent).feed(page.read_text("utf-8"))
