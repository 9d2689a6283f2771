"""A quick FID and KID of a model in training, by all of its processes together.

Small numbers of images make FID large: a quick one is for comparing the steps of one run, and runs with the same
settings, and is never put beside ``evaluate``'s. KID has no such bias.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common.distributed_features import from_main, in_agreement, shared_features, shared_reference
from ..common.errors import Diverged, UsageError, WavelatentError
from ..common.feature_distances import FeatureStatistics, frechet_distance, kernel_distance
from ..common.images import ImageData, open_data
from ..common.inception import InceptionFeatures
from ..common.latent_cache import Manifest
from ..common.reference_cache import ReferenceCache
from ..common.reference_features import Reference
from ..common.runtime import autocast
from ..stage2_diffusion.generation import draw_labels, generate_latents
from ..stage2_diffusion.model import LatentDiffusion
from ..stage2_diffusion.sampling import DEFAULT_SAMPLING, Sampling
from .sample_images import finite_pixels

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..stage2_diffusion.trainer import Decode

LogEvent = Callable[[int, str, str], None]
"""Step, name and message of an event, as :meth:`~wavelatent.common.run_folder.RunFolder.log_event` takes them."""

SMALLEST = 4
"""Images on a side: KID compares subsets of at least 2, half of the smaller set."""


class QuickEvaluation:
    """Measures a model every so many steps; every process of a run makes one, and calls it at the same steps.

    All processes sample, decode and extract equal shares, and agree before every collective: none waits long for
    another, or at all for one that failed. Where anything cannot be had in any process (Inception's weights, the
    autoencoder, images that are neither in the reference cache nor where they were), the main process says so in one
    line and there are no figures for the rest of the run; training goes on. Samples that are not finite cost this one
    measurement, which is said and logged too. It draws from no global generator.

    Args:
        manifest: of the latent cache that the model is trained on; its images are the reference.
        decode: raw latents to images, in every process; None where the autoencoder is gone.
        accelerator: of the run. Sampling is in its precision, the decoder and all figures are in float32.
        num_samples: the seeds 0 to ``num_samples - 1``; a model with classes draws each one's class by its seed.
        num_reference: how many images, the first of ``evaluate``'s order, whose cache is shared; None, or more than
            there are, is all. The 5000 cost minutes on a GPU-less machine, once, and leave the noise of the samples,
            which are fewer, the larger part.
        batch_size: images per pass, in each process.
        sampling: how the samples are drawn.
        log_event: takes down a measurement that was left out.

    Raises:
        UsageError: fewer than 4 samples or reference images, of which there is no KID.
    """

    def __init__(
        self,
        manifest: Manifest,
        decode: Decode | None,
        accelerator: Accelerator,
        *,
        num_samples: int = 1000,
        num_reference: int | None = 5000,
        batch_size: int = 64,
        sampling: Sampling = DEFAULT_SAMPLING,
        log_event: LogEvent | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.num_reference = min(num_reference or manifest.count, manifest.count)
        if min(num_samples, self.num_reference) < SMALLEST:
            raise UsageError(
                f"a quick FID of {num_samples} samples against {self.num_reference} images: "
                f"ask for at least {SMALLEST} of each, or for none"
            )
        self.data, self.decode, self.accelerator = manifest.data, decode, accelerator
        self.batch_size, self.sampling, self.log_event = batch_size, sampling, log_event
        self._reference: Reference | None = None
        self._given_up = False

    def __call__(self, model: LatentDiffusion, step: int) -> dict[str, float] | None:
        """Return ``quick_fid``, ``quick_kid`` and ``quick_seconds`` (what it took), in every process the same.

        ``model`` is on the accelerator's device and comes back in the modes that its modules were in. None where
        there are no figures; why is said once.
        """
        if self._given_up:
            return None
        try:
            with torch.no_grad(), autocast(self.accelerator.device, "no"), evaluating(model):
                return self._measure(model)
        except Diverged:  # as the next, in every process; later weights may do better
            self._skip(step)
            return None
        except WavelatentError as error:  # every process has this one
            self._given_up, self._reference = True, None
            if self.accelerator.is_main_process:
                tqdm.write(f"no quick FID at step {step} and after: {error}", file=sys.stderr)
            return None
        finally:
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    def _skip(self, step: int) -> None:
        message = f"no quick FID at step {step}: a sample is not finite"
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)
            if self.log_event is not None:
                self.log_event(step, "quick_evaluation_skipped", message)

    def _measure(self, model: LatentDiffusion) -> dict[str, float]:
        begin = time.monotonic()
        accelerator = self.accelerator
        extractor = in_agreement(accelerator, self._extractor)  # kept for this call only: it is 90 MB
        if self._reference is None:
            cache = ReferenceCache(self.data.fingerprint, extractor)
            self._reference = shared_reference(
                accelerator, extractor, cache, self._open_images, self.num_reference, self.batch_size
            )
        reference = self._reference

        def samples(seeds: range) -> Tensor:
            return self._samples(model, seeds)

        features = shared_features(accelerator, extractor, samples, self.num_samples, self.batch_size, "quick FID")
        # Everywhere: the main process alone would keep the others waiting.
        fid, kid = in_agreement(accelerator, lambda: _distances(features, reference))
        values = torch.tensor([fid, kid, time.monotonic() - begin], dtype=torch.float64)
        return dict(
            zip(("quick_fid", "quick_kid", "quick_seconds"), from_main(accelerator, values).tolist(), strict=True)
        )

    def _extractor(self) -> InceptionFeatures:
        if self.decode is None:
            raise WavelatentError("the autoencoder that made the latents is not to be had: put it back and run again")
        return InceptionFeatures(self.accelerator.device)

    def _open_images(self) -> ImageData:
        """Open the images that the latents were made from, or raise :class:`WavelatentError`."""
        data, transform = self.data, self.data.transform
        images = open_data(
            data.spec,
            size=transform.get("size"),
            resize_filter=transform.get("filter") or "lanczos",
            max_bad_fraction=1.0,  # the fingerprint decides
        )
        if images.fingerprint() != data.fingerprint:
            raise WavelatentError(
                f"{data.spec} has changed since the latents were made from it: put it back and run again"
            )
        return images

    def _samples(self, model: LatentDiffusion, seeds: range) -> Tensor:
        """Return the images of ``seeds``, uint8 ``[B,3,H,W]``."""
        assert self.decode is not None, "seen to by _extractor"
        labels = draw_labels(seeds, model.num_classes) if model.num_classes else None
        with autocast(self.accelerator.device, self.accelerator.mixed_precision):
            raw = generate_latents(model, seeds, labels=labels, sampling=self.sampling)
        return finite_pixels(self.decode(raw))


def _distances(features: Tensor, reference: Reference) -> tuple[float, float]:
    fid = frechet_distance(FeatureStatistics.of(features), reference.statistics)
    return fid, kernel_distance(features, reference.features).mean


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode for the block, and then back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
