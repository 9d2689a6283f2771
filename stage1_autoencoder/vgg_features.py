"""The distance between VGG features before the activation, as ESRGAN trains with it (arXiv 1809.00219)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from ..common.frozen_network import FrozenFeatureDistance
from ..common.metric_weights import lpips_backbone
from ..common.torchvision_import import ensure_torchvision

VGGLayer = Literal[
    "conv1_1",
    "conv1_2",
    "conv2_1",
    "conv2_2",
    "conv3_1",
    "conv3_2",
    "conv3_3",
    "conv4_1",
    "conv4_2",
    "conv4_3",
    "conv5_1",
    "conv5_2",
    "conv5_3",
]
"""VGG16's convolutions: block, and place in the block (Simonyan & Zisserman 2015, arXiv 1409.1556, column D)."""

VGG16_LAYERS: tuple[VGGLayer, ...] = get_args(VGGLayer)


class VGGFeaturesConfig(Config):
    """The term of :class:`VGGFeatureDistance`."""

    weight: float = Field(0.0, ge=0)
    """0 leaves the term and its network out. ESRGAN adds the term with weight 1 to an L1 of weight 0.01."""
    layers: tuple[VGGLayer, ...] = Field(("conv5_3",), min_length=1)
    """Whose outputs are compared, before the activation; ESRGAN takes the last convolution alone."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of each batch it is computed on, an unbiased estimate."""


class VGGFeatureDistance(FrozenFeatureDistance):
    """Distance ``[B]`` between the pre-activation VGG16 features of images ``[B,3,H,W]`` in [-1, 1].

    ``mean over layers l of mean over channels and sites |phi_l(images) - phi_l(target)|``, where ``phi_l`` is the
    output of convolution ``l`` before its ReLU and the images are normalised by ImageNet's mean and deviation.

    Features before the activation, because after it most of the deep ones are zero, and the L1 distance are ESRGAN's
    (Wang et al. 2018, arXiv 1809.00219, section 3.2 and its released configuration). Ours: VGG16 in place of VGG19,
    since its weights are the ones that LPIPS brings, so conv5_3 stands for VGG19's conv5_4; and the mean over layers.

    Args:
        layers: Names of convolutions; only the network up to the deepest is computed.

    Raises:
        MissingWeightsError: VGG16 is neither here nor within reach.
    """

    def __init__(self, layers: Sequence[VGGLayer] = ("conv5_3",)) -> None:
        backbone = lpips_backbone("vgg")
        deepest = max(layers, key=VGG16_LAYERS.index)
        # Each block but the first begins with a pooling: below this size its features have no sites.
        super().__init__(_vgg16(backbone.tensors, deepest), title="VGG", min_size=2 ** (_block(deepest) - 1))
        self.layers = frozenset(layers)
        self.weights_sha256 = backbone.sha256

    def _features(self, network: Any, images: Tensor) -> list[Tensor]:
        features = []
        for name, module in network.named_children():
            images = module(images)
            if name in self.layers:
                features.append(images)
        return features

    def _distance(self, network: Any, features: list[Tensor], target_features: list[Tensor]) -> Tensor:
        distances = [
            (mine - theirs).abs().mean(dim=(1, 2, 3)) for mine, theirs in zip(features, target_features, strict=True)
        ]
        return torch.stack(distances).mean(dim=0)


class _ImageNetScaling(nn.Module):
    """Images in [-1, 1] to the normalised ones that torchvision's ImageNet networks were trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - self.mean) / self.std


def _vgg16(tensors: dict[str, Tensor], deepest: VGGLayer) -> nn.Sequential:
    """Return torchvision's VGG16 up to the convolution ``deepest``, filled from ``features.N.*``.

    Its convolutions are children named as in ``VGGLayer``, what stands between them by its number.
    """
    ensure_torchvision()
    from torchvision.models import vgg16

    with torch.device("meta"):  # no weights are drawn: all are given
        features = vgg16(weights=None).features
    features.load_state_dict({key.removeprefix("features."): value for key, value in tensors.items()}, assign=True)
    network, names = nn.Sequential(), iter(VGG16_LAYERS)
    network.add_module("scaling", _ImageNetScaling())
    for number, module in features.named_children():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # what comes before it is the result
        name = next(names) if isinstance(module, nn.Conv2d) else number
        network.add_module(name, module)
        if name == deepest:
            break
    return network


def _block(layer: VGGLayer) -> int:
    return int(layer.removeprefix("conv")[0])
