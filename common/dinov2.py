"""DINOv2 features, for a Fréchet distance whose network has not been trained on ImageNet's labels.

Inception scores what its thousand classes look at, which faces and drawings hardly have; a Fréchet distance between
DINOv2 features agrees better with people (Stein et al. 2023, arXiv 2306.04675). It is ``fd_dinov2`` here and never
FID: the two are on different scales.

As in that paper: ViT-L/14 (Oquab et al. 2023, arXiv 2304.07193, without registers), the class token after the last
normalisation, images resized to 224 px by an antialiased bicubic filter, normalised by ImageNet's mean and deviation.
Any other DINOv2 is taken too, and the features' name says which it was. The weights are the user's: a folder or hub id
of the `transformers` library, an optional extra.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError, WavelatentError
from .metric_weights import tensors_sha256
from .precision import full_float32
from .torchvision_import import ensure_torchvision

SIZE = 224
RESIZE_NAME = f"antialiased bicubic to {SIZE}x{SIZE}, rounded to uint8, ImageNet mean and std"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU_PASS = 8
_MODELS = {(384, 12): "s", (768, 12): "b", (1024, 24): "l", (1536, 40): "g"}


class Dinov2Features:
    """The class token of a DINOv2 vision transformer, in float32 whatever autocast or TF32 setting is active.

    Args:
        source: folder of a `transformers` ``Dinov2Model``, or its id on the hub, such as ``facebook/dinov2-large``.
        device: where to compute.

    Attributes:
        name: which network, such as ``dinov2-vit-l14-cls``.
        dim: number of features.
        weights_sha256: over the configuration and every weight.

    Raises:
        UsageError: the extra is not installed, or ``source`` is something else.
        WavelatentError: ``source`` cannot be had, or weights are missing in it.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu") -> None:
        network = _load(source)
        config = network.config
        self.device = torch.device(device)
        self.dim = int(config.hidden_size)
        kind = _MODELS.get((self.dim, config.num_hidden_layers), f"{self.dim}x{config.num_hidden_layers}-")
        self.name = f"dinov2-vit-{kind}{config.patch_size}-cls"
        self.weights_sha256 = _sha256(network)
        self._network = network.to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``[B, dim]`` float32 on the CPU of uint8 images ``[B,3,H,W]``."""
        parts = images.split(CPU_PASS) if self.device.type == "cpu" else [images]
        with full_float32(self.device):
            tokens = [self._network(pixel_values=normalised(part.to(self.device))).pooler_output for part in parts]
        return torch.cat(tokens).float().cpu()


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images ``[B,3,H,W]`` as the network takes them: float32 ``[B,3,224,224]``, of mean about 0."""
    resized = F.interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True)
    pixels = resized.round().clamp(0, 255) / 255  # as Pillow does, which rounds what it resizes
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def _load(source: str) -> Any:
    try:
        ensure_torchvision()
        import transformers
    except ImportError as error:
        raise UsageError(f"transformers cannot be imported ({error}): pip install 'wavelatent[dinov2]'") from error
    library: Any = transformers  # whose annotations forget that loading may also return what was loaded
    try:
        config = library.AutoConfig.from_pretrained(source)
        if config.model_type != "dinov2":
            raise UsageError(f"--dinov2 {source} is a {config.model_type}: give a DINOv2, as facebook/dinov2-large is")
        network, loaded = library.Dinov2Model.from_pretrained(source, config=config, output_loading_info=True)
    except (OSError, ValueError) as error:
        where = "folder" if Path(source).exists() else "folder or hub id within reach"
        raise WavelatentError(
            f"--dinov2 {source} is no {where} of a transformers Dinov2Model ({_first_line(error)}): "
            "download facebook/dinov2-large and give its folder"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise WavelatentError(f"--dinov2 {source} lacks the weights {', '.join(missing[:3])}: download it again")
    return network.float().eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sha256(network: Any) -> str:
    """Return one hash of what decides the features: equal weights in another architecture give others."""
    config = network.config
    settings = {
        name: getattr(config, name, None)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "hidden_act")
    }
    content = json.dumps(settings, sort_keys=True) + tensors_sha256(network.state_dict())
    return hashlib.sha256(content.encode()).hexdigest()
