"""The latent health report on the size of latents and of their noise: the sections ``scale`` and ``posterior``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.latents import Posterior
from .bottlenecks import LOGVAR_RANGE, SATURATED, kl_to_standard_normal
from .health import Figure, LatentData, Plot, Section, Verdict
from .health_measures import (
    channel_quantiles,
    finite_images,
    image_variance,
    in_words,
    level_of,
    live_channels,
    plain,
    positions,
    usable,
)
from .moments import ACTIVE_VARIANCE

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
MAX_SORTED = 1_000_000  # values per channel; 1,000 of them lie beyond the outermost quantiles

# Whitening mends the scale, so it is worth a note only; where a channel is ten times off, whatever was meant to hold
# the latents (a KL term, a normalisation) does not.
UNIT_NOTE, UNIT_FAULT = 2.0, 10.0
# One sigma_data stands for all channels of a denoiser (EDM, arXiv 2206.00364) unless they are whitened one by one.
# Stable Diffusion's largest and smallest deviation differ 1.4-fold, those of the KL autoencoders that we trained up to
# 2.8-fold.
UNEQUAL_NOTE, UNEQUAL_FAULT = 2.0, 5.0
# A normal variable clamped at three deviations, as the bounded bottleneck is made for, has 0.3 % at its bounds, and a
# uniform one 1 % beyond 0.99 of them.
SATURATED_NOTE, SATURATED_FAULT = 0.02, 0.05
# Without a bound its place is guessed from the range, where a flat background may lie too: more has to pile up.
PILED_UP_FAULT = 0.2
DENORMAL_NOTE = 0.01  # of 11 bits of precision they lose one or more

CLAMPED_NOTE, CLAMPED_FAULT = 0.0, 1e-3
# Burda's threshold is meant for latents of about unit variance; as a share of signal and noise it fits any scale.
SIGNAL_NOTE, SIGNAL_FAULT = 0.5, ACTIVE_VARIANCE
LOGVAR_BINS = 50


def scale(data: LatentData) -> Section:
    """Return moments, quantiles and range of every channel of the drawn latents, what stage two is to learn.

    Moments are the population's, over images and sites; the kurtosis is in excess of the normal distribution's.
    """
    broken = int((~finite_images(data)).sum())
    data = usable(data)
    latents = data.drawn
    mean, std, skew, kurtosis = _moments(latents)
    quantiles, quantile_images = channel_quantiles(latents, torch.tensor(QUANTILES), MAX_SORTED)
    saturation = _saturation(latents, data.bound)
    half = torch.finfo(torch.float16)
    size = latents.abs()
    overflow = (size > half.max).float().mean(dim=(0, 2, 3))
    denormal = ((size > 0) & (size < half.tiny)).float().mean(dim=(0, 2, 3))
    figures: dict[str, Figure] = {
        "images": len(latents),
        "images_not_finite": broken,
        "bound": data.bound,
        "mean": plain(mean),
        "std": plain(std),
        "skew": plain(skew),
        "excess_kurtosis": plain(kurtosis),
        **{f"quantile_{q}": plain(row) for q, row in zip(QUANTILES, quantiles, strict=True)},
        "quantile_images": quantile_images,
        "min": plain(latents.amin(dim=(0, 2, 3))),
        "max": plain(latents.amax(dim=(0, 2, 3))),
        "saturated_share": plain(saturation),
        "fp16_overflow_share": plain(overflow),
        "fp16_denormal_share": plain(denormal),
    }
    live = live_channels(data.mean)
    verdicts = [
        _finite_verdict(broken, len(latents) + broken),
        *_size_verdicts(std, live),
        _saturation_verdict(saturation, data.bound),
        *_half_precision_verdicts(overflow, denormal),
    ]
    plots = [
        Plot("Deviation of every channel", {"std": [float(s) for s in std]}, kind="bar", labels=("channel", "std")),
        Plot(
            "Quantiles of every channel",
            {f"{q:g}": [float(v) for v in row] for q, row in zip(QUANTILES, quantiles, strict=True)},
            labels=("channel", "value"),
        ),
    ]
    return Section("scale", figures, verdicts, plots)


def _moments(latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, std, skew and excess kurtosis, float64 ``[C]``; the last two are NaN of a constant channel."""
    rows = []
    for channel in latents.unbind(dim=1):  # one at a time: float64 of all would take three times the memory
        values = channel.flatten().double()
        centred = values - values.mean()
        std = centred.square().mean().sqrt()
        standard = centred / std
        rows.append(torch.stack([values.mean(), std, standard.pow(3).mean(), standard.pow(4).mean() - 3]))
    mean, std, skew, kurtosis = torch.stack(rows, dim=1)
    return mean, std, skew, kurtosis


def _saturation(latents: Tensor, bound: float | None) -> Tensor:
    """Return the share of values of each channel at its bounds, ``[C]``.

    Without a bound, at the ends of the channel's own range: a squashing that nobody declared piles values up there.
    """
    if bound is not None:
        return (latents.abs() > SATURATED * bound).float().mean(dim=(0, 2, 3))
    low, high = latents.amin(dim=(0, 2, 3), keepdim=True), latents.amax(dim=(0, 2, 3), keepdim=True)
    middle, reach = (low + high) / 2, (high - low) / 2
    at_the_ends = ((latents - middle).abs() > SATURATED * reach) & (reach > 0)
    return at_the_ends.float().mean(dim=(0, 2, 3))


def _finite_verdict(broken: int, images: int) -> Verdict:
    text = f"{broken} of {images} images have latents that are not finite; they are left out of everything else"
    return Verdict(
        "fault" if broken else "ok",
        "not_finite",
        text if broken else f"All latents of {images} images are finite",
        "any NaN or infinity is a fault",
        "ours",
    )


def _size_verdicts(std: Tensor, live: list[int]) -> list[Verdict]:
    """Return ``far_from_unit_variance`` and ``unequal_scale``, of the channels that are not dead."""
    of_live = std[live].clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.maximum(of_live, 1 / of_live)
    off = [channel for channel, value in zip(live, factor, strict=True) if value > UNIT_NOTE]
    spread = f"the deviations of the channels lie between {std[live].min():.3g} and {std[live].max():.3g}"
    ratio = float(of_live.max() / of_live.min())
    small, large = live[int(of_live.argmin())], live[int(of_live.argmax())]
    return [
        Verdict(
            level_of(float(factor.max()), UNIT_NOTE, UNIT_FAULT),
            "far_from_unit_variance",
            f"Far from unit variance in {in_words(off)}: {spread}; whiten before stage two"
            if off
            else f"Near unit variance: {spread}",
            f"a deviation outside 1/{UNIT_NOTE:g} to {UNIT_NOTE:g} is a note, outside 1/{UNIT_FAULT:g} to "
            f"{UNIT_FAULT:g} a fault",
            "ours",
        ),
        Verdict(
            level_of(ratio, UNEQUAL_NOTE, UNEQUAL_FAULT),
            "unequal_scale",
            f"The deviation of channel {large} is {ratio:.3g} times that of channel {small}"
            if ratio > UNEQUAL_NOTE
            else f"The channels are of similar scale: the largest deviation is {ratio:.3g} times the smallest",
            f"a ratio above {UNEQUAL_NOTE:g} is a note, above {UNEQUAL_FAULT:g} a fault",
            "ours",
        ),
    ]


def _saturation_verdict(share: Tensor, bound: float | None) -> Verdict:
    where = f"within 1 % of the bound {bound:g}" if bound is not None else "at the ends of their range"
    fault = SATURATED_FAULT if bound is not None else PILED_UP_FAULT
    off = positions(share > SATURATED_NOTE)
    worst = f"{100 * float(share.max()):.3g} % of the values of channel {int(share.argmax())}"
    return Verdict(
        level_of(float(share.max()), SATURATED_NOTE, fault),
        "saturated",
        f"{in_words(off).capitalize()}: values pile up {where}, up to {worst}"
        if off
        else f"Not saturated: {worst} at most lie {where}",
        f"a share of a channel above {100 * SATURATED_NOTE:g} % is a note, above {100 * fault:g} % a fault",
        "ours",
    )


def _half_precision_verdicts(overflow: Tensor, denormal: Tensor) -> list[Verdict]:
    over, small = positions(overflow > 0), positions(denormal > DENORMAL_NOTE)
    return [
        Verdict(
            "fault" if over else "ok",
            "fp16_overflow",
            f"{in_words(over).capitalize()}: up to {100 * float(overflow.max()):.3g} % of the values overflow float16"
            if over
            else "Every value is within the range of float16",
            "any value beyond 65504 is a fault",
            "IEEE 754 binary16",
        ),
        Verdict(
            "note" if small else "ok",
            "fp16_denormal",
            f"{in_words(small).capitalize()}: up to {100 * float(denormal.max()):.3g} % of the values are denormal in "
            "float16 and lose precision"
            if small
            else f"{100 * float(denormal.max()):.2g} % of the values of a channel at most are denormal in float16",
            f"a share of a channel above {100 * DENORMAL_NOTE:g} %, below 6.1e-5 in size, is a note",
            "ours; the range is IEEE 754 binary16",
        ),
    ]


def posterior(data: LatentData) -> Section:
    """Return what the posterior's noise is like: log-variances, KL against N(0, 1), and what the noise drowns.

    A *unit* is one value of the latent, so that there are ``C * h * w``. Active ones are Burda et al.'s (2016, arXiv
    1509.00519): the posterior's mean varies by more than 0.01 from image to image.
    """
    data = usable(data)
    if data.std is None:
        verdict = Verdict("ok", "deterministic", "The encoder is deterministic: there is no posterior", "none", "ours")
        return Section("posterior", {"images": len(data.mean), "deterministic": 1}, [verdict])
    std = data.std.clamp_min(math.exp(0.5 * LOGVAR_RANGE[0]))  # a zero counts as the clamp's, not as minus infinity
    logvar = 2 * std.log()
    clamped = _clamped(logvar)
    variance = image_variance(data.mean)
    noise = std.square().mean(dim=0, dtype=torch.float64)
    active = variance > ACTIVE_VARIANCE
    signal = variance.mean(dim=(1, 2)) / (variance + noise).mean(dim=(1, 2))
    kl = torch.stack(
        [
            kl_to_standard_normal(Posterior(mean, deviation)).double().mean()
            for mean, deviation in zip(data.mean.split(1, dim=1), std.split(1, dim=1), strict=True)
        ]
    )
    counts, edges = _histogram(logvar)
    figures: dict[str, Figure] = {
        "images": len(data.mean),
        "deterministic": 0,
        "logvar_mean": plain(logvar.mean(dim=(0, 2, 3))),
        "logvar_min": plain(logvar.amin(dim=(0, 2, 3))),
        "logvar_max": plain(logvar.amax(dim=(0, 2, 3))),
        "logvar_histogram": plain(counts),
        "logvar_histogram_edges": plain(edges),
        "clamped_share": plain(clamped.mean(dim=(1, 2))),
        "clamped_share_worst_site": float(clamped.max()),
        "kl_nats": plain(kl),
        "kl_nats_per_value": plain(kl / data.mean[0, 0].numel()),
        "units": active.numel(),
        "active_units": int(active.sum()),
        "active_share": plain(active.double().mean(dim=(1, 2))),
        "signal_share": plain(signal),
    }
    plots = [
        Plot(
            "Log-variance of the posterior",
            {"share": [float(c) for c in counts]},
            x=[float(x) for x in (edges[1:] + edges[:-1]) / 2],
            labels=("log-variance", "share of values"),
        ),
        Plot("KL of every channel", {"kl": [float(k) for k in kl]}, kind="bar", labels=("channel", "nats per image")),
    ]
    verdicts = [_clamp_verdict(clamped), _collapse_verdict(signal, active)]
    return Section("posterior", figures, verdicts, plots)


def _clamped(logvar: Tensor) -> Tensor:
    """Return the share of images, per value of the latent ``[C, h, w]``, whose log-variance is at the clamp."""
    low, high = LOGVAR_RANGE
    slack = 1e-3  # exp, square root and log in float32 leave a log-variance of -30 within 1e-5 of itself
    return ((logvar <= low + slack) | (logvar >= high - slack)).double().mean(dim=0)


def _histogram(logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Return shares ``[bins]`` and edges ``[bins + 1]`` over the range of the log-variances that are finite."""
    values = logvar.clamp(*LOGVAR_RANGE).flatten()
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, LOGVAR_BINS, low, high)
    return counts / values.numel(), torch.linspace(low, high, LOGVAR_BINS + 1)


def _clamp_verdict(clamped: Tensor) -> Verdict:
    share = float(clamped.mean())
    off = positions(clamped.amax(dim=(1, 2)) > 0)
    low, high = LOGVAR_RANGE
    return Verdict(
        level_of(share, CLAMPED_NOTE, CLAMPED_FAULT) if float(clamped.max()) <= 0.5 else "fault",
        "logvar_clamp",
        f"{in_words(off).capitalize()}: {100 * share:.3g} % of the log-variances are at the clamp, at the worst site "
        f"in {100 * float(clamped.max()):.3g} % of the images"
        if off
        else f"No log-variance is at the clamp of {low:g} and {high:g}",
        f"any is a note; more than {100 * CLAMPED_FAULT:g} % of all, or one site in half of the images, is a fault",
        "ours; the clamp is Stable Diffusion's",
    )


def _collapse_verdict(signal: Tensor, active: Tensor) -> Verdict:
    off = positions(signal < SIGNAL_NOTE)
    burda = f"{int(active.sum())} of {active.numel()} units are active"
    worst = f"the mean makes {100 * float(signal.min()):.3g} % of the variance of channel {int(signal.argmin())}"
    return Verdict(
        level_of(-float(signal.min()), -SIGNAL_NOTE, -SIGNAL_FAULT),
        "posterior_collapse",
        f"The posterior's noise drowns {in_words(off)}: {worst}; {burda}"
        if off
        else f"No channel has collapsed to noise: {worst} at least; {burda}",
        f"a share below {100 * SIGNAL_NOTE:g} % is a note, below {100 * SIGNAL_FAULT:g} % a fault",
        "Burda et al. 2016 (arXiv 1509.00519), whose variance of 0.01 is taken relative to the noise (ours)",
    )
