"""What a page that is meant to be passed on shows of paths and digests: enough to tell them apart.

It says which folder, and nothing about whose machine that is on.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from pathlib import Path

KEPT = 2
"""Folders of an absolute path that stay: enough to tell ``kl/diffusion`` from ``bounded/diffusion``."""

_PART = r"[^\s/'\"<>,;:()&|]+"
_PICTURE = r"data:image/[^\"]*"  # skipped whole: base64 has slashes too
# A path begins where no word, relative path or tag goes on; one that is not known, where no URL does either, or behind
# what says of which kind an autoencoder or a data set is.
_ANEW = r"(?<![\w/.~<-])"
_BEGIN = rf"(?:{_ANEW}(?<!:)|(?<=\bdiffusers:)|(?<=\bhf:))"
_PATH = rf"{_BEGIN}/(?:{_PART}/)+{_PART}/?"

KEPT_DIGITS = 12
"""Of a SHA-256."""
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


def shorten(page: str, known: Iterable[Path] = ()) -> str:
    """Return HTML without absolute paths (:func:`hide_paths`), and with the beginnings of digests only."""
    return _SHA256.sub(lambda found: f"{found[0][:KEPT_DIGITS]}...", hide_paths(page, known))


def hide_paths(page: str, known: Iterable[Path] = ()) -> str:
    """Return HTML in which only the last folders of absolute paths are left, as ``.../kl/diffusion``.

    Args:
        page: the HTML.
        known: paths that may stand in it and could not be told from the text around them, such as ones with spaces.
    """
    named = sorted({html.escape(str(path)) for path in known if path.is_absolute()}, key=len, reverse=True)
    exact = [rf"{_ANEW}{re.escape(path)}(?![\w-])" for path in named]
    pattern = re.compile("|".join([_PICTURE, *exact, _PATH]))
    return pattern.sub(lambda found: found[0] if found[0].startswith("data:") else _short(found[0]), page)


def _short(path: str) -> str:
    parts = path.strip("/").split("/")
    return "/".join(["...", *parts[-KEPT:]])
