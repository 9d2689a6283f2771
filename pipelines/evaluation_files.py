"""What an evaluation leaves on disk: the result, the figures of every image, a picture of the worst."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.adm_npz import is_npz
from ..common.evaluation import Result
from ..common.files import write_atomically
from ..common.images import ImageData, save_grid, to_float
from .comparison import flatten

WORST = 8
"""Images that are listed and shown."""
IMAGE_METRICS = {"psnr": True, "ssim": True, "lpips": False}
"""What is measured image by image, and whether more is better."""
_OF_NETWORKS = ("weights_sha256", "lpips_sha256")
RECONSTRUCTED_PLAINLY = {"autoencoder.mixed_precision": "no", "autoencoder.tile": None, "reference_order_seed": 0}
"""Of a protocol: how ``ablate`` and ``study`` run every autoencoder when they measure it."""


def result_path(out: Path | None, default: Path | None) -> Path | None:
    """Return where the result belongs: ``out`` or ``default`` if they name a ``.json``, else ``metrics.json`` there."""
    place = out or default
    return place if place is None or place.suffix == ".json" else place / "metrics.json"


def beside_samples(samples: Path | None, run: Path | None) -> Path | None:
    """Return where the result of samples, or of a run, belongs by default."""
    if samples is not None:
        return samples.with_suffix(".metrics.json") if is_npz(samples) else samples
    return None if run is None else run / "evaluation-generation"


def beside(path: Path, name: str) -> Path:
    """Return where ``name`` belongs beside the result at ``path``."""
    return path.with_name(name if path.name == "metrics.json" else f"{path.stem}-{name}")


def finished(
    path: Path | None, protocol: Mapping[str, Any], dinov2_sha256: Callable[[], str] | None = None
) -> Result | None:
    """Return the saved result where it is final and of the same inputs, protocol and versions.

    ``dinov2_sha256`` gives the hash of the DINOv2 that was asked for, which is the user's: the same folder may hold
    another one by now. The other networks' weights are always the same.
    """
    done = Result.load(path) if path is not None else None
    if done is None or not done.is_final:
        return None
    if differing := _differing(_known_before(done.protocol), _known_before(protocol)):
        print(f"measuring again, in the place of {path}, which has another {' and '.join(differing)}", file=sys.stderr)
        return None
    if dinov2_sha256 is not None and done.protocol["dinov2"].get("weights_sha256") != dinov2_sha256():
        return None
    print(f"already measured: {path} (--overwrite measures again)", file=sys.stderr)
    return done


def measured_as(folder: Path, wanted: Mapping[str, Any]) -> Result | None:
    """Return the result in ``folder`` where its protocol has all of ``wanted``, a name of which may be ``outer.inner``.

    A comparison looks at each of its cells with this: someone may have measured one in another way since.
    """
    result = Result.load(folder / "metrics.json")
    return None if result is None or _differing(flatten(result.protocol), wanted) else result


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [name for name, value in wanted.items() if found.get(name) != value]


def _known_before(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a protocol is known before any network is loaded."""
    known = {name: value for name, value in protocol.items() if name not in _OF_NETWORKS}
    if "dinov2" in known:
        known["dinov2"] = known["dinov2"]["source"]
    return known


def image_name(data: ImageData, index: int) -> str | None:
    """Return what image ``index`` is called, where the data has names."""
    name = getattr(data, "name", None)
    return str(name(index)) if callable(name) else None


def worst_images(
    data: ImageData, indices: Sequence[int], values: Mapping[str, Tensor]
) -> dict[str, list[dict[str, Any]]]:
    """List, for each figure, the :data:`WORST` images, the worst first; ``values`` ``[N]`` are of the ``indices``."""

    def listed(name: str, each: Tensor) -> list[dict[str, Any]]:
        order = each.argsort(descending=not IMAGE_METRICS[name], stable=True)[:WORST].tolist()
        return [{"index": indices[at], "name": image_name(data, indices[at]), "value": float(each[at])} for at in order]

    return {name: listed(name, each) for name, each in values.items()}


def write_per_image(path: Path, data: ImageData, indices: Sequence[int], values: Mapping[str, Tensor]) -> None:
    """Write ``index, name`` and the figures of every image as CSV, by index."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["index", "name", *values])
    columns = {name: each.tolist() for name, each in values.items()}
    for at in sorted(range(len(indices)), key=indices.__getitem__):
        figures = ["" if math.isnan(column[at]) else f"{column[at]:.8g}" for column in columns.values()]
        table.writerow([indices[at], image_name(data, indices[at]) or "", *figures])
    write_atomically(path, text.getvalue())


def save_worst(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Write images uint8 ``[K,3,H,W]`` as one PNG: the originals, and below each its reconstruction."""
    pairs = torch.cat([originals, reconstructions]).cpu()
    save_grid(path, to_float(pairs), columns=len(originals))
