"""SHA-256 of large files, once: a file that has been hashed and not been touched since is not hashed again.

What was found right is noted in the user's cache folder (see :func:`~wavelatent.common.metric_weights.cache_folder`)
with the file's size, inode, and times of modification and of status change. Any write changes the last, and it cannot
be set back. A note that is lost only costs another hash. What changes no time, as a disk that rots, is not noticed
until the notes (``verified/``) are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .files import sha256_file, write_atomically
from .metric_weights import cache_folder

SETTLED_SECONDS = 2.0
"""A file changed more recently is hashed but not noted: the next write could fall on the same tick of its clock."""
THREADS = 8
"""Files hashed at once; `hashlib` lets other threads run meanwhile."""

Stamp = list[int | str]


def first_mismatch(folder: Path, expected: Mapping[str, str]) -> str | None:
    """Return the first of ``expected`` (file name in ``folder`` -> SHA-256) that has another hash, or None.

    Every file must exist.
    """
    notes_file = cache_folder() / "verified" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    notes = _read(notes_file)
    settled = time.time() - SETTLED_SECONDS
    stamps = {name: _stamp(folder / name, sha256) for name, sha256 in expected.items()}
    unknown = [name for name in expected if notes.get(name) != stamps[name]]
    with ThreadPoolExecutor(max(1, min(THREADS, os.cpu_count() or 1))) as pool:
        hashes = pool.map(sha256_file, [folder / name for name in unknown])
        for name, found in zip(unknown, hashes, strict=True):
            if found != expected[name]:
                pool.shutdown(cancel_futures=True)
                return name
    unsettled = {name for name in unknown if (folder / name).stat().st_ctime > settled}
    known = {name: stamp for name, stamp in stamps.items() if name not in unsettled}
    if known and known != notes:
        with contextlib.suppress(OSError):  # a home that cannot be written: hashed again next time
            write_atomically(notes_file, json.dumps(known))
    return None


def _stamp(file: Path, sha256: str) -> Stamp:
    """Return what is the same as long as nobody writes to ``file``, before it is hashed."""
    status = file.stat()
    return [sha256, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read(file: Path) -> dict[str, Stamp]:
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
