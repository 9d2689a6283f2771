"""Plot the training curves: ``python curves.py OUT`` reads the runs in OUT and writes curves.png beside itself."""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

VARIANTS = {"kl4": "KL, 4 channels", "bounded16": "bounded, 16 channels"}
PANELS = [
    ("ae", "loss/l1", "stage 1: L1", "log"),
    ("ae", "loss/lpips", "stage 1: LPIPS (VGG)", "log"),
    ("ae", "psnr", "stage 1: PSNR of training batches (dB)", "linear"),
    ("ae", "latent/std", "stage 1: std of raw latents", "linear"),
    ("ae", "loss/discriminator", "stage 1: discriminator (from step 1400)", "linear"),
    ("unet", "loss/denoising", "stage 2: denoising loss, whitened latents", "log"),
]


def main(out: Path) -> None:
    """Write the figure."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for (stage, name, title, scale), axis in zip(PANELS, axes.flat, strict=True):
        for variant, label in VARIANTS.items():
            lines = (out / f"{stage}-{variant}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            points = [(p["step"], p[name]) for p in map(json.loads, lines) if p.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend()
    figure.savefig(Path(__file__).with_name("curves.png"), dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
