"""What both stages share: images, latents, noise scalings, evaluation, checkpoints and the run folder."""
