"""The images of a stage-two run in memory: what decides them, and the one function that draws them.

The image of a seed is the same whatever else is drawn. Its noise and its class come from the seed alone, but that is
not enough: a library chooses its kernels by the shape of a batch, kernels add up in different orders, and a difference
in the last bit turns a pixel value that lies halfway. Measured with PyTorch 2.13 on a CPU, an image differs between
passes of 1, 2, 4 and 16 rows, and not at all with its place in a pass nor with the images beside it. So every pass of
the denoiser and of the decoder has :attr:`SampleOptions.pass_rows` rows, the last one filled up with repeats, however
many images are asked for at a time and by however many processes.

That makes images equal to the bit on one kind of device, with one number of threads per process and the same versions
of the libraries; nothing more is promised. (The number of threads may choose a kernel too: passes of 16 rows were equal
with 1 and 2 threads, those of 8 were not. ``torchrun`` gives each process one thread unless ``OMP_NUM_THREADS`` says
otherwise.)
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.config import parse_yaml
from ..common.errors import Diverged, UsageError, WavelatentError
from ..common.images import to_uint8
from ..common.runtime import MixedPrecision, autocast, resolve_device
from ..stage1_autoencoder.autoencoder import Autoencoder
from ..stage1_autoencoder.tiling import TiledAutoencoder, tiled
from ..stage2_diffusion.generation import (
    draw_labels,
    evaluations,
    generate_interpolation,
    generate_latents,
    guided_denoiser,
)
from ..stage2_diffusion.model import LatentDiffusion
from ..stage2_diffusion.sampling import DEFAULT_SAMPLING, Sampling
from .diffusion_run import load_best, load_diffusion, read_inputs, recorded_autoencoder
from .ema_snapshots import load_diffusion_at_width

EMAChoice = float | Literal["best"]
"""The average with which to sample: by its width, or the one that was best when it was measured."""


@dataclass(frozen=True)
class SampleOptions:
    """What decides the images besides the run and the seeds.

    Attributes:
        sampling: sampler, noise levels and guidance.
        label: the class of every image; by default a class-conditional run draws one uniformly by the seed.
        ema: width of the average of the weights, or ``best``, the model of the run's best measurement; None is the one
            in the run's model folder.
        ema_step: training step of that average, rebuilt from the run's snapshots; None is the last.
        guide: run of the weaker model of autoguidance, which may be the run itself; ``sampling.guidance`` is then its
            weight.
        guide_ema: as ``ema``, of the weaker run.
        guide_step: as ``ema_step``, of the weaker run.
        mixed_precision: the precision that all networks run in.
        tile: decode in tiles of so many pixels (:mod:`..stage1_autoencoder.tiling`), for images that do not fit in
            memory.
        pass_rows: images per pass of the networks; more are faster on a GPU, fewer need less memory.
    """

    sampling: Sampling = DEFAULT_SAMPLING
    label: int | None = None
    ema: EMAChoice | None = None
    ema_step: int | None = None
    guide: Path | None = None
    guide_ema: EMAChoice | None = None
    guide_step: int | None = None
    mixed_precision: MixedPrecision = "no"
    tile: int | None = None
    pass_rows: int = 16

    def __post_init__(self) -> None:
        if self.pass_rows < 1:
            raise UsageError(f"--pass-rows {self.pass_rows}: a pass has at least 1 row")
        for option, value in (("--guide-ema", self.guide_ema), ("--guide-step", self.guide_step)):
            if self.guide is None and value is not None:
                raise UsageError(f"{option} has no effect here: give the weaker run too, as --guide RUN")
        for option, ema, step in (("ema", self.ema, self.ema_step), ("guide", self.guide_ema, self.guide_step)):
            if ema == "best" and step is not None:
                width = "--ema" if option == "ema" else "--guide-ema"
                raise UsageError(f"--{option}-step has no effect on {width} best, which has its own: leave one out")
        if self.guide is not None and self.sampling.guidance == 1:
            raise UsageError("--guide has no effect at guidance 1: give its weight too, such as --guidance 2")

    def protocol(self) -> dict[str, Any]:
        """Return, as JSON values, what of a protocol follows from the options alone, whatever the run."""
        sampling = {name: _plain(value) for name, value in asdict(self.sampling).items()}
        return {
            **sampling,
            "mixed_precision": self.mixed_precision,
            "tile": self.tile,
            "pass_rows": self.pass_rows,
        }


DEFAULT_OPTIONS = SampleOptions()


def take_options(arguments: dict[str, Any]) -> SampleOptions:
    """Take the fields of `SampleOptions` and of its `Sampling` out of ``arguments``; None there is the default."""

    def given(kind: type[Sampling] | type[SampleOptions]) -> dict[str, Any]:
        names = [field.name for field in fields(kind) if field.name != "sampling"]
        values = {name: arguments.pop(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    sampling, options = Sampling(**given(Sampling)), given(SampleOptions)
    options |= {name: ema_choice(options[name], name) for name in ("ema", "guide_ema") if name in options}
    return SampleOptions(sampling, **options)


class ImageSampler:
    """Draws the images of one run in one way.

    Args:
        run: run folder of ``train-diffusion``.
        options: what else decides the images.
        device: where to draw them.
        autoencoder: the recorded autoencoder, where it is no longer at the recorded path.

    Raises:
        UsageError: a label that the run has no class for, guidance that it cannot have, or a weaker model that does
            not suit it.
        WavelatentError: the run has no model yet.
    """

    def __init__(
        self,
        run: Path,
        options: SampleOptions = DEFAULT_OPTIONS,
        *,
        device: str | torch.device = "auto",
        autoencoder: str | Autoencoder | None = None,
    ) -> None:
        self.run, self.options = run, options
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self._inputs = read_inputs(run)
        self._autoencoder = autoencoder
        self.model = _load(run, options.ema, options.ema_step).to(self.device)
        self.weaker = None
        if options.guide is not None:
            self.weaker = _load(options.guide, options.guide_ema, options.guide_step).to(self.device)
        if options.label is not None and not 0 <= options.label < self.model.num_classes:
            has = f"the classes 0 to {self.model.num_classes - 1}" if self.model.num_classes else "no classes"
            raise UsageError(f"label {options.label}: this run was trained with {has}")
        guided_denoiser(self.model, self.labels([0]), options.sampling, self.weaker)  # refuses what cannot be
        if options.sampling.guidance != 1 and self.weaker is None:
            self._require_unconditional(run, "guide it by another run with --guide")
        if options.guide is not None and self.weaker is not None and self.weaker.num_classes > self.model.num_classes:
            self._require_unconditional(options.guide, "give one without classes")

    def _require_unconditional(self, run: Path, advice: str) -> None:
        if not _train_config(run)["label_dropout"]:
            raise UsageError(
                f"--guidance {self.options.sampling.guidance}: {run} was trained with label_dropout 0 and has no "
                f"unconditional output; {advice}"
            )

    @cached_property
    def decoder(self) -> Autoencoder | TiledAutoencoder:
        """The autoencoder that the run records.

        Raises :class:`WavelatentError` where it is missing or has changed, and :class:`UsageError` for a tile that does
        not suit it.
        """
        autoencoder = recorded_autoencoder(self._inputs["autoencoder"], self._autoencoder)
        decoder = tiled(autoencoder.to(self.device), self.options.tile)
        if isinstance(decoder, TiledAutoencoder):
            print(decoder.describe("decode"), file=sys.stderr)
        return decoder

    def protocol(self) -> dict[str, Any]:
        """Return everything that decides the image of a seed, as ``samples.json`` and ``metrics.json`` record it."""
        options = self.options
        by_seed = "uniform by seed" if self.model.num_classes else None
        return {
            "run": str(self.run.resolve()),
            "model_sha256": self._hashes[0],
            "autoencoder_fingerprint": self._inputs["autoencoder"]["fingerprint"],
            **options.protocol(),
            "evaluations": evaluations(options.sampling, self.model.objective),
            "ema": _width(self.run, options.ema),
            "ema_step": options.ema_step,
            "guide": None if options.guide is None else str(options.guide.resolve()),
            "guide_ema": None if options.guide is None else _width(options.guide, options.guide_ema),
            "guide_step": options.guide_step,
            "guide_sha256": self._hashes[1],
            "guided_by": self._guided_by,
            "label": by_seed if options.label is None else options.label,
        }

    @property
    def _guided_by(self) -> str | None:
        if self.options.sampling.guidance == 1:
            return None
        return "its unconditional output" if self.weaker is None else "a weaker model"

    @cached_property
    def _hashes(self) -> tuple[str, str | None]:
        return weights_sha256(self.model), None if self.weaker is None else weights_sha256(self.weaker)

    def identity(self) -> str:
        """Return the hashes of all weights that decide an image."""
        return f"{self._hashes} {self._inputs['autoencoder']['fingerprint']}"

    def labels(self, seeds: Sequence[int]) -> Tensor | None:
        """Return the classes ``[len(seeds)]`` of the images of ``seeds``; None where the run has no classes."""
        if self.options.label is not None:
            return torch.full((len(seeds),), self.options.label)
        return draw_labels(seeds, self.model.num_classes) if self.model.num_classes else None

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Return the images of ``seeds``, uint8 ``[len(seeds), 3, H, W]`` on the CPU."""
        parts = [self._pass(list(seeds[at : at + self._rows])) for at in range(0, len(seeds), self._rows)]
        return torch.cat(parts)

    def interpolate(self, seed_pair: tuple[int, int], points: int) -> Tensor:
        """Return ``points`` images that lead from one seed to another, uint8 ``[points, 3, H, W]`` on the CPU.

        Up to rounding its ends are the images of the two seeds, with one exception: a class cannot be interpolated, so
        that where each seed has its own all points have the first one's. See :func:`generate_interpolation`.
        """
        labels = self.labels(seed_pair[:1])
        with self._inference():
            latents = generate_interpolation(
                self.model,
                seed_pair,
                points,
                labels=None if labels is None else labels.expand(points),
                sampling=self.options.sampling,
                weaker=self.weaker,
                pass_rows=self._rows,
            )
            images = [self._decode(latents[at : at + self._rows]) for at in range(0, points, self._rows)]
        return torch.cat(images)[:points]

    @property
    def _rows(self) -> int:
        return self.options.pass_rows

    def _pass(self, seeds: list[int]) -> Tensor:
        filled = seeds + seeds[-1:] * (self._rows - len(seeds))
        with self._inference():
            latents = generate_latents(
                self.model,
                filled,
                labels=self.labels(filled),
                sampling=self.options.sampling,
                weaker=self.weaker,
            )
            return self._decode(latents)[: len(seeds)]

    def _decode(self, latents: Tensor) -> Tensor:
        missing = self._rows - len(latents)
        filled = torch.cat([latents, latents[-1:].expand(missing, -1, -1, -1)]) if missing else latents
        return finite_pixels(self.decoder.decode(filled).float()).cpu()[: len(latents)]

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Run the block without gradients, in the asked precision, with advice where memory runs out."""
        try:
            with torch.inference_mode(), autocast(self.device, self.options.mixed_precision):
                yield
        except torch.OutOfMemoryError as error:
            raise WavelatentError(f"out of memory: lower --pass-rows {self._rows}, or give --tile") from error


def whole_passes(batch_size: int, pass_rows: int) -> int:
    """Return the least multiple of ``pass_rows`` that is no less than ``batch_size``."""
    return -(-batch_size // pass_rows) * pass_rows


def finite_pixels(images: Tensor) -> Tensor:
    """Return decoded images ``[B, 3, H, W]`` in [-1, 1] as uint8.

    Raises :class:`Diverged` where one is not finite, which 8 bits would show, and a metric measure, as black.
    """
    if not images.isfinite().all():
        raise Diverged(
            "a sample is not finite: sample with --mixed-precision no, lower --guidance, or train the run again"
        )
    return to_uint8(images)


def weights_sha256(model: LatentDiffusion) -> str:
    """Return the SHA-256 over names, types, shapes and values of a model's weights and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def ema_choice(text: str, option: str = "ema") -> EMAChoice:
    """Parse a width or ``best``. Raises :class:`UsageError` naming the option."""
    if text == "best":
        return "best"
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--{option.replace('_', '-')} {text}: give a width, such as 0.05, or best") from error


def _load(run: Path, ema: EMAChoice | None, step: int | None) -> LatentDiffusion:
    width = _width(run, ema)
    if width == "best":
        return load_best(run)
    if ema is None and step is None:
        return load_diffusion(run)
    return load_diffusion_at_width(run, width, at_step=step)


def _width(run: Path, ema: EMAChoice | None) -> EMAChoice:
    """Return the average that is meant: ``ema``, or the first that the run was trained with."""
    first: float = _train_config(run)["ema"]["widths"][0]
    return first if ema is None else ema


def _train_config(run: Path) -> dict[str, Any]:
    config = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
    if "widths" not in config["train"]["ema"]:
        raise WavelatentError(f"{run} was trained by an older version, whose averages were others: train it again")
    return config["train"]


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON knows it: no tuples, and None for a bound at infinity."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value
