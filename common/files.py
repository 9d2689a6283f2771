"""Files that are written whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes the name ``path`` when the block ends without an error, and else leaves nothing.

    It is written beside ``path`` under a name that begins with a dot. The bytes are on the disk before the name is: a
    crash leaves the old file or the new one. The folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two machines may number alike
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` to ``path`` by :func:`open_atomically`, so that a reader never sees half of it."""
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
