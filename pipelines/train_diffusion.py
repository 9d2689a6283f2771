"""``train-diffusion``: stage two on a latent cache, into a run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import UsageError, WavelatentError
from ..common.latent_cache import LatentCache
from ..common.run_folder import RunFolder
from ..common.runtime import RuntimeOptions, StopRequest, accelerated
from ..stage2_diffusion.model import LatentDiffusion
from ..stage2_diffusion.trainer import DiffusionTrainer
from .diffusion_config import DiffusionRunConfig
from .diffusion_run import inputs_of, recorded_autoencoder


def train_diffusion(config: DiffusionRunConfig, *, latents: Path, out: Path, options: RuntimeOptions) -> bool:
    """Train, or go on training, the run in ``out`` on the cache ``latents``; return False where it was done already.

    The sample grids need the autoencoder that the cache records; where it is gone, training goes on without them.

    Raises :class:`UsageError` for a configuration that does not fit the cache or the folder, :class:`Stopped` after
    SIGTERM, SIGINT or ``max_minutes``, and :class:`WavelatentError` for a cache that does not verify, or when the loss
    is no longer finite; all is saved then.
    """
    with (
        StopRequest(options.max_minutes) as stop,
        accelerated(options, config.train.gradient_accumulation) as accelerator,
    ):
        cache = LatentCache.open(latents)
        model = build_model(config, cache)
        main = accelerator.is_main_process
        with RunFolder(out, config, inputs_of(cache), overwrite=options.overwrite, is_main=main) as run:
            if run.finished(config.train.steps):
                return False
            trainer = DiffusionTrainer(
                model,
                config.train,
                cache=cache,
                seed=config.seed,
                run=run,
                accelerator=accelerator,
                decode=_decoder(cache, accelerator.device) if main else None,
            )
            trainer.train(stop)
    return True


def build_model(config: DiffusionRunConfig, cache: LatentCache) -> LatentDiffusion:
    """Return the untrained model of ``config`` for the latents of ``cache``, initialised from ``config.seed``.

    Raises :class:`UsageError` where the two do not fit.
    """
    if config.class_conditional and not cache.num_classes:
        raise UsageError(f"class_conditional: {cache.path} has no labels; set class_conditional=false")
    statistics = cache.manifest.stats
    torch.manual_seed(config.seed)  # the same initial weights in every process
    try:
        return LatentDiffusion(
            config.model,
            config.objective,
            cache.shape,
            num_classes=cache.num_classes if config.class_conditional else 0,
            whitening=config.whitening,
            statistics={"mean": statistics.mean, "std": statistics.std},
        )
    except ValueError as error:  # a latent size that the network cannot halve
        raise UsageError(f"model: {error}") from error


def _decoder(cache: LatentCache, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return the map from raw latents to images of the cache's autoencoder, or None where that is not to be had."""
    record = cache.manifest.autoencoder
    try:
        autoencoder = recorded_autoencoder({"path": record.path, "fingerprint": record.fingerprint})
    except WavelatentError as error:
        print(f"no sample grids during training: {error}", file=sys.stderr)
        return None
    autoencoder.requires_grad_(False).to(device)
    return lambda raw: autoencoder.decode(raw.float())
