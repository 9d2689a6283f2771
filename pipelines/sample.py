"""``sample``: images from a stage-two run, one per seed, through the autoencoder that the run records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..common.distributed_features import by_main, require_same
from ..common.errors import Stopped, UsageError
from ..common.runtime import RuntimeOptions, StopRequest, accelerated
from ..stage1_autoencoder.autoencoder import Autoencoder
from .sample_folder import SampleWriter
from .sample_images import DEFAULT_OPTIONS, ImageSampler, SampleOptions, whole_passes

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SEED = 2**63


@dataclass(frozen=True)
class Extras:
    """What ``sample`` makes besides the images.

    Attributes:
        npz: file for ADM's evaluation, see :meth:`SampleWriter.save_npz`.
        contact_sheet: PNG file for the first images, in rows.
        interpolate: two seeds, for ``out/interpolate-<A>-<B>-<point>.png`` from one to the other and a strip of all.
        points: images of the interpolation.
    """

    npz: Path | None = None
    contact_sheet: Path | None = None
    interpolate: tuple[int, int] | None = None
    points: int = 8


NO_EXTRAS = Extras()


def sample(
    run: Path,
    out: Path,
    seeds: Sequence[int],
    options: SampleOptions = DEFAULT_OPTIONS,
    *,
    extras: Extras = NO_EXTRAS,
    batch_size: int = 64,
    device: str = "auto",
    autoencoder: str | Autoencoder | None = None,
    max_minutes: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the image of every seed as ``out/<seed, 6 digits>.png``; what is there already is kept.

    ``out/samples.json`` records how the images were made; images made otherwise are not mixed with them. Under
    ``torchrun`` the processes share the seeds (``torchrun --nproc_per_node 8 -- cli.py sample --run RUN ...``: without
    the ``--`` it takes ``--run`` for an option of its own). Several commands may also fill one folder, each with seeds
    of its own.

    Args:
        run: run folder of ``train-diffusion``.
        out: folder for the images.
        seeds: one per image, each once.
        options: what decides the images besides.
        extras: what to make besides the images, when all are there.
        batch_size: images between two writes (and two looks at whether to stop), raised to whole passes; it does not
            change the images.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; of several processes each takes the GPU of its local rank.
        autoencoder: the recorded autoencoder, where it is no longer at the recorded path.
        max_minutes: stop after so many minutes.
        overwrite: remove the samples that are there first.

    Returns:
        ``samples``, ``count``, ``written``, ``seconds``, ``npz``, ``contact_sheet`` and ``interpolation`` where they
        were asked for, and what ``samples.json`` records.

    Raises:
        UsageError: ``out`` holds other files or other samples, or a seed is negative or huge; see also
            :class:`ImageSampler`.
        WavelatentError: the run has no model yet, its autoencoder is missing or has changed, processes see different
            models (one was still training), or the disk is full.
        Stopped: by ``max_minutes`` or a signal; the same command goes on.
    """
    begin = time.monotonic()
    _check_seeds([*seeds, *(extras.interpolate or ())])
    if not seeds and (extras.npz or extras.contact_sheet):
        raise UsageError("--npz and --contact-sheet show samples: give --num N or --seeds A-B too")
    runtime = RuntimeOptions(device=device, mixed_precision=options.mixed_precision)
    with StopRequest(max_minutes) as stop, accelerated(runtime) as accelerator:
        place = device if accelerator.num_processes == 1 else accelerator.device
        sampler = ImageSampler(run, options, device=place, autoencoder=autoencoder)
        require_same(accelerator, f"--run {run}", sampler.identity())
        writer = SampleWriter(out, sampler.protocol())
        writer.check(overwrite)
        if overwrite or writer.missing(seeds) or extras.interpolate:
            _ = sampler.decoder  # what is wrong with it is said before the folder records anything
        accelerator.wait_for_everyone()  # all have looked at the folder, before one of them changes it
        if accelerator.is_main_process:
            writer.open(overwrite)
        missing = _agreed(writer.missing(seeds), accelerator)
        _write_missing(sampler, writer, seeds, missing, batch_size, accelerator, stop)
        made = by_main(accelerator, lambda: _make_extras(sampler, writer, seeds, extras))  # it may take minutes
    seconds = round(time.monotonic() - begin, 3)
    counts = {"samples": str(out), "count": len(seeds), "written": len(missing), "seconds": seconds}
    return {**counts, **made, **writer.record}


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if not 0 <= seed < MAX_SEED:
            raise UsageError(f"seed {seed}: give seeds from 0 to 2^63 - 1")


def _agreed(missing: list[int], accelerator: Accelerator) -> list[int]:
    """Return the first process's list in all: the folder may change while they look."""
    if accelerator.num_processes == 1:
        return missing
    from accelerate.utils import broadcast_object_list

    return list(broadcast_object_list([missing])[0])


def _write_missing(
    sampler: ImageSampler,
    writer: SampleWriter,
    seeds: Sequence[int],
    missing: list[int],
    batch_size: int,
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """Draw and write this process's share of ``missing``. All processes stop together, by :class:`Stopped`."""
    world, batch = accelerator.num_processes, whole_passes(batch_size, sampler.options.pass_rows)
    share = missing[accelerator.process_index :: world]
    rounds = -(-len(missing) // (world * batch))  # as many in every process, so that they can agree after each
    there = len(seeds) - len(missing)
    with tqdm(total=len(seeds), initial=there, desc="sample", disable=not accelerator.is_main_process) as bar:
        for number in range(rounds):
            if chosen := share[number * batch : (number + 1) * batch]:
                writer.write(chosen, sampler.draw(chosen))
            bar.update(min(world * batch, len(seeds) - bar.n))
            reason = stop.agreed(accelerator)
            if reason and number + 1 < rounds:
                raise Stopped(f"stopped by {reason} with {bar.n} of {len(seeds)} images; run again to go on")
    accelerator.wait_for_everyone()


def _make_extras(sampler: ImageSampler, writer: SampleWriter, seeds: Sequence[int], extras: Extras) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if extras.interpolate is not None:
        images = sampler.interpolate(extras.interpolate, extras.points)
        made["interpolation"] = writer.save_interpolation(extras.interpolate, images)
    if extras.npz is not None:
        writer.save_npz(extras.npz, seeds, sampler.labels(seeds))
        made["npz"] = str(extras.npz)
    if extras.contact_sheet is not None:
        writer.save_contact_sheet(extras.contact_sheet, seeds)
        made["contact_sheet"] = str(extras.contact_sheet)
    return made
