"""Adversarial losses and the discriminator's regularisers, as functions of its logit maps.

Everything takes lists of logit maps, each ``[B, 1, h, w]``, and is computed in float32. Where a loss is a mean over
sites and maps, every map counts the same, whatever its number of sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Sequence[Tensor]
GanLossName = Literal["hinge", "logistic", "relativistic"]


def mean_over_maps(maps: Maps) -> Tensor:
    """Return the mean over the sites of each map, then over maps: ``[B]`` float32."""
    return torch.stack([logits.float().flatten(1).mean(dim=1) for logits in maps]).mean(dim=0)


def hinge_generator(fake: Maps, real: Maps = ()) -> Tensor:
    """``-D(fake)``, the mean over sites and maps, ``[B]``; ``real`` is not used."""
    return -mean_over_maps(fake)


def hinge_discriminator(real: Maps, fake: Maps) -> Tensor:
    """``(relu(1 - D(real)) + relu(1 + D(fake))) / 2``, the mean over sites and maps, ``[B]``.

    Lim & Ye 2017 (arXiv 1705.02894); halved as in VQGAN, so that it is the mean of its two terms.
    """
    on_real = mean_over_maps([F.relu(1 - logits.float()) for logits in real])
    on_fake = mean_over_maps([F.relu(1 + logits.float()) for logits in fake])
    return (on_real + on_fake) / 2


def logistic_generator(fake: Maps, real: Maps = ()) -> Tensor:
    """``softplus(-D(fake))``, the mean over sites and maps, ``[B]``; ``real`` is not used.

    The non-saturating loss of Goodfellow et al. 2014 (arXiv 1406.2661, section 3).
    """
    return mean_over_maps([F.softplus(-logits.float()) for logits in fake])


def logistic_discriminator(real: Maps, fake: Maps) -> Tensor:
    """``(softplus(-D(real)) + softplus(D(fake))) / 2``, the mean over sites and maps, ``[B]``.

    Halved, which is ours: it makes it the mean of its two terms, as the hinge loss is. Published weights of penalties
    beside the sum of the two are to be halved with it.
    """
    on_real = mean_over_maps([F.softplus(-logits.float()) for logits in real])
    on_fake = mean_over_maps([F.softplus(logits.float()) for logits in fake])
    return (on_real + on_fake) / 2


def relativistic_generator(fake: Maps, real: Maps) -> Tensor:
    """``softplus(-(D(fake) - D(real)))``, the mean over sites and maps, ``[B]``.

    RpGAN (Jolicoeur-Martineau 2018, arXiv 1807.00734) with the logistic function, as R3GAN takes it (Huang et al. 2025,
    arXiv 2501.05441, equation 2). The papers pair images at random; here image ``i`` is paired, site by site, with its
    own reconstruction, which is ours.
    """
    return mean_over_maps(_relative(fake, real))


def relativistic_discriminator(real: Maps, fake: Maps) -> Tensor:
    """``softplus(-(D(real) - D(fake)))``, the mean over sites and maps, ``[B]``; one term, so nothing is halved.

    Source and pairing as in :func:`relativistic_generator`.
    """
    return mean_over_maps(_relative(real, fake))


def _relative(better: Maps, worse: Maps) -> list[Tensor]:
    return [F.softplus(b.float() - a.float()) for a, b in zip(better, worse, strict=True)]


@dataclass(frozen=True)
class GanLoss:
    """A pair of losses, each ``[B]`` and each in the scale of a mean over its terms."""

    generator: Callable[[Maps, Maps], Tensor]
    """``(fake, real) -> [B]``; ``real`` may be empty unless :attr:`generator_needs_real`."""
    discriminator: Callable[[Maps, Maps], Tensor]
    """``(real, fake) -> [B]``."""
    generator_needs_real: bool = False


GAN_LOSSES: dict[GanLossName, GanLoss] = {
    "hinge": GanLoss(hinge_generator, hinge_discriminator),
    "logistic": GanLoss(logistic_generator, logistic_discriminator),
    "relativistic": GanLoss(relativistic_generator, relativistic_discriminator, generator_needs_real=True),
}


def gradient_penalty(maps: Maps, images: Tensor) -> Tensor:
    """``1/2 * ||d D(x) / d x||^2``, the sum over an image's values, ``[B]``: R1 on real images, R2 on reconstructions.

    Mescheder et al. 2018 (arXiv 1801.04406, equation 9), with ``D(x)`` the mean over sites and maps, which is ours for
    discriminators with more than one logit. Where logits depend on other images too (minibatch standard deviation),
    the derivative is that of the batch's sum. It can be differentiated again.

    Args:
        maps: what the discriminator said of ``images``.
        images: the very tensor it was given, ``[B, 3, H, W]``, with ``requires_grad`` set before.
    """
    assert images.requires_grad, "the discriminator must see images that require a gradient"
    (gradient,) = torch.autograd.grad(mean_over_maps(maps).sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1) / 2


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al. 2021, arXiv 2104.03310): ties logits to running means of the other side's.

    ``R = E[(D(real) - a_fake)^2] + E[(D(fake) - a_real)^2]``, with the anchors ``a`` exponential moving averages of the
    mean logits: ``a <- decay * a + (1 - decay) * mean``. The squares are taken site by site and averaged over images,
    sites and maps. The anchors are buffers, so a checkpoint keeps them.

    Args:
        decay: of the moving averages; 0.99 in the paper.
    """

    real: Tensor
    fake: Tensor
    started: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        for name in ("real", "fake", "started"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, real: Maps, fake: Maps) -> Tensor:
        """Return the penalty, a scalar; 0 until the first :meth:`update`, as there is nothing to be tied to."""
        on_real = mean_over_maps([(logits.float() - self.fake).square() for logits in real])
        on_fake = mean_over_maps([(logits.float() - self.real).square() for logits in fake])
        return self.started * (on_real + on_fake).mean()

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move the anchors towards the mean logits of a step, scalars over all processes; the first sets them."""
        share = 1 - self.decay * self.started
        # New tensors, not changed ones: a penalty that waits for its backward pass still needs the old.
        self.real = torch.lerp(self.real, real_mean.detach().to(self.real), share)
        self.fake = torch.lerp(self.fake, fake_mean.detach().to(self.fake), share)
        self.started = torch.ones_like(self.started)
