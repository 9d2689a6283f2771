"""Inception V3 features, on which FID and KID are defined."""

from __future__ import annotations

import io
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .metric_weights import inception_weights
from .precision import full_float32
from .torchvision_import import ensure_torchvision

FEATURES_NAME = "inception-v3-2015-12-05"
RESIZE_NAME = "bilinear to 299x299 as in TensorFlow 1 (torch-fidelity)"
CPU_PASS = 16
"""Images in a pass on a CPU: a fifth faster there than 8 or 32."""
FeatureLayer = Literal["64", "192", "768", "2048"]


class InceptionFeatures:
    """The 2048 pool3 features of the 2015-12-05 Inception V3, through torch-fidelity's network and resize.

    Computes in float32 whatever autocast or TF32 setting is active: lower precision moves FID by percents.

    Args:
        device: where to compute.
        layer: ``"2048"`` is the only one whose Fréchet distance is called FID; the others serve the known answers.

    Raises:
        MissingWeightsError: the weights are neither here nor within reach.
    """

    name = FEATURES_NAME

    def __init__(self, device: str | torch.device = "cpu", layer: FeatureLayer = "2048") -> None:
        weights = inception_weights()
        self.device = torch.device(device)
        self.dim = int(layer)
        self.weights_sha256 = weights.sha256
        network = _build_network(weights.tensors, layer).to(self.device)
        _fold_normalisation(network)
        if self.device.type == "cpu":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster
        self._network = network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``[B, dim]`` float32 on the CPU of uint8 images ``[B,3,H,W]``."""
        parts = images.split(CPU_PASS) if self.device.type == "cpu" else [images]
        with full_float32(self.device):
            features = [self._network(part.to(self.device))[0] for part in parts]
        return torch.cat(features).float().cpu()


def _build_network(tensors: dict[str, Tensor], layer: FeatureLayer) -> torch.nn.Module:
    ensure_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The class loads strictly from a file; the classifier that our weights leave out is never reached.
    state = io.BytesIO()
    torch.save({**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, state)
    state.seek(0)
    with torch.random.fork_rng(devices=[]):  # its layers are first filled at random
        return FeatureExtractorInceptionV3(FEATURES_NAME, [layer], feature_extractor_weights_path=state)


def _fold_normalisation(network: torch.nn.Module) -> None:
    """Multiply the batch normalisations into the convolutions before them: the same function, a tenth faster."""
    for block in network.modules():
        conv, norm = getattr(block, "conv", None), getattr(block, "bn", None)
        if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
            block.conv, block.bn = fuse_conv_bn_eval(conv, norm), torch.nn.Identity()
