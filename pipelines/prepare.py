"""``wavelatent prepare``: decode, crop and resize a data set once, into a prepared folder.

Images are written in shards; a run that was cut short goes on after its last whole shard, and the manifest, written
last, is what makes the folder a data set. See `common.prepared` for the format.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common.errors import Stopped, UsageError, WavelatentError
from ..common.hf_data import HubImages, HubStream
from ..common.image_folders import FolderImages
from ..common.image_sources import Decoded, decode_item, ordered_map, require_few_bad
from ..common.prepared import (
    MANIFEST,
    PROGRESS,
    SHARDS,
    TEMPORARY,
    Manifest,
    PreparedFolder,
    Progress,
    is_prepared,
    prepared_fingerprint,
    read_record,
    write_record,
    write_shard,
)
from ..common.runtime import StopRequest
from ..common.synthetic_faces import SyntheticFaces
from ..common.transforms import ImageTransform

SHARD_IMAGES = 1024
SHARD_BYTES = 1 << 28
"""A shard is built in memory: at most so many source images, and fewer where they are large."""
UNKNOWN_LENGTH_PATIENCE = 10_000
"""How much of a stream of unknown length is read before its fraction of bad images can stop it."""


def prepare(
    data: str,
    size: int,
    out: str | Path,
    *,
    resize_filter: str = "lanczos",
    max_bad_fraction: float = 0.01,
    num_workers: int = 2,
    streaming: bool = False,
    overwrite: bool = False,
    max_images: int | None = None,
) -> dict[str, Any]:
    """Turn ``data`` into the prepared folder ``out`` of ``size`` x ``size`` images.

    Args:
        data: ``synthetic[:N]``, an image folder, or ``hf:NAME[:SPLIT]``.
        size: side of the images in pixels.
        out: the folder to make; an unfinished one of the same request is continued, a finished one is left alone.
        resize_filter: a name of `transforms.RESIZE_FILTERS`.
        max_bad_fraction: how many of the files, at most, may be unreadable or too small.
        num_workers: processes that decode; a stream is decoded in this one.
        streaming: read an ``hf:`` data set as a stream instead of downloading all of it first.
        overwrite: begin again, discarding what an earlier request put into ``out``.
        max_images: look only at the first so many of the source's images.

    Returns:
        ``{"state": "done" | "already done", "out", "count", "size", "num_classes", "class_names", "skipped",
        "transform", "fingerprint", "seconds"}``.

    Raises:
        UsageError: there is no such data, or ``out`` holds something else.
        WavelatentError: too many files are bad, or a finished ``out`` is damaged.
        Stopped: by SIGTERM or SIGINT; the finished shards are kept.
    """
    started = time.monotonic()
    out = Path(out)
    source = _open_source(data, ImageTransform(size, resize_filter), streaming, max_images)
    _require_free(out)
    if overwrite:
        _remove_prepared(out)
    finished = (out / MANIFEST).is_file()
    if finished:
        _require_same_request(out, read_record(Manifest, out / MANIFEST).request, source.request)
        PreparedFolder(out).verify()
    else:
        _write_images(out, source, max_bad_fraction, num_workers)
    return {
        "state": "already done" if finished else "done",
        **_summary(PreparedFolder(out)),
        "seconds": round(time.monotonic() - started, 3),
    }


@dataclass(frozen=True)
class _Source:
    """Images to prepare: ``items(start, num_workers)`` yields them in order from number ``start`` on."""

    spec: str
    class_names: list[str]
    transform: dict[str, object]
    request: dict[str, object]
    total: int | None
    items: Callable[[int, int], Iterator[Decoded]]


def _open_source(data: str, transform: ImageTransform, streaming: bool, max_images: int | None) -> _Source:
    if max_images is not None and max_images < 1:
        raise UsageError(f"max_images must be at least 1, not {max_images}")
    if streaming:
        if not data.startswith("hf:"):
            raise UsageError(f"only hf:NAME[:SPLIT] can be streamed, not {data}")
        return _stream_source(data, transform, max_images)
    if data == "synthetic" or data.startswith("synthetic:"):
        faces = SyntheticFaces.from_spec(data, transform.size)
        return _indexed_source(
            data, faces.class_names, faces.transform, faces.identity(), len(faces), partial(_draw, faces), max_images
        )
    if not data.startswith("hf:") and is_prepared(Path(data)):
        raise UsageError(f"{data} is a prepared folder already: name the images it was made from")
    files = HubImages(data) if data.startswith("hf:") else FolderImages(data)
    decode = partial(decode_item, files, transform)
    return _indexed_source(
        data, files.class_names, transform.record(), files.identity(), len(files), decode, max_images
    )


def _indexed_source(
    spec: str,
    class_names: list[str],
    transform: dict[str, object],
    identity: str,
    available: int,
    decode: Callable[[int], Decoded],
    max_images: int | None,
) -> _Source:
    total = available if max_images is None else min(available, max_images)
    request: dict[str, object] = {"data": spec, "files": identity, "transform": transform, "max_images": max_images}

    def items(start: int, num_workers: int) -> Iterator[Decoded]:
        return ordered_map(decode, range(start, total), num_workers)

    return _Source(spec, class_names, transform, request, total, items)


def _stream_source(spec: str, transform: ImageTransform, max_images: int | None) -> _Source:
    stream = HubStream(spec)
    totals = [total for total in (stream.total, max_images) if total is not None]
    request: dict[str, object] = {"data": spec, "transform": transform.record(), "max_images": max_images}

    def items(start: int, num_workers: int) -> Iterator[Decoded]:
        rest = None if max_images is None else max_images - start
        return islice(stream.decoded(transform, start), rest)

    total = min(totals) if totals else None
    return _Source(spec, stream.class_names, transform.record(), request, total, items)


def _draw(faces: SyntheticFaces, index: int) -> Decoded:
    return Decoded(faces.image(index), faces.label(index), None)


def _write_images(out: Path, source: _Source, max_bad_fraction: float, num_workers: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _remove(out, TEMPORARY)
    progress = _read_progress(out, source)
    side = int(str(source.transform["size"]))
    shard_images = max(1, min(SHARD_IMAGES, SHARD_BYTES // (3 * side * side)))
    with (
        StopRequest() as stop,
        tqdm(desc=f"preparing {source.spec}", total=source.total, initial=progress.consumed, unit="img") as bar,
    ):
        items = _until_stopped(source.items(progress.consumed, num_workers), stop, bar)
        while chunk := list(islice(items, shard_images)):
            progress = _add_shard(out, progress, chunk)
            if source.total is not None or progress.consumed >= UNKNOWN_LENGTH_PATIENCE:
                total = source.total or progress.consumed
                require_few_bad(source.spec, progress.skipped, total, max_bad_fraction)
            write_record(out / PROGRESS, progress)
            bar.update(len(chunk))
    require_few_bad(source.spec, progress.skipped, progress.consumed, max_bad_fraction)
    count = sum(shard.count for shard in progress.shards)
    if count == 0:
        raise WavelatentError(f"no image of {source.spec} can be used: nothing to prepare")
    manifest = Manifest(
        spec=source.spec,
        transform=source.transform,
        count=count,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        skipped=progress.skipped,
        fingerprint=prepared_fingerprint(progress.shards, source.transform),
        request=source.request,
        shards=progress.shards,
    )
    write_record(out / MANIFEST, manifest)
    (out / PROGRESS).unlink(missing_ok=True)


def _until_stopped(items: Iterator[Decoded], stop: StopRequest, bar: tqdm) -> Iterator[Decoded]:
    """Yield ``items``, and raise `Stopped` before the next one when asked to: the shard they were for is lost."""
    for item in items:
        if stop.reason:
            raise Stopped(f"prepare stopped by {stop.reason} with {bar.n} images finished; run it again to go on")
        yield item


def _read_progress(out: Path, source: _Source) -> Progress:
    if not (out / PROGRESS).is_file():
        progress = Progress(request=source.request, class_names=source.class_names)
        write_record(out / PROGRESS, progress)
        return progress
    progress = read_record(Progress, out / PROGRESS)
    _require_same_request(out, progress.request, source.request)
    return progress


def _add_shard(out: Path, progress: Progress, chunk: list[Decoded]) -> Progress:
    """Write the usable images of ``chunk`` as the next shard, if there are any, and return the new progress."""
    images = [item.image for item in chunk if item.image is not None]
    labels = [item.label for item in chunk if item.image is not None and item.label is not None]
    shards = list(progress.shards)
    if images:
        shards.append(write_shard(out, len(shards), images, labels if progress.class_names else None))
    return Progress(
        request=progress.request,
        class_names=progress.class_names,
        consumed=progress.consumed + len(chunk),
        skipped=progress.skipped + [item.skipped for item in chunk if item.skipped is not None],
        shards=shards,
    )


def _require_same_request(out: Path, earlier: dict[str, object], now: dict[str, object]) -> None:
    for key in now:
        if earlier.get(key) == now[key]:
            continue
        if key == "files":
            raise UsageError(f"{now['data']} has changed since {out} was prepared: name another --out, or --overwrite")
        raise UsageError(
            f"{out} was prepared with {key} {earlier.get(key)}, not {now[key]}: name another --out, or --overwrite"
        )


def _require_free(out: Path) -> None:
    """Raise `UsageError` when ``out`` holds anything that `prepare` did not write."""
    if out.is_file():
        raise UsageError(f"{out} is a file: name a folder for the prepared images")
    if out.is_dir() and not is_prepared(out) and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UsageError(f"{out} is not empty and not a prepared folder: name another --out")


def _remove_prepared(out: Path) -> None:
    """Remove an earlier request's files, so that a crash half-way leaves no data set, and what can be removed again."""
    if not is_prepared(out):
        return
    if not (out / PROGRESS).is_file():
        write_record(out / PROGRESS, Progress(request={}, class_names=[]))  # says whose the folder is; removed last
    _remove(out, (MANIFEST, *SHARDS, PROGRESS))


def _remove(out: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in out.glob(pattern):
            path.unlink()


def _summary(folder: PreparedFolder) -> dict[str, Any]:
    return {
        "out": str(folder.root),
        "count": len(folder),
        "size": folder.size,
        "num_classes": folder.num_classes,
        "class_names": folder.class_names,
        "skipped": [{"path": file.path, "reason": file.reason} for file in folder.skipped],
        "transform": folder.transform,
        "fingerprint": folder.fingerprint(),
    }
