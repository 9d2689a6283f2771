"""Work out the figures of the README and of the follow-up's that the reports do not have.

    python beside.py

Prints them as a table, from the kept measurements and logs. None of them decides anything.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from recompute import HERE, Interval, interval, logarithms_of, text_of
from scipy import stats

FOLLOW_UP = HERE.parent / "study-faces32-noise-shift"
SHARING = ("kl-4-unwhitened", "kl-4-scalar", "bounded-4-unwhitened")
"""Variants that have another's autoencoder."""
COMPARISONS, MARGIN = 12, math.log(1.1)
BY_FID = {
    "bounded / kl": [["bounded-4", "kl-4"], ["bounded-16", "kl-16"]],
    "bounded-4 / plain-4": [["bounded-4", "plain-4"]],
    "bounded-4-unwhitened / bounded-4": [["bounded-4-unwhitened", "bounded-4"]],
    "kl-4-unwhitened / kl-4-scalar": [["kl-4-unwhitened", "kl-4-scalar"]],
    "bounded-16 / bounded-4": [["bounded-16", "bounded-4"]],
}
Floats = npt.NDArray[np.float64]


def rows() -> list[tuple[str, str]]:
    """Return what each figure is, and the figure."""
    cells = json.loads((HERE / "results.json").read_text(encoding="utf-8"))["cells"]
    variants = list(dict.fromkeys(cell["variant"] for cell in cells))
    alone = [name for name in variants if name not in SHARING]
    kid, fid, rfid = (
        {name: logarithms_of(cells, name, metric) for name in variants} for metric in ("kid_mean", "fid", "rfid")
    )
    return [
        *_scatter(kid, rfid, alone),
        *_comparisons(kid, fid, variants),
        *_power(_rms(_residuals(kid, variants), variants)),
        ("smallest absolute rank correlation of eight that passes Holm's correction for 120", f"{_smallest_rho():.3f}"),
        ("the same of rFID with KID, without the 16-channel variants", _without_wide(kid, rfid, alone)),
        *_training(cells),
        *_follow_up(),
    ]


def _residuals(values: dict[str, Floats], variants: list[str]) -> Floats:
    table = np.array([values[name] for name in variants])
    return table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()


def _rms(residuals: Floats, variants: list[str]) -> float:
    return float(np.sqrt((residuals**2).sum() / ((len(variants) - 1) * (residuals.shape[1] - 1))))


def _scatter(kid: dict[str, Floats], rfid: dict[str, Floats], alone: list[str]) -> list[tuple[str, str]]:
    variants = list(kid)
    found = []
    for label, values, names in (("KID", kid, variants), ("rFID", rfid, alone)):
        raw = np.sqrt(np.mean([values[name].var(ddof=1) for name in names]))
        rest = _rms(_residuals(values, names), names)
        found.append(
            (f"scatter of {label} between seeds, without and with the seed's common shift", _shares(rest, raw))
        )
    residuals = dict(zip(variants, _residuals(kid, variants), strict=True))
    named = ("bounded-4", "kl-16", "plain-4")
    rests = _shares(*(np.sqrt((residuals[name] ** 2).sum() / 2) for name in named))
    found.append((f"scatter of KID of {', '.join(named)}, without it", rests))
    found.append(("of bounded-4, with it", _shares(kid["bounded-4"].std(ddof=1))))
    table = np.array([kid[name] for name in variants])
    found.append(("KID of all variants at seeds 0, 1, 2 against the mean", _ratios(table.mean(0) - table.mean())))
    r = np.corrcoef(_residuals(kid, alone).ravel(), _residuals(rfid, alone).ravel())[0, 1]
    found.append(("correlation of the residuals of KID and rFID over the 24 autoencoders", f"{r:.2f}"))
    return found


def _comparisons(kid: dict[str, Floats], fid: dict[str, Floats], variants: list[str]) -> list[tuple[str, str]]:
    level = 0.05 / COMPARISONS
    found = [
        (f"FID by the rule, {name}", _estimate(fid, pairs, interval(fid, variants, pairs, level)))
        for name, pairs in BY_FID.items()
    ]
    for width in (4, 16):
        pairs = [[f"bounded-{width}", f"kl-{width}"]]
        found.append(
            (f"KID by the rule, {' / '.join(pairs[0])}", _estimate(kid, pairs, interval(kid, variants, pairs, level)))
        )
        found.append(("the same by seed", _ratios(kid[pairs[0][0]] - kid[pairs[0][1]])))
    package = [["bounded-16", "kl-4"]]
    found.append(("KID, bounded-16 / kl-4, 95 %", _estimate(kid, package, interval(kid, variants, package, 0.05))))
    found.append(("the same by seed", _ratios(kid["bounded-16"] - kid["kl-4"])))
    best = float(np.exp(kid["bounded-4-high-frequency"].mean() - kid["kl-4"].mean()))
    found.append(("KID, bounded-4-high-frequency / kl-4", f"×{best:.2f}"))
    return found


def _power(std: float) -> list[tuple[str, str]]:
    """How often "no worse by 10 %" is found where nothing differs, and with how many seeds in four studies of five."""

    def power(seeds: int) -> float:
        degrees = 10 * (seeds - 1)
        threshold = stats.t.ppf(1 - 0.05 / (2 * COMPARISONS), degrees)
        return float(stats.nct.sf(threshold, degrees, MARGIN / (std * math.sqrt(2 / seeds))))

    enough = next(seeds for seeds in itertools.count(3) if power(seeds) >= 0.8)
    return [
        ('power of "no worse by 10 %" with three seeds, where nothing differs', f"{100 * power(3):.0f} %"),
        ("seeds for a power of 80 %", str(enough)),
    ]


def _smallest_rho() -> float:
    ranks = np.arange(8)
    squares = np.array([((ranks - np.array(other)) ** 2).sum() for other in itertools.permutations(range(8))])
    rho = np.abs(1 - 6 * squares / (8 * 63))
    return float(min(value for value in np.unique(rho) if (rho >= value - 1e-12).mean() < 0.05 / 120))


def _without_wide(kid: dict[str, Floats], rfid: dict[str, Floats], alone: list[str]) -> str:
    narrow = [name for name in alone if not name.endswith("-16")]
    means = [[np.exp(values[name]).mean() for name in narrow] for values in (rfid, kid)]
    found = stats.spearmanr(*means)
    return f"{found.statistic:.2f} (p = {found.pvalue:.2f})"


def _training(cells: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    for name in ("kl-4", "bounded-4", "plain-4", "bounded-16", "kl-16"):
        before, after = (_logged(cells, name, "diffusion", "validation/loss", step) for step in (2500, 3000))
        found.append(
            (f"fall of the validation loss from step 2,500 to 3,000, {name}", f"{100 * (1 - after / before):.1f} %")
        )
    for step in (1000, 2000):
        for name in ("bounded-4", "bounded-4-smc"):
            psnr, lpips = (_logged(cells, name, "autoencoder", key, step) for key in ("psnr", "loss/lpips"))
            found.append((f"training batches at step {step:,}, {name}", f"PSNR {psnr:.2f} dB, LPIPS {lpips:.4f}"))
    kl, total = (_logged(cells, "kl-4", "autoencoder", key, 2000) for key in ("loss/kl", "loss/total"))
    return [*found, ("share of the KL term, of weight 1e-6, in the loss of kl-4", f"{1e-6 * kl / total:.0e}")]


def _logged(cells: list[dict[str, Any]], variant: str, stage: str, key: str, step: int) -> float:
    """Return the mean over seeds of what was logged."""
    values = []
    for cell in cells:
        if cell["variant"] == variant:
            log = HERE / "cells" / cell["folders"][stage] / "metrics.jsonl"
            lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
            values += [line[key] for line in lines if line["step"] == step and line.get(key) is not None]
    return float(np.mean(values))


def _follow_up() -> list[tuple[str, str]]:
    cells = json.loads((FOLLOW_UP / "results.json").read_text(encoding="utf-8"))["cells"]
    kid: dict[str, list[float]] = {}
    for cell in sorted(cells, key=lambda cell: int(cell["seed"])):
        kid.setdefault(cell["variant"], []).append(math.log(cell["metrics"]["kid_mean"]))
    found = []
    for one, other in (("bounded-4-shifted", "bounded-4"), ("bounded-16-shifted", "bounded-4")):
        difference = np.array(kid[one]) - np.array(kid[other])
        half = stats.t.ppf(0.975, 2) * difference.std(ddof=1) / math.sqrt(3)
        bounds = Interval(*(float(np.exp(difference.mean() + sign * half)) for sign in (-1, 1)))
        label = f"follow-up: KID, {one} / {other}, paired, 95 %"
        found.append((label, f"×{np.exp(difference.mean()):.3f} {text_of(bounds)}; by seed {_ratios(difference)}"))
    return found


def _estimate(values: dict[str, Floats], pairs: list[list[str]], bounds: Interval) -> str:
    mean = np.mean([values[one].mean() - values[other].mean() for one, other in pairs])
    return f"×{np.exp(mean):.3f} {text_of(bounds)}"


def _ratios(logarithms: Floats) -> str:
    return ", ".join(f"×{ratio:.3f}" for ratio in np.exp(logarithms))


def _shares(*values: float) -> str:
    return ", ".join(f"{100 * value:.1f} %" for value in values)


def table(found: list[tuple[str, str]]) -> str:
    """Return the Markdown table."""
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in found)])


if __name__ == "__main__":
    print(table(rows()))
