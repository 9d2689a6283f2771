"""``train-ae``: stage one on a data set, into a run folder."""

from __future__ import annotations

import gc
from pathlib import Path

from ..common.errors import UsageError
from ..common.images import ImageData
from ..common.runtime import RunFolder, RuntimeOptions, StopRequest, make_accelerator
from ..stage1_autoencoder.trainer import AutoencoderTrainer
from .run_config import AutoencoderRunConfig


def train_autoencoder(config: AutoencoderRunConfig, *, data: ImageData, out: Path, options: RuntimeOptions) -> bool:
    """Train, or go on training, the run in ``out``; return False where it was finished already.

    Raises :class:`UsageError` for a configuration that does not fit the data or the folder, :class:`Stopped` after
    SIGTERM, SIGINT or ``max_minutes``, and :class:`WavelatentError` when a loss is no longer finite; all is saved then.
    """
    with StopRequest(options.max_minutes) as stop:
        accelerator = make_accelerator(options, config.train.gradient_accumulation)
        identity = {
            "kind": "autoencoder",
            "data": {"spec": data.spec, "fingerprint": data.fingerprint(), "transform": data.transform},
        }
        run = RunFolder(out, config, identity, overwrite=options.overwrite, is_main=accelerator.is_main_process)
        if run.finished(config.train.steps):
            return False
        try:
            trainer = AutoencoderTrainer(
                config.model,
                config.objective,
                config.train,
                data=data,
                seed=config.seed,
                run=run,
                accelerator=accelerator,
            )
            trainer.train(stop)
        except ValueError as error:  # a size that does not divide, an option the model cannot have
            raise UsageError(str(error)) from error
        finally:
            run.close()
        accelerator.wait_for_everyone()
        accelerator.free_memory()
        del trainer
        gc.collect()
        accelerator.end_training()
    return True
