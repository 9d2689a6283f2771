"""The variants of a study: which level of every factor each has, what that makes of the recipes, and the pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..common.config import Config, merge
from ..common.errors import UsageError
from .cells import nested, result_key, variant_configs
from .diffusion_config import DiffusionRunConfig
from .run_config import AutoencoderRunConfig
from .study_config import FactorialConfig, Levels, NamedConfig, StudyConfig


class Recipe(Config):
    """The configurations of both stages of one variant."""

    autoencoder: AutoencoderRunConfig
    diffusion: DiffusionRunConfig


@dataclass(frozen=True)
class Variant:
    """A variant's name, its level of every factor, and what that comes to."""

    name: str
    levels: Levels
    recipe: Recipe


def make_variants(config: StudyConfig) -> list[Variant]:
    """Return the study's variants, the reference of its tables first.

    Raises :class:`UsageError` naming the variant and the key where levels do not go together, where there are fewer
    than two variants, where two come to the same cells, where they do not see the same number of images in each
    stage, or where a claim's comparison has no pair of variants.
    """
    levels = _levels_by_name(config)
    if len(levels) < 2:
        raise UsageError(f"design: a study compares at least two variants, and this one makes {len(levels)}")
    base = Recipe(autoencoder=config.autoencoder, diffusion=config.diffusion)
    changes = {name: _changes(config, chosen) for name, chosen in levels.items()}
    recipes = variant_configs(base, changes)
    variants = [Variant(name, levels[name], recipes[name]) for name in levels]
    _check_different(variants)
    _check_equal_length(variants)
    _check_claims(config, variants)
    return variants


def pairs(
    variants: Sequence[Variant],
    factor: str,
    level: str,
    against: str,
    at: Levels,
    against_at: Levels | None = None,
) -> list[tuple[str, str]]:
    """Return the names of the variants at ``level`` and at ``against`` of ``factor`` that are alike in all else.

    ``at`` holds levels of other factors that both must have, and ``against_at`` those that the second has instead.
    """
    by_levels = {tuple(sorted(variant.levels.items())): variant.name for variant in variants}
    found = []
    for variant in variants:
        if variant.levels[factor] == level and all(variant.levels[f] == held for f, held in at.items()):
            other = tuple(sorted({**variant.levels, **(against_at or {}), factor: against}.items()))
            if other in by_levels:
                found.append((variant.name, by_levels[other]))
    return found


def _levels_by_name(config: StudyConfig) -> dict[str, Levels]:
    base = {factor: next(iter(levels)) for factor, levels in config.factors.items()}
    if isinstance(config.design, NamedConfig):
        return {name: {**base, **levels} for name, levels in config.design.variants.items()}
    if isinstance(config.design, FactorialConfig):
        combinations = [
            dict(zip(config.factors, chosen, strict=True)) for chosen in itertools.product(*config.factors.values())
        ]
        kept = [levels for levels in combinations if not _excluded(levels, config.design.exclude)]
        return {", ".join(levels.values()): levels for levels in kept}
    alone = [
        {**base, factor: level}
        for factor, levels in config.factors.items()
        for level in itertools.islice(levels, 1, None)
    ]
    return {"base": base, **{_only_change(levels, base): levels for levels in alone}}


def _excluded(levels: Levels, exclude: Sequence[Levels]) -> bool:
    return any(all(levels[factor] == level for factor, level in combination.items()) for combination in exclude)


def _only_change(levels: Levels, base: Levels) -> str:
    (factor,) = [factor for factor in levels if levels[factor] != base[factor]]
    return f"{factor}: {levels[factor]}"


def _changes(config: StudyConfig, levels: Levels) -> dict[str, object]:
    """Return what the levels change together; a later factor goes over an earlier one."""
    changes: dict[str, object] = {}
    for factor, level in levels.items():
        changes = merge(changes, nested(config.factors[factor][level]))
    return changes


def _check_different(variants: Sequence[Variant]) -> None:
    keys = [[result_key(stage, {}) for stage in (v.recipe.autoencoder, v.recipe.diffusion)] for v in variants]
    for (first, key), (second, other) in itertools.combinations(zip(variants, keys, strict=True), 2):
        if key == other:
            raise UsageError(f"variants: {first.name!r} and {second.name!r} come to the same configuration")


def _check_equal_length(variants: Sequence[Variant]) -> None:
    for stage in ("autoencoder", "diffusion"):
        seen: Mapping[str, int] = {
            variant.name: train.images_at(train.steps)
            for variant in variants
            for train in [getattr(variant.recipe, stage).train]
        }
        if len(set(seen.values())) > 1:
            listed = ", ".join(f"{name} {count:,}" for name, count in seen.items())
            raise UsageError(f"variants: all must see the same number of images in {stage}.train: {listed}")


def _check_claims(config: StudyConfig, variants: Sequence[Variant]) -> None:
    for name, claim in config.claims.items():
        for c in claim.comparisons:
            if not pairs(variants, c.factor, c.level, c.against, c.at, c.against_at):
                raise UsageError(
                    f"claims.{name}: no two variants differ in nothing but {c.factor} {c.level!r}{_held(c.at)} "
                    f"against {c.against!r}{_held(c.against_at)}"
                )


def _held(levels: Levels) -> str:
    return f" at {', '.join(f'{factor} {level}' for factor, level in levels.items())}" if levels else ""
