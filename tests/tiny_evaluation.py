"""Stand-ins for what an evaluation needs: a network of six features, an autoencoder without weights, small images."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from wavelatent.common.images import to_uint8
from wavelatent.common.latents import Posterior

SIZE, COUNT = 16, 13


class TinyInception:
    """Six numbers per image: the mean of each half, per channel. Counts the images that it has seen."""

    name, dim, weights_sha256 = "inception-v3-2015-12-05", 6, "of the stand-in"
    images_seen = 0

    def __init__(self, device: object = "cpu") -> None:
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        TinyInception.images_seen += len(images)
        return F.adaptive_avg_pool2d(images.float() / 255, (2, 1)).flatten(1).cpu()


class HalfSize(nn.Module):
    """An autoencoder that halves and doubles."""

    downsampling, latent_channels = 2, 3

    def encode(self, images: Tensor) -> Posterior:
        return Posterior(F.avg_pool2d(images, 2), None)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=2)

    def fingerprint(self) -> str:
        return "half-size"


def pixels(seed: int, count: int = COUNT) -> np.ndarray:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(coarse, size=SIZE, mode="bilinear") * 2 - 1
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def write_folder(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:06d}.png")
    return path
