"""A stage-two run and its autoencoder with random weights: what sampling needs, without training."""

import json
from pathlib import Path

import torch
from torch import nn

from wavelatent.common.run_folder import save_model_folder
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.objectives import EDMConfig
from wavelatent.stage2_diffusion.unet import UNetConfig

C, H, W = 3, 4, 8
"""Shape of a latent; the images are four times as high and wide."""
UNET = {"channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "attention_levels": [1], "head_channels": 8}


def random_model(seed: int, num_classes: int = 0) -> LatentDiffusion:
    """Return a denoiser all of whose weights, also those that begin at zero, matter."""
    torch.manual_seed(seed)
    model = LatentDiffusion(UNetConfig.model_validate(UNET), EDMConfig(), (C, H, W), num_classes=num_classes)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_autoencoder(folder: Path) -> Path:
    """Write an autoencoder of downsampling 4."""
    torch.manual_seed(0)
    encoder = {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1}
    config = {"encoder": encoder, "channels": C, "decoder": {"width": "tiny"}}
    Autoencoder(AutoencoderConfig.model_validate(config)).save_pretrained(folder)
    return folder


def write_run(folder: Path, autoencoder: Path, *, seed: int = 0, num_classes: int = 0) -> Path:
    """Write a run of train-diffusion that says it averaged at width 0.1."""
    folder.mkdir(parents=True)
    save_model_folder(random_model(seed, num_classes), folder / "model")
    fingerprint = Autoencoder.from_pretrained(autoencoder).fingerprint()
    record = {"kind": "diffusion", "autoencoder": {"fingerprint": fingerprint, "path": str(autoencoder)}}
    (folder / "inputs.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text("train:\n  label_dropout: 0.1\n  ema:\n    widths: [0.1, 0.05]\n")
    return folder
