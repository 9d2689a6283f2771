"""A safetensors file mapped into memory for reading rows of it at random, however large it is."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .errors import WavelatentError

_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
"""What a latent cache holds, by safetensors' names; other tensors are left out."""


class MappedTensors:
    """The tensors of a safetensors file, mapped shared and read-only; it stays open as long as they are used.

    safetensors' own mapping is private and writable, which Linux counts as memory that may be needed: it refuses a file
    larger than the memory (and with ``vm.overcommit_memory=2`` all files together). And the system reads ahead, up to
    megabytes around every row, unless it is told what comes: :meth:`will_need`.

    Raises :class:`WavelatentError` naming a file that cannot be read.
    """

    tensors: Mapping[str, NDArray[Any]]
    """By name; read-only."""

    def __init__(self, file: Path) -> None:
        try:
            with safe_open(str(file), framework="np"):  # checks the header against the size of the file
                pass
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header: dict[str, Any] = json.loads(opened.read(length))
                self._mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError) as error:
            raise WavelatentError(f"{file} cannot be read ({error}); run encode again with --overwrite") from error
        self._can_advise = hasattr(self._mapping, "madvise")  # not on Windows
        if self._can_advise:
            self._mapping.madvise(mmap.MADV_RANDOM)
        header.pop("__metadata__", None)
        content = np.frombuffer(self._mapping, np.uint8)
        self._begins: dict[str, int] = {}
        tensors = {}
        for name, tensor in header.items():
            if tensor["dtype"] in _NUMPY_DTYPES:
                begin, end = (8 + length + offset for offset in tensor["data_offsets"])
                self._begins[name] = begin
                tensors[name] = content[begin:end].view(_NUMPY_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        self.tensors = tensors

    def will_need(self, name: str, row: int) -> None:
        """Let the system begin to read ``tensors[name][row]``, exactly, and go on without waiting for it."""
        if self._can_advise:
            size = self.tensors[name].strides[0]
            begin = self._begins[name] + row * size
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_WILLNEED, page, begin + size - page)


def allow_open_files(count: int) -> None:
    """Raise the process's own limit of open files, as far as it may, so that ``count`` more fit.

    Raises :class:`WavelatentError` where they cannot.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise WavelatentError(f"{count} files must be open at once, and only {hard} may: raise the limit (ulimit -Hn)")
    needed = count + 1024  # what else the process has open
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
