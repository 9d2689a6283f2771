"""What an evaluation is held against, and the networks that it is measured with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.adm_npz import GivenStatistics, NpzFile, NpzImages, is_npz
from ..common.dinov2 import RESIZE_NAME as DINOV2_RESIZE
from ..common.distributed_features import shared_reference
from ..common.errors import UsageError
from ..common.images import ImageData, open_data
from ..common.inception import FEATURES_NAME
from ..common.inception import RESIZE_NAME as INCEPTION_RESIZE
from ..common.reference_cache import FeatureNetwork, ReferenceCache
from ..common.reference_features import Reference, choose_images, reference_features
from ..common.runtime import StopRequest, environment

if TYPE_CHECKING:
    from accelerate import Accelerator

DINOV2 = "fd_dinov2"
"""What the Fréchet distance between DINOv2 features is called, of samples and of reconstructions."""


@dataclass(frozen=True)
class ReferenceData:
    """The reference: images, the first ``num`` of an order drawn from ``seed``, or statistics that were given, or both.

    An ``.npz`` of ADM may hold the statistics of more images than it has: its FID is against those, as in ADM's own
    evaluation, and what else needs features is against the images.
    """

    spec: str
    images: ImageData | None
    given: GivenStatistics | None
    fingerprint: str
    num: int | None
    seed: int

    @property
    def indices(self) -> list[int]:
        """Which images, in which order. Raises :class:`UsageError` where there are not so many."""
        return [] if self.images is None else choose_images(len(self.images), self.num, self.seed)

    def protocol(self) -> dict[str, Any]:
        """Return what is known before anything is measured, and what a figure must not be compared across."""
        transform = {} if self.images is None else self.images.transform
        given = {} if self.given is None else {"reference_statistics": "mu and sigma of the file"}
        return {
            "num_reference": None if self.images is None else len(self.indices),
            "features": FEATURES_NAME,
            "weights_sha256": None,
            "resize": {"data": transform.get("filter"), "features": INCEPTION_RESIZE},
            "crop": transform.get("crop"),
            "size": None if self.images is None else self.images.size,
            "reference": self.spec,
            "reference_fingerprint": self.fingerprint,
            "reference_order_seed": self.seed,
            **given,
            "library versions": environment()["versions"],
        }

    def images_alone(self) -> ReferenceData:
        """Return it without given statistics. Raises :class:`UsageError` where there is nothing else."""
        if self.images is None:
            raise UsageError(f"--data {self.spec} holds statistics: give the images that are to be reconstructed")
        return replace(self, given=None)

    def notes(self) -> list[str]:
        """Return what a reader of the figures must know of the reference."""
        if self.given is None:
            return []
        return [
            f"given-statistics: FID is against the mu and sigma in {self.spec}, which does not say of how many images, "
            "of which size and by which network's weights they are"
        ]

    def features(
        self, accelerator: Accelerator, network: FeatureNetwork, batch_size: int, stop: StopRequest
    ) -> Reference:
        """Return the reference's features, the same in every process, from the cache where they are there."""
        if self.images is None:
            assert self.given is not None, "there are images or statistics"
            return Reference(torch.empty(0, network.dim), self.given, self.fingerprint)
        if accelerator.num_processes == 1:
            images, num, seed = self.images, self.num, self.seed
            found = reference_features(images, network, num=num, seed=seed, batch_size=batch_size, stop=stop)
        else:
            images, cache = self.images, ReferenceCache(self.images.fingerprint(), network, self.seed)
            count = len(self.indices)
            found = shared_reference(accelerator, network, cache, lambda: images, count, batch_size, stop)
        is_inception = network.name == FEATURES_NAME
        return found if self.given is None or not is_inception else replace(found, statistics=self.given)


def open_reference(
    data: str, *, size: int | None, max_bad_fraction: float, num: int | None, seed: int
) -> ReferenceData:
    """Open what ``--data`` names: a data set, or an ``.npz`` with images or statistics.

    Raises:
        UsageError: there is no such data, or fewer images than ``num``.
    """
    if not is_npz(data):
        images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
        opened = ReferenceData(images.spec, images, None, images.fingerprint(), num, seed)
    else:
        file = NpzFile(Path(data))
        of_file = None if file.images is None else NpzImages(file, size)
        fingerprint = of_file.fingerprint() if of_file and file.statistics is None else file.fingerprint
        opened = ReferenceData(data, of_file, file.statistics, fingerprint, num, seed)
    if opened.images is None and num is not None:
        raise UsageError(f"{data} holds statistics and no images: leave out --num-reference")
    _ = opened.indices
    return opened


def dinov2_protocol(source: str, network: FeatureNetwork) -> dict[str, Any]:
    """Return how ``fd_dinov2`` was defined; its features are never Inception's, nor is it ever called FID."""
    return {
        "source": source,
        "features": network.name,
        "weights_sha256": network.weights_sha256,
        "resize": DINOV2_RESIZE,
    }
