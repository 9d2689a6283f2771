"""``evaluate``: measures an autoencoder's reconstructions, or generated samples, against a data set."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.dinov2 import Dinov2Features
from ..common.distributed_features import by_main, in_agreement, known_to_any, require_same
from ..common.errors import UsageError, WavelatentError
from ..common.evaluation import (
    INTERVALS_PROTOCOL,
    KERNEL_NAMES,
    MANIFOLD_NAMES,
    Measurement,
    Result,
    mean_figures,
)
from ..common.inception import InceptionFeatures
from ..common.lpips_metric import LpipsNet, PerceptualDistance
from ..common.metric_weights import MissingWeightsError
from ..common.reference_cache import FeatureNetwork
from ..common.runtime import MixedPrecision, RuntimeOptions, StopRequest, accelerated, resolve_device
from ..stage1_autoencoder.tiling import TiledAutoencoder, tiled
from .evaluation_files import beside, beside_samples, finished, result_path, save_worst, worst_images, write_per_image
from .evaluation_inputs import DINOV2, ReferenceData, dinov2_protocol, open_reference
from .feature_pass import FeaturePass
from .loading import load_autoencoder
from .reconstructions import FIGURES, Reconstructions
from .sample_images import DEFAULT_OPTIONS, SampleOptions
from .sample_sources import RunSamples, SampleSource, chosen_seeds, open_samples

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    intervals: bool = True,
    dinov2: str | None = None,
) -> Result:
    """Measure rFID, PSNR, SSIM and LPIPS of ``ae`` on ``data``, through the posterior's mode and uint8 images.

    The reference of rFID is the very images that were reconstructed. Without the Inception or LPIPS weights the other
    figures are still given, and ``not_computed`` says why. A measurement that is already there, of the same
    autoencoder, data and protocol, is returned as it is. Under ``torchrun`` the processes share the images; the figures
    are the same for any number of them and any ``batch_size`` but for rounding, and every process returns the result.

    Beside ``metrics.json`` stand ``per-image.csv`` and ``worst-reconstructions.png``: the originals of the worst
    images (by LPIPS where it was computed, else by PSNR), and below them their reconstructions.

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
        intervals: also give intervals, and rFID extrapolated to infinitely many images.
        dinov2: folder or hub id of a DINOv2 (:mod:`..common.dinov2`), whose Fréchet distance is ``fd_dinov2``.

    Raises:
        UsageError: the size of the images or of ``tile`` does not suit the autoencoder, or there are fewer images than
            asked for.
        Stopped: by SIGTERM or SIGINT; what has been extracted of the reference is kept.
    """
    begin = time.monotonic()
    with StopRequest() as stop, accelerated(RuntimeOptions(device, mixed_precision)) as accelerator:
        place = _place(accelerator, device)
        reference = in_agreement(
            accelerator,
            lambda: open_reference(
                data, size=size, max_bad_fraction=max_bad_fraction, num=num_images, seed=seed
            ).images_alone(),
        )
        require_same(accelerator, f"--data {data}", reference.fingerprint)
        work = in_agreement(accelerator, lambda: _reconstructions(ae, reference, place, mixed_precision, tile))
        protocol = {
            **reference.protocol(),
            "autoencoder": {"path": ae, **work.protocol()},
            "latents": "posterior mode",
            "lpips_net": lpips_net,
            "num_samples": len(work.indices),
            **_asked(intervals, dinov2),
        }
        require_same(accelerator, f"--ae {ae}", protocol["autoencoder"]["fingerprint"])
        folder = Path(ae) / "evaluation-reconstruction" if Path(ae).is_dir() else None
        path = result_path(out, folder)
        if done := by_main(accelerator, lambda: None if overwrite else finished(path, protocol, _hash_of(dinov2))):
            return done
        missing: dict[str, str] = {}
        work.lpips = in_agreement(accelerator, lambda: _lpips(lpips_net, place, missing))
        networks = _networks(accelerator, "rfid", place, dinov2, protocol, missing)
        work.lpips = None if "lpips" in missing else work.lpips
        features = FeaturePass(accelerator, networks, reference, batch_size, stop)
        values = features.collect(work, len(work.indices), len(FIGURES), batch_size, "reconstructions")

        def measure() -> Result:
            per_image = work.by_figure(values)
            measured = mean_figures(per_image, intervals=intervals)
            measured.add(features.figures(intervals=intervals))
            measured.not_computed.update(work.not_computed)
            measured.protocol.update(work.figure_protocol())
            worst = worst_images(work.data, work.indices, per_image)
            if path is not None:
                write_per_image(beside(path, "per-image.csv"), work.data, work.indices, per_image)
                shown = [image["index"] for image in worst.get("lpips") or worst["psnr"]]
                save_worst(beside(path, "worst-reconstructions.png"), *work.pairs(shown))
            return _finish(measured, missing, protocol, path, begin, worst)

        return by_main(accelerator, measure)


def evaluate_generation(
    *,
    data: str,
    samples: Path | None = None,
    run: Path | None = None,
    num: int | None = None,
    seeds: Sequence[int] | None = None,
    options: SampleOptions = DEFAULT_OPTIONS,
    autoencoder: str | None = None,
    out: Path | None = None,
    num_reference: int | None = None,
    size: int | None = None,
    max_bad_fraction: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
    reference_seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    intervals: bool = True,
    dinov2: str | None = None,
) -> Result:
    """Measure FID, KID, precision, recall, density and coverage of samples against ``data``.

    The samples are in a folder or a file, or drawn here from a run; each is looked at once for all figures. Under
    ``torchrun`` the processes share them; the figures are the same for any number of processes and any ``batch_size``
    but for rounding, and every process returns the result.

    Args:
        data: the reference, as on the command line; or an ``.npz`` of ADM's evaluation with images, or with the
            statistics of images, which give no more than FID.
        samples: a folder of lossless images of one size, such as ``sample`` writes, or an ``.npz`` such as it writes.
            Either this or ``run``.
        run: a stage-2 run folder; its samples are drawn in memory.
        num: how many samples; None is every one in the folder. A run needs it, or ``seeds``.
        seeds: the seeds to sample a run with; None is ``num`` of them from ``seed`` on.
        options: what decides the samples of a run besides the seeds, as in ``sample``.
        autoencoder: the one that the run records, where it is no longer at the recorded path.
        out: folder (or ``.json`` file) for ``metrics.json``; by default in the samples' folder, or
            ``evaluation-generation`` in the run's; for ``NAME.npz`` it is ``NAME.metrics.json`` beside it.
        num_reference: how many reference images, the first of the order drawn from ``reference_seed``; None is all.
        size: side of the reference images in pixels; None is the data's own.
        max_bad_fraction: how many unreadable or too small files of ``data`` may be skipped.
        batch_size: images per pass of the metrics; ``options.pass_rows`` is that of the sampling.
        seed: the first seed to sample a run with, as in ``sample``.
        reference_seed: draws the order of the reference images; another order is another cache entry.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: measure again.
        intervals: also give intervals, and FID extrapolated to infinitely many samples.
        dinov2: folder or hub id of a DINOv2 (:mod:`..common.dinov2`), whose Fréchet distance is ``fd_dinov2``.

    Raises:
        UsageError: not exactly one of ``samples`` and ``run``, options of sampling without a run, or no number of
            samples for one.
        WavelatentError: samples of another size than the reference, lossy, unreadable, or fewer than asked for.
        MissingWeightsError: there are no Inception weights, so nothing here can be computed.
        Stopped: by SIGTERM or SIGINT; what has been extracted of the reference is kept.
    """
    begin = time.monotonic()
    if (samples is None) == (run is None):
        raise UsageError("give either --samples DIR, or --run RUN with --num N")
    if samples is not None and (autoencoder or replace(options, mixed_precision="no") != DEFAULT_OPTIONS):
        raise UsageError("how to sample is for --run: --samples are drawn already; leave out --sampler, --ae and such")
    with StopRequest() as stop, accelerated(RuntimeOptions(device, options.mixed_precision)) as accelerator:
        place = _place(accelerator, device)
        reference = in_agreement(
            accelerator,
            lambda: open_reference(
                data, size=size, max_bad_fraction=max_bad_fraction, num=num_reference, seed=reference_seed
            ),
        )

        def open_source() -> SampleSource:
            if samples is not None:
                return open_samples(samples, num)
            assert run is not None, "seen to above"
            return RunSamples(run, chosen_seeds(num, seeds, seed), options, device=place, autoencoder=autoencoder)

        require_same(accelerator, f"--data {data}", reference.fingerprint)
        source = in_agreement(accelerator, open_source)
        require_same(accelerator, f"--samples {samples}" if run is None else f"--run {run}", source.identity())
        path = result_path(out, beside_samples(samples, run))

        def look() -> tuple[dict[str, Any], Result | None]:
            protocol = {**reference.protocol(), **source.protocol(), **_asked(intervals, dinov2)}
            protocol["num_samples"] = len(source)
            if protocol["size"] is None:  # statistics do not say; but two sets of samples must be of one size
                protocol["size"] = source.size[0] if len(set(source.size)) == 1 else list(source.size)
            return protocol, None if overwrite else finished(path, protocol, _hash_of(dinov2))

        protocol, done = by_main(accelerator, look)
        if done is not None:
            return done
        missing: dict[str, str] = {}
        networks = _networks(accelerator, "fid", place, dinov2, protocol, missing)
        if "fid" in missing:
            if not networks:
                raise MissingWeightsError(missing["fid"])
            missing.update(dict.fromkeys((*KERNEL_NAMES, *MANIFOLD_NAMES), missing["fid"]))
        in_agreement(accelerator, lambda: _require_one_size(source, reference))  # before the reference is paid for
        features = FeaturePass(accelerator, networks, reference, batch_size, stop)

        def drawn(numbers: range) -> tuple[Tensor, Tensor]:
            return torch.empty(len(numbers), 0, dtype=torch.float64), source.images(numbers)

        features.collect(drawn, len(source), 0, source.whole_batch(batch_size), "samples")

        def measure() -> Result:
            measured = Measurement(notes=[*source.notes(), *reference.notes()])
            measured.add(features.figures(full="fid", intervals=intervals))
            return _finish(measured, missing, protocol, path, begin)

        return by_main(accelerator, measure)


def _place(accelerator: Accelerator, device: str) -> torch.device:
    return resolve_device(device) if accelerator.num_processes == 1 else accelerator.device


def _reconstructions(
    ae: str, reference: ReferenceData, device: torch.device, mixed_precision: MixedPrecision, tile: int | None
) -> Reconstructions:
    assert reference.images is not None, "seen to by images_alone"
    autoencoder = tiled(load_autoencoder(ae).to(device), tile)
    if isinstance(autoencoder, TiledAutoencoder):
        print(autoencoder.describe("encode", "decode"), file=sys.stderr)
    return Reconstructions(autoencoder, reference.images, reference.indices, device, mixed_precision)


def _require_one_size(source: SampleSource, reference: ReferenceData) -> None:
    if reference.images is not None and source.size != (reference.images.size,) * 2:
        width, height = source.size
        raise WavelatentError(
            f"the samples are {width}x{height} px and the reference {reference.spec} is {reference.images.size}: "
            f"FID compares images of one size; give --size {height}, or a reference prepared at it"
        )


def _asked(intervals: bool, dinov2: str | None) -> dict[str, Any]:
    """Return the parts of the protocol that say what was asked for."""
    return {
        "intervals": INTERVALS_PROTOCOL if intervals else None,
        **({} if dinov2 is None else {"dinov2": {"source": dinov2}}),
    }


def _hash_of(dinov2: str | None) -> Callable[[], str] | None:
    return None if dinov2 is None else lambda: Dinov2Features(dinov2).weights_sha256


def _lpips(net: LpipsNet, device: torch.device, missing: dict[str, str]) -> PerceptualDistance | None:
    try:
        return PerceptualDistance(net).to(device)
    except MissingWeightsError as error:
        missing["lpips"] = str(error)
        return None


def _networks(
    accelerator: Accelerator,
    name: str,
    device: torch.device,
    dinov2: str | None,
    protocol: dict[str, Any],
    missing: dict[str, str],
) -> dict[str, FeatureNetwork]:
    """Return the networks that every process has, by their Fréchet distance's name; write both into ``protocol``.

    What is ``missing`` to one process is missing to all: they may be on machines of which one has no weights.
    """

    def load() -> dict[str, FeatureNetwork]:
        found: dict[str, FeatureNetwork] = {}
        try:
            found[name] = InceptionFeatures(device)
        except MissingWeightsError as error:
            missing[name] = str(error)
        if dinov2 is not None:
            found[DINOV2] = Dinov2Features(dinov2, device)
        return found

    networks = in_agreement(accelerator, load)
    missing.update(known_to_any(accelerator, missing))
    networks = {each: network for each, network in networks.items() if each not in missing}
    if name in networks:
        protocol["weights_sha256"] = networks[name].weights_sha256
    if dinov2 is not None:
        protocol["dinov2"] = dinov2_protocol(dinov2, networks[DINOV2])
    return networks


def _finish(
    measured: Measurement,
    missing: Mapping[str, str],
    protocol: dict[str, Any],
    path: Path | None,
    begin: float,
    worst: dict[str, list[dict[str, Any]]] | None = None,
) -> Result:
    result = Result(
        metrics=measured.metrics,
        intervals={name: (interval.low, interval.high) for name, interval in measured.intervals.items()},
        not_computed={**measured.not_computed, **missing},
        without_weights=tuple(sorted(missing)),
        protocol={**measured.protocol, **protocol, **({"notes": measured.notes} if measured.notes else {})},
        worst=worst or {},
        seconds=round(time.monotonic() - begin, 3),
    )
    if path is not None:
        result.save(path)
    return result
