"""What a study's page and its Markdown summary say in sentences: protocol, cost, what is missing, how to rerun."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..stage1_autoencoder.train_config import AutoencoderTrainConfig
from ..stage2_diffusion.train_config import DiffusionTrainConfig
from .comparison import flatten, plain
from .metric_columns import METRICS
from .report_tables import duration
from .study_config import StudyConfig
from .study_design import Variant
from .study_effects import claimed_effects
from .study_findings import Analysis
from .study_records import CellRecord
from .study_tables import OF_AUTOENCODER, SECONDS

AT_THIS_SCALE = "at this scale"
BIAS_IN_WORDS = (
    "rFID∞ is rFID extrapolated to infinitely many images: at few, rFID is too high, and not alike for all "
    "autoencoders."
)
VERDICTS = ("supported", "refuted", "inconclusive")


def verdict_line(
    config: StudyConfig, variants: Sequence[Variant], analysis: Analysis, records: Sequence[CellRecord]
) -> str:
    """Say how many claims came out how, and what that rests on."""
    counts = {verdict: sum(claim.verdict == verdict for claim in analysis.claims) for verdict in VERDICTS}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    finished = sum(record.failed is None for record in records)
    return (
        (
            f"Of {len(analysis.claims)} claim{'s' * (len(analysis.claims) > 1)} {told} {AT_THIS_SCALE}"
            if told
            else "No claim was made"
        )
        + f": {len(variants)} variants, {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}, "
        f"{finished} of {len(variants) * len(config.seeds)} cells, {config.evaluation.num_samples:,} samples of each."
    )


def changed_line(setting: Mapping[str, Any]) -> str:
    """Say what keeps claims and rule from being called fixed before the run; nothing where nothing does.

    That is a section of the configuration that is not as it was when the first cell was begun, or a cell that was begun
    before any configuration lay here.
    """
    told = []
    sections = setting.get("changed_since_the_first_start", [])
    if "data" in sections:
        told.append("The images are not those of the first start.")
    if names := [name for name in sections if name != "data"]:
        were = "was" if len(names) == 1 and not names[0].endswith("s") else "were"
        changed = f"{', '.join(names)} {were} changed after the first start; see config.1.yaml"
        told.append(_sentence(changed.replace("_", " ")))
    if count := len(setting.get("begun_before_the_first_start", [])):
        were = "run was" if count == 1 else "runs were"
        told.append(
            f"{count} {were} begun before the study's folder held a configuration, so that nothing says what had been "
            "decided then."
        )
    return " ".join(told)


def protocol_lines(config: StudyConfig, variants: Sequence[Variant], setting: Mapping[str, Any]) -> list[str]:
    """Say what is the same in all cells."""
    evaluation = config.evaluation
    stages = [
        _training_in_words([getattr(variant.recipe, stage).train for variant in variants])
        for stage in ("autoencoder", "diffusion")
    ]
    reconstructed = "all" if evaluation.num_reconstructions is None else f"{evaluation.num_reconstructions:,}"
    seeds = ", ".join(map(str, config.seeds))
    return [
        _data_line(config, setting),
        f"Stage one: {stages[0]} in every cell. Stage two: {stages[1]}, on latents that are cached once"
        f"{', with those of the mirror images' if config.flips else ''}; {_networks_in_words(variants, setting)}.",
        f"Seeds {seeds}: a seed decides initial weights, order of the images, flips and noise of both stages, and the "
        "noise of the samples. At a seed, variants see the same images in the same order, flipped alike, and at the "
        "same noise levels but for the noise shift; latents of one shape meet the same noise, and their networks of "
        "stage two begin from the same weights. Those of stage one do up to their first layer of another shape.",
        f"Each cell is measured in float32: {evaluation.num_samples:,} samples ({evaluation.sampler}, "
        f"{evaluation.steps} steps, {evaluation.grid} grid, averaged weights) against all training images, and "
        f"{reconstructed} images reconstructed (LPIPS with {evaluation.lpips_net}). KID, which has no bias at few "
        "samples, decides; FID stands beside it and is comparable within this study only.",
        *_claims_line(config, setting),
    ]


def _training_in_words(trainings: Sequence[AutoencoderTrainConfig] | Sequence[DiffusionTrainConfig]) -> str:
    """Say how many steps and images a stage has; a factor may change steps and batch together."""
    steps = sorted({train.steps for train in trainings})
    told = " to ".join(f"{count:,}" for count in dict.fromkeys([steps[0], steps[-1]]))
    return f"{told} steps, {trainings[0].images_at(trainings[0].steps):,} images"


def _networks_in_words(variants: Sequence[Variant], setting: Mapping[str, Any]) -> str:
    """Say that the variants have one network in stage two, unless a factor changes it."""
    models = [variant.recipe.diffusion.model for variant in variants]
    inside = {each.get("denoiser_parameters_inside") for each in setting.get("networks", {}).values()}
    if len(inside) > 1 or any(model != models[0] for model in models):
        return "the networks are not the same in all variants, see their table"
    return "the same network but for its first and last convolution, where the number of channels differs"


def _claims_line(config: StudyConfig, setting: Mapping[str, Any]) -> list[str]:
    """Say what the claims compare, and that they were there beforehand only where they were."""
    count, changed = len(claimed_effects(config)), changed_line(setting)
    if not count:
        return []
    fixed = "" if changed else ", fixed with the rule before the run"
    told = (
        f"The claims make {count} comparison{'s' * (count > 1)}{fixed}. The intervals that decide them are corrected "
        f"for that number: they hold together at level {config.rule.level:g}, as far as the rule below says."
    )
    return [f"{told} {changed}".rstrip()]


def _data_line(config: StudyConfig, setting: Mapping[str, Any]) -> str:
    data = setting.get("data", {})

    def told(name: str, spec: str | None) -> str:
        count = data.get(name, {}).get("count")
        return data_name(spec) + (f" ({count:,} images)" if count else "")

    size = config.data.size or data.get("train", {}).get("size")
    at = f" at {size} px" if size else ""
    same = data.get("validation_is_train", config.data.validation is None)
    measured = "the same images" if same else told("validation", config.data.validation)
    return f"Trained on {told('train', config.data.train)}{at}; reconstructed and diagnosed on {measured}."


def data_name(spec: str | None) -> str:
    """Return what a data set is called; of a folder the name alone, as where it lies is nobody's business."""
    if spec is None:
        return "the images that were given"
    return PurePath(spec).name if _is_folder(spec) else spec


def is_gone(spec: str) -> bool:
    """Return whether a data set is a folder that is not there any more."""
    return _is_folder(spec) and not Path(spec).is_dir()


def _is_folder(spec: str) -> bool:
    return not spec.startswith(("synthetic", "hf:"))


def total_seconds(records: Sequence[CellRecord]) -> dict[str, float]:
    """Return the wall time of each part of the study; an autoencoder that cells share counts once."""
    total = dict.fromkeys(SECONDS, 0.0)
    seen = set()
    for record in records:
        autoencoder = record.folders.get("autoencoder", f"{record.variant}, seed {record.seed}")
        for key in SECONDS:
            if key not in OF_AUTOENCODER or autoencoder not in seen:
                total[key] += record.cost.get(key, 0.0)
        seen.add(autoencoder)
    return total


def cost_lines(records: Sequence[CellRecord]) -> list[str]:
    """Say what the study took, in all and by stage, and a cell of it."""
    if not any(record.cost for record in records):
        return []
    total = total_seconds(records)
    parts = ", ".join(f"{SECONDS[key]} {duration(seconds)}" for key, seconds in total.items() if seconds)
    whole = [sum(record.cost.get(key, 0.0) for key in SECONDS) for record in records if record.cost]
    autoencoders = {record.folders.get("autoencoder", f"{record.variant}, {record.seed}") for record in records}
    return [
        f"{duration(sum(total.values()))} of wall time in all: {parts}.",
        f"{len(records)} cells with {len(autoencoders)} autoencoders; a cell took {duration(statistics.median(whole))} "
        "with its autoencoder (the median).",
    ]


def missing_lines(
    config: StudyConfig,
    variants: Sequence[Variant],
    analysis: Analysis,
    records: Sequence[CellRecord],
    setting: Mapping[str, Any],
) -> list[str]:
    """Say what was changed after the first start; and what was left out or failed, and why."""
    there = {(record.variant, record.seed) for record in records}
    absent = [f"{v.name}, seed {seed}" for v in variants for seed in config.seeds if (v.name, seed) not in there]
    lines = [changed] if (changed := changed_line(setting)) else []
    lines += [_sentence(note) for note in analysis.notes]
    if absent:
        lines.append(f"Not finished when this was written: {'; '.join(absent)}.")
    measured = [record for record in records if record.failed is None]
    for metric, column in METRICS.items():
        lacking = [f"{record.variant}, seed {record.seed}" for record in measured if metric not in record.metrics]
        if lacking:
            of = f" of {'; '.join(lacking)}" if len(lacking) < len(measured) else ""
            lines.append(f"{column.label} was not computed{of}.")
    return lines


def _sentence(note: str) -> str:
    first = note[:1] if note[1:2].isupper() else note[:1].upper()  # rFID stays as it is
    return f"{first}{note[1:].removesuffix('.')}."


def setting_rows(setting: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the runner recorded of the data, the measurements and the machines."""
    machines = {f"machine {n}": each for n, each in enumerate(setting.get("environments", []), 1)}
    rest = {name: value for name, value in setting.items() if name not in {"environments", "networks", "unfinished"}}
    return [(name, plain(value)) for name, value in flatten({**rest, **machines}).items()]


def command_line(config: StudyConfig, setting: Mapping[str, Any]) -> str:
    """Return the command that makes the study again from the configuration that lies beside its results.

    Where images are is the reader's business: they stand as ``TRAIN`` and ``VALIDATION``.
    """
    words = ["wavelatent study config.yaml"]
    train, validation = config.data.train, config.data.validation
    if train is None or _is_folder(train):
        words.append("--data TRAIN")
    if validation is not None and _is_folder(validation):  # None measures on the training images
        words.append("--eval-data VALIDATION")
    if setting.get("mixed_precision", "no") != "no":
        words.append(f"--mixed-precision {setting['mixed_precision']}")
    return " ".join([*words, "--out OUT"])
