"""``sample``: images from a stage-two run, one per seed, through the autoencoder that the run records."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.config import parse_yaml
from ..common.errors import Stopped, UsageError
from ..common.files import sha256_file, write_atomically
from ..common.images import save_png, to_uint8
from ..common.runtime import MixedPrecision, StopRequest, autocast, resolve_device
from ..stage1_autoencoder.autoencoder import Autoencoder
from ..stage1_autoencoder.tiling import TiledAutoencoder, tiled
from ..stage2_diffusion.generation import draw_labels, generate_latents
from ..stage2_diffusion.model import LatentDiffusion
from ..stage2_diffusion.samplers import SAMPLERS
from .diffusion_run import load_diffusion, read_inputs, recorded_autoencoder

MANIFEST = "samples.json"


def sample_images(
    run: Path,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    sampler: str = "heun",
    steps: int = 32,
    label: int | None = None,
    device: str = "auto",
    mixed_precision: MixedPrecision = "no",
    autoencoder: str | Autoencoder | None = None,
    tile: int | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield ``(seeds of the batch, uint8 images [B, 3, H, W])`` until every seed has had its image.

    The image of a seed does not depend on the batch it is in, up to the rounding of floating point.

    Args:
        run: run folder of ``train-diffusion``.
        seeds: one per image.
        batch_size: images per pass.
        sampler: a name in :data:`SAMPLERS`.
        steps: noise levels; Heun calls the denoiser twice per step.
        label: the class of every image; by default a class-conditional run draws one uniformly by the seed.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        mixed_precision: the precision that both networks run in.
        autoencoder: the recorded autoencoder, where it is no longer at the recorded path.
        tile: decode in tiles of so many pixels (:mod:`..stage1_autoencoder.tiling`), for images that do not fit in
            memory.

    Raises:
        UsageError: an unknown sampler, a label that the run has no class for, or a tile that does not suit the
            autoencoder.
        WavelatentError: the run has no model yet, or its autoencoder is missing or has changed.
    """
    where = resolve_device(device)
    inputs = read_inputs(run)
    model = load_diffusion(run).to(where)
    _check(model, sampler, steps, label)
    decoder = tiled(recorded_autoencoder(inputs["autoencoder"], autoencoder).to(where), tile)
    if isinstance(decoder, TiledAutoencoder):
        print(decoder.describe("decode"), file=sys.stderr)
    for start in range(0, len(seeds), batch_size):
        batch = list(seeds[start : start + batch_size])
        with torch.inference_mode(), autocast(where, mixed_precision):
            raw = generate_latents(model, batch, labels=_labels(model, batch, label), sampler=sampler, steps=steps)
            images = decoder.decode(raw)
        yield batch, to_uint8(images.float()).cpu()


def sample(
    run: Path,
    out: Path,
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
    sampler: str = "heun",
    steps: int = 32,
    label: int | None = None,
    device: str = "auto",
    mixed_precision: MixedPrecision = "no",
    autoencoder: str | Autoencoder | None = None,
    overwrite: bool = False,
    tile: int | None = None,
) -> dict[str, Any]:
    """Write the image of every seed as ``out/<seed, 6 digits>.png``; what is there already is kept.

    ``out/samples.json`` records how the images were made; images made otherwise are not mixed with them. The arguments
    are those of :func:`sample_images`.

    Returns:
        ``samples``, ``count``, ``written``, ``seconds`` and what ``samples.json`` records.

    Raises:
        UsageError: ``out`` holds other files or other samples; see also :func:`sample_images`.
        Stopped: on SIGTERM or SIGINT.
    """
    begin = time.monotonic()
    record = protocol(run, sampler=sampler, steps=steps, label=label, mixed_precision=mixed_precision, tile=tile)
    if tile is not None:  # one that does not suit is refused before the folder records it
        autoencoder = recorded_autoencoder(read_inputs(run)["autoencoder"], autoencoder)
        tiled(autoencoder, tile)
    _open_folder(out, record, overwrite)
    missing = [seed for seed in seeds if not _path(out, seed).exists()]
    if missing:
        batches = sample_images(
            run,
            missing,
            batch_size=batch_size,
            sampler=sampler,
            steps=steps,
            label=label,
            device=device,
            mixed_precision=mixed_precision,
            autoencoder=autoencoder,
            tile=tile,
        )
        with StopRequest() as stop, tqdm(total=len(seeds), initial=len(seeds) - len(missing), desc="sample") as bar:
            for batch, images in batches:
                for seed, image in zip(batch, images, strict=True):
                    save_png(_path(out, seed), image.permute(1, 2, 0).numpy())
                bar.update(len(batch))
                if stop.reason and bar.n < len(seeds):
                    raise Stopped(f"stopped by {stop.reason} with {bar.n} of {len(seeds)} images; run again to go on")
    seconds = round(time.monotonic() - begin, 3)
    return {"samples": str(out), "count": len(seeds), "written": len(missing), "seconds": seconds, **record}


def protocol(
    run: Path,
    *,
    sampler: str,
    steps: int,
    label: int | None = None,
    mixed_precision: MixedPrecision = "no",
    tile: int | None = None,
) -> dict[str, Any]:
    """Return everything that decides the image of a seed, as ``samples.json`` and ``metrics.json`` record it."""
    inputs = read_inputs(run)
    model = load_diffusion(run)
    _check(model, sampler, steps, label)
    by_seed = "uniform by seed" if model.num_classes else None
    config = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
    return {
        "run": str(run.resolve()),
        "model_sha256": sha256_file(run / "model" / "model.safetensors"),
        "autoencoder_fingerprint": inputs["autoencoder"]["fingerprint"],
        "sampler": sampler,
        "steps": steps,
        "ema": config["train"]["ema"],
        "label": by_seed if label is None else label,
        "mixed_precision": mixed_precision,
        "tile": tile,
    }


def _check(model: LatentDiffusion, sampler: str, steps: int, label: int | None) -> None:
    if sampler not in SAMPLERS:
        raise UsageError(f"--sampler {sampler}: unknown; choose one of {', '.join(SAMPLERS)}")
    if steps < 1:
        raise UsageError(f"--steps {steps}: sampling needs at least 1 step")
    if label is not None and not 0 <= label < model.num_classes:
        has = f"the classes 0 to {model.num_classes - 1}" if model.num_classes else "no classes"
        raise UsageError(f"label {label}: this run was trained with {has}")


def _labels(model: LatentDiffusion, seeds: Sequence[int], label: int | None) -> Tensor | None:
    if label is not None:
        return torch.full((len(seeds),), label)
    return draw_labels(seeds, model.num_classes) if model.num_classes else None


def _path(out: Path, seed: int) -> Path:
    return out / f"{seed:06d}.png"


def _open_folder(out: Path, record: dict[str, Any], overwrite: bool) -> None:
    """Make ``out`` a folder of samples made as ``record`` says, or raise :class:`UsageError` where it is another."""
    manifest = out / MANIFEST
    if overwrite and manifest.exists():
        for path in out.iterdir():
            if re.fullmatch(r"\d{6,}\.png", path.name):
                path.unlink()
        manifest.unlink()
    if manifest.exists():
        recorded = json.loads(manifest.read_text(encoding="utf-8"))
        differing = [key for key in record if key != "run" and recorded.get(key) != record[key]]
        if differing:
            raise UsageError(
                f"{out} holds samples made with another {', '.join(differing)}; "
                "give another --out, or --overwrite to start again"
            )
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder nor one of samples; give another --out")
    write_atomically(manifest, json.dumps(record, indent=2) + "\n")
