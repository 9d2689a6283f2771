"""``encode``: the stage-1 posteriors of a data set, into a verified latent cache."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.distributed_features import by_main
from ..common.errors import Stopped, UsageError
from ..common.images import ImageData, iterate_batches, open_data
from ..common.latent_cache import MANIFEST, AutoencoderRecord, CacheDtype, DataRecord, LatentCache, Manifest
from ..common.latent_cache_writer import CachePlan, CacheWriter, default_shard_size, require_cache_folder
from ..common.latents import Posterior
from ..common.runtime import MixedPrecision, RuntimeOptions, StopRequest, accelerated, autocast
from ..stage1_autoencoder.tiling import TiledAutoencoder, tiled
from .loading import load_autoencoder

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..stage1_autoencoder.autoencoder import Autoencoder


def encode(
    ae: str,
    data: str,
    out: Path,
    *,
    batch_size: int = 64,
    flips: bool = False,
    dtype: CacheDtype = "float32",
    shard_size: int | None = None,
    device: str = "auto",
    mixed_precision: MixedPrecision = "no",
    max_minutes: float | None = None,
    overwrite: bool = False,
    size: int | None = None,
    max_bad_fraction: float = 0.01,
    tile: int | None = None,
) -> dict[str, Any]:
    """Encode every image of ``data`` once with ``ae`` and write the latent cache ``out``.

    Run again, it goes on where it was stopped; a finished cache is verified and left as it is. Under ``torchrun`` the
    processes share the shards, and each of them decodes and checks a whole folder of images first: give them one that
    ``prepare`` made.

    Args:
        ae: autoencoder, as on the command line.
        data: data set, as on the command line.
        out: the cache's folder.
        batch_size: images per pass and process.
        flips: cache the posteriors of the mirror images too.
        dtype: how the posteriors are stored; ``float16`` refuses values beyond its range.
        shard_size: images per shard; by default what fills 64 MiB.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        mixed_precision: the precision that the encoder runs in.
        max_minutes: stop, with everything encoded so far saved, after so many minutes.
        overwrite: remove a cache that is there, finished or not, and start again.
        size: side of the images in pixels; None is the data's own.
        max_bad_fraction: how many unreadable or too small files of ``data`` may be skipped.
        tile: encode in tiles of so many pixels (:mod:`..stage1_autoencoder.tiling`), for images that do not fit in
            memory. The cache records it, and one made with another is refused.

    Returns:
        What the cache holds: ``cache``, ``count``, ``shape``, ``dtype``, ``flips``, ``posterior``, ``stats``,
        ``shards``, ``bytes``, ``already_complete`` and ``seconds``.

    Raises:
        UsageError: ``out`` is the folder of something else, or the size of the images or of ``tile`` does not suit
            the autoencoder.
        WavelatentError: the cache was begun or finished with other inputs, or a latent cannot be stored.
        Stopped: by ``max_minutes`` or a signal.
    """
    begin = time.monotonic()
    require_cache_folder(out)
    images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
    autoencoder = tiled(load_autoencoder(ae), tile)
    if isinstance(autoencoder, TiledAutoencoder):
        print(autoencoder.describe("encode"), file=sys.stderr)
    record = AutoencoderRecord(
        fingerprint=autoencoder.fingerprint(), path=_resolved(ae), mixed_precision=mixed_precision, tile=tile
    )
    plan = _plan(autoencoder, record, images, dtype, flips, shard_size)
    options = RuntimeOptions(device=device, mixed_precision=mixed_precision)
    with StopRequest(max_minutes) as stop, accelerated(options) as accelerator:
        if overwrite and accelerator.is_main_process:
            CacheWriter.clear(out)
        accelerator.wait_for_everyone()
        if already_complete := (out / MANIFEST).exists():
            _check_same(out, plan)
        else:
            _write_cache(CacheWriter(out, plan), autoencoder, images, batch_size, accelerator, stop)
    manifest = LatentCache.open(out, verify=False).manifest
    return _summary(out, manifest, already_complete, time.monotonic() - begin)


def _plan(
    autoencoder: Autoencoder | TiledAutoencoder,
    record: AutoencoderRecord,
    images: ImageData,
    dtype: CacheDtype,
    flips: bool,
    shard_size: int | None,
) -> CachePlan:
    """Return what the cache will be. Raises :class:`UsageError` where the image size does not suit the autoencoder."""
    factor = autoencoder.downsampling
    if images.size % factor:
        raise UsageError(
            f"images of {images.size} px do not divide by the autoencoder's downsampling factor {factor}; "
            f"use --size {max(factor, images.size // factor * factor)}"
        )
    shape = (autoencoder.latent_channels, images.size // factor, images.size // factor)
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"--shard-size {shard_size}: a shard holds at least one image")
    return CachePlan(
        autoencoder=record,
        data=DataRecord(
            fingerprint=images.fingerprint(),
            spec=_resolved(images.spec),
            transform=dict(images.transform),
            num_classes=images.num_classes,
        ),
        shape=shape,
        count=len(images),
        dtype=dtype,
        flips=flips,
        shard_size=shard_size or default_shard_size(shape, dtype, flips),
    )


def _resolved(spec: str) -> str:
    """Return ``spec`` with a relative folder made absolute, so that the record means the same from anywhere."""
    scheme, colon, path = spec.rpartition("diffusers:")
    return f"{scheme}{colon}{Path(path).resolve()}" if path and Path(path).exists() else spec


def _check_same(out: Path, plan: CachePlan) -> None:
    """Verify the finished cache ``out`` and that it is the one that was asked for."""
    manifest = LatentCache.open(
        out, autoencoder_fingerprint=plan.autoencoder.fingerprint, data_fingerprint=plan.data.fingerprint
    ).manifest
    recorded, given = [
        {
            "flips": c.flips,
            "dtype": c.dtype,
            "mixed-precision": c.autoencoder.mixed_precision,
            "tile": c.autoencoder.tile or "none",
        }
        for c in (manifest, plan)
    ]
    for name, value in given.items():
        if recorded[name] != value:
            raise UsageError(
                f"{out} is a finished cache with {name} {recorded[name]}, not {value}; "
                "give another --out, or --overwrite to start again"
            )


def _write_cache(
    writer: CacheWriter,
    autoencoder: Autoencoder | TiledAutoencoder,
    images: ImageData,
    batch_size: int,
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """Write every process's shards and, when all are there, the manifest. Raises :class:`Stopped`."""
    _write_shards(writer, autoencoder, images, batch_size, accelerator, stop)
    accelerator.wait_for_everyone()
    total, missing = writer.plan.num_shards, writer.num_missing
    accelerator.wait_for_everyone()  # all have counted, before one of them removes what is counted
    if missing:
        raise Stopped(
            f"encode stopped ({stop.reason or 'another process'}) with {total - missing} of {total} shards finished "
            "and everything encoded so far saved; run the same command to go on"
        )
    by_main(accelerator, lambda: bool(writer.finish()))  # it reads everything again, which may take minutes


def _write_shards(
    writer: CacheWriter,
    autoencoder: Autoencoder | TiledAutoencoder,
    images: ImageData,
    batch_size: int,
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """Encode this process's shards, until they are finished or ``stop`` asks to stop."""
    to_posterior = _encoder(autoencoder, accelerator)
    numbers = writer.unfinished(accelerator.process_index, accelerator.num_processes)
    total = sum(len(writer.remaining(number)) for number in numbers)
    with tqdm(total=total, unit="img", desc="encode", disable=not accelerator.is_main_process) as progress:
        for number in numbers:
            for batch in iterate_batches(images, batch_size, indices=writer.remaining(number)):
                flipped = to_posterior(batch.images.flip(-1)) if writer.plan.flips else None
                writer.add(number, batch.index, to_posterior(batch.images), flipped, batch.labels)
                progress.update(len(batch.index))
                if stop.reason:
                    writer.save_rows(number)
                    return


def _encoder(autoencoder: Autoencoder | TiledAutoencoder, accelerator: Accelerator) -> Callable[[Tensor], Posterior]:
    """Return the map from images ``[B, 3, H, W]`` on the CPU to their float32 posteriors."""
    model = autoencoder.eval().requires_grad_(False).to(accelerator.device)

    @torch.inference_mode()
    def to_posterior(images: Tensor) -> Posterior:
        with autocast(accelerator.device, accelerator.mixed_precision):
            posterior = model.encode(images.to(accelerator.device))
        std = None if posterior.std is None else posterior.std.float()
        return Posterior(posterior.mean.float(), std)

    return to_posterior


def _summary(out: Path, manifest: Manifest, already_complete: bool, seconds: float) -> dict[str, Any]:
    content = manifest.model_dump(mode="json", include={"count", "shape", "dtype", "flips", "posterior", "stats"})
    return {
        "cache": str(out),
        **content,
        "shards": len(manifest.shards),
        "bytes": sum((out / shard.file).stat().st_size for shard in manifest.shards),
        "already_complete": already_complete,
        "seconds": round(seconds, 3),
    }
