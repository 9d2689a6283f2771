"""What a CONFIG of ``study`` holds: the recipes of both stages, what is varied, how it is measured, what would count.

The rule by which a claim is called supported or refuted stands here too, so that it is written down before any cell is
trained; see ``docs/study.md``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..common.config import Config, Seeds
from ..common.lpips_metric import LpipsNet
from ..stage2_diffusion.samplers import SAMPLERS
from ..stage2_diffusion.sampling import Grid
from .diffusion_config import DiffusionRunConfig
from .health_sections import SECTIONS
from .run_config import AutoencoderRunConfig

Changes = dict[str, Any]
"""Keys of ``autoencoder`` and ``diffusion``, nested or dotted: ``autoencoder.model.channels: 16``."""


def _as_text(name: object) -> object:
    """Return a name that YAML took for a number as text: ``channels: {4: ..., 16: ...}``."""
    if name is None or isinstance(name, bool):
        raise ValueError("YAML reads names such as on, off, yes, no and null as other things than text: quote it")
    return str(name) if isinstance(name, int | float) else name


Name = Annotated[str, BeforeValidator(_as_text)]
"""Of a factor, a level, a variant or a claim."""
Levels = dict[Name, Name]
"""A level by factor; a factor that is not named is at its first level."""


class StudyDataConfig(Config):
    """The images. Both may be left to the command line."""

    train: str | None = None
    """What is trained on, as ``--data``; all of it is the reference of the samples' FID and KID."""
    validation: str | None = None
    """What is reconstructed and diagnosed, as ``--eval-data``; None is ``train``, and the report says so."""
    size: int | None = Field(None, ge=8)
    """What both are brought to first; None takes them as they are."""


class OneAtATimeConfig(Config):
    """The first level of every factor, and every other level of one factor alone."""

    kind: Literal["one_at_a_time"] = "one_at_a_time"


class FactorialConfig(Config):
    """Every combination of levels."""

    kind: Literal["factorial"] = "factorial"
    exclude: tuple[Levels, ...] = ()
    """Combinations to leave out: those that have all of the levels that one of these names."""


class NamedConfig(Config):
    """The variants that are listed."""

    kind: Literal["named"] = "named"
    variants: dict[Name, Levels] = Field(min_length=2)
    """Levels by the variant's name. The first is the reference of the tables; cells are trained in this order."""


DesignConfig = Annotated[OneAtATimeConfig | FactorialConfig | NamedConfig, Field(discriminator="kind")]


class StudyEvaluationConfig(Config):
    """How every cell is measured; in float32, whatever the training's precision."""

    num_samples: int = Field(2000, ge=2)
    """Images that each cell generates, from noise that depends on its seed and not on its variant."""
    sampler: str = "dpmpp_2m"
    steps: int = Field(20, ge=1)
    grid: Grid = "karras"
    pass_rows: int = Field(16, ge=1)
    """Images per pass of the networks in sampling; more are faster on a GPU. It decides the last bits of an image."""
    num_reconstructions: int | None = Field(None, ge=2)
    """Images of ``data.validation`` that each autoencoder reconstructs; None is all of them."""
    lpips_net: LpipsNet = "alex"
    health: tuple[str, ...] = tuple(SECTIONS)
    """Sections of the latent health report that are computed of every autoencoder, by default all; none: no report."""
    health_images: int = Field(512, ge=2)
    """Images that they look at, where there are as many."""

    @field_validator("sampler")
    @classmethod
    def _a_sampler(cls, name: str) -> str:
        return _one_of(name, SAMPLERS, "no sampler")

    @field_validator("health")
    @classmethod
    def _sections(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_one_of(name, SECTIONS, "no section of the latent health report") for name in names)


def _one_of(name: str, known: Iterable[str], complaint: str) -> str:
    """Return ``name``, or raise ``ValueError`` with the nearest that is known, or all."""
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid: {', '.join(known)}"
        raise ValueError(f"{complaint} {name!r}; {hint}")
    return name


Metric = Literal["kid_mean", "fid", "precision", "recall", "rfid", "psnr", "ssim", "lpips"]


class ComparisonConfig(Config):
    """One comparison of two levels of a factor, and which outcome a claim expects of it."""

    factor: Name
    level: Name
    """The level that the claim is about."""
    against: Name
    """The level that it is compared with."""
    at: Levels = Field(default_factory=dict)
    """Levels of other factors at which alone the two are compared; the others may be at any, equal on both sides."""
    against_at: Levels = Field(default_factory=dict)
    """Levels that the side of ``against`` has instead, where a claim is about more than one factor at once."""
    metric: Metric = "kid_mean"
    expect: Literal["better", "worse", "no_worse"] = "better"
    """``better`` or ``worse``, of which the metric knows the direction; or ``no_worse`` by more than ``margin``."""
    margin: float = Field(0.0, ge=0)
    """Of ``no_worse``, as a share of the metric (0.05: five percent); of PSNR, SSIM, precision and recall in their own
    unit."""

    @model_validator(mode="after")
    def _margin_where_it_counts(self) -> ComparisonConfig:
        if (self.expect == "no_worse") != (self.margin > 0):
            raise ValueError("margin belongs to expect: no_worse, which needs one above 0")
        if self.level == self.against:
            raise ValueError(f"level and against are both {self.level!r}")
        if self.factor in {**self.at, **self.against_at}:
            raise ValueError(f"{self.factor!r} is compared, so it cannot be held in at or against_at")
        if alone := self.against_at.keys() - self.at.keys():
            raise ValueError(f"against_at holds {', '.join(sorted(alone))}, of which at does not say the other side")
        return self


class ClaimConfig(Config):
    """A statement and the comparisons that decide it: all must come out as expected; one the other way refutes it."""

    statement: str = Field(min_length=1)
    comparisons: tuple[ComparisonConfig, ...] = Field(min_length=1)


class RuleConfig(Config):
    """When a claim is supported or refuted. Fixed before the run: it is part of what the results record."""

    level: float = Field(0.05, gt=0, lt=0.5)
    """Probability, over all claims together, of calling one supported or refuted where there is no effect at all; with
    ``pooled``, where variants also scatter alike."""
    spread: Literal["pooled", "paired"] = "pooled"
    """Where the error of an effect comes from: the residuals of all cells about variant plus seed, which assumes one
    variance for all variants; or the effect's own differences by seed alone, which assumes nothing and needs many."""


class StudyConfig(Config):
    """Variants times seeds through both stages under one protocol, and the claims that they are to decide."""

    title: str = Field(min_length=1)
    question: str = ""
    """What the study answers, in a sentence or two."""
    data: StudyDataConfig = StudyDataConfig()
    autoencoder: AutoencoderRunConfig = AutoencoderRunConfig()
    """The recipe of stage one that all variants share; usually ``{base: PRESET, ...}``."""
    diffusion: DiffusionRunConfig = DiffusionRunConfig()
    """The recipe of stage two."""
    flips: bool = True
    """Cache the latents of the mirror images too, and draw either in stage two."""
    factors: dict[Name, Annotated[dict[Name, Changes], Field(min_length=1)]] = Field(min_length=1)
    """What is varied: by factor, by level, what the level changes of the recipes. The first level is the base."""
    design: DesignConfig = OneAtATimeConfig()
    seeds: Seeds = (0, 1, 2)
    """Each decides initial weights, order of images, flips and noise of both stages, and the noise of the samples."""
    evaluation: StudyEvaluationConfig = StudyEvaluationConfig()
    claims: dict[Name, ClaimConfig] = Field(default_factory=dict)
    rule: RuleConfig = RuleConfig()

    @field_validator("factors")
    @classmethod
    def _both_stages_and_nothing_else(cls, factors: dict[str, dict[str, Changes]]) -> dict[str, dict[str, Changes]]:
        for factor, level, changes in ((f, name, c) for f, levels in factors.items() for name, c in levels.items()):
            for key in changes:
                stage, _, rest = key.partition(".")
                if stage not in {"autoencoder", "diffusion"}:
                    raise ValueError(f"{factor}.{level} changes {key!r}: keys begin with autoencoder. or diffusion.")
                if rest == "seed" or (not rest and isinstance(changes[key], dict) and "seed" in changes[key]):
                    raise ValueError(f"{factor}.{level} changes the seed, which is what seeds are for")
        return factors

    @model_validator(mode="after")
    def _factors_vary(self) -> StudyConfig:
        for factor, levels in self.factors.items():
            if len(levels) < 2:  # such as an override of a mistyped one makes
                near = difflib.get_close_matches(factor, [other for other in self.factors if other != factor], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ": give it another, or leave it out"
                raise ValueError(f"factors.{factor} has one level, which varies nothing{hint}")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> StudyConfig:
        for where, levels in self._named():
            for factor, level in levels.items():
                _one_of(factor, self.factors, f"{where}: no factor")
                _one_of(level, self.factors[factor], f"{where}: {factor} has no level")
        return self

    def _named(self) -> Iterator[tuple[str, Levels]]:
        """Yield every levels by factor that design and claims name, and the key that names them."""
        for name, levels in getattr(self.design, "variants", {}).items():
            yield f"design.variants.{name}", levels
        for number, levels in enumerate(getattr(self.design, "exclude", ())):
            yield f"design.exclude.{number}", levels
        for name, claim in self.claims.items():
            for number, comparison in enumerate(claim.comparisons):
                where = f"claims.{name}.comparisons.{number}"
                yield where, {comparison.factor: comparison.level}
                yield where, {comparison.factor: comparison.against}
                yield f"{where}.at", comparison.at
                yield f"{where}.against_at", comparison.against_at
