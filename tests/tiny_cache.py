"""A latent cache of a few small latents with classes, written without an autoencoder."""

from pathlib import Path

import torch

from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord
from wavelatent.common.latent_cache_writer import CachePlan, CacheWriter
from wavelatent.common.latents import Posterior
from wavelatent.common.randomness import generator

C, H, W, COUNT, CLASSES = 3, 4, 8, 13, 2


def write_cache(path: Path, num_classes: int = CLASSES) -> Path:
    plan = CachePlan(
        autoencoder=AutoencoderRecord(fingerprint="a" * 64, path="somewhere/ae"),
        data=DataRecord(fingerprint="d" * 64, spec="synthetic:13", transform={"size": 8}, num_classes=num_classes),
        shape=(C, H, W),
        count=COUNT,
        shard_size=5,
    )
    writer = CacheWriter(path, plan)
    for number in writer.unfinished():
        index = torch.tensor(writer.remaining(number))
        scale = torch.tensor([1.0, 2.0, 5.0])[:, None, None]
        # Flat latents: white ones would leave nothing to learn, as c_skip x is then the best estimate already.
        mean = [3 + scale * torch.randn(C, 1, 1, generator=generator("mean", i)) for i in index.tolist()]
        posterior = Posterior(
            torch.stack(mean).expand(-1, C, H, W).contiguous(), torch.full((len(index), C, H, W), 0.1)
        )
        writer.add(number, index, posterior, None, index % num_classes if num_classes else None)
    writer.finish()
    return path
