"""The latent health report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..stage1_autoencoder.health import Figure, Section
from .comparison import flatten
from .health_plots import alternative, draw
from .health_sections import SECTIONS
from .pages import render
from .report_paths import shorten
from .report_pictures import data_uri

if TYPE_CHECKING:
    from .diagnose import Health

SHOWN = 16
"""Values of a figure that the page lists; the JSON has them all."""
WORDS = {"fault": "fault", "note": "note", "ok": "in order"}


def health_page(health: Health, record: Mapping[str, Any]) -> str:
    """Return the page about ``health``, whose numbers are ``record``; of paths and digests it shows the ends."""
    protocol = record["protocol"]
    page = render(
        "health.html.j2",
        title=f"Latent health of {protocol['autoencoder']['path']}",
        lead=_lead(record),
        data=protocol["data"]["spec"],
        size=protocol["size"],
        num_images=protocol["num_images"],
        words=WORDS,
        ranked=[(name, verdict) for level in WORDS for name, verdict in health.verdicts(level)],
        not_computed=record["not_computed"],
        skipped=record["skipped"],
        entries=SECTIONS,
        sections=[(section, _plots(section), _figures(section)) for section in health.sections],
        protocol={name: _text(value) for name, value in flatten(protocol).items() if not name.startswith("library")},
        versions=", ".join(f"{name} {version}" for name, version in protocol["library versions"].items() if version),
    )
    return shorten(page, [Path(protocol["autoencoder"]["path"]), Path(protocol["data"]["spec"])])


def _lead(record: Mapping[str, Any]) -> str:
    counts = record["summary"]
    missing = f", and {_count(counts['not_computed'], 'part')} could not be computed" if counts["not_computed"] else ""
    if counts["fault"]:
        return f"{_count(counts['fault'], 'fault')}: expect trouble in stage two{missing}."
    return f"No fault was found{missing}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _plots(section: Section) -> list[tuple[str, str, str]]:
    return [(plot.kind, data_uri(draw(plot)), alternative(plot)) for plot in section.plots]


def _figures(section: Section) -> dict[str, str]:
    return {name: _text(value) for name, value in section.figures.items()}


def _text(value: Figure | Mapping[str, Any]) -> str:
    """Return a figure as a reader wants it: four digits, and of a long list the beginning."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(_text(item) for item in value[:SHOWN])
        return f"{shown}, ... ({len(value)} values)" if len(value) > SHOWN else shown
    return str(value)
