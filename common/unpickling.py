"""Reads the tensors out of foreign pickles and TorchScript archives without running anything that is in them.

A pickle may name any function and call it. These readers answer to a short list of names (array and tensor
constructors), give every class of a TorchScript module the same inert stand-in, and refuse all else.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import WavelatentError

_NUMPY_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays inside plain containers, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY_NAMES:
            return super().find_class(module.replace("numpy.core", "numpy._core") if _has_new_core() else module, name)
        raise WavelatentError(
            f"refused a pickle that asks for {module}.{name}: only numpy arrays and dicts are admitted"
        )


def _has_new_core() -> bool:
    return hasattr(np, "_core")


def load_array_tree(content: bytes) -> dict[str, Any]:
    """Return the nested dict of numpy arrays pickled in ``content``.

    Raises:
        WavelatentError: the pickle asks for anything but numpy arrays and plain containers.
    """
    tree = _ArrayUnpickler(io.BytesIO(content)).load()
    if not isinstance(tree, dict):
        raise WavelatentError(f"expected a pickled dict of arrays, found {type(tree).__name__}")
    return tree


class _Module:
    """Stands in for any class of a TorchScript archive: holds attributes, does nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _ScriptUnpickler(pickle.Unpickler):
    """Rebuilds the attribute tree of a TorchScript module with tensors read from the archive."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        admitted = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch", "FloatStorage"): np.dtype("<f4"),
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch.jit._pickle", "build_intlist"): list,
        }
        if (module, name) in admitted:
            return admitted[module, name]
        raise WavelatentError(f"refused a TorchScript archive that asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _location, count = pid
        if kind != "storage":
            raise WavelatentError(f"refused a TorchScript archive that refers to a {kind!r}")
        return np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), dtype=dtype, count=count)


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return (
        torch.from_numpy(storage.copy()).as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
    )


def load_torchscript_tensors(content: bytes) -> dict[str, Tensor]:
    """Return every float32 tensor in the TorchScript archive ``content`` by its dotted attribute path.

    Raises:
        WavelatentError: the archive asks for anything but modules and tensors.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        module = _ScriptUnpickler(archive, root).load()
    return dict(_tensors_of(module, ""))


def _tensors_of(module: _Module, prefix: str) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Module):
            found.extend(_tensors_of(value, f"{prefix}{name}."))
    return found
