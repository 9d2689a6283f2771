"""The report of a study: one HTML page that needs nothing but itself, and a summary in Markdown."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import write_atomically
from .metric_columns import BESIDE, METRICS, OF_VARIANTS, Column
from .pages import render
from .report_figures import Figure
from .report_latents import distinct_latents, latents_of
from .report_paths import shorten
from .report_pictures import WIDEST, Picture, data_uri
from .report_reconstructions import reconstruction_strips, worst_strips
from .report_runs import Variant as RunVariant
from .report_samples import sample_sheets
from .study_analysis import power_in_words
from .study_checks import check_table, checks_in_words
from .study_claims import limit_of
from .study_config import StudyConfig
from .study_design import Variant
from .study_findings import Analysis, Effect
from .study_markdown import markdown
from .study_pictures import (
    SHOWN,
    CellRuns,
    health_levels,
    own_autoencoders,
    read_cells,
    shown_variants,
    spectra,
    stage_one_curves,
    stage_two_curves,
    with_samples,
)
from .study_plots import Dots, Row, Style, forest, label_lines, scatter, styles
from .study_records import CellRecord
from .study_tables import (
    NONE,
    Table,
    claim_rows,
    cost_table,
    distinct_effects,
    effect_label,
    effect_rows,
    interaction_rows,
    is_better,
    is_empty,
    metric_cells,
    predictor_table,
    shown_metrics,
)
from .study_text import (
    AT_THIS_SCALE,
    BIAS_IN_WORDS,
    changed_line,
    command_line,
    cost_lines,
    is_gone,
    missing_lines,
    protocol_lines,
    setting_rows,
    verdict_line,
)
from .study_variant_tables import level_table, network_table, recipe_tables

PAGE, SUMMARY = "report.html", "summary.md"
SECTIONS = {2: "Samples", 1: "Reconstructions"}
SUREST = 12
"""Rank correlations that are shown at once; the others can be unfolded."""


def write_report(
    folder: Path,
    config: StudyConfig,
    variants: Sequence[Variant],
    records: Sequence[CellRecord],
    analysis: Analysis,
    setting: Mapping[str, Any],
    *,
    photographs: bool = True,
    device: str = "auto",
) -> None:
    """Write ``folder/report.html`` and ``folder/summary.md``. Of absolute paths they show the last folders only.

    What the cells' folders no longer hold is said to be missing. Where a cell has no samples on disk, a few are drawn
    into its folder.

    Args:
        folder: the study's folder.
        config: the study.
        variants: its variants, the reference first.
        records: the cells that there are.
        analysis: what they say.
        setting: what the runner recorded of the data, the machine and the command line.
        photographs: whether to show reconstructions, beside which stand the images themselves; a page that is to be
            published may have to leave them out.
        device: where to draw samples, where there are none.
    """
    cells = read_cells(folder, records)
    looks = styles([variant.name for variant in variants])
    seed, shown = shown_variants(cells)
    known = _known_paths(folder, config, cells)
    page = render(
        "study.html.j2",
        config=config,
        at_this_scale=AT_THIS_SCALE,
        lead=verdict_line(config, variants, analysis, records),
        changed=changed_line(setting),
        claims=claim_rows(config, analysis, records),
        checks=check_table(config, analysis, records),
        checks_in_words=checks_in_words(config),
        protocol=protocol_lines(config, variants, setting),
        levels=level_table(config, variants),
        networks=network_table(variants, setting.get("networks", {})),
        recipe=recipe_tables(variants),
        names=[variant.name for variant in variants],
        rule=analysis.rule,
        power=power_in_words(config, variants),
        metrics=[
            (*head, metric_cells(config, variants, analysis, records, names))
            for *head, names in _columns(analysis, OF_VARIANTS)
        ],
        bias=BIAS_IN_WORDS if any(name in of for of in analysis.variants.values() for name in BESIDE) else "",
        health=_health_table(variants, cells),
        costs=cost_table(records),
        cost_lines=cost_lines(records),
        effects=[(*head, effect_rows(analysis.effects, names)) for *head, names in _columns(analysis)],
        forests=_with_uris(_forests(analysis)),
        interactions=[(*head, interaction_rows(analysis.interactions, names)) for *head, names in _columns(analysis)],
        predictors=_in_two(predictor_table(analysis.predictors)),
        rfid=predictor_table(analysis.rfid_against_gfid),
        scatters=_with_uris(_scatters(analysis, looks)),
        curves=[
            ("Stage one: autoencoders", _with_uris(stage_one_curves(cells, looks))),
            ("Stage two: denoisers", _with_uris(stage_two_curves(cells, looks))),
        ],
        spectra=_with_uris([figure] if (figure := spectra(cells, looks)) else []),
        latents=_latents(shown),
        shown_seed=seed,
        samples=_samples(shown, seed, config, device),
        photographs=photographs,
        reconstructions=_reconstructions(folder, config, shown) if photographs else [],
        worst=worst_strips(shown) if photographs else [],
        missing=missing_lines(config, variants, analysis, records, setting),
        command=command_line(config, setting),
        setting=setting_rows(setting),
    )
    summary = markdown(config, variants, records, analysis, setting)
    for name, text in ((PAGE, page), (SUMMARY, summary)):
        write_atomically(folder / name, shorten(_from_inside(folder, text), known))


def _from_inside(folder: Path, text: str) -> str:
    """Return ``text`` with the absolute paths in the study's folder as they are seen from there."""
    for path in (folder.absolute(), folder.resolve()):
        text = text.replace(f"{html.escape(str(path))}/", "")
    return text


def _columns(analysis: Analysis, columns: Mapping[str, Column] = METRICS) -> list[tuple[str, list[Column], list[str]]]:
    """Return the heading, the columns and the metrics of the tables of each stage, that of the samples first."""
    found = {heading: shown_metrics(analysis, stage, columns) for stage, heading in SECTIONS.items()}
    return [(heading, [columns[name] for name in names], names) for heading, names in found.items() if names]


def _health_table(variants: Sequence[Variant], cells: Sequence[CellRuns]) -> Table:
    """Return which findings of the health report are not in order, and at how many seeds, for every variant."""
    levels = {cell.first.path: health_levels(cell.first.path) for cell in own_autoencoders(cells) if cell.first}
    rows = []
    for finding in dict.fromkeys(name for cell in cells for name in cell.record.verdicts):
        row = [finding.replace("_", " ")]
        for variant in variants:
            mine = [cell for cell in cells if cell.record.variant == variant.name and cell.record.failed is None]
            found = [cell for cell in mine if finding in cell.record.verdicts]
            known = {levels[cell.first.path].get(finding) for cell in found if cell.first}
            worst = next((f"{level} " for level in ("fault", "note") if level in known), "")
            row.append(f"{worst}{len(found)}/{len(mine)}" if found else NONE)
        rows.append(row)
    return Table(["finding", *(variant.name for variant in variants)], rows, 1 + len(variants))


def _forests(analysis: Analysis) -> list[Figure]:
    """Return a plot of the effects on every metric that is compared by ratios."""
    figures = []
    effects = distinct_effects(analysis.effects)
    for metric in shown_metrics(analysis):
        column = METRICS[metric]
        if column.scale != "ratio":
            continue
        groups: dict[str, list[Row]] = {}
        for effect in effects:
            if effect.metric == metric and effect.estimate is not None and not is_empty(effect):
                label = label_lines(effect_label(effect).removeprefix(f"{effect.factor} "))
                better = is_better(effect, effect.simultaneous or effect.interval)
                limits = _margins(effect, analysis)
                row = Row(label, effect.estimate, effect.interval, effect.simultaneous, better, limits)
                groups.setdefault(effect.factor, []).append(row)
        if groups:
            side = "above" if column.higher_is_better else "below"
            title, axis = f"Effects on {column.label}", f"ratio of {column.label}; {side} 1 is better"
            figures.append(forest(title, groups, axis, ratio=True))
    return figures


def _margins(effect: Effect, analysis: Analysis) -> tuple[float, ...]:
    """Return the effects that claims about the same pairs of variants allow at worst."""
    key = (effect.factor, effect.metric, effect.contexts)
    parts = [part for claim in analysis.claims for part in claim.parts if part.margin]
    found = {
        limit_of(effect.metric, part.margin)
        for part in parts
        if (part.effect.factor, part.effect.metric, part.effect.contexts) == key
    }
    return tuple(sorted(found))


def _scatters(analysis: Analysis, looks: Mapping[str, Style]) -> list[Figure]:
    """Return rFID against KID and FID; error bars are a standard deviation over seeds to either side."""
    figures = []
    for metric in ("kid_mean", "fid"):
        dots = {}
        for name, summaries in analysis.variants.items():
            if "rfid" in summaries and metric in summaries:
                x, y = summaries["rfid"], summaries[metric]
                by_seed = dict(zip(x.seeds, x.values, strict=True)), dict(zip(y.seeds, y.values, strict=True))
                points = [(by_seed[0][seed], by_seed[1][seed]) for seed in x.seeds if seed in by_seed[1]]
                if points:
                    bars = [(each.mean - (each.std or 0), each.mean + (each.std or 0)) for each in (x, y)]
                    dots[name] = Dots(points, (x.mean, y.mean), bars[0], bars[1])
        if dots:
            label = METRICS[metric].label
            labels = ("rFID of the reconstructions (lower is better)", f"{label} of the samples (lower is better)")
            figures.append(scatter(f"rFID against {label}", dots, labels, looks))
    return figures


def _latents(shown: Sequence[RunVariant]) -> list[tuple[str, str | None, str, str]]:
    """Return, of every cache and whitening once: the variants, a picture of histograms, its text, and a note."""
    found = distinct_latents(shown, {variant.name: latents_of(variant) for variant in shown})
    return [
        (name, data_uri(item.figure.png), item.figure.alt, item.note) if item.figure else (name, None, "", item.note)
        for name, item in found.items()
    ]


def _samples(shown: Sequence[RunVariant], seed: int | None, config: StudyConfig, device: str) -> list[Picture]:
    if seed is None:
        return []
    drawn = with_samples(shown, seed, config.evaluation, device)
    return sample_sheets(drawn, count=SHOWN, columns=SHOWN, widest=WIDEST)[0]


def _reconstructions(folder: Path, config: StudyConfig, shown: Sequence[RunVariant]) -> list[Picture]:
    """Reconstruct a few images that were evaluated; where they are not there any more, show the last training grids."""
    prepared = folder / "data" / "validation"
    data = str(prepared) if prepared.is_dir() else config.data.validation
    return reconstruction_strips(shown, None if data is None or is_gone(data) else data)


def _in_two(table: Table) -> tuple[Table, Table]:
    """Return the first rows of a table and the others."""
    return tuple(Table(table.head, rows, table.text_columns) for rows in (table.rows[:SUREST], table.rows[SUREST:]))  # type: ignore[return-value]


def _with_uris(figures: Sequence[Figure]) -> list[tuple[Figure, str]]:
    return [(figure, data_uri(figure.png)) for figure in figures]


def _known_paths(folder: Path, config: StudyConfig, cells: Sequence[CellRuns]) -> list[Path]:
    """Return the paths that the report may speak of."""
    data = [Path(spec) for spec in (config.data.train, config.data.validation) if spec]
    runs = [run.path for cell in cells for run in (cell.first, cell.second) if run is not None]
    return [*data, *runs]
