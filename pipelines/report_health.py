"""The latent health of a report: the verdicts of ``diagnose`` side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..common.checkpoints import read_json
from .comparison import NOT_COMPARABLE, flatten, protocol_differences
from .report_runs import Variant

RECORD, PAGE = "health.json", "health.html"
FOLDERS = ("latent-health", "health", ".")
"""Where in a run folder ``diagnose --out`` is looked for; ``study`` writes ``health``."""
LEVELS = {"fault": "fault", "note": "note", "ok": "in order"}
"""Levels, the worst first, and what the page calls them."""
MISSING = "not computed"
_DECIDES_NOTHING = ("data.spec", "sections", "lpips", "features")
"""Fields of the protocol that no verdict depends on: what data is called, and what was measured besides."""


@dataclass(frozen=True)
class Finding:
    """What one section said about one variant."""

    level: str
    text: str
    threshold: str = ""
    source: str = ""


@dataclass(frozen=True)
class Health:
    """What ``diagnose`` found in an autoencoder.

    Attributes:
        findings: by ``section: name``.
        not_computed: by section, why.
        page: ``diagnose``'s own page, where it is there.
        doubt: why the findings may not be of the autoencoder that is shown, else None.
        protocol: how they were measured.
        not_comparable: with which variant's findings, and in which fields the protocols differ, else None.
    """

    findings: Mapping[str, Finding]
    not_computed: Mapping[str, str] = field(default_factory=dict)
    page: Path | None = None
    doubt: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    not_comparable: str | None = None

    def count(self, level: str) -> int:
        """Return the number of findings of a level."""
        return sum(finding.level == level for finding in self.findings.values())


@dataclass(frozen=True)
class HealthRow:
    """One finding, of every variant; None where it was not looked for."""

    name: str
    cells: list[Finding | None]

    @property
    def worst(self) -> str:
        """The worst level in the row."""
        levels = {cell.level for cell in self.cells if cell}
        return next((level for level in LEVELS if level in levels), MISSING)


def health_of(variant: Variant) -> Health | None:
    """Read what ``diagnose`` wrote into the variant's run folders, stage 1 first; None where there is nothing."""
    for run in variant.runs:
        for folder in (run.path / name for name in FOLDERS):
            if (record := read_json(folder / RECORD)).get("sections"):
                page = folder / PAGE
                return Health(
                    _findings(record), record.get("not_computed", {}), page if page.is_file() else None,
                    _doubt(variant, record), record.get("protocol", {}),
                )  # fmt: skip
    return None


def side_by_side(found: Mapping[str, Health | None]) -> dict[str, Health | None]:
    """Return the same, with ``not_comparable`` where a protocol differs from that of the first variant that has one."""
    first = next(((name, health.protocol) for name, health in found.items() if health), None)
    if first is None:
        return dict(found)
    base, protocol = first

    def compared(health: Health) -> Health:
        differing = protocol_differences(_deciding(protocol), _deciding(health.protocol), "health")
        words = f"{NOT_COMPARABLE} with {base}: {', '.join(differing)}" if differing else None
        return replace(health, not_comparable=words)

    return {name: health and compared(health) for name, health in found.items()}


def _deciding(protocol: Mapping[str, Any]) -> dict[str, Any]:
    fields = flatten(protocol)
    return {name: value for name, value in fields.items() if not name.startswith(_DECIDES_NOTHING)}


def health_rows(found: Mapping[str, Health | None]) -> list[HealthRow]:
    """Return a row per finding, those that are a fault for any variant first, in the order of ``diagnose``."""
    shown = [health for health in found.values() if health]
    names = dict.fromkeys(name for health in shown for name in health.findings)
    rows = [
        HealthRow(name, [health.findings.get(name) if health else None for health in found.values()]) for name in names
    ]
    order = [*LEVELS, MISSING]
    return sorted(rows, key=lambda row: order.index(row.worst))


def health_link(health: Health, out: Path) -> str | None:
    """Return the address of ``diagnose``'s page as seen from a page in ``out``: relative, so that both may move."""
    if health.page is None:
        return None
    return quote(Path(os.path.relpath(health.page.resolve(), out.resolve())).as_posix())


def health_record(health: Health | None) -> dict[str, Any] | None:
    """Return the findings as plain JSON values."""
    if health is None:
        return None
    verdicts = {name: {"level": finding.level, "text": finding.text} for name, finding in health.findings.items()}
    return {
        "verdicts": verdicts,
        "not_computed": dict(health.not_computed),
        "doubt": health.doubt,
        "not_comparable": health.not_comparable,
    }


def _findings(record: Mapping[str, Any]) -> dict[str, Finding]:
    """Return the verdicts by ``section: name``; two of one name in a section are joined, the worse level counts."""
    findings: dict[str, Finding] = {}
    for section, content in record["sections"].items():
        for verdict in content.get("verdicts", []):
            name = f"{section}: {verdict['name']}"
            level, text = verdict["level"], verdict["text"]
            if (other := findings.get(name)) is not None:
                level = min(level, other.level, key=list(LEVELS).index)
                text = f"{other.text} {text}"
            findings[name] = Finding(level, text, verdict.get("threshold", ""), verdict.get("source", ""))
    return findings


def _doubt(variant: Variant, record: Mapping[str, Any]) -> str | None:
    measured = record.get("protocol", {}).get("autoencoder", {}).get("fingerprint")
    if measured is None or variant.autoencoder is None or variant.autoencoder.fingerprint() == measured:
        return None
    return f"{variant.name}: the autoencoder has changed since it was diagnosed; run diagnose again"
