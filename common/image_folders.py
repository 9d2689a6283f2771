"""Image folders, flat or nested: which files are images, and which class they belong to."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .errors import UsageError

IMAGE_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jpx"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)
"""Files with another ending (captions, archives, notes) are not images and are passed over in silence."""


class FolderImages:
    """The image files of a folder, sorted by their path below it; hidden files and folders do not count.

    When every image lies in a sub-folder and there are at least two, the first-level sub-folders are the classes, in
    alphabetical order. A single sub-folder says nothing about its images, so it gives no labels.

    Raises `UsageError` when the folder does not exist or holds no images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.spec = str(root)
        self.paths = _list_images(self.root)
        tops = [path.split("/")[0] if "/" in path else None for path in self.paths]
        names = sorted({top for top in tops if top is not None})
        self.class_names = names if None not in tops and len(names) > 1 else []
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = [numbers[top] for top in tops if top is not None] if self.class_names else None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path of file ``index`` below the root."""
        return self.paths[index]

    def payload(self, index: int) -> bytes:
        """Return the bytes of file ``index``."""
        return (self.root / self.paths[index]).read_bytes()

    def label(self, index: int) -> int | None:
        """Return the class of file ``index``, or None where the sub-folders are not classes."""
        return self._labels[index] if self._labels else None

    def identity(self) -> str:
        """Return a digest of the files' names and sizes."""
        listing = (f"{path}\0{_file_size(self.root / path)}\n" for path in self.paths)
        return hashlib.sha256("".join(listing).encode("utf-8", "surrogateescape")).hexdigest()


def _list_images(root: Path) -> list[str]:
    """Return the paths of the images below ``root``, with ``/`` between their parts, sorted."""
    if not root.exists():
        raise UsageError(f"no data at {root}: expected synthetic[:N], an image folder, a prepared folder or hf:NAME")
    if not root.is_dir():
        raise UsageError(f"{root} is a file: expected a folder of images")
    others: Counter[str] = Counter()
    images = []
    for path in _walk(root):
        if path.suffix.lower() in IMAGE_EXTENSIONS:
            images.append(path.relative_to(root).as_posix())
        else:
            others[path.suffix or path.name] += 1
    if not images:
        found = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5)) or "nothing"
        raise UsageError(f"no images in {root} (found {found}): expected {', '.join(sorted(IMAGE_EXTENSIONS))} files")
    return sorted(images)


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files below ``root``, through symbolic links, each real folder once."""
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link: reading it will name and count it
        return -1
