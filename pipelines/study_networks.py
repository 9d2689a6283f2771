"""What the networks of a variant are and cost, from tensors without data: for the report and the estimate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from ..common.errors import UsageError
from ..stage2_diffusion.networks import build_network
from .costs import count_parameters
from .info import autoencoder_info, denoiser_info
from .study_design import Recipe, Variant


@dataclass(frozen=True)
class Networks:
    """The networks of one variant.

    Attributes:
        latent_shape: ``(C, h, w)``.
        noise_shift: factor on the noise levels of stage two.
        autoencoder_parameters: of encoder, bottleneck and decoder.
        discriminator_parameters: 0 without one.
        denoiser_parameters: of stage two's network.
        denoiser_parameters_inside: the same without its first and last convolution, which alone depend on the number of
            latent channels; equal for all variants that share one network.
        encode_flops: floating-point operations per image, a multiply-add counted as 2.
        decode_flops: likewise.
        denoise_flops: likewise, of one call.
    """

    latent_shape: tuple[int, int, int]
    noise_shift: float
    autoencoder_parameters: int
    discriminator_parameters: int
    denoiser_parameters: int
    denoiser_parameters_inside: int
    encode_flops: int
    decode_flops: int
    denoise_flops: int

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "latent_shape": list(self.latent_shape)}


def networks_of(variant: Variant, size: int, num_classes: int) -> Networks:
    """Return the networks of ``variant`` for images of ``size`` pixels in ``num_classes`` classes (0: none).

    Raises :class:`UsageError` naming the variant where a size does not suit its networks.
    """
    recipe = variant.recipe
    try:
        first = autoencoder_info(recipe.autoencoder, size)
        channels, height, width = first["latent_shape"]
        second = denoiser_info(recipe.diffusion, first["latent_shape"], num_classes)
    except UsageError as error:
        raise UsageError(f"variants.{variant.name}: {error}") from error
    total = second["parameters"]["denoiser"]
    return Networks(
        latent_shape=(channels, height, width),
        noise_shift=recipe.diffusion.objective.shift_for(math.prod(first["latent_shape"])),
        autoencoder_parameters=first["parameters"]["total"],
        discriminator_parameters=first["parameters"].get("discriminator", 0),
        denoiser_parameters=total,
        denoiser_parameters_inside=total - _ends(recipe, channels, num_classes),
        encode_flops=first["flops"]["encode"],
        decode_flops=first["flops"]["decode"],
        denoise_flops=second["flops"]["denoise"],
    )


def _ends(recipe: Recipe, channels: int, num_classes: int) -> int:
    """Return the parameters of the first and the last convolution of stage two's network."""
    with FakeTensorMode():
        network = build_network(
            recipe.diffusion.model, channels, num_classes if recipe.diffusion.class_conditional else 0
        )
    return count_parameters(network.stem) + count_parameters(network.out)
