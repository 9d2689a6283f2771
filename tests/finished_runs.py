"""Run folders as training and evaluation leave them, written by hand: what a report reads, without training."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord, LatentCache
from wavelatent.common.latent_cache_writer import CachePlan, CacheWriter
from wavelatent.common.latents import Posterior
from wavelatent.pipelines.diffusion_run import inputs_of
from wavelatent.pipelines.report_pictures import tile

SIDE = 16
TINY = {"encoder": {"kind": "litevae", "size": "s", "levels": 1, "num_res_blocks": 1}, "decoder": {"width": "tiny"}}
RECONSTRUCTION: dict[str, Any] = {
    "metrics": {"psnr": 21.5, "ssim": 0.71, "lpips": 0.123, "rfid": 33.25},
    "protocol": {
        "num_samples": 64, "num_reference": 64, "features": "inception-v3-2015-12-05", "weights_sha256": "abc",
        "resize": {"data": "none", "features": "bilinear"}, "lpips_net": "alex", "reference_fingerprint": "d" * 64,
        "autoencoder": {"path": "one", "fingerprint": "a" * 64, "mixed_precision": "no"},
    },
    "seconds": 1.0,
}  # fmt: skip


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def colour(number: int) -> tuple[int, int, int]:
    """Return one of sixteen colours that nothing else on a page has."""
    red, green, blue = colorsys.hsv_to_rgb(number / 16, 1.0, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def write_run(path: Path, config: dict, inputs: dict, names: tuple[str, ...], grid: tuple[int, int]) -> Path:
    """Write a finished run; the cells of its sample grid, ``(rows, columns)``, are flat, each in its own colour."""
    write(path / "config.yaml", yaml.safe_dump(config))
    write(path / "inputs.json", inputs)
    write(path / "status.json", {"state": "done", "step": 20, "of": 20, "peak_memory_bytes": 300 * 2**20})
    write(path / "environment.json", {"command_line": ["/x/cli.py", "train", "a b"], "versions": {"torch": "2.9"}})
    lines = [{"step": s, "images": 8 * s, "seconds": 2.0 * s, **dict.fromkeys(names, 1 / s)} for s in (10, 20)]
    write(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "los')
    cells = [np.full((SIDE, SIDE, 3), colour(n), dtype=np.uint8) for n in range(grid[0] * grid[1])]
    (path / "samples").mkdir()
    Image.fromarray(tile(cells, grid[1])).save(path / "samples" / "step-20.png")
    Image.fromarray(tile(cells, grid[1])[::-1]).save(path / "samples" / "step-9.png")
    return path


def write_first(path: Path, **model: Any) -> Path:
    data = {"spec": "synthetic:64", "fingerprint": "d" * 64, "transform": {"size": SIDE}}
    config = {"model": {**TINY, "channels": 2, "bottleneck": {"kind": "kl"}, **model}, "seed": 0}
    return write_run(path, config, {"kind": "autoencoder", "data": data}, ("loss/l1", "psnr"), (2, 8))


MEASURED = (
    "validation/loss", "validation/sigma_0-0.2", "validation/sigma_0.2-1", "validation/sigma_1-5",
    "validation/sigma_5-inf", "quick_fid",
)  # fmt: skip


def write_second(path: Path, first: Path, *, num_samples: int = 4, measured: tuple[str, ...] = ()) -> Path:
    """A stage-2 run on a cache whose first channel is at +-2.9 and whose second is at 0."""
    plan = CachePlan(
        autoencoder=AutoencoderRecord(fingerprint="a" * 64, path=str(first.resolve())),
        data=DataRecord(fingerprint="d" * 64, spec="synthetic:64", transform={"size": SIDE}),
        shape=(2, 3, 5),
        count=10,
        shard_size=4,
    )
    writer = CacheWriter(path.with_name(f"{path.name}-cache"), plan)
    for number in writer.unfinished():
        index = torch.tensor(writer.remaining(number))
        signs = torch.where(index % 2 == 0, 2.9, -2.9)[:, None, None].expand(-1, 3, 5)
        writer.add(number, index, Posterior(torch.stack([signs, torch.zeros_like(signs)], dim=1)))
    writer.finish()
    cache = LatentCache.open(path.with_name(f"{path.name}-cache"))
    config = {
        "model": {"kind": "unet", "channels": 32, "multipliers": [1], "attention_levels": [], "head_channels": 8},
        "objective": {"kind": "edm"},
        "whitening": "scalar",
        "train": {"num_samples": num_samples, "sample_steps": 3, "ema": {"widths": [0.1, 0.05]}},
        "seed": 0,
    }
    write(path / "best" / "best.json", {"step": 20, "validation/loss": 0.05})
    return write_run(path, config, inputs_of(cache), ("loss/denoising", *measured), (2, 2))


def write_samples(path: Path, run: Path, seeds: range, **record: Any) -> Path:
    """Write a folder of samples of ``run``; the image of a seed is flat and of the seed's colour."""
    write(path / "samples.json", {"run": str(run.resolve()), "sampler": "heun", "steps": 18, "ema": 0.05, **record})
    for seed in seeds:
        Image.new("RGB", (SIDE, SIDE), colour(seed)).save(path / f"{seed:06d}.png")
    return path


def write_health(path: Path, **levels: str) -> Path:
    """Write what ``diagnose`` leaves of one section ``scale``, ``{verdict name: level}``, and its page."""
    verdicts = [
        {"level": level, "name": name, "text": f"{name} measured 3.", "threshold": "below 2", "source": "ours"}
        for name, level in levels.items()
    ]
    record = {
        "format": 1,
        "sections": {"scale": {"asks": "?", "verdicts": verdicts, "figures": {}}},
        "not_computed": {"locality": "too small"},
        "protocol": {"autoencoder": {"fingerprint": "a" * 64}},
    }
    write(path / "health.json", record)
    write(path / "health.html", "<p>health</p>")
    return path


def result(**changes: Any) -> dict[str, Any]:
    """Return :data:`RECONSTRUCTION` with another protocol."""
    return {**RECONSTRUCTION, "protocol": {**RECONSTRUCTION["protocol"], **changes}}


def write_two(root: Path) -> tuple[Path, Path]:
    """Write a whole variant and a stage-1 run by itself; return the stage-2 run of the one, and the other."""
    first = write_first(root / "one", bottleneck={"kind": "bounded", "bound": 3.0})
    write(first / "evaluation-reconstruction" / "metrics.json", RECONSTRUCTION)
    return write_second(root / "one-diffusion", first), write_first(root / "two")
