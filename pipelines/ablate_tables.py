"""The tables of an ablation: from measured cells to JSON, and from that to Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.evaluation import Result
from .ablate_config import AblationConfig
from .ablate_statistics import Difference, Spread, t_quantile
from .metric_columns import METRICS

COLUMNS = {name: METRICS[name] for name in ("rfid", "psnr", "ssim", "lpips")}


@dataclass(frozen=True)
class Run:
    """What is known of one cell: ``result`` is None where its training failed."""

    variant: str
    seed: int
    cell: str
    result: Result | None
    train_seconds: float
    steps: int
    images: int


def make_table(config: AblationConfig, runs: Sequence[Run], setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ablation's table as plain JSON values.

    ``variants`` holds, per variant, its ``changes``, every ``run``, per metric the ``mean``, sample standard deviation
    ``std`` and ``values`` in the order of the seeds, and per metric the ``differences`` from the baseline, paired by
    seed. A seed at which a training failed is left out of that variant's figures and named in ``notes``.
    """
    by_variant = {name: [run for run in runs if run.variant == name] for name in config.variants}
    baseline = by_variant[config.baseline]
    by_difference = {name: _differences(mine, baseline) for name, mine in by_variant.items() if mine is not baseline}
    variants = {
        name: {
            "changes": config.variants[name],
            "runs": [_run(run) for run in mine],
            "metrics": {metric: spread for metric in COLUMNS if (spread := _spread(_values(mine, metric).values()))},
            "train_seconds": _spread([run.train_seconds for run in mine if run.result]),
            "differences": by_difference.get(name, {}),
        }
        for name, mine in by_variant.items()
    }
    comparisons = sum(len(differences) for differences in by_difference.values())
    return {
        "title": config.title,
        "question": config.question,
        "baseline": config.baseline,
        "seeds": list(config.seeds),
        "setting": dict(setting),
        "variants": variants,
        "rule": rule(len(config.seeds), comparisons),
        "notes": _notes(runs),
    }


def _values(runs: Sequence[Run], metric: str) -> dict[int, float]:
    """Return the metric by seed, of the runs that have it."""
    return {run.seed: run.result.metrics[metric] for run in runs if run.result and metric in run.result.metrics}


def _run(run: Run) -> dict[str, Any]:
    metrics = run.result.metrics if run.result else None
    return {
        "seed": run.seed,
        "cell": run.cell,
        "failed": run.result is None,
        "metrics": metrics,
        "train_seconds": run.train_seconds,
        "steps": run.steps,
        "images": run.images,
    }


def _spread(values: Collection[float]) -> dict[str, Any] | None:
    if not values:
        return None
    spread = Spread.of(list(values))
    return {"mean": spread.mean, "std": spread.std, "values": list(spread.values)}


def _differences(runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any]:
    differences = {}
    for metric, column in COLUMNS.items():
        mine, other = _values(runs, metric), _values(baseline, metric)
        seeds = [seed for seed in mine if seed in other]
        if not seeds:
            continue
        difference = Difference.of([mine[seed] for seed in seeds], [other[seed] for seed in seeds])
        differences[metric] = {
            "seeds": seeds,
            "values": list(difference.spread.values),
            "mean": difference.spread.mean,
            "interval": None if difference.interval is None else list(difference.interval),
            "verdict": difference.verdict(higher_is_better=column.higher_is_better),
        }
    return differences


def _notes(runs: Sequence[Run]) -> list[str]:
    failed = [f"{run.variant}, seed {run.seed}: failed, and is left out" for run in runs if not run.result]
    missing = [f"{name}: {why}" for run in runs if run.result for name, why in run.result.not_computed.items()]
    measured = [note for run in runs if run.result for note in run.result.protocol.get("notes", [])]
    return list(dict.fromkeys([*failed, *missing, *measured]))


def rule(seeds: int, comparisons: int) -> str:
    """Return in words how a verdict comes about, and what it is worth."""
    if seeds < 2:
        return "One seed says nothing about the spread, so no difference is called better or worse."
    return (
        "Mean ± sample standard deviation over the seeds, and the value of each. A difference is the variant minus the "
        "baseline at the same seed, which fixes the order of the images, their flips and, where the networks are the "
        "same, the initial weights; its 95 % interval is mean ± t·s/√n with Student's t at n − 1 degrees of freedom "
        f"(for {seeds} seeds {t_quantile(seeds - 1):.3f}). A variant is called better or worse only where that "
        "interval leaves out 0; otherwise the difference is inside the spread, which with so few seeds does not mean "
        f"that there is none. The table makes {comparisons} comparisons without a correction for their number: of "
        "comparisons between equals, one in twenty is called better or worse by chance. The spread is that between "
        "seeds, for one data set, one recipe and this length of training."
    )


def markdown(table: Mapping[str, Any]) -> str:
    """Return the table as Markdown: the values, the differences, the rule."""
    metrics = [name for name in COLUMNS if any(name in v["metrics"] for v in table["variants"].values())]
    parts = [f"# {table['title']}", table["question"], _setting(table), _value_table(table, metrics)]
    intervals = ", with 95 % intervals" if len(table["seeds"]) > 1 else ""
    parts += [f"Differences from *{table['baseline']}*{intervals}:", _difference_table(table, metrics)]
    parts += [table["rule"], *(f"Note: {note}." for note in table["notes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(table: Mapping[str, Any]) -> str:
    setting = table["setting"]
    train, evaluation = setting["train"], setting["evaluation"]
    which = "training" if evaluation["are_training_images"] else "held-out"
    return (
        f"{setting['steps']:,} steps of {setting['images']:,} images in all, from {train['count']:,} of "
        f"{train['size']} px; seeds {', '.join(map(str, table['seeds']))}; {_precision(setting['mixed_precision'])}. "
        f"rFID between the reconstructions of {evaluation['num_images']:,} {which} images and the images "
        f"themselves; LPIPS with {evaluation['lpips_net']}."
    )


def _precision(mixed_precision: str) -> str:
    return "training in float32" if mixed_precision == "no" else f"training under {mixed_precision} autocast"


def _value_table(table: Mapping[str, Any], metrics: Sequence[str]) -> str:
    rows = [["variant", *(COLUMNS[name].heading for name in metrics), "wall time (s)", "steps"]]
    for name, variant in table["variants"].items():
        cells = [_figure(variant["metrics"].get(metric), COLUMNS[metric].digits) for metric in metrics]
        steps = ", ".join(dict.fromkeys(f"{run['steps']:,}" for run in variant["runs"] if not run["failed"]))
        rows.append([name, *cells, _figure(variant["train_seconds"], 0), steps or "–"])
    return grid(rows)


def _figure(spread: Mapping[str, Any] | None, digits: int) -> str:
    if spread is None:
        return "–"
    mean = f"{spread['mean']:.{digits}f}"
    if spread["std"] is None:
        return mean
    return f"{mean} ± {spread['std']:.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in spread['values'])})"


def _difference_table(table: Mapping[str, Any], metrics: Sequence[str]) -> str:
    rows = [["variant", *(COLUMNS[name].label for name in metrics)]]
    for name, variant in table["variants"].items():
        if name != table["baseline"]:
            rows.append([name, *(_verdict(variant["differences"].get(m), COLUMNS[m].digits) for m in metrics)])
    return grid(rows)


def _verdict(difference: Mapping[str, Any] | None, digits: int) -> str:
    if difference is None:
        return "–"
    interval = ""
    if difference["interval"] is not None:
        interval = " [{}]".format(", ".join(signed(bound, digits) for bound in difference["interval"]))
    verdict = difference["verdict"]
    verdict = f"**{verdict}**" if verdict in {"better", "worse"} else verdict
    return f"{signed(difference['mean'], digits)}{interval} {verdict}"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the head first, as a Markdown table."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
