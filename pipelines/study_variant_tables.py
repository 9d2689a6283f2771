"""What the variants of a study are, as text: their levels, their settings and their networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .comparison import flatten, plain
from .report_tables import short_count
from .study_config import StudyConfig
from .study_design import Variant
from .study_tables import NONE, Table


def level_table(config: StudyConfig, variants: Sequence[Variant]) -> Table:
    """Return what each variant changes: its levels, a dot where a factor is at its base level, which the head names.

    Factors that are at it in all variants are left out.
    """
    base = {factor: next(iter(levels)) for factor, levels in config.factors.items()}
    varied = [factor for factor in base if any(variant.levels[factor] != base[factor] for variant in variants)]

    def told(variant: Variant, factor: str) -> str:
        level = variant.levels[factor]
        return "·" if level == base[factor] else level

    rows = [[variant.name, *(told(variant, factor) for factor in varied)] for variant in variants]
    return Table(("variant", *(f"{factor} (base: {base[factor]})" for factor in varied)), rows, 1 + len(varied))


def recipe_tables(variants: Sequence[Variant]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """Return the settings of both stages: those in which variants differ, a value of each; and the others."""
    recipes = [flatten(variant.recipe.model_dump(mode="json")) for variant in variants]
    names = [name for name in dict.fromkeys(name for recipe in recipes for name in recipe) if not _is_seed(name)]
    rows = [(name, [plain(recipe[name]) if name in recipe else NONE for recipe in recipes]) for name in names]
    return (
        [(name, values) for name, values in rows if len(set(values)) > 1],
        [(name, values[:1]) for name, values in rows if len(set(values)) == 1],
    )


def _is_seed(name: str) -> bool:
    return name.rpartition(".")[2] == "seed"


def network_table(variants: Sequence[Variant], networks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return what the runner recorded of every variant's networks: the capacities that a comparison rests on."""
    columns = {
        "latent_shape": "latents",
        "noise_shift": "noise shift",
        "autoencoder_parameters": "autoencoder",
        "denoiser_parameters": "denoiser",
        "denoiser_parameters_inside": "denoiser without its ends",
        "encode_flops": "encode, GFLOP",
        "decode_flops": "decode, GFLOP",
        "denoise_flops": "denoise, GFLOP",
    }
    shown = [key for key in columns if any(key in networks.get(variant.name, {}) for variant in variants)]
    rows = [[v.name, *(_of_network(key, networks.get(v.name, {}).get(key)) for key in shown)] for v in variants]
    return Table(("variant", *(columns[key] for key in shown)), rows if shown else [])


def _of_network(key: str, value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, Sequence):
        return " × ".join(map(str, value))
    if key.endswith("_parameters") or key == "denoiser_parameters_inside":
        return short_count(value)
    return f"{value / 1e9:.2f}" if key.endswith("_flops") else f"{value:.3g}"
