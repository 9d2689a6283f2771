"""Write a diffusers AutoencoderKL with random weights, which has learned nothing: make_random.py FOLDER.

Stable Diffusion's layout (two residual blocks in each stage, attention in the middle, 4 channels, the 1x1 convolutions
around the latents), but narrow and with three stages, so that the latents of images of 64 px are 16x16 as those beside
it in the report are. `wavelatent` takes it as diffusers:FOLDER.
"""

import sys

import torch

from wavelatent.stage1_autoencoder.diffusers_source import import_diffusers

STAGES = (32, 64, 64)
SEED = 0


def main(folder: str) -> None:
    """Make it and save it."""
    torch.manual_seed(SEED)
    autoencoder = import_diffusers().AutoencoderKL(
        block_out_channels=STAGES,
        down_block_types=["DownEncoderBlock2D"] * len(STAGES),
        up_block_types=["UpDecoderBlock2D"] * len(STAGES),
        layers_per_block=2,
        latent_channels=4,
        sample_size=64,
    )
    autoencoder.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
