"""Tiny diffusers autoencoders with random weights, which the tests hold ours to."""

from typing import Any

import torch

from wavelatent.stage1_autoencoder.diffusers_source import import_diffusers

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
KL = {**BLOCKS, "block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("AutoencoderKL", KL),
    "kl shifted": ("AutoencoderKL", KL | {"scaling_factor": 0.7, "shift_factor": 0.2}),
    "kl per channel": (
        "AutoencoderKL",
        {
            **KL,
            "latents_mean": [0.1, -0.2, 0.3, 0.0, 1.0],
            "latents_std": [1.5, 0.5, 2.0, 1.0, 3.0],
            "scaling_factor": 0.5,
        },
    ),
    "kl without 1x1": ("AutoencoderKL", KL | {"use_quant_conv": False, "use_post_quant_conv": False}),
    "kl flux 2": ("AutoencoderKLFlux2", KL),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            **BLOCKS,
            "down_block_out_channels": [8, 16],
            "up_block_out_channels": [16, 16],
            "norm_num_groups": 4,
            "latent_channels": 5,
        },
    ),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "encoder_block_out_channels": [8, 16],
            "decoder_block_out_channels": [8, 16],
            "encoder_layers_per_block": [1, 1],
            "decoder_layers_per_block": [1, 1],
            "encoder_qkv_multiscales": [[], [5]],
            "decoder_qkv_multiscales": [[], [5]],
            "scaling_factor": 0.4,
        },
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": [8, 8, 8],
            "decoder_block_out_channels": [8, 8, 8],
            "num_encoder_blocks": [1, 1, 1],
            "num_decoder_blocks": [1, 1, 1],
            "latent_channels": 5,
        },
    ),
    "vq": ("VQModel", {**KL, "latent_channels": 6, "vq_embed_dim": 3, "num_vq_embeddings": 7}),
}
GAUSSIAN = [name for name, (kind, _) in MODELS.items() if "KL" in kind]


def diffusers_model(name: str, seed: int = 0) -> Any:
    """Return a model of ``MODELS`` in eval mode."""
    kind, settings = MODELS[name]
    torch.manual_seed(seed)
    return getattr(import_diffusers(), kind)(**settings).eval().requires_grad_(False)
