"""``diagnose``: the latent health report, on whether what an autoencoder makes of images is fit for diffusion.

An autoencoder encodes a sample of the data once; the sections (:mod:`.health_sections`) measure the latents and the
autoencoder, each with a verdict and the threshold that decided it. The result is a JSON file and a page.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..common.errors import UsageError, WavelatentError
from ..common.files import write_atomically
from ..common.images import ImageData, iterate_batches, open_data
from ..common.inception import FEATURES_NAME, InceptionFeatures
from ..common.latents import Posterior
from ..common.lpips_metric import LpipsNet, PerceptualDistance
from ..common.metric_weights import MissingWeightsError
from ..common.randomness import generator
from ..common.reference_features import choose_images
from ..common.runtime import MixedPrecision, autocast, check_precision, environment, resolve_device
from ..stage1_autoencoder.autoencoder import Autoencoder
from ..stage1_autoencoder.bottlenecks import BoundedConfig
from ..stage1_autoencoder.health import Figure, LatentData, Section, Verdict
from ..stage1_autoencoder.health_autoencoder import AUTOENCODER_SECTIONS
from ..stage1_autoencoder.health_measures import usable
from .diagnose_page import health_page
from .health_sections import SECTIONS, Given, choose_sections
from .loading import load_autoencoder

RECORD, PAGE = "health.json", "health.html"
FORMAT = 1
"""Of the JSON; rises when a reader of it would have to change."""
LPIPS_NET: LpipsNet = "alex"
"""The usual one in tables, and a twentieth of the cost of the other."""
NUM_IMAGES = 2000
"""Images that are looked at, where there are as many."""
NO_WEIGHTS = "its weights are not on this machine: run `wavelatent doctor --fetch`"
"""What the report says; where they were looked for, which is this machine's business, goes to the terminal."""
FAILURES = (WavelatentError, ArithmeticError, RuntimeError, ValueError)
"""What an odd autoencoder, a missing file or a full memory raise: a section that meets one is not computed.

Anything else is a mistake of ours and ends the command.
"""


@dataclass(frozen=True)
class Health:
    """What the sections found.

    Attributes:
        sections: those that were computed, in the order of the report.
        not_computed: of the others, and of figures that want a network that is not here, by name, why.
        skipped: those that nobody asked for.
        seconds: that each of ``sections`` took.
    """

    sections: list[Section] = field(default_factory=list)
    not_computed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def verdicts(self, level: str | None = None) -> list[tuple[str, Verdict]]:
        """Return ``(section, verdict)`` of one level, or of all, in the order of the report."""
        found = [(section.name, verdict) for section in self.sections for verdict in section.verdicts]
        return [(name, verdict) for name, verdict in found if level in (None, verdict.level)]

    def counts(self) -> dict[str, int]:
        """Return how many verdicts there are of each level, and how many sections were not computed."""
        levels = {level: len(self.verdicts(level)) for level in ("fault", "note", "ok")}
        return {**levels, "not_computed": len(self.not_computed)}


def diagnose(
    ae: str,
    data: str,
    out: Path,
    *,
    num_images: int | None = None,
    size: int | None = None,
    max_bad_fraction: float = 0.01,
    batch_size: int = 32,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    mixed_precision: MixedPrecision = "no",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``out/health.json`` and ``out/health.html`` about ``ae`` on ``data``; return what the JSON holds.

    A report that is there and complete, of the same autoencoder, data, sections and protocol, is left as it is. A
    section that cannot be computed stands under ``not_computed`` with the reason, one that was not wanted under
    ``skipped``.

    Args:
        ae: autoencoder, as on the command line.
        data: data set, as on the command line.
        out: folder of the report.
        num_images: how many images, the first of the order that ``evaluate`` draws from ``seed`` too; None is 2,000,
            or what there is.
        size: side of the images in pixels; None is the data's own.
        max_bad_fraction: how many unreadable or too small files of ``data`` may be skipped.
        batch_size: images per pass of the autoencoder.
        skip: sections to leave out.
        only: sections to compute, and no others.
        seed: draws the images, and from their posteriors; what the sections draw besides is the same for every seed.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        mixed_precision: of the encoder that makes the latents.
        overwrite: compute it all again.

    Raises:
        UsageError: an unknown section, the size of the images does not suit the autoencoder, or there are fewer images
            than asked for.
        WavelatentError: fewer than two images have finite latents, so that there is nothing to measure.
    """
    begin = time.monotonic()
    wanted = choose_sections(skip=skip, only=only)
    place = resolve_device(device)
    check_precision(place, mixed_precision)
    images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
    autoencoder = load_autoencoder(ae).to(place)
    _check_divides(images.size, autoencoder)
    indices = choose_images(len(images), min(NUM_IMAGES, len(images)) if num_images is None else num_images, seed)
    missing: dict[str, str] = {}
    lpips, extractor = _networks(place, wanted, missing)
    protocol = {
        "autoencoder": {"path": ae, "fingerprint": autoencoder.fingerprint(), "mixed_precision": mixed_precision},
        "data": {"spec": images.spec, "fingerprint": images.fingerprint(), "transform": dict(images.transform)},
        "num_images": len(indices),
        "size": images.size,
        "seed": seed,
        "sections": wanted,
        "lpips": {"net": LPIPS_NET, "weights_sha256": lpips.weights_sha256 if lpips else None},
        "features": {"net": FEATURES_NAME, "weights_sha256": extractor.weights_sha256 if extractor else None},
        "library versions": environment()["versions"],
    }
    if not overwrite and (done := _finished(out, protocol)):
        return done
    gathered = gather(autoencoder, images, indices, batch_size=batch_size, seed=seed, mixed_precision=mixed_precision)
    usable(gathered)  # raises where there is nothing to measure: better than a page without a section
    health = examine(Given(autoencoder, gathered, batch_size, lpips, extractor), wanted)
    health.not_computed.update(missing)
    record = _record(health, protocol, seconds=round(time.monotonic() - begin, 3))
    page = health_page(health, record)  # before the record is written, which says that all is there
    write_atomically(out / PAGE, page)
    write_atomically(out / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return {**record, "page": str(out / PAGE), "already_finished": False}


@torch.no_grad()
def gather(
    autoencoder: nn.Module,
    images: ImageData,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    seed: int = 0,
    mixed_precision: MixedPrecision = "no",
) -> LatentData:
    """Encode the images at ``indices`` once. The draw from a posterior is a function of the seed and of the image."""
    place = next((parameter.device for parameter in autoencoder.parameters()), torch.device("cpu"))
    pixels, means, stds, draws = [], [], [], []
    with tqdm(total=len(indices), desc="Encode", unit="img", leave=False) as progress:
        for batch in iterate_batches(images, batch_size, indices=indices):
            with autocast(place, mixed_precision):
                encoded = autoencoder.encode(batch.images.to(place))  # type: ignore[operator]
            posterior = Posterior(
                encoded.mean.float().cpu(), None if encoded.std is None else encoded.std.float().cpu()
            )
            pixels.append(batch.images)
            means.append(posterior.mean)
            stds += [] if posterior.std is None else [posterior.std]
            draws.append(posterior.sample([generator("diagnose", seed, index) for index in batch.index.tolist()]))
            progress.update(len(batch.images))
    std = torch.cat(stds) if stds else None
    return LatentData(torch.cat(pixels), torch.cat(means), std, torch.cat(draws), _bound(autoencoder))


def examine(given: Given, sections: Sequence[str]) -> Health:
    """Compute ``sections`` in the order of the report; those that fail are named with the reason."""
    health = Health()
    for name, entry in SECTIONS.items():
        if name not in sections:
            health.skipped.append(name)
            continue
        print(f"{name}{f' ({entry.cost})' if entry.cost else ''}", file=sys.stderr)
        begin = time.monotonic()
        try:
            health.sections.append(entry.compute(given))
        except FAILURES as error:
            health.not_computed[name] = " ".join(str(error).split()) or type(error).__name__
            continue
        health.seconds[name] = round(time.monotonic() - begin, 3)
    return health


def summary_lines(record: Mapping[str, Any]) -> list[str]:
    """Return what to print of a record: a line per verdict that is not ok, faults first, and per gap."""
    verdicts = [(name, verdict) for name, section in record["sections"].items() for verdict in section["verdicts"]]
    lines = [
        f"{level}: {verdict['name']} ({name}): {verdict['text']}"
        for level in ("fault", "note")
        for name, verdict in verdicts
        if verdict["level"] == level
    ]
    lines += [f"not computed: {name}: {why}" for name, why in record["not_computed"].items()]
    counts = record["summary"]
    found = f"faults: {counts['fault']}, notes: {counts['note']}, in order: {counts['ok']}"
    return [*lines, f"{found}; the report is {record['page']}"]


def _check_divides(size: int, autoencoder: Autoencoder) -> None:
    try:
        autoencoder.latent_shape(size)
    except ValueError as error:
        factor = autoencoder.downsampling
        raise UsageError(f"{error}; use --size {max(factor, size // factor * factor)}") from error


def _networks(
    device: torch.device, sections: Sequence[str], missing: dict[str, str]
) -> tuple[PerceptualDistance | None, InceptionFeatures | None]:
    """Return the networks that ``sections`` measure with; what cannot be measured without goes into ``missing``."""
    lpips, extractor = None, None
    try:
        if not AUTOENCODER_SECTIONS.keys().isdisjoint(sections):
            lpips = PerceptualDistance(LPIPS_NET).to(device)
    except MissingWeightsError as error:
        missing["LPIPS"] = NO_WEIGHTS
        print(f"without LPIPS: {error}", file=sys.stderr)
    try:
        if "learnability" in sections:
            extractor = InceptionFeatures(device)
    except MissingWeightsError as error:
        missing["quick FID"] = NO_WEIGHTS
        print(f"without a quick FID: {error}", file=sys.stderr)
    return lpips, extractor


def _bound(autoencoder: nn.Module) -> float | None:
    bottleneck = getattr(getattr(autoencoder, "config", None), "bottleneck", None)
    return bottleneck.bound if isinstance(bottleneck, BoundedConfig) else None


def _finished(out: Path, protocol: dict[str, Any]) -> dict[str, Any] | None:
    """Return the saved record where it is of the same inputs and versions and nothing that was wanted is missing."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        same = record["format"] == FORMAT and record["protocol"] == protocol
        complete = set(record["sections"]) == set(protocol["sections"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (same and complete and (out / PAGE).is_file()):
        return None
    print(f"already diagnosed: {out / PAGE} (--overwrite does it again)", file=sys.stderr)
    return {**record, "page": str(out / PAGE), "already_finished": True}


def _record(health: Health, protocol: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the findings as JSON values; figures that are not finite are null."""
    return {
        "format": FORMAT,
        "summary": health.counts(),
        "sections": {
            section.name: {
                "asks": SECTIONS[section.name].asks,
                "verdicts": [asdict(verdict) for verdict in section.verdicts],
                "figures": {name: _plain(value) for name, value in section.figures.items()},
                "seconds": health.seconds[section.name],
            }
            for section in health.sections
        },
        "not_computed": health.not_computed,
        "skipped": health.skipped,
        "protocol": protocol,
        "seconds": seconds,
    }


def _plain(value: Figure) -> Figure:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [item if item is None or math.isfinite(item) else None for item in value]
    return value
