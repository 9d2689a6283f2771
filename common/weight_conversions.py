"""Brings published weights to the names that torch-fidelity and torchvision use, whatever file they came in."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .unpickling import load_array_tree, load_torchscript_tensors

Tensors = dict[str, Tensor]

_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_BLOCKS = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]
_TOWERS = {
    **dict.fromkeys(["5b", "5c", "5d"], ("branch5x5", "branch3x3dbl")),
    "6a": ("branch3x3dbl",),
    **dict.fromkeys(["6b", "6c", "6d", "6e"], ("branch7x7", "branch7x7dbl")),
    "7a": ("branch3x3", "branch7x7x3"),
}
_NORM = {"beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var", "weight": "conv.weight"}
# Mixed_7b and 7c split the end of two branches, and their names with them.
_SPLIT = {
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}


def _inception_layer(path: str) -> str:
    """Translate a layer's TensorFlow-style path (``mixed_3.tower.conv_1``) to torch-fidelity's name."""
    if path in _STEM:
        return _STEM[path]
    block_path, _, inner = path.partition(".")
    block = _BLOCKS[_suffix(block_path)]
    return f"Mixed_{block}.{_inception_branch(block, inner)}"


def _inception_branch(block: str, inner: str) -> str:
    if block in {"7b", "7c"}:
        return _SPLIT[inner]
    if inner == "conv":
        return "branch3x3" if block == "6a" else "branch1x1"
    if inner == "tower_2.conv":
        return "branch_pool"
    tower, _, conv = inner.partition(".")
    return f"{_TOWERS[block][_suffix(tower)]}_{_suffix(conv) + 1}"


def _suffix(name: str) -> int:
    """Return 2 for ``conv_2``, and 0 for ``conv``."""
    return int(name.partition("_")[2] or 0)


def inception_from_torchscript(content: bytes) -> Tensors:
    """Return the network in the TorchScript archive ``content`` under torch-fidelity's names, without a classifier."""
    tensors: Tensors = {}
    for path, tensor in load_torchscript_tensors(content).items():
        layer, _, kind = path.removeprefix("net.layers.").rpartition(".")
        name = _inception_layer(layer)
        tensors[f"{name}.{_NORM[kind]}"] = tensor
        if kind == "beta":  # the original batch norms have no scale
            tensors[f"{name}.bn.weight"] = torch.ones_like(tensor)
    return tensors


def without_classifier(tensors: Tensors) -> Tensors:
    """Return what the features need of torch-fidelity's own state dict."""
    return {
        name: tensor.float().contiguous()
        for name, tensor in tensors.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


VGG_LAYERS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
ALEX_LAYERS = [0, 3, 6, 8, 10]


def features_from_flax(content: bytes, root: str, layers: list[int]) -> Tensors:
    """Return ``features.N.{weight,bias}``, N in ``layers``, from the pickled Flax tree ``content`` below ``root``."""
    tree: dict[str, Any] = load_array_tree(content)[root]
    tensors: Tensors = {}
    for index, layer in enumerate(layers):
        convolution = tree[f"Conv_{index}"]
        kernel = torch.from_numpy(convolution["kernel"].copy()).permute(3, 2, 0, 1)  # HWIO -> OIHW
        tensors[f"features.{layer}.weight"] = kernel.contiguous()
        tensors[f"features.{layer}.bias"] = torch.from_numpy(convolution["bias"].copy())
    return tensors


def only_features(tensors: Tensors) -> Tensors:
    """Return the convolutions of torchvision's own state dict."""
    return {name: t.float().contiguous() for name, t in tensors.items() if re.fullmatch(r"features\.\d+\.\w+", name)}
