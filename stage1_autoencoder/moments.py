"""Statistics of a batch of latents, per channel: of all processes' batch together for the penalties, local for the log.

With gradient accumulation, the batch is that of one micro-step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ..common.latents import Posterior

ACTIVE_VARIANCE = 0.01
"""A channel is active where the variance of its posterior mean is above it (Burda et al. 2016, arXiv 1509.00519)."""


def world_size() -> int:
    """Return the number of processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def average_over_processes(values: Tensor) -> Tensor:
    """Return the mean of ``values`` over all processes; in a single process, ``values``.

    Every process must call it. Differentiable: with gradients averaged over processes, as DistributedDataParallel does,
    what is computed from it has the gradient of the same computation on the whole batch.
    """
    return values if world_size() == 1 else _Average.apply(values)


class _Average(torch.autograd.Function):
    """The mean over processes; its gradient is the mean of the processes' gradients.

    PyTorch's own differentiable `all_reduce` is deprecated, and what replaces it is private.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Average.apply(gradient)


def global_moments(latents: Tensor, *, across_processes: bool = True) -> tuple[Tensor, Tensor]:
    """Return the mean and variance ``[C]`` of every channel of ``[B, C, h, w]`` over images, sites and processes.

    The variance is of the population (divided by the count). Differentiable, and exact to rounding also where the mean
    is large against the spread. Every process must have the same number of images.
    """
    return _global_moments(latents, across_processes, covariance=False)


def global_covariance(latents: Tensor, *, across_processes: bool = True) -> tuple[Tensor, Tensor]:
    """Return the mean ``[C]`` and covariance ``[C, C]`` of the channels; its diagonal is :func:`global_moments`'."""
    return _global_moments(latents, across_processes, covariance=True)


def _global_moments(latents: Tensor, across_processes: bool, *, covariance: bool) -> tuple[Tensor, Tensor]:
    average = average_over_processes if across_processes else _identity
    values = latents.float().transpose(0, 1).flatten(1)  # [C, B*h*w]
    # E[x^2] - E[x]^2 cancels where the mean is large. About a centre near the mean it does not; the centre is a
    # constant, and the same in all processes.
    center = average(values.detach().mean(dim=1))
    deviations = values - center[:, None]
    with torch.autocast(values.device.type, enabled=False):  # it would do the product in half precision
        second = deviations @ deviations.T / values.shape[1] if covariance else deviations.square().mean(dim=1)
    offset = deviations.mean(dim=1)  # 0 up to rounding, but it carries the gradient of the mean
    joint = average(torch.cat([offset, second.flatten()]))
    offset, second = joint[: len(center)], joint[len(center) :].view_as(second)
    squares = torch.outer(offset, offset) if covariance else offset.square()
    return center + offset, second - squares


def _identity(values: Tensor) -> Tensor:
    return values


@torch.no_grad()
def posterior_metrics(posterior: Posterior) -> dict[str, Tensor]:
    """Return what the log shows of this process's batch, over images and sites.

    - ``latent/std_min``, ``latent/std_max``: the smallest and the largest standard deviation of a channel of the drawn
      latents, from ``Var[z] = Var[mean] + E[std^2]``;
    - ``latent/active_channels``: the number of channels whose posterior mean has a variance above 0.01.
    """
    of_mean = posterior.mean.var(dim=(0, 2, 3), correction=0)
    drawn = of_mean if posterior.std is None else of_mean + posterior.std.square().mean(dim=(0, 2, 3))
    std = drawn.sqrt()
    return {
        "latent/std_min": std.min(),
        "latent/std_max": std.max(),
        "latent/active_channels": (of_mean > ACTIVE_VARIANCE).float().sum(),
    }
