"""How much of an error in the latents the decoder passes on to the picture: a section of the latent health report."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.latents import Whitening
from ..common.randomness import image_noise
from .health import Figure, LatentData, Plot, Section, Verdict
from .health_passes import (
    LPIPS_MISSING,
    Coder,
    Lpips,
    Passes,
    graded,
    image_spread,
    mean_lpips,
    mean_psnr,
    root_mean_square,
    subset,
    whitening_of,
)

IMAGES = 16
"""Images whose latents are noised."""
SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Noise levels, in units of each channel's standard deviation."""
SMALL = 0.1
"""The noise level at which the decoder is judged: about what a good sampler leaves of error."""
PROBED = 8
"""Images at which the Jacobian is probed."""
STEP = 0.01
"""Step of the finite differences, in standard deviations: rounding and curvature are both far below the estimate."""
GAIN_NOTE, GAIN_FAULT = 2.0, 4.0
ONE_COLOUR = 1 / 255
"""Standard deviation of half a level of 8 bits: decoded images that vary less have no picture to be judged by."""


def robustness(autoencoder: Coder, data: LatentData, *, batch_size: int, lpips: Lpips | None) -> Section:
    """Return what noise on the latents does to the decoded picture, and the decoder's sensitivity per channel.

    ``psnr`` and ``lpips`` are of D(z + sigma std n) against the images, with n standard normal and std per channel, at
    the noise levels ``sigmas``. ``gain`` is rms(D(z + sigma std n) - D(z)) / (sigma times the images' standard
    deviation) at sigma = 0.1. It is 1 for a linear decoder of uncorrelated latents that carry all the variance (noise
    of a tenth of each latent's deviation is then a tenth of the picture's), and less for latents that share content.

    ``sensitivity`` is per channel how far the whole picture moves (Euclidean, values in [-1, 1]) when one latent value
    moves by a standard deviation, the root mean square over values: ||J std||_F / sqrt(values of the channel), J the
    decoder's Jacobian. Its Frobenius norm is Hutchinson's estimate (1990; one Gaussian probe per image, E|Jv|^2 =
    ||J||_F^2), with the products Jv taken by central finite differences: they need nothing of the decoder, where
    forward-mode differentiation does not know every operation.
    """
    whiten, passes = whitening_of(data), Passes(autoencoder, batch_size)
    noised, probed = subset(data, IMAGES), subset(data, PROBED)
    psnrs, distances, gain = _noised(passes, whiten, noised, lpips)
    sensitivity = _sensitivity(passes, whiten, probed)
    figures: dict[str, Figure] = {
        "images": len(noised.images),
        "sigmas": list(SIGMAS),
        "psnr": psnrs,
        "lpips": distances,
        "gain": gain,
        "sensitivity_images": len(probed.images),
        "sensitivity": sensitivity,
    }
    text = (
        f"Noise of {SMALL:g} standard deviations on the latents of {len(noised.images)} images lowers the PSNR from "
        f"{psnrs[0]:.1f} to {psnrs[SIGMAS.index(SMALL)]:.1f} dB; the picture's relative error is "
        f"{'not defined (no variance)' if gain is None else f'{gain:.2f}'} times the latents'."
    )
    verdict = Verdict(
        graded(gain, GAIN_NOTE, GAIN_FAULT),
        "fragile_decoder",
        text + (LPIPS_MISSING if lpips is None else ""),
        f"note: above {GAIN_NOTE:g} times; fault: above {GAIN_FAULT:g} times",
        "ours: 1 is a linear decoder of uncorrelated latents; at 4, a sampler's error of 5 % is a fifth of the picture",
    )
    return Section("robustness", figures, [verdict], _plots(psnrs, distances, sensitivity))


def _noised(
    passes: Passes, whiten: Whitening, data: LatentData, lpips: Lpips | None
) -> tuple[list[float], list[float | None], float | None]:
    """Return PSNR and LPIPS at every noise level, and the gain."""
    latents = whiten(data.mean)
    noise = image_noise(range(len(latents)), latents.shape[1:], "robustness")
    psnrs, distances, gain = [], [], None
    clean = passes.decode(data.mean)
    for sigma in SIGMAS:
        decoded = passes.decode(whiten.inverse(latents + sigma * noise)) if sigma else clean
        psnrs.append(mean_psnr(decoded, data.images))
        distances.append(mean_lpips(lpips, decoded, data.images, passes.batch_size))
        if sigma == SMALL:
            spread = image_spread(clean)
            gain = root_mean_square(decoded - clean) / (sigma * spread) if spread > ONE_COLOUR else None
    return psnrs, distances, gain


def _sensitivity(passes: Passes, whiten: Whitening, data: LatentData) -> list[float]:
    """Return, per channel, the root mean square of the Jacobian's columns, in images per whitened unit."""
    latents = whiten(data.mean)
    probes = image_noise(range(len(latents)), latents.shape[1:], "sensitivity")
    result = []
    for channel in range(latents.shape[1]):
        probe = torch.zeros_like(probes)
        probe[:, channel] = probes[:, channel]
        ends: list[Tensor] = [passes.decode(whiten.inverse(latents + sign * STEP * probe)) for sign in (1, -1)]
        moved = (ends[0] - ends[1]).double().square().sum() / (2 * STEP) ** 2  # summed over images: |J v|^2
        result.append((moved / latents[:, channel].numel()).sqrt().item())
    return result


def _plots(psnrs: list[float], distances: list[float | None], sensitivity: list[float]) -> list[Plot]:
    labels = ("noise on the latents, in standard deviations", "PSNR in dB")
    plots = [Plot("Decoding noised latents", {"PSNR": psnrs}, x=list(SIGMAS), labels=labels)]
    known = [distance for distance in distances if distance is not None]
    if len(known) == len(SIGMAS):
        plots.append(Plot("Decoding noised latents", {"LPIPS": known}, x=list(SIGMAS), labels=(labels[0], "LPIPS")))
    labels = ("channel", "movement of the picture per standard deviation")
    return [*plots, Plot("The decoder's sensitivity", {"sensitivity": sensitivity}, kind="bar", labels=labels)]
