"""Every file is written whole or not at all, and its bytes are on the disk before it has its name."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wavelatent.common import prepared
from wavelatent.common.files import write_atomically
from wavelatent.common.images import save_png

PIXELS = np.zeros((2, 3, 3), np.uint8)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_atomically(path, "something new"),
    "png": lambda path: save_png(path, PIXELS),
    "record": lambda path: prepared.write_record(path, prepared.Progress(request={}, class_names=[])),
    "array": lambda path: prepared.write_shard(path.parent, 0, [PIXELS], None),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("file", "images-00000.npy"):
        (tmp_path / name).write_text("old")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_bytes_are_on_the_disk_before_the_name_is(
    write: Callable[[Path], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append((os.fstat(handle).st_size, contents(folder))))
    write(folder / "file")
    after = contents(folder)
    ((size, during),) = flushed
    assert [len(content) for content in after.values() if content != b"old"] == [size]
    assert {name: during[name] for name in after} == dict.fromkeys(after, b"old"), "until then the old file is there"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    write: Callable[[Path], object], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    before = contents(folder)
    for owner, name in ((np, "save"), (Image.Image, "save"), (os, "fsync")):
        monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="no space left"):
        write(folder / "file")
    assert contents(folder) == before
