"""Draw figure.png from tables/*.json: every seed of every variant, and their means. Run it in this folder."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

METRICS = {"rfid": "rFID, N = {n} (lower is better)", "psnr": "PSNR in dB (higher)", "lpips": "LPIPS, AlexNet (lower)"}
ORDER = [
    "discriminator",
    "adversarial-loss",
    "adversarial-weight",
    "high-frequency-losses",
    "normalisation-of-the-decoder",
    "wavelet",
    "resolution-of-training",
]


def main() -> None:
    """Write figure.png."""
    tables = [json.loads((Path("tables") / f"{name}.json").read_text()) for name in ORDER]
    rows = [(table["title"], name, variant) for table in tables for name, variant in table["variants"].items()]
    figure, axes = plt.subplots(
        1, len(METRICS), figsize=(13, 0.33 * len(rows) + 1.2), sharey=True, layout="constrained"
    )
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for y, (_, _, variant) in enumerate(rows):
            values = [run["metrics"][metric] for run in variant["runs"] if not run["failed"]]
            axis.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.45, markersize=6)
            axis.plot([sum(values) / len(values)], [y], "|", color="black", markersize=15, markeredgewidth=2)
        y = 0
        for table in tables[:-1]:
            y += len(table["variants"])
            axis.axhline(y - 0.5, color="lightgrey", linewidth=1)
        axis.set_xlabel(label.format(n=tables[0]["setting"]["evaluation"]["num_images"]))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [f"{title}: {name}" for title, name, _ in rows])
    axes[0].invert_yaxis()
    figure.savefig("figure.png", dpi=110)


if __name__ == "__main__":
    main()
