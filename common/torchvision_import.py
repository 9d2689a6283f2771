"""Lets torchvision, and what imports it, be imported beside a torch build that its binary was not made for.

A torchvision wheel carries compiled operators for one torch build. Beside another (the usual pair is the CPU torch with
the index's default torchvision) they do not load, and since torchvision registers shape rules for two of them while it
is imported, the whole import fails. Its networks and transforms need none of these operators: declaring the two
schemas is enough.

Call :func:`ensure_torchvision` before importing torchvision, lpips, torch_fidelity or diffusers' models.
"""

from __future__ import annotations

import importlib
import sys
import threading

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A ``Library`` takes its definitions back when it is collected, so it lives as long as the process.
_libraries: list[torch.library.Library] = []
_lock = threading.Lock()


def ensure_torchvision() -> None:
    """Import torchvision, declaring the operators that its binary could not; idempotent.

    Raises:
        ImportError: torchvision is not installed, or fails for another reason than its missing operators.
    """
    with _lock:
        if "torchvision" in sys.modules:
            return
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise ImportError(f"torchvision cannot be imported: {error}") from error
        _forget_half_imported()
        _declare_schemas()
        importlib.import_module("torchvision")


def has_compiled_operators() -> bool:
    """Return whether torchvision's own operators (not just their schemas) are loaded."""
    ensure_torchvision()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"))


def _forget_half_imported() -> None:
    # A failed first import leaves submodules behind that a second one would take for complete.
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]


def _declare_schemas() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _libraries.append(library)
