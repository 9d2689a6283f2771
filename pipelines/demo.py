"""``demo``: the whole pipeline on the built-in faces, on a CPU, in minutes; it ends with the report.

Two autoencoders side by side, each through both stages with one core to itself: a KL bottleneck with 4 channels, and
bounded latents with 16 channels. Everything is what the commands do, with the presets and a few overrides; the report
lists those commands. Every step goes on where it was stopped, so a killed demo is run again and finishes.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..common.config import load_config
from ..common.errors import WavelatentError
from ..common.files import write_atomically
from ..common.images import open_data
from ..common.metric_weights import MissingWeightsError, load_weights
from ..common.runtime import MixedPrecision, RuntimeOptions
from ..stage2_diffusion.sampling import Sampling
from .demo_processes import run_children, stop_with_parent
from .diffusion_config import DiffusionRunConfig
from .encode import encode
from .evaluate import evaluate_generation, evaluate_reconstruction
from .prepare import prepare
from .report import report
from .run_config import AutoencoderRunConfig
from .sample import sample
from .sample_images import SampleOptions
from .train_autoencoder import train_autoencoder
from .train_diffusion import train_diffusion

VARIANTS = {
    "kl-4": [],
    "bounded-16": [
        "model.channels=16",
        "model.bottleneck.kind=bounded",
        "model.bottleneck.bound=3",
        "model.perturbations=[{kind: gaussian, std: 0.1}]",
    ],
}
"""What distinguishes the variants: overrides of ``ae-tiny``."""


@dataclass(frozen=True)
class Plan:
    """How much of everything, and what this machine offers; the same for both variants.

    The numbers are a budget of about 390 CPU-seconds per variant in float32, one core each, or 6.5 minutes: 130 for the
    autoencoder (0.13 a step), 15 to encode, 155 for the denoiser (0.12 a step), 15 to sample, 65 to measure, 10 to
    start. bf16 takes a fourth off the training where the CPU has instructions for it.
    """

    images: int = 4096
    size: int = 32
    autoencoder_steps: int = 1000
    diffusion_steps: int = 1300
    evaluated: int = 256
    mixed_precision: MixedPrecision = "no"
    lpips: bool = True

    @classmethod
    def scaled(cls, scale: float, **machine: Any) -> Plan:
        """Return the plan with ``scale`` times the images and steps, but enough of each to pass through every step."""
        full = cls()
        return cls(
            images=max(32, round(full.images * scale)),
            autoencoder_steps=max(2, round(full.autoencoder_steps * scale)),
            diffusion_steps=max(2, round(full.diffusion_steps * scale)),
            evaluated=max(16, round(full.evaluated * scale)),
            **machine,
        )

    def autoencoder_overrides(self, variant: str) -> list[str]:
        """Return the overrides of ``ae-tiny``: a lighter encoder, a fast schedule, and LPIPS by AlexNet.

        AlexNet costs a twentieth of VGG16, which would take half of the budget. With betas of (0.5, 0.9), the usual
        choice beside a GAN, PSNR after 300 steps was 1.3 dB lower.
        """
        return [
            *VARIANTS[variant],
            "model.encoder.num_res_blocks=1",
            "objective.lpips.net=alex",
            f"objective.lpips.weight={0.5 if self.lpips else 0.0}",
            "objective.lpips.share=0.5",
            f"train.steps={self.autoencoder_steps}",
            "train.batch_size=16",
            "train.learning_rate.peak=3e-3",
            "train.learning_rate.warmup_steps=30",
            "train.betas=[0.9,0.99]",
            "train.ema.half_life_images=1000",
            "train.log_every=10",
            "train.checkpoint_every=200",
            f"train.sample_every={self.autoencoder_steps}",
        ]

    def diffusion_overrides(self) -> list[str]:
        """Return the overrides of ``unet-tiny``."""
        return [
            f"train.steps={self.diffusion_steps}",
            "train.batch_size=32",
            "train.learning_rate.peak=1e-3",
            "train.learning_rate.warmup_steps=50",
            "train.learning_rate.decay=cosine",
            "train.log_every=10",
            "train.checkpoint_every=200",
            f"train.sample_every={self.diffusion_steps}",
        ]


SAMPLER = "dpmpp_2m"
SAMPLER_STEPS = 20

REPEATS = 10
"""Of the test for the faster precision; the fastest counts."""


def demo(out: Path = Path("demo"), *, scale: float = 1.0, processes: int | None = None) -> Path:
    """Run all of it into ``out`` and return the path of the report.

    Without the weights of LPIPS the autoencoders train without it, and without those of Inception there is no FID; the
    report says so. bf16 autocast is used in training where a quick test finds it faster, as on CPUs with AVX512-BF16.

    Args:
        out: folder for everything; run again with the same folder, an unfinished demo goes on.
        scale: share of the images and steps, for a test of the way through; the pictures need 1.
        processes: 1 runs one variant after the other in this process, 2 runs both at a time; by default by the cores.

    Raises:
        WavelatentError: a step failed; the message names the log.
        Stopped: on SIGTERM or SIGINT, with everything saved.
    """
    out = Path(out)
    plan = _plan(out, scale)
    print(
        f"demo in {out}: prepare, then train, encode, train, sample and measure {' and '.join(VARIANTS)}",
        file=sys.stderr,
    )
    prepare(f"synthetic:{plan.images}", plan.size, out / "faces", num_workers=min(2, _cores()))
    if (processes or min(2, _cores())) == 1:
        for variant in VARIANTS:
            run_variant(out, variant, plan)
    else:
        arguments = {variant: [str(out), variant] for variant in VARIANTS}
        run_children(arguments, out / "logs", threads=max(1, _cores() // len(VARIANTS)))
    runs = [out / variant / stage for variant in VARIANTS for stage in ("autoencoder", "diffusion")]
    return report(
        runs,
        out / "report",
        title="wavelatent demo: two autoencoders, one pipeline",
        notes=[_note(plan)],
        data=str(out / "faces"),
        commands=["wavelatent demo", *commands(plan)],
    )


def _note(plan: Plan) -> str:
    lpips = "" if plan.lpips else " LPIPS was left out of the training, because its weights could not be had."
    return (
        "A demonstration that everything runs: minutes of training on drawn faces. The pictures show that the parts "
        f"work together, and the figures are far from what longer training gives.{lpips}"
    )


def _plan(out: Path, scale: float) -> Plan:
    """Return the plan of the demo in ``out``: what an earlier start decided, or what suits this machine."""
    file = out / "demo.json"
    if file.is_file():
        return Plan(**json.loads(file.read_text(encoding="utf-8")))
    plan = Plan.scaled(scale, mixed_precision=faster_precision(), lpips=_weights("alex"))
    _weights("inception")
    write_atomically(file, json.dumps(asdict(plan), indent=2) + "\n")
    return plan


def _weights(name: Any) -> bool:
    """Fetch a metric network's weights; say so where they cannot be had."""
    try:
        load_weights(name)
    except MissingWeightsError as error:
        print(f"going on without: {error}", file=sys.stderr)
        return False
    return True


def faster_precision() -> MixedPrecision:
    """Return ``bf16`` where this CPU runs a small convolution at least a sixth faster in it, else ``no``.

    By the processor time of one thread, which other work on the machine changes little.
    """

    def seconds(enabled: bool) -> float:
        images = torch.zeros(16, 32, 32, 32)
        layer = torch.nn.Conv2d(32, 32, 3, padding=1)
        times = []
        for _ in range(REPEATS):
            start = time.thread_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                layer(images)
            times.append(time.thread_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return "bf16" if seconds(True) < 0.83 * seconds(False) else "no"
    finally:
        torch.set_num_threads(threads)


def run_variant(out: Path, variant: str, plan: Plan) -> None:
    """Take one variant through both stages and both evaluations; what is done already is left as it is."""
    folder, faces = out / variant, str(out / "faces")
    options = RuntimeOptions(device="cpu", mixed_precision=plan.mixed_precision)
    train_autoencoder(
        load_config(AutoencoderRunConfig, "ae-tiny", plan.autoencoder_overrides(variant)),
        data=open_data(faces),
        out=folder / "autoencoder",
        options=options,
    )
    encode(str(folder / "autoencoder"), faces, folder / "latents", flips=True, device="cpu")
    train_diffusion(
        load_config(DiffusionRunConfig, "unet-tiny", plan.diffusion_overrides()),
        latents=folder / "latents",
        out=folder / "diffusion",
        options=options,
    )
    sample(
        folder / "diffusion",
        folder / "samples",
        range(plan.evaluated),
        SampleOptions(Sampling(SAMPLER, SAMPLER_STEPS)),
        device="cpu",
    )
    evaluate_reconstruction(str(folder / "autoencoder"), faces, num_images=plan.evaluated, device="cpu")
    try:
        evaluate_generation(
            samples=folder / "samples",
            data=faces,
            num_reference=plan.evaluated,
            out=folder / "diffusion" / "evaluation-generation",
            device="cpu",
        )
    except MissingWeightsError as error:
        print(f"no FID: {error}", file=sys.stderr)


def run_child() -> None:
    """Run the variant that the command line names: what each process of the demo does. See :mod:`.demo_processes`."""
    out, variant = Path(sys.argv[1]), sys.argv[2]
    stop_with_parent(sys.stdin.buffer)
    try:
        with FileLock(out / f".{variant}.lock"):  # a child of a killed demo may still be saving
            run_variant(out, variant, _plan(out, 1.0))
    except WavelatentError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def commands(plan: Plan) -> list[str]:
    """Return the command lines that do what the demo does, in a folder of one's own."""
    precision = f" --mixed-precision {plan.mixed_precision}" if plan.mixed_precision != "no" else ""
    lines = [f"wavelatent prepare --data synthetic:{plan.images} --size {plan.size} --out faces"]
    for variant in VARIANTS:
        overrides = shlex.join(plan.autoencoder_overrides(variant))
        lines += [
            f"wavelatent train-ae ae-tiny {overrides} --data faces --out {variant}/autoencoder{precision}",
            f"wavelatent encode --ae {variant}/autoencoder --data faces --out {variant}/latents --flips",
            f"wavelatent train-diffusion unet-tiny {shlex.join(plan.diffusion_overrides())} "
            f"--latents {variant}/latents --out {variant}/diffusion{precision}",
            f"wavelatent sample --run {variant}/diffusion --out {variant}/samples --num {plan.evaluated} "
            f"--sampler {SAMPLER} --steps {SAMPLER_STEPS}",
            f"wavelatent evaluate reconstruction --ae {variant}/autoencoder --data faces --num-images {plan.evaluated}",
            f"wavelatent evaluate generation --samples {variant}/samples --data faces "
            f"--num-reference {plan.evaluated} --out {variant}/diffusion/evaluation-generation",
        ]
    runs = " ".join(f"{variant}/autoencoder {variant}/diffusion" for variant in VARIANTS)
    return [*lines, f"wavelatent report {runs} --data faces --out report"]


def _cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
