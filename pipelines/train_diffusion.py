"""``train-diffusion``: stage two on a latent cache, into a run folder."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..common.distributed_features import by_main
from ..common.errors import UsageError, WavelatentError
from ..common.latent_cache import LatentCache
from ..common.run_folder import RunFolder
from ..common.runtime import RuntimeOptions, StopRequest, accelerated
from ..stage2_diffusion.model import LatentDiffusion
from ..stage2_diffusion.sampling import Sampling
from ..stage2_diffusion.trainer import Decode, DiffusionTrainer, Evaluate
from .diffusion_config import DiffusionRunConfig
from .diffusion_run import inputs_of, recorded_autoencoder
from .quick_evaluation import LogEvent, QuickEvaluation

if TYPE_CHECKING:
    from accelerate import Accelerator


def train_diffusion(config: DiffusionRunConfig, *, latents: Path, out: Path, options: RuntimeOptions) -> bool:
    """Train, or go on training, the run in ``out`` on the cache ``latents``; return False where it was done already.

    The sample grids and the quick evaluation need the autoencoder that the cache records; where it is gone, training
    goes on without them. The run's ``config.yaml`` has the noise shift that ``auto`` came to.

    Raises :class:`UsageError` for a configuration that does not fit the cache or the folder, :class:`Stopped` after
    SIGTERM, SIGINT or ``max_minutes``, and :class:`WavelatentError` for a cache that does not verify, and
    :class:`Diverged` when the loss is no longer finite; all is saved then.
    """
    with (
        StopRequest(options.max_minutes) as stop,
        accelerated(options, config.train.gradient_accumulation) as accelerator,
    ):
        cache = _open(latents, accelerator)
        config = resolved(config, cache)
        model = build_model(config, cache)
        main = accelerator.is_main_process
        quick = config.train.quick_evaluation.every > 0
        with RunFolder(out, config, inputs_of(cache), overwrite=options.overwrite, is_main=main) as run:
            if run.finished(config.train.steps):
                return False
            decode = _decoder(cache, accelerator.device, say=main) if main or quick else None
            trainer = DiffusionTrainer(
                model,
                config.train,
                cache=cache,
                seed=config.seed,
                run=run,
                accelerator=accelerator,
                decode=decode,
                evaluate=_quick_evaluation(config, cache, decode, accelerator, run.log_event) if quick else None,
            )
            trainer.train(stop)
    return True


def _open(latents: Path, accelerator: Accelerator) -> LatentCache:
    """Open the cache in every process; the main one checks its files for all, which may take minutes."""
    if accelerator.num_processes == 1:
        return LatentCache.open(latents)

    def check() -> None:
        LatentCache.open(latents)

    by_main(accelerator, check)
    return LatentCache.open(latents, verify=False)


def resolved(config: DiffusionRunConfig, cache: LatentCache) -> DiffusionRunConfig:
    """Return ``config`` with the noise shift for the latents of ``cache`` in place of ``auto``."""
    shift = config.objective.shift_for(math.prod(cache.shape))
    objective = config.objective.model_copy(update={"noise_shift": shift})
    return config.model_copy(update={"objective": objective})


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
            uncertainty=config.train.uncertainty,
        )
    except ValueError as error:  # a latent size that the network cannot halve
        raise UsageError(f"model: {error}") from error


def _decoder(cache: LatentCache, device: torch.device, *, say: bool) -> Decode | None:
    """Return the map from raw latents to images of the cache's autoencoder, or None where that is not to be had."""
    record = cache.manifest.autoencoder
    try:
        autoencoder = recorded_autoencoder({"path": record.path, "fingerprint": record.fingerprint})
    except WavelatentError as error:
        if say:
            print(f"no sample grids during training: {error}", file=sys.stderr)
        return None
    autoencoder.requires_grad_(False).to(device)
    return lambda raw: autoencoder.decode(raw.float())


def _quick_evaluation(
    config: DiffusionRunConfig,
    cache: LatentCache,
    decode: Decode | None,
    accelerator: Accelerator,
    log_event: LogEvent,
) -> Evaluate:
    settings = config.train.quick_evaluation
    return QuickEvaluation(
        cache.manifest,
        decode,
        accelerator,
        num_samples=settings.num_samples,
        num_reference=settings.num_reference,
        batch_size=settings.batch_size,
        sampling=Sampling(steps=settings.sample_steps),
        log_event=log_event,
    )
