"""What a CONFIG of ``ablate`` holds: one recipe of stage one, what is varied in it, and how it is measured."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from ..common.config import Config, Seeds
from ..common.lpips_metric import LpipsNet
from .run_config import AutoencoderRunConfig


class AblationConfig(Config):
    """Variants times seeds of one autoencoder's training."""

    title: str = Field(min_length=1)
    """Of the table; its file is named after it."""
    question: str = ""
    """What the table answers, in a sentence or two that stand above it."""
    autoencoder: AutoencoderRunConfig = AutoencoderRunConfig()
    """The recipe that all variants share; usually ``{base: PRESET}``. Its ``seed`` is replaced by the ``seeds``."""
    variants: dict[str, dict[str, Any]] = Field(min_length=2)
    """What each variant changes of the recipe, by its name; ``{}`` changes nothing. The first is the baseline."""
    seeds: Seeds = (0, 1, 2)
    """Each decides initial weights, order of images, flips and noise."""
    num_images: int | None = Field(1000, ge=2)
    """Images of the evaluation data that are reconstructed; they are rFID's reference too. None is all of them."""
    lpips_net: LpipsNet = "alex"
    """Of the LPIPS that is reported, whatever the one that is trained with."""

    @field_validator("variants")
    @classmethod
    def _seeds_are_not_varied(cls, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, changes in variants.items():
            if "seed" in changes:
                raise ValueError(f"{name} changes the seed, which is what seeds are for")
        return variants

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    @property
    def file_name(self) -> str:
        """The title as the name of a file, without an ending."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "ablation"
