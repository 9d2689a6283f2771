"""The tables of a report besides the metrics: settings that differ, how training went, and what it all cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .comparison import flatten, plain
from .report_metrics import protocol_of
from .report_runs import Run, Variant

UNKNOWN = "unknown"
LOWER_IS_BETTER = {"validation/loss": "Validation loss", "quick_fid": "Quick FID", "quick_kid": "Quick KID"}
"""Logged figures of stage two that say how good a model is, and their titles."""


def setting_table(variants: Sequence[Variant], stage: int) -> list[tuple[str, list[str]]]:
    """Return the settings in which the variants' runs of one stage differ."""
    runs = [variant.stage(stage) for variant in variants]
    configs = [{} if run is None else flatten(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [plain(config[name]) if name in config else "-" for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def progress_table(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of what training measured of stage-two models, last and best, runs by variant."""
    measured = {key: title for key, title in LOWER_IS_BETTER.items() if any(run.logged(key) for run in runs.values())}
    head = [f"{title}, {which}" for title in measured.values() for which in ("last", "best")]
    rows = []
    for name, run in runs.items():
        row = [name]
        for key in measured:
            points = run.logged(key)
            row += [_at(points[-1]), _at(min(points, key=lambda point: point[1]))] if points else ["-", "-"]
        rows.append([*row, _kept(run), _widths(run)])
    return ["variant", *head, "kept as best", "EMA widths"], rows


def _at(point: tuple[int, float]) -> str:
    return f"{point[1]:.4g} at step {point[0]:,}"


def _kept(run: Run) -> str:
    """Return the step of the model in ``best/`` and the figure that chose it."""
    chosen = [f"{LOWER_IS_BETTER.get(name, name)} {value:.4g}" for name, value in run.best.items() if name != "step"]
    return f"step {run.best.get('step', 0):,}, by {', '.join(chosen)}" if chosen else "-"


def _widths(run: Run) -> str:
    """Return the averages of the weights that the run kept, and the one that was measured."""
    ema = run.config.get("train", {}).get("ema", {})
    kept = ", ".join(f"{width:g}" for width in ema["widths"]) if "widths" in ema else plain(ema or None)
    used = protocol_of(run).get("ema")
    return kept if used is None or isinstance(used, Mapping) else f"{kept}; measured: {plain(used)}"


COST_HEAD = (
    "variant", "stage", "parameters", "FLOPs per image", "per sample", "steps", "images", "training", "speed",
    "peak memory", "on",
)  # fmt: skip
COST_NUMBERS = ("steps", "images", "training", "speed", "peak memory")


def cost_rows(variants: Sequence[Variant]) -> list[list[str]]:
    """Return one row per run, of what :data:`COST_HEAD` names."""
    rows, seen = [], set()
    for variant in variants:
        for run in variant.runs:
            if run.path not in seen:
                seen.add(run.path)
                flops = ", ".join(f"{part} {_flops(n)}" for part, n in run.flops.items())
                sample = _sample_cost(variant, run)
                rows.append([variant.name, f"{run.stage}", _parameters(run), flops or UNKNOWN, sample, *_training(run)])
    return rows


def sampling_flops(variant: Variant) -> int | None:
    """Return the operations of one sample: every evaluation of the denoiser, and the decoder.

    None where they are not known: nothing was measured, there is no autoencoder, or another network guides.
    """
    first, second = variant.first, variant.second
    protocol = protocol_of(second)
    calls = protocol.get("evaluations")
    if first is None or second is None or not calls or protocol.get("guide_sha256"):
        return None
    denoise, decode = second.flops.get("denoise"), first.flops.get("decode")
    return None if denoise is None or decode is None else calls * denoise + decode


def _sample_cost(variant: Variant, run: Run) -> str:
    if run.stage == 1:
        return "-"
    protocol = protocol_of(run)
    if not (calls := protocol.get("evaluations")):
        return "not measured"
    parts = [f"{calls} evaluations ({protocol.get('sampler')}, {protocol.get('steps')} steps{_guidance(protocol)})"]
    if (total := sampling_flops(variant)) is not None:
        parts.append(f"{_flops(total)} with the decoder")
    return ": ".join(parts)


def _guidance(protocol: Mapping[str, Any]) -> str:
    weight = protocol.get("guidance", 1)
    if weight == 1:
        return ""
    interval = protocol.get("guidance_interval")
    within = f" for noise levels {plain(interval)}" if interval else ""
    return f", guidance {weight:g}{within}{' by another run' if protocol.get('guide_sha256') else ''}"


def _parameters(run: Run) -> str:
    return ", ".join(f"{part} {short_count(n)}" for part, n in run.parameters.items() if part != "total") or UNKNOWN


def _training(run: Run) -> list[str]:
    last = run.curves[-1] if run.curves else {}
    seconds, images = last.get("seconds"), last.get("images")
    memory = run.status.get("peak_memory_bytes")
    hardware = run.environment.get("hardware", {})
    return [
        f"{last.get('step', 0):,}",
        f"{images:,}" if images else UNKNOWN,
        f"{duration(seconds)} ({seconds:,.0f} s)" if seconds else UNKNOWN,
        f"{images / seconds:,.0f} / s" if seconds and images else UNKNOWN,
        f"{memory / 2**20:,.0f} MiB" if memory else UNKNOWN,
        ", ".join(hardware.get("gpus") or [f"CPU, {hardware.get('threads', '?')} thread(s)"]),
    ]


def short_count(number: float) -> str:
    """Return ``12.34 M``, or a small number whole."""
    return f"{number / 1e6:.2f} M" if number >= 10_000 else f"{number:,.0f}"


def _flops(number: int) -> str:
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1e6:.2f} MFLOP"


def duration(seconds: float) -> str:
    """Return ``1 h 02 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def command_of(run: Run) -> str | None:
    """Return the command line that the run recorded, as it would be typed; None where it recorded none."""
    recorded = run.environment.get("command_line")
    if not recorded:
        return None
    program = "python cli.py" if Path(recorded[0]).name == "cli.py" else Path(recorded[0]).name
    return f"{program} {shlex.join(recorded[1:])}"


def versions(variants: Sequence[Variant]) -> str:
    """Return the software of the runs; several where they differ."""
    found = dict.fromkeys(
        ", ".join(
            [f"{name} {version}" for name, version in run.environment.get("versions", {}).items() if version]
            + ([f"commit {run.environment['git_commit']}"] if run.environment.get("git_commit") else [])
        )
        for variant in variants
        for run in variant.runs
    )
    return "; ".join(text for text in found if text)
