"""From seeds to raw latents: noise, grid, guidance and sampler put together for one trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..common.denoising import Denoise
from ..common.errors import UsageError
from ..common.randomness import generator, image_noise
from .guidance import autoguidance, classifier_free
from .model import LatentDiffusion
from .objectives import Objective
from .samplers import SAMPLERS
from .sampling import DEFAULT_SAMPLING, Sampling
from .schedules import karras_sigmas, sampling_sigmas

WHITENING_TOLERANCE = 1e-4
"""How far a weaker model's whitening may be from the main model's, in whitened units: rounding, far below any noise."""

StreamNoise = Callable[[str], Tensor]
"""Standard normal noise ``[B, C, h, w]`` of a named stream."""


@torch.no_grad()
def generate_latents(
    model: LatentDiffusion,
    seeds: Sequence[int],
    *,
    labels: Tensor | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    weaker: LatentDiffusion | None = None,
) -> Tensor:
    """Return raw latents ``[len(seeds), C, h, w]`` on the model's device, ready for the autoencoder's decoder.

    Row i depends on ``seeds[i]`` and ``labels[i]`` alone: its start and every later draw come from generators of its
    own.

    Args:
        model: the denoiser, in evaluation mode.
        seeds: one per latent.
        labels: classes ``[len(seeds)]``; None is unconditional.
        sampling: sampler, noise levels and guidance.
        weaker: the model that autoguidance leads away from, on the same device. With it ``sampling.guidance`` is the
            weight of autoguidance, without it that of classifier-free guidance. A weight of 1 never calls it.

    Raises:
        UsageError: guidance with neither labels nor a weaker model, or a weaker model of other latents.
    """
    if labels is not None and labels.shape != (len(seeds),):
        raise ValueError(f"give one label per seed: {len(seeds)} seeds, labels of shape {tuple(labels.shape)}")

    def noise(stream: str) -> Tensor:
        return image_noise(seeds, model.latent_shape, stream)

    return _generate(model, noise, labels, sampling, weaker)


@torch.no_grad()
def generate_interpolation(
    model: LatentDiffusion,
    seed_pair: tuple[int, int],
    points: int,
    *,
    labels: Tensor | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    weaker: LatentDiffusion | None = None,
    pass_rows: int | None = None,
) -> Tensor:
    """Return raw latents ``[points, C, h, w]`` that lead from one seed to another.

    The start noise is interpolated spherically between the two seeds' (Song et al. 2021, arXiv 2010.02502, appendix
    D.5). So is the noise of every later step of a stochastic sampler, at the same fraction (ours): every point then
    sees noise of the right strength throughout, neighbours stay alike, and both ends are what `generate_latents` makes
    of the seeds. ``labels [points]`` are the classes of the points, ``pass_rows`` how many of them the networks see at
    a time (None: all), of which the last pass is filled up; the other arguments are those of `generate_latents`.

    Raises:
        UsageError: fewer than 2 points; see also `generate_latents`.
    """
    if points < 2:
        raise UsageError(f"an interpolation has at least its 2 ends: give 2 points or more, not {points}")
    if labels is not None and labels.shape != (points,):
        raise ValueError(f"give one label per point: {points} points, labels of shape {tuple(labels.shape)}")

    def noise(rows: Sequence[int], stream: str) -> Tensor:
        first, second = image_noise(seed_pair, model.latent_shape, stream)
        return spherical_interpolation(first, second, points)[rows]

    size, parts = pass_rows or points, []
    for start in range(0, points, size):
        rows = [min(start + row, points - 1) for row in range(size)]
        of_rows = None if labels is None else labels[rows]
        parts.append(_generate(model, partial(noise, rows), of_rows, sampling, weaker))
    return torch.cat(parts)[:points]


def spherical_interpolation(first: Tensor, second: Tensor, points: int) -> Tensor:
    """Return ``points`` tensors ``[points, ...]`` on the arc from ``first`` to ``second``, both ends exact.

    With omega the angle between the two and t from 0 to 1: ``sin((1 - t) omega) / sin(omega) first + sin(t omega) /
    sin(omega) second``. Where they (all but) lie on one line there is no arc, and the line is taken.
    """
    assert first.shape == second.shape, f"{tuple(first.shape)} to {tuple(second.shape)}"
    a, b = first.double(), second.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    omega = cosine.clamp(-1, 1).acos()
    t = torch.linspace(0, 1, points, dtype=torch.float64, device=first.device).reshape(-1, *[1] * first.ndim)
    if omega.sin() < 1e-6:
        path = (1 - t) * a + t * b
    else:
        path = (((1 - t) * omega).sin() * a + (t * omega).sin() * b) / omega.sin()
    return path.to(first.dtype)


def evaluations(sampling: Sampling, objective: Objective | None = None) -> int:
    """Return how often a network sees each image: the number of function evaluations (NFE) of ``sampling``.

    Guidance adds one evaluation, of the unconditional output or of the weaker model, to each within its interval. A
    weaker model counts as a whole evaluation however small it is. The levels, hence how many are in the interval, are
    the objective's; without one an interval is taken to hold all levels, which is the most that ``sampling`` can cost.
    Counted by running the sampler on a single number.
    """
    calls = 0

    def counting(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    if objective is None:
        sigmas, interval = karras_sigmas(sampling.steps), None
    else:
        sigmas, interval = sampling_sigmas(sampling, objective), sampling.guidance_interval
    x = torch.zeros(1, 1, 1, 1)
    denoise = classifier_free(counting, sampling.guidance, interval)
    labels = torch.zeros(1, dtype=torch.int64)
    SAMPLERS[sampling.sampler](denoise, x, sigmas, labels, lambda step: x, **sampling.sampler_options())
    return calls


def draw_labels(seeds: Sequence[int], num_classes: int) -> Tensor:
    """Return one class per seed, drawn uniformly by the seed itself, ``[len(seeds)]`` int64."""
    return torch.stack([torch.randint(num_classes, (), generator=generator("label", seed)) for seed in seeds])


def _generate(
    model: LatentDiffusion,
    noise: StreamNoise,
    labels: Tensor | None,
    sampling: Sampling,
    weaker: LatentDiffusion | None,
) -> Tensor:
    """Sample from the noise of the stream ``start``, with that of ``step-<i>`` in step i, and undo the whitening."""
    device = model.whitening.shift.device
    sigmas = sampling_sigmas(sampling, model.objective)
    denoise = guided_denoiser(model, labels, sampling, weaker)
    latents = SAMPLERS[sampling.sampler](
        denoise,
        noise("start").to(device) * sigmas[0].item(),
        sigmas,
        None if labels is None else labels.to(device),
        lambda step: noise(f"step-{step}"),
        **sampling.sampler_options(),
    )
    return model.whitening.inverse(latents)


def guided_denoiser(
    model: LatentDiffusion, labels: Tensor | None, sampling: Sampling, weaker: LatentDiffusion | None = None
) -> Denoise:
    """Return ``model.denoise`` with the guidance that ``sampling`` asks for; see `generate_latents`."""
    if weaker is not None:
        _check_weaker(model, weaker)
        return autoguidance(model.denoise, _weak_denoiser(weaker), sampling.guidance, sampling.guidance_interval)
    if labels is None and sampling.guidance != 1:
        raise UsageError(
            f"guidance {sampling.guidance:g} needs class labels or a weaker model: sample a run with classes, give a "
            "weaker model, or leave guidance at 1"
        )
    return classifier_free(model.denoise, sampling.guidance, sampling.guidance_interval)


def _weak_denoiser(weaker: LatentDiffusion) -> Denoise:
    """Return the weaker model's denoiser, which sees the labels only where it knows classes."""
    if weaker.num_classes:
        return weaker.denoise
    return lambda x, sigma, labels=None, /: weaker.denoise(x, sigma)


def _check_weaker(model: LatentDiffusion, weaker: LatentDiffusion) -> None:
    """Raise :class:`UsageError` unless the two models denoise the same latents and know the same classes.

    Another whitening is refused rather than converted: white noise in one model's latents is not white in the other's
    unless all scales keep their proportions, so no noise level of the weaker model would be the right one. Models of
    one latent cache have one whitening.
    """
    advice = "give one that was trained on the same latent cache"
    if weaker.latent_shape != model.latent_shape:
        shapes = " and ".join("x".join(map(str, m.latent_shape)) for m in (weaker, model))
        raise UsageError(f"the weaker model and the model have latents of {shapes}: {advice}")
    if weaker.num_classes not in (0, model.num_classes) and model.num_classes:
        raise UsageError(
            f"the weaker model has {weaker.num_classes} classes and the model {model.num_classes}: give one with the "
            "same classes or with none"
        )
    scale = model.whitening.scale
    shifted = ((weaker.whitening.shift - model.whitening.shift) / scale).abs().max().item()
    scaled = (weaker.whitening.scale / scale - 1).abs().max().item()
    if not math.isfinite(shifted + scaled) or max(shifted, scaled) > WHITENING_TOLERANCE:
        raise UsageError(f"the weaker model whitens its latents otherwise than the model: {advice}")
