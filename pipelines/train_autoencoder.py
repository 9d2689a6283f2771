"""``train-ae``: stage one on a data set, into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.checkpoints import latest_checkpoint, read_json
from ..common.errors import UsageError
from ..common.images import ImageData
from ..common.run_folder import RunFolder
from ..common.runtime import RuntimeOptions, StopRequest, accelerated
from ..stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from ..stage1_autoencoder.diffusers_layout import from_diffusers
from ..stage1_autoencoder.kl_vae import KLEncoderConfig
from ..stage1_autoencoder.pretrained import resolve_pretrained
from ..stage1_autoencoder.trainer import AutoencoderTrainer
from .loading import DIFFUSERS, load_autoencoder
from .run_config import AutoencoderRunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def train_autoencoder(config: AutoencoderRunConfig, *, data: ImageData, out: Path, options: RuntimeOptions) -> bool:
    """Train, or go on training, the run in ``out``; return False where it was finished already.

    Raises :class:`UsageError` for a configuration that does not fit the data or the folder, :class:`Stopped` after
    SIGTERM, SIGINT or ``max_minutes``, and :class:`Diverged` when a loss is no longer finite; all is saved then.
    """
    config = config.model_copy(update={"model": resolve_pretrained(config.model)})
    initial, from_init = None, None
    if config.init is not None and (from_init := _known_init(config.init, out, options.overwrite)) is None:
        initial = _initial(config.init, config.model)
        from_init = {"spec": config.init, "fingerprint": initial.fingerprint()}
    with (
        StopRequest(options.max_minutes) as stop,
        accelerated(options, config.train.gradient_accumulation) as accelerator,
    ):
        identity: dict[str, Any] = {
            "kind": "autoencoder",
            "data": {"spec": data.spec, "fingerprint": data.fingerprint(), "transform": data.transform},
        }
        if from_init is not None:
            identity["init"] = from_init
        main = accelerator.is_main_process
        with RunFolder(out, config, identity, overwrite=options.overwrite, is_main=main) as run:
            if run.finished(config.train.steps):
                return False
            _trainer(config, initial, data, run, accelerator).train(stop)
    return True


def _known_init(spec: str, out: Path, overwrite: bool) -> dict[str, Any] | None:
    """Return what ``out`` recorded of the same ``init``, where it is past its first step: that needs no weights more.

    None where the weights are needed, or lie on this machine: other ones under the same name are another run.
    """
    recorded = read_json(out / "inputs.json").get("init", {})
    started = not overwrite and latest_checkpoint(out) is not None and recorded.get("spec") == spec
    is_here = Path(spec.removeprefix(DIFFUSERS)).exists()
    return recorded if started and not is_here else None


def _initial(spec: str, model: AutoencoderConfig) -> Autoencoder:
    """Return the autoencoder to start from; a KL autoencoder of ours takes the weights of a diffusers one."""
    if spec.startswith(DIFFUSERS) and isinstance(model.encoder, KLEncoderConfig):
        autoencoder = from_diffusers(spec.removeprefix(DIFFUSERS))
    else:
        autoencoder = load_autoencoder(spec)
    weights, wanted = autoencoder.state_dict(), _shapes(model)
    if differing := sorted(
        {n for n, v in weights.items() if wanted.get(n) != v.shape} | {n for n in wanted if n not in weights}
    ):
        raise UsageError(
            f"init={spec} is not of this model's architecture: {len(differing)} of its weights differ, "
            f"{differing[0]} among them; compare model with its config.json"
        )
    return autoencoder


def _shapes(model: AutoencoderConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in Autoencoder(model).state_dict().items()}


def _trainer(
    config: AutoencoderRunConfig, initial: Autoencoder | None, data: ImageData, run: RunFolder, accelerator: Accelerator
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
            initial=None if initial is None else initial.state_dict(),
        )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:  # what a library says of a size or an option that cannot be
        raise UsageError(f"this model cannot take images of {data.size} px: {' '.join(str(error).split())}") from error
