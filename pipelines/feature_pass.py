"""One look at every image: the features of all networks go into files, and all figures are computed from those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.distributed_features import in_agreement, shared_rows
from ..common.evaluation import Measurement, set_figures
from ..common.feature_store import FeatureStore
from ..common.reference_cache import FeatureNetwork
from ..common.runtime import StopRequest
from .evaluation_inputs import ReferenceData

if TYPE_CHECKING:
    from accelerate import Accelerator

Make = Callable[[range], tuple[Tensor, Tensor]]
"""Makes the images of a range of numbers, uint8 ``[B,3,H,W]``, and figures of each, float64 ``[B,width]``."""


class FeaturePass:
    """Compares images with a reference in the features of several networks, by all processes together.

    Args:
        accelerator: of this process; each takes its share, and the main one keeps what all of them made.
        networks: by what the Fréchet distance between their features is called.
        reference: what the images are held against; its features are extracted here where they are not cached.
        batch_size: images per pass of the networks.
        stop: looked at after every batch.

    Raises:
        Stopped: in every process; what is known of the reference is kept.
        WavelatentError: in every process, where one of them failed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        networks: Mapping[str, FeatureNetwork],
        reference: ReferenceData,
        batch_size: int,
        stop: StopRequest,
    ) -> None:
        self.accelerator, self.networks, self.stop = accelerator, networks, stop
        self.references = {
            name: reference.features(accelerator, network, batch_size, stop) for name, network in networks.items()
        }
        self.features: dict[str, Tensor] = {}

    def collect(self, make: Make, count: int, width: int, batch_size: int, label: str) -> Tensor:
        """Look at images 0 to ``count - 1``; return their figures ``[count,width]`` in the main process, else nothing.

        The features are mapped from files: memory does not grow with them.
        """
        dims = [network.dim for network in self.networks.values()]
        stores = {name: FeatureStore(network.dim) for name, network in self.networks.items()}
        values = []

        def row(numbers: range) -> Tensor:
            figures, images = make(numbers)
            features = [network(images).double() for network in self.networks.values()]
            return torch.cat([figures.cpu(), *features], dim=1)

        def keep(numbers: range, rows: Tensor) -> None:
            figures, *features = rows.split([width, *dims], dim=1)
            values.append(figures.clone())
            for store, of_network in zip(stores.values(), features, strict=True):
                store.append(of_network, numbers)

        parts = shared_rows(self.accelerator, row, count, width + sum(dims), batch_size, label, self.stop)
        for numbers, rows in parts:
            self._in_main(lambda n=numbers, r=rows: keep(n, r))  # type: ignore[misc]
        self._in_main(lambda: self.features.update({name: store.features for name, store in stores.items()}))
        for store in stores.values():
            store.close()
        return torch.cat(values) if values else torch.empty(0, width, dtype=torch.float64)

    def figures(self, *, full: str | None = None, intervals: bool) -> Measurement:
        """Return the figures of what was collected; in the main process.

        Of the network ``full`` these are all that :func:`set_figures` knows, of the others the Fréchet distance alone.
        """
        result = Measurement()
        for name, features in self.features.items():
            only_frechet, reference = name != full, self.references[name]
            result.add(set_figures(name, features, reference, only_frechet=only_frechet, intervals=intervals))
        return result

    def _in_main(self, work: Callable[[], None]) -> None:
        in_agreement(self.accelerator, lambda: work() if self.accelerator.is_main_process else None)
