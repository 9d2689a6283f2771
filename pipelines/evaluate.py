"""``evaluate``: measures an autoencoder's reconstructions, or generated samples, against a data set."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import UsageError, WavelatentError
from ..common.evaluation import Measurement, Result, measure_generation, measure_reconstruction
from ..common.images import ImageData, open_data, to_float, to_uint8
from ..common.inception import FEATURES_NAME, RESIZE_NAME, InceptionFeatures
from ..common.lpips_metric import LpipsNet, PerceptualDistance
from ..common.metric_weights import MissingWeightsError
from ..common.reference_features import choose_images, reference_features, stoppable, uint8_batches
from ..common.runtime import MixedPrecision, StopRequest, autocast, check_precision, environment, resolve_device
from ..stage1_autoencoder.tiling import TiledAutoencoder, tiled
from .loading import load_autoencoder
from .sample_images import DEFAULT_OPTIONS, SampleOptions
from .sample_sources import RunSamples, SampleFolder, SampleSource

if TYPE_CHECKING:
    from ..stage1_autoencoder.autoencoder import Autoencoder


def evaluate_reconstruction(
    ae: str,
    data: str,
    *,
    out: Path | None = None,
    num_images: int | None = None,
    size: int | None = None,
    max_bad_fraction: float = 0.01,
    batch_size: int = 32,
    lpips_net: LpipsNet = "alex",
    seed: int = 0,
    device: str = "auto",
    mixed_precision: MixedPrecision = "no",
    overwrite: bool = False,
    tile: int | None = None,
) -> Result:
    """Measure rFID, PSNR, SSIM and LPIPS of ``ae`` on ``data``, through the posterior's mode and uint8 images.

    The reference of rFID is the very images that were reconstructed. Without the Inception or LPIPS weights the other
    figures are still given, and ``not_computed`` says why. A measurement that is already there, of the same
    autoencoder, data and protocol, is returned as it is.

    Args:
        ae: autoencoder, as on the command line.
        data: data set, as on the command line.
        out: folder (or ``.json`` file) for ``metrics.json``; by default ``evaluation-reconstruction`` in the
            autoencoder's folder, and nothing is saved for one that has no folder.
        num_images: how many images, the first of the order drawn from ``seed``; None is all.
        size: side of the images in pixels; None is the data's own.
        max_bad_fraction: how many unreadable or too small files of ``data`` may be skipped.
        batch_size: images per pass, of the autoencoder and of the metrics.
        lpips_net: ``alex``, usual in tables, or ``vgg``. Papers often do not say which they used.
        seed: draws the order of the images.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        mixed_precision: of the autoencoder; metrics are always computed in float32.
        overwrite: measure again.
        tile: encode and decode in tiles of so many pixels (:mod:`..stage1_autoencoder.tiling`), for images that do not
            fit in memory; the protocol records it.

    Raises:
        UsageError: the size of the images or of ``tile`` does not suit the autoencoder, or there are fewer images than
            asked for.
        Stopped: by SIGTERM or SIGINT; what has been extracted of the reference is kept.
    """
    begin = time.monotonic()
    place = resolve_device(device)
    check_precision(place, mixed_precision)
    images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
    indices = choose_images(len(images), num_images, seed)
    autoencoder = tiled(load_autoencoder(ae).to(place), tile)
    _check_divides(images.size, autoencoder.downsampling)
    how: dict[str, Any] = {"mixed_precision": mixed_precision}
    if isinstance(autoencoder, TiledAutoencoder):
        print(autoencoder.describe("encode", "decode"), file=sys.stderr)
        how["tile"] = autoencoder.tile
    protocol = {
        **_protocol(images, num_reference=len(indices), seed=seed),
        "autoencoder": {"path": ae, "fingerprint": autoencoder.fingerprint(), **how},
        "latents": "posterior mode",
        "lpips_net": lpips_net,
    }
    folder = Path(ae) / "evaluation-reconstruction" if Path(ae).is_dir() else None
    path = _result_path(out, folder)
    if not overwrite and (done := _finished(path, protocol)):
        return done
    missing: dict[str, str] = {}
    lpips = _lpips(lpips_net, place, missing)
    extractor = _inception(place, missing)
    reference = None
    with StopRequest() as stop:
        if extractor is not None:
            protocol["weights_sha256"] = extractor.weights_sha256
            reference = reference_features(
                images, extractor, num=num_images, seed=seed, batch_size=batch_size, stop=stop
            )
        pairs = _reconstructions(autoencoder, images, indices, batch_size, place, mixed_precision)
        measured = measure_reconstruction(
            stoppable(pairs, stop), reference=reference, extractor=extractor, lpips=lpips, total=len(indices)
        )
    measured.not_computed.update(missing)
    return _finish(measured, protocol, path, begin)


def evaluate_generation(
    *,
    data: str,
    samples: Path | None = None,
    run: Path | None = None,
    num: int | None = None,
    seeds: Sequence[int] | None = None,
    options: SampleOptions = DEFAULT_OPTIONS,
    out: Path | None = None,
    num_reference: int | None = None,
    size: int | None = None,
    max_bad_fraction: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
    reference_seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> Result:
    """Measure FID, KID, precision and recall of samples in a folder, or drawn here from a run, against ``data``.

    Args:
        data: the reference, as on the command line.
        samples: a folder of lossless images of one size, such as ``sample`` writes. Either this or ``run``.
        run: a stage-2 run folder; its samples are drawn in memory.
        num: how many samples; None is every one in the folder. A run needs it, or ``seeds``.
        seeds: the seeds to sample a run with; None is ``num`` of them from ``seed`` on.
        options: what decides the samples of a run besides the seeds, as in ``sample``.
        out: folder (or ``.json`` file) for ``metrics.json``; by default in the samples' folder, or
            ``evaluation-generation`` in the run's.
        num_reference: how many reference images, the first of the order drawn from ``reference_seed``; None is all.
        size: side of the reference images in pixels; None is the data's own.
        max_bad_fraction: how many unreadable or too small files of ``data`` may be skipped.
        batch_size: images per pass of the metrics; ``options.pass_rows`` is that of the sampling.
        seed: the first seed to sample a run with, as in ``sample``.
        reference_seed: draws the order of the reference images; another order is another cache entry.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: measure again.

    Raises:
        UsageError: not exactly one of ``samples`` and ``run``, or no number of samples for a run.
        WavelatentError: samples of another size than the reference, lossy, unreadable, or fewer than asked for.
        MissingWeightsError: there are no Inception weights, so nothing here can be computed.
        Stopped: by SIGTERM or SIGINT; what has been extracted of the reference is kept.
    """
    begin = time.monotonic()
    place = resolve_device(device)
    check_precision(place, options.mixed_precision)
    images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
    source: SampleSource
    if samples is not None and run is None:
        source, folder = SampleFolder(samples, num), samples
    elif run is not None and samples is None:
        source = RunSamples(run, _seeds(num, seeds, seed), options, device=place)
        folder = run / "evaluation-generation"
    else:
        raise UsageError("give either --samples DIR, or --run RUN with --num N")
    reference_count = len(choose_images(len(images), num_reference, reference_seed))
    protocol = {**_protocol(images, num_reference=reference_count, seed=reference_seed), **source.protocol()}
    path = _result_path(out, folder)
    if not overwrite and (done := _finished(path, protocol)):
        return done
    extractor = InceptionFeatures(place)
    protocol["weights_sha256"] = extractor.weights_sha256
    with StopRequest() as stop:
        stream = _one_size(source.batches(batch_size), images)
        first = next(stream)  # a wrong size shows before the reference is paid for
        reference = reference_features(
            images, extractor, num=num_reference, seed=reference_seed, batch_size=batch_size, stop=stop
        )
        measured = measure_generation(
            stoppable(itertools.chain([first], stream), stop),
            reference=reference,
            extractor=extractor,
            total=len(source),
        )
    return _finish(measured, protocol, path, begin)


def _seeds(num: int | None, seeds: Sequence[int] | None, first: int) -> Sequence[int]:
    if seeds is None and num is None:
        raise UsageError("--run needs --num N: how many samples to draw")
    chosen = range(first, first + (num or 0)) if seeds is None else seeds[:num]
    if not chosen or (num is not None and len(chosen) < num):
        raise UsageError(f"--num {num}: ask for at least 1 sample, and no more than there are seeds")
    return chosen


def _one_size(batches: Iterator[Tensor], images: ImageData) -> Iterator[Tensor]:
    for batch in batches:
        height, width = batch.shape[-2:]
        if (height, width) != (images.size, images.size):
            raise WavelatentError(
                f"the samples are {width}x{height} px and the reference {images.spec} is {images.size}: "
                f"FID compares images of one size; give --size {height}, or a reference prepared at it"
            )
        yield batch


def _reconstructions(
    autoencoder: Autoencoder | TiledAutoencoder,
    images: ImageData,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
    mixed_precision: MixedPrecision,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs (originals, reconstructions), uint8 on ``device``: all metrics are computed there."""
    for batch in uint8_batches(images, batch_size, indices):
        originals = batch.to(device)
        with torch.no_grad(), autocast(device, mixed_precision):
            decoded = autoencoder.decode(autoencoder.encode(to_float(originals)).mode())
        yield originals, to_uint8(decoded)


def _check_divides(size: int, factor: int) -> None:
    if size % factor:
        nearest = max(factor, size // factor * factor)
        raise UsageError(
            f"images of {size} px do not divide by the autoencoder's downsampling factor {factor}; use --size {nearest}"
        )


def _lpips(net: LpipsNet, device: torch.device, missing: dict[str, str]) -> PerceptualDistance | None:
    try:
        return PerceptualDistance(net).to(device)
    except MissingWeightsError as error:
        missing["lpips"] = str(error)
        return None


def _inception(device: torch.device, missing: dict[str, str]) -> InceptionFeatures | None:
    try:
        return InceptionFeatures(device)
    except MissingWeightsError as error:
        missing["rfid"] = str(error)
        return None


def _protocol(images: ImageData, *, num_reference: int, seed: int) -> dict[str, Any]:
    """Return what is known before anything is measured, and what a figure must not be compared across."""
    return {
        "num_reference": num_reference,
        "features": FEATURES_NAME,
        "weights_sha256": None,
        "resize": {"data": images.transform.get("filter"), "features": RESIZE_NAME},
        "crop": images.transform.get("crop"),
        "size": images.size,
        "reference": images.spec,
        "reference_fingerprint": images.fingerprint(),
        "reference_order_seed": seed,
        "library versions": environment()["versions"],
    }


def _result_path(out: Path | None, default: Path | None) -> Path | None:
    if out is not None and out.suffix == ".json":
        return out
    folder = out or default
    return None if folder is None else folder / "metrics.json"


def _finished(path: Path | None, protocol: dict[str, Any]) -> Result | None:
    """Return the saved result where it is complete and of the same inputs, protocol and versions."""
    done = Result.load(path) if path is not None else None
    if done is None or done.not_computed:
        return None
    expected = {name: value for name, value in protocol.items() if name != "weights_sha256"}
    if any(done.protocol.get(name) != value for name, value in expected.items()):
        return None
    print(f"already measured: {path} (--overwrite measures again)", file=sys.stderr)
    return done


def _finish(measured: Measurement, protocol: dict[str, Any], path: Path | None, begin: float) -> Result:
    result = Result(
        metrics=measured.metrics,
        not_computed=measured.not_computed,
        protocol={**measured.protocol, **protocol},
        seconds=round(time.monotonic() - begin, 3),
    )
    if path is not None:
        result.save(path)
    return result
