"""The numbers of a report: metrics with what they may be compared with, settings that differ, cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report_runs import EVALUATIONS, Run, Variant

SMALL_SAMPLE = 10_000


@dataclass(frozen=True)
class Metric:
    """A column of the metric table. ``own`` are the protocol fields that matter to it and not to every metric."""

    key: str
    title: str
    better: str
    stage: int
    digits: int
    own: tuple[str, ...] = ()


INCEPTION = ("features", "weights_sha256", "resize.features")
METRICS = [
    Metric("psnr", "PSNR (dB)", "higher", 1, 2, ("psnr",)),
    Metric("ssim", "SSIM", "higher", 1, 3, ("ssim",)),
    Metric("lpips", "LPIPS", "lower", 1, 3, ("lpips_net",)),
    Metric("rfid", "rFID", "lower", 1, 2, INCEPTION),
    Metric("fid", "FID", "lower", 2, 2, INCEPTION),
    Metric("kid_mean", "KID", "lower", 2, 4, (*INCEPTION, "kid")),
    Metric("precision", "Precision", "higher", 2, 3, (*INCEPTION, "precision_recall")),
    Metric("recall", "Recall", "higher", 2, 3, (*INCEPTION, "precision_recall")),
]
OWN_FIELDS = {name for metric in METRICS for name in metric.own}
IDENTITY = (
    "autoencoder.path", "autoencoder.fingerprint", "run", "model_sha256", "autoencoder_fingerprint", "samples",
    "reference", "notes", "ema", "library versions",
)  # fmt: skip
"""Protocol fields that say what was measured or with which software, and do not define the figure."""


@dataclass(frozen=True)
class Cell:
    """One figure: its text, and why it is missing or must not be compared."""

    text: str
    value: float | None = None
    not_computed: str | None = None
    not_comparable: str | None = None


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as ``{"a.b": value}``."""
    if not isinstance(content, Mapping) or not content:
        return {prefix[:-1]: content}
    return {key: value for name, inner in content.items() for key, value in flatten(inner, f"{prefix}{name}.").items()}


def metric_rows(variants: Sequence[Variant]) -> list[dict[str, Cell]]:
    """Return one row per variant, metric key to cell; a cell is held against the first variant that has the figure."""
    base: dict[str, tuple[str, dict[str, Any]]] = {}
    rows = []
    for variant in variants:
        row = {}
        for metric in METRICS:
            cell, protocol = _cell(variant, metric)
            if cell.value is not None:
                first_name, first_protocol = base.setdefault(metric.key, (variant.name, protocol))
                if differing := _differing(metric, first_protocol, protocol):
                    reason = f"not comparable with {first_name}: {', '.join(differing)}"
                    cell = Cell(cell.text, cell.value, not_comparable=reason)
            row[metric.key] = cell
        rows.append(row)
    return rows


def _cell(variant: Variant, metric: Metric) -> tuple[Cell, dict[str, Any]]:
    run = variant.first if metric.stage == 1 else variant.second
    if run is None:
        return Cell("not computed", not_computed=f"there is no stage-{metric.stage} run"), {}
    if run.evaluation is None:
        command = "reconstruction --ae" if metric.stage == 1 else "generation --num N --run"
        reason = f"no {EVALUATIONS[run.stage]}/metrics.json; run: wavelatent evaluate {command} {run.path} --data DATA"
        return Cell("not computed", not_computed=reason), {}
    value = run.evaluation.get("metrics", {}).get(metric.key)
    protocol = flatten(_protocol(run))
    if not isinstance(value, int | float):
        reason = run.evaluation.get("not_computed", {}).get(metric.key, "not among the metrics that were saved")
        return Cell("not computed", not_computed=reason), protocol
    text = f"{value:.{metric.digits}f}"
    spread = run.evaluation["metrics"].get("kid_std") if metric.key == "kid_mean" else None
    if isinstance(spread, int | float):
        text += f" ± {spread:.{metric.digits}f}"
    if interval := run.evaluation["metrics"].get(f"{metric.key}_interval"):
        text += f" [{interval[0]:.{metric.digits}f}, {interval[1]:.{metric.digits}f}]"
    return Cell(text, float(value)), protocol


def _is_in(name: str, fields: Sequence[str] | set[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _differing(metric: Metric, first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name the protocol fields that define ``metric`` and differ, with both values."""
    names = [
        name
        for name in dict.fromkeys([*first, *other])
        if not _is_in(name, IDENTITY) and (_is_in(name, metric.own) or not _is_in(name, OWN_FIELDS))
    ]
    return [
        f"{name} ({_plain(other.get(name))} against {_plain(first.get(name))})"
        for name in names
        if first.get(name) != other.get(name)
    ]


def protocol_table(variants: Sequence[Variant], stage: int) -> list[tuple[str, list[str]]]:
    """Return the protocol's fields and every variant's value; one value where all agree."""
    protocols = [
        {} if run is None or run.evaluation is None else flatten(_protocol(run))
        for run in (variant.first if stage == 1 else variant.second for variant in variants)
    ]
    names = dict.fromkeys(name for protocol in protocols for name in protocol)
    rows = []
    for name in names:
        values = [_plain(protocol[name]) if name in protocol else "-" for protocol in protocols]
        rows.append((name, values[:1] if len(set(values)) == 1 else values))
    return rows


def setting_table(variants: Sequence[Variant], stage: int) -> list[tuple[str, list[str]]]:
    """Return the settings in which the variants' runs of one stage differ."""
    runs = [variant.first if stage == 1 else variant.second for variant in variants]
    configs = [{} if run is None else flatten(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [_plain(config[name]) if name in config else "-" for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def cost_rows(variants: Sequence[Variant]) -> list[list[str]]:
    """Return one row per run: variant, stage, parameters, steps, images, time, speed, peak memory, hardware."""
    rows, seen = [], set()
    for variant in variants:
        for run in variant.runs:
            if run.path not in seen:
                seen.add(run.path)
                rows.append([variant.name, f"{run.stage}", *_cost(run)])
    return rows


def _cost(run: Run) -> list[str]:
    last = run.curves[-1] if run.curves else {}
    seconds, images = last.get("seconds"), last.get("images")
    parameters = ", ".join(f"{part} {_count(n)}" for part, n in run.parameters.items() if part != "total")
    memory = run.status.get("peak_memory_bytes")
    hardware = run.environment.get("hardware", {})
    machine = ", ".join(hardware.get("gpus") or [f"CPU, {hardware.get('threads', '?')} thread(s)"])
    return [
        parameters or "unknown",
        f"{last.get('step', 0):,}",
        f"{images:,}" if images else "unknown",
        duration(seconds) if seconds else "unknown",
        f"{images / seconds:,.0f} / s" if seconds and images else "unknown",
        f"{memory / 2**20:,.0f} MiB" if memory else "unknown",
        machine,
    ]


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10_000 else f"{number:,}"


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


def _plain(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def summary(variants: Sequence[Variant], rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Say in plain words what the table shows, and what it does not."""
    names = [variant.name for variant in variants]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    first = f"This page shows {'one variant' if len(names) == 1 else f'{len(names)} variants'}: {listed}."
    lines = [f"{first} {_what_was_trained(variants)}"]
    lines += _sample_sizes(variants)
    if len(variants) > 1:
        lines.append(
            "No variant is claimed to be better than another. Each was trained once, so the table has no error bars, "
            "and the same training with another seed would move every figure by an unknown amount. Showing a "
            "difference takes several seeds per variant."
        )
    if any(cell.not_comparable for row in rows for cell in row.values()):
        lines.append(
            "Figures marked “not comparable” were measured under another protocol than the first in their column: "
            "do not read them side by side."
        )
    missing = dict.fromkeys(METRICS_BY_KEY[key].title for row in rows for key, cell in row.items() if cell.not_computed)
    if missing:
        lines.append(f"Missing for at least one variant: {', '.join(missing)}. The reasons stand below the table.")
    lines += [note[0].upper() + note[1:] + "." for variant in variants for note in variant.notes]
    return lines


METRICS_BY_KEY = {metric.key: metric for metric in METRICS}


def _what_was_trained(variants: Sequence[Variant]) -> str:
    runs = [run for variant in variants for run in variant.runs]
    data = {run.inputs["data"]["fingerprint"]: run.inputs["data"] for run in reversed(runs)}
    names = [f"{d['spec']} at {d['transform'].get('size', '?')} px" for d in reversed(data.values())]
    seeds = dict.fromkeys(str(run.config.get("seed", "?")) for run in runs)
    return f"Trained on {'; '.join(names)}, with seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}."


def _sample_sizes(variants: Sequence[Variant]) -> list[str]:
    """State N, and the bias of the Fréchet distance where it is small."""
    lines = []
    for stage, name, what in ((1, "rFID", "Reconstructions were"), (2, "FID", "Samples were")):
        runs = [run for variant in variants for run in variant.runs if run.stage == stage and run.evaluation]
        sizes = {(p.get("num_samples", 0), p.get("num_reference", 0)) for p in map(_protocol, runs)}
        if not sizes:
            continue
        counts = "; ".join(f"{a:,} against {b:,}" for a, b in sorted(sizes))
        line = f"{what} measured on {counts} reference images."
        computed = any(name.lower() in (run.evaluation or {}).get("metrics", {}) for run in runs)
        if computed and min(min(pair) for pair in sizes) < SMALL_SAMPLE:
            line += (
                f" So few images bias {name} upwards, the more the fewer they are: compare it only inside this page, "
                "never with published figures at 50,000."
            )
        if stage == 1 and any(_is_training_data(run) for run in runs):
            line += " They are training images: nothing here tests unseen ones."
        lines.append(line)
    return lines


def _protocol(run: Run) -> dict[str, Any]:
    return (run.evaluation or {}).get("protocol", {})


def _is_training_data(run: Run) -> bool:
    measured = _protocol(run).get("reference_fingerprint")
    return measured is not None and measured == run.inputs["data"]["fingerprint"]
