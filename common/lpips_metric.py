"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924, v0.1), as a loss and as a metric."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .metric_weights import lpips_backbone
from .precision import full_float32
from .torchvision_import import ensure_torchvision

LpipsNet = Literal["vgg", "alex"]


class PerceptualDistance(nn.Module):
    """LPIPS distance ``[B]`` between images ``[B,3,H,W]`` in [-1, 1], with a frozen VGG16 or AlexNet.

    Its gradient reaches the first argument only; the target's features are taken without a graph. It computes in
    float32 whatever autocast is active (in bfloat16 the gradient is 15 % off), stays in eval mode when its parent is
    put into train mode (the heads have dropout), and neither lists nor saves its parameters, so that optimizers,
    weight averages, checkpoints and model folders do not carry it. Where no gradient is recorded it is a metric and
    computes without TF32 too; as a loss it leaves that to the program, for its speed.

    Args:
        net: ``"vgg"`` (the usual training loss) or ``"alex"`` (the usual figure in tables; four times faster).

    Raises:
        MissingWeightsError: the backbone is neither here nor within reach.
    """

    def __init__(self, net: LpipsNet = "vgg") -> None:
        super().__init__()
        ensure_torchvision()
        import lpips

        backbone = lpips_backbone(net)
        self.net = net
        self.weights_sha256 = backbone.sha256
        # Building it draws random weights, which must not move the caller's generator.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by its older argument names
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _fill_backbone(model.net, backbone.tensors)
        # Held in a list, not registered: it is a fixed function and no part of its parent's state.
        self._frozen = [model.float().eval().requires_grad_(False)]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._frozen[0].parameters()).device

    def _apply(self, fn, recurse: bool = True) -> PerceptualDistance:  # type: ignore[no-untyped-def]
        # ``.to(device)`` on a parent moves the network along; a change of dtype must not round its weights.
        super()._apply(fn, recurse)
        self._frozen[0].to(fn(torch.empty(0, device=self.device)).device)
        return self

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the distance per image, ``[B]`` float32.

        Raises:
            ValueError: the shapes differ, or the images are too small for the network.
        """
        if images.shape != target.shape:
            raise ValueError(f"images {tuple(images.shape)} and target {tuple(target.shape)} differ in shape")
        if min(images.shape[-2:]) < MIN_SIZE:
            raise ValueError(f"LPIPS needs images of at least {MIN_SIZE} px, got {tuple(images.shape[-2:])}")
        model = self._frozen[0]
        is_loss = torch.is_grad_enabled() and images.requires_grad
        with torch.autocast(images.device.type, enabled=False) if is_loss else full_float32(images.device):
            with torch.no_grad():
                target_features = _unit_features(model, target.float())
            image_features = _unit_features(model, images.float())
            distances = [
                head((mine - theirs).square()).mean(dim=(1, 2, 3))
                for head, mine, theirs in zip(model.lins, image_features, target_features, strict=True)
            ]
            return torch.stack(distances).sum(dim=0)


# Below it AlexNet's last pooling has no pixels left, and VGG's deepest features are a single site.
MIN_SIZE = 32


def _unit_features(model: Any, images: Tensor) -> list[Tensor]:
    import lpips

    return [lpips.normalize_tensor(features) for features in model.net(model.scaling_layer(images))]


def _fill_backbone(backbone: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy ``features.N.*`` into lpips's ``sliceK.N.*``; every parameter must be there and nothing may be left over."""
    names = {f"features.{name.split('.', 1)[1]}": name for name in backbone.state_dict()}
    backbone.load_state_dict({names[key]: tensor for key, tensor in tensors.items()}, strict=True)
