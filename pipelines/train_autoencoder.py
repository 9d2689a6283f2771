"""``train-ae``: stage one on a data set, into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UsageError
from ..common.images import ImageData
from ..common.run_folder import RunFolder
from ..common.runtime import RuntimeOptions, StopRequest, accelerated
from ..stage1_autoencoder.pretrained import resolve_pretrained
from ..stage1_autoencoder.trainer import AutoencoderTrainer
from .run_config import AutoencoderRunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def train_autoencoder(config: AutoencoderRunConfig, *, data: ImageData, out: Path, options: RuntimeOptions) -> bool:
    """Train, or go on training, the run in ``out``; return False where it was finished already.

    Raises :class:`UsageError` for a configuration that does not fit the data or the folder, :class:`Stopped` after
    SIGTERM, SIGINT or ``max_minutes``, and :class:`WavelatentError` when a loss is no longer finite; all is saved then.
    """
    config = config.model_copy(update={"model": resolve_pretrained(config.model)})
    with (
        StopRequest(options.max_minutes) as stop,
        accelerated(options, config.train.gradient_accumulation) as accelerator,
    ):
        identity = {
            "kind": "autoencoder",
            "data": {"spec": data.spec, "fingerprint": data.fingerprint(), "transform": data.transform},
        }
        main = accelerator.is_main_process
        with RunFolder(out, config, identity, overwrite=options.overwrite, is_main=main) as run:
            if run.finished(config.train.steps):
                return False
            _trainer(config, data, run, accelerator).train(stop)
    return True


def _trainer(
    config: AutoencoderRunConfig, data: ImageData, run: RunFolder, accelerator: Accelerator
) -> AutoencoderTrainer:
    try:
        return AutoencoderTrainer(
            config.model,
            config.objective,
            config.train,
            data=data,
            seed=config.seed,
            run=run,
            accelerator=accelerator,
        )
    except (ValueError, RuntimeError) as error:  # what a library says of a size or an option that cannot be
        raise UsageError(f"this model cannot take images of {data.size} px: {' '.join(str(error).split())}") from error
