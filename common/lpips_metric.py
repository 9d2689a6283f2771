"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924, v0.1), as a loss and as a metric."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .frozen_network import FrozenFeatureDistance
from .metric_weights import lpips_backbone
from .torchvision_import import ensure_torchvision

LpipsNet = Literal["vgg", "alex"]

# Below it AlexNet's last pooling has no pixels left, and VGG's deepest features are a single site.
MIN_SIZE = 32


class PerceptualDistance(FrozenFeatureDistance):
    """LPIPS distance ``[B]`` between images ``[B,3,H,W]`` in [-1, 1], with a frozen VGG16 or AlexNet.

    The sum over layers of the mean over sites of the weighted squared difference between features that are normalised
    over channels. It is float32 always (in bfloat16 the gradient is 15 % off) and in eval mode always (the heads have
    dropout).

    Args:
        net: ``"vgg"`` (the usual training loss) or ``"alex"`` (the usual figure in tables; a twentieth
            of the cost on a CPU).

    Raises:
        MissingWeightsError: the backbone is neither here nor within reach.
    """

    def __init__(self, net: LpipsNet = "vgg") -> None:
        ensure_torchvision()
        import lpips

        backbone = lpips_backbone(net)
        # Building it draws random weights, which must not move the caller's generator.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by its older argument names
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _fill_backbone(model.net, backbone.tensors)
        super().__init__(model, title="LPIPS", min_size=MIN_SIZE)
        self.net = net
        self.weights_sha256 = backbone.sha256

    def _features(self, network: Any, images: Tensor) -> list[Tensor]:
        import lpips

        return [lpips.normalize_tensor(features) for features in network.net(network.scaling_layer(images))]

    def _distance(self, network: Any, features: list[Tensor], target_features: list[Tensor]) -> Tensor:
        distances = [
            head((mine - theirs).square()).mean(dim=(1, 2, 3))
            for head, mine, theirs in zip(network.lins, features, target_features, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)


def _fill_backbone(backbone: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy ``features.N.*`` into lpips's ``sliceK.N.*``; every parameter must be there and nothing may be left over."""
    names = {f"features.{name.split('.', 1)[1]}": name for name in backbone.state_dict()}
    backbone.load_state_dict({names[key]: tensor for key, tensor in tensors.items()}, strict=True)
