"""What stands beside the intervals that decide claims and decides nothing: the seeds one by one, their spread, images.

The rule's error rate holds where variants scatter alike; an interval by a comparison's own differences needs nothing of
the kind. And an interval over seeds says nothing of what the number of images does to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .metric_columns import METRICS
from .study_claims import figure
from .study_config import StudyConfig
from .study_findings import Analysis, Effect
from .study_records import CellRecord
from .study_tables import NONE, Table, effect_label, images_of, interval_text, is_empty


def checks_in_words(config: StudyConfig) -> str:
    """Return what :func:`check_table` shows."""
    paired = (
        "the interval of each comparison by Student's t on its own differences by seed, at the same simultaneous "
        "level, which does not take variants to scatter alike; and "
    )
    return (
        "Beside the rule, and deciding nothing: the paired differences of each seed; "
        f"{paired * (config.rule.spread == 'pooled')}what the number of images does to its error. That is from each "
        "cell's own interval over redraws of its images, as if cells were independent: they share seeds and images, so "
        "it is an upper bound."
    )


def check_table(config: StudyConfig, analysis: Analysis, records: Sequence[CellRecord]) -> Table:
    """Return the rule's interval of every comparison that decides a claim, the paired one, and what the images do."""
    effects = {_label(part.effect): part.effect for claim in analysis.claims for part in claim.parts}
    shown = {label: effect for label, effect in effects.items() if effect.simultaneous and not is_empty(effect)}
    is_pooled = config.rule.spread == "pooled"
    rows = [
        [
            label,
            interval_text(effect, effect.simultaneous),
            ", ".join(figure(effect, value) for value in effect.by_seed),
            *([interval_text(effect, effect.paired) or NONE] if is_pooled else []),
            _of_images(effect, images_of(config, records, effect.metric)),
        ]
        for label, effect in shown.items()
    ]
    head = ("comparison", "interval of the rule", "by seed", *(["paired interval"] if is_pooled else []), "images")
    return Table(head, rows, text_columns=len(head))


def _label(effect: Effect) -> str:
    return f"{METRICS[effect.metric].label}, {effect_label(effect)}"


def _of_images(effect: Effect, images: str) -> str:
    """Return what more samples would do, whose error the spread over seeds holds; of reconstructions, what it lacks."""
    error = effect.image_error
    if METRICS[effect.metric].stage == 1:
        holds = f"the interval holds for these {images.removeprefix('all ')}"
        if error is None:
            return holds
        size = f"{100 * error:.2g} %" if effect.scale == "ratio" else f"{error:.{METRICS[effect.metric].digits}f}"
        return f"{holds}; other images would move it by up to {size} (standard error)"
    if error is None or not effect.error:
        return NONE
    share = (error / effect.error) ** 2
    removed = f"{100 * share:.0f} %" if share < 1 else "all"
    return f"more samples would remove up to {removed} of the square of its error"
