"""The metrics of a report: figures with their intervals, and what each may be compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.evaluation import SMALL_SAMPLE
from .comparison import NOT_COMPARABLE, flatten, plain, protocol_differences
from .metric_columns import METRICS as METRIC_COLUMNS
from .metric_columns import ON_REQUEST, Column
from .report_runs import EVALUATIONS, Run, Variant

_ELSEWHERE = re.compile(r"notes$|\w+_extrapolated\.")
"""Fields of a protocol that say something about one figure, not how it was defined."""


@dataclass(frozen=True)
class Metric:
    """A column of a metric table; an ``optional`` one is left out where no variant has it."""

    key: str
    column: Column
    stage: int
    optional: bool = False
    saved_as: str = ""
    """Its name in ``metrics.json``, where that is not its key here."""

    @property
    def name(self) -> str:
        """Its name in ``metrics.json``."""
        return self.saved_as or self.key

    @property
    def title(self) -> str:
        """What a paper calls it."""
        return self.column.label

    @property
    def better(self) -> str:
        """Which values are the better ones."""
        return "higher" if self.column.higher_is_better else "lower"


def _metrics() -> list[Metric]:
    found = [Metric(key, METRIC_COLUMNS[key], 1) for key in ("psnr", "ssim", "lpips", "rfid")]
    # The one figure that both stages have under one name.
    found.append(Metric("rfd_dinov2", ON_REQUEST["fd_dinov2"], 1, optional=True, saved_as="fd_dinov2"))
    found += [Metric(key, METRIC_COLUMNS[key], 2) for key in ("fid", "kid_mean", "precision", "recall")]
    return found + [Metric(key, column, 2, optional=True) for key, column in ON_REQUEST.items()]


METRICS = _metrics()
METRICS_BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Cell:
    """One figure: its text, how sure it is, and why it is missing or must not be compared.

    Attributes:
        text: the figure as the table shows it.
        value: the figure.
        interval: its lower and upper bound, where they were computed.
        extrapolated: the figure expected of infinitely many images, where it was estimated.
        not_computed: why there is none.
        differing: fields of the protocol that keep it from being compared with ``base``, each with both values.
        base: the variant that it is held against.
    """

    text: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    extrapolated: float | None = None
    not_computed: str | None = None
    differing: tuple[str, ...] = ()
    base: str = ""

    @property
    def not_comparable(self) -> str | None:
        """Why it must not be compared, with the values that differ; None where it may be."""
        return f"{NOT_COMPARABLE} with {self.base}: {', '.join(self.differing)}" if self.differing else None

    @property
    def mark(self) -> str | None:
        """The same in a few words, for a table: the names of the fields alone."""
        fields = [line.partition(" (")[0] for line in self.differing]
        more = f" and {len(fields) - 2} more" if len(fields) > 2 else ""
        return f"{NOT_COMPARABLE}: {', '.join(fields[:2])}{more}" if fields else None


def metric_rows(variants: Sequence[Variant]) -> list[dict[str, Cell]]:
    """Return one row per variant, metric key to cell; a cell is held against the first variant that has the figure."""
    base: dict[str, tuple[str, dict[str, Any]]] = {}
    rows: list[dict[str, Cell]] = []
    for variant in variants:
        row = {}
        for metric in METRICS:
            cell = row[metric.key] = _cell(variant, metric)
            if cell.value is None:
                continue
            protocol = protocol_of(variant.stage(metric.stage))
            name, first = base.setdefault(metric.key, (variant.name, protocol))
            differing = protocol_differences(first, protocol, metric.name)
            row[metric.key] = Cell(
                cell.text, cell.value, cell.interval, cell.extrapolated, differing=tuple(differing), base=name
            )
        rows.append(row)
    for metric in METRICS:
        if metric.optional and all(row[metric.key].value is None for row in rows):
            for row in rows:
                del row[metric.key]
    return rows


def metric_tables(rows: Sequence[Mapping[str, Cell]]) -> list[tuple[str, list[Metric]]]:
    """Return the tables that ``rows`` are shown in: heading and columns, one per stage."""
    headings = {1: "Reconstructions", 2: "Samples"}
    shown = rows[0] if rows else {}
    return [(headings[stage], [m for m in METRICS if m.stage == stage and m.key in shown]) for stage in headings]


def _cell(variant: Variant, metric: Metric) -> Cell:
    run = variant.stage(metric.stage)
    if run is None:
        return Cell("not computed", not_computed=f"there is no stage-{metric.stage} run")
    if run.evaluation is None:
        command = "reconstruction --ae" if metric.stage == 1 else "generation --num N --run"
        reason = f"no {EVALUATIONS[run.stage]}/metrics.json; run: wavelatent evaluate {command} {run.path} --data DATA"
        return Cell("not computed", not_computed=reason)
    metrics = run.evaluation.get("metrics", {})
    value = metrics.get(metric.name)
    if not isinstance(value, int | float):
        reason = run.evaluation.get("not_computed", {}).get(metric.name, "not among the metrics that were saved")
        return Cell("not computed", not_computed=reason)
    text = f"{value:.{metric.column.digits}f}"
    spread = metrics.get("kid_std") if metric.key == "kid_mean" else None
    if isinstance(spread, int | float):
        text += f" ± {spread:.{metric.column.digits}f}"
    return Cell(text, float(value), _interval(metrics, metric.name), _extrapolated(metrics, metric.name))


def _interval(metrics: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    match metrics.get(f"{key}_interval"):
        case [int() | float() as low, int() | float() as high]:
            return float(low), float(high)
    return None


def _extrapolated(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(f"{key}_extrapolated")
    return float(value) if isinstance(value, int | float) else None


def protocol_of(run: Run | None) -> dict[str, Any]:
    """Return the protocol of the run's evaluation; empty where it has none."""
    return {} if run is None else (run.evaluation or {}).get("protocol", {})


def footnotes(variants: Sequence[Variant], rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Return why figures are missing or must not be compared; what shares a reason shares a line."""
    reasons: dict[str, dict[str, list[str]]] = {}  # reason -> metric -> variants
    for variant, row in zip(variants, rows, strict=True):
        for key, cell in row.items():
            for text in (cell.not_computed and f"not computed: {cell.not_computed}", cell.not_comparable):
                if text:
                    reasons.setdefault(text, {}).setdefault(METRICS_BY_KEY[key].title, []).append(variant.name)
    lines = []
    for text, metrics in reasons.items():
        names = dict.fromkeys(name for found in metrics.values() for name in found)
        lines.append(f"{', '.join(names)} - {', '.join(metrics)}: {text}")
    return lines


def evaluation_notes(variants: Sequence[Variant]) -> list[str]:
    """Return the warnings that ``evaluate`` put into the protocols, each once, with the variants that it is of."""
    found: dict[str, list[str]] = {}
    for variant in variants:
        for run in variant.runs:
            for note in protocol_of(run).get("notes", []):
                names = found.setdefault(str(note), [])
                if variant.name not in names:
                    names.append(variant.name)
    return [f"{', '.join(names)}: {note}." for note, names in found.items()]


def protocol_table(variants: Sequence[Variant], stage: int) -> list[tuple[str, list[str]]]:
    """Return the protocol's fields and every variant's value; one value where all agree."""
    protocols = [flatten(protocol_of(variant.stage(stage))) for variant in variants]
    names = dict.fromkeys(name for protocol in protocols for name in protocol if not _ELSEWHERE.match(name))
    rows = []
    for name in names:
        values = [plain(protocol[name]) if name in protocol else "-" for protocol in protocols]
        rows.append((name, values[:1] if len(set(values)) == 1 else values))
    return rows


def summary(variants: Sequence[Variant], rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Say in plain words what the tables show, and what they do not."""
    names = [variant.name for variant in variants]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    first = f"This page shows {'one variant' if len(names) == 1 else f'{len(names)} variants'}: {listed}."
    lines = [f"{first} {_what_was_trained(variants)}"]
    lines += _sample_sizes(variants)
    cells = [cell for row in rows for cell in row.values()]
    if len(variants) > 1:
        intervals = any(cell.interval for cell in cells)
        lines.append(
            "No variant is claimed to be better than another. Each was trained once, and the same training with "
            "another seed would move every figure by an unknown amount"
            + (": the intervals say how much it depends on the images that were measured, no more" if intervals else "")
            + ". Showing a difference takes several seeds per variant."
        )
    if any(cell.differing for cell in cells):
        lines.append(
            f"Figures marked “{NOT_COMPARABLE}” were measured under another protocol than the first in their column, "
            "in the field that is named: do not read them side by side."
        )
    missing = dict.fromkeys(METRICS_BY_KEY[key].title for row in rows for key, cell in row.items() if cell.not_computed)
    if missing:
        lines.append(f"Missing for at least one variant: {', '.join(missing)}. The reasons stand below the tables.")
    lines += [note[0].upper() + note[1:] + "." for variant in variants for note in variant.notes]
    return lines


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
        # Statistics that were given as such do not say of how many images they are.
        sizes = {(p.get("num_samples") or 0, p.get("num_reference") or 0) for p in map(protocol_of, runs)}
        if not sizes:
            continue
        counts = "; ".join(f"{a:,} against {f'{b:,}' if b else 'an unknown number of'}" for a, b in sorted(sizes))
        line = f"{what} measured on {counts} reference images."
        computed = any(name.lower() in (run.evaluation or {}).get("metrics", {}) for run in runs)
        if computed and min(n for pair in sizes for n in pair if n) < SMALL_SAMPLE:
            line += (
                f" So few images bias {name} upwards, the more the fewer they are: compare it only inside this page, "
                "never with published figures at 50,000."
            )
        if stage == 1 and any(_is_training_data(run) for run in runs):
            line += " They are training images: nothing here tests unseen ones."
        lines.append(line)
    return lines


def _is_training_data(run: Run) -> bool:
    measured = protocol_of(run).get("reference_fingerprint")
    return measured is not None and measured == run.inputs["data"]["fingerprint"]
