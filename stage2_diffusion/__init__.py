"""Stage two: the diffusion model trained on cached latents, and its samplers."""
