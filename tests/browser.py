"""Opens a page in headless Chromium, as wide as a telephone or a desk, and says what is there to be seen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as the Debian package chromium")

HEIGHT = 12_000
DARK = "--blink-settings=preferredColorScheme=0"
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--allow-file-access-from-files",
    "--enable-logging=stderr",
]  # fmt: skip
# A window cannot be as narrow as a telephone: the page is looked at in a frame that is.
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe id="frame" src="{page}"
style="border:0; width:{width}px; height:{height}px"></iframe><pre id="found"></pre><script>
addEventListener("load", () => {{
  const page = document.getElementById("frame").contentDocument;
  const box = e => {{ const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; }};
  const boxes = selector => [...page.querySelectorAll(selector)].map(box);
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    height: page.body.offsetHeight,
    broken: [...page.images].filter(i => !i.naturalWidth).length,
    lead: boxes(".lead"), strips: boxes(".strips img"), sheets: boxes(".sheets img"), plots: boxes(".plot img"),
    rows: boxes(".rows img"),
    bleeding: [...page.querySelectorAll("main > *")].filter(e => e.scrollWidth > e.clientWidth + 1
      && getComputedStyle(e).overflowX == "visible").map(e => e.outerHTML.slice(0, 80)),
  }});
}});
</script></body>"""


@dataclass(frozen=True)
class Look:
    """What Chromium shows of a page: where parts are, as ``[left, top, width, height]``, pixels, and its console."""

    found: dict[str, Any]
    pixels: np.ndarray
    console: list[str]

    def at(self, left: float, top: float) -> tuple[int, ...]:
        return tuple(self.pixels[round(top), round(left)].tolist())

    def part(self, box: list[float]) -> np.ndarray:
        left, top, width, height = map(round, box)
        return self.pixels[top : top + height, left : left + width]


def look(page: Path, width: int, folder: Path, *options: str, height: int = HEIGHT) -> Look:
    """Open ``page`` in a frame of ``width`` by ``height`` pixels."""
    assert CHROMIUM is not None
    frame, picture = page.with_name(f"frame-{width}.html"), folder / "picture.png"
    frame.write_text(FRAME.format(page=page.name, width=width, height=height))
    window = [f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},{height}"]
    command = [CHROMIUM, *OPTIONS, *options, *window, f"--screenshot={picture}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    with Image.open(picture) as image:
        return Look(
            json.loads(html.unescape(found[1])),
            np.asarray(image.convert("RGB"))[:, :width],
            [line for line in done.stderr.splitlines() if ":CONSOLE" in line],
        )
