"""What every distance that a fixed, pretrained network measures has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .precision import full_float32


class FrozenFeatureDistance(nn.Module, ABC):
    """A distance ``[B]`` between images ``[B,3,H,W]`` in [-1, 1], taken between a frozen network's features.

    Its gradient reaches the first argument only; the target's features are taken without a graph. It computes in
    float32 whatever autocast is active, stays in eval mode when its parent is put into train mode, and neither lists
    nor saves its parameters, so that optimizers, weight averages, checkpoints and model folders do not carry it. Where
    no gradient is recorded it is a metric and computes without TF32 too; as a loss it leaves that to the program, for
    its speed.

    Subclasses say what the features are and how far apart two sets of them are.

    Args:
        network: Becomes float32, in eval mode and without gradients of its own.
        title: What errors call the distance.
        min_size: The shortest side, in pixels, that the network can take.
    """

    def __init__(self, network: nn.Module, *, title: str, min_size: int) -> None:
        super().__init__()
        self.title = title
        self.min_size = min_size
        # Held in a list, not registered: it is a fixed function and no part of its parent's state.
        self._frozen: list[Any] = [network.float().eval().requires_grad_(False)]

    @abstractmethod
    def _features(self, network: Any, images: Tensor) -> list[Tensor]:
        """Return the features of float32 images, one ``[B,C,h,w]`` per layer."""

    @abstractmethod
    def _distance(self, network: Any, features: list[Tensor], target_features: list[Tensor]) -> Tensor:
        """Return the distance per image, ``[B]``."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._frozen[0].parameters()).device

    def _apply(self, fn, recurse: bool = True) -> FrozenFeatureDistance:  # type: ignore[no-untyped-def]
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
        if min(images.shape[-2:]) < self.min_size:
            size = tuple(images.shape[-2:])
            raise ValueError(f"{self.title} needs images of at least {self.min_size} px, got {size}")
        network = self._frozen[0]
        is_loss = torch.is_grad_enabled() and images.requires_grad
        with torch.autocast(images.device.type, enabled=False) if is_loss else full_float32(images.device):
            with torch.no_grad():
                target_features = self._features(network, target.float())
            return self._distance(network, self._features(network, images.float()), target_features)
