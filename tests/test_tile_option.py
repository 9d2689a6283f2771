"""``tile`` of encode, sample and evaluate reconstruction: what it changes, what is recorded and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from wavelatent.common.errors import UsageError
from wavelatent.common.images import open_data, read_batch
from wavelatent.common.latent_cache import LatentCache
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines import evaluate
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.encode import encode
from wavelatent.pipelines.evaluate import evaluate_reconstruction
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.sample import sample
from wavelatent.pipelines.sample_images import ImageSampler, SampleOptions
from wavelatent.pipelines.train_diffusion import train_diffusion
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from wavelatent.stage1_autoencoder.tiling import TiledAutoencoder
from wavelatent.stage2_diffusion.sampling import Sampling

DATA, SIZE = "synthetic:3", 32
MODEL = {
    "encoder": {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1},
    "decoder": {"width": "tiny", "num_res_blocks": 1},
    "channels": 5,
}
DENOISER = {
    "model": {
        "kind": "unet",
        "channels": 8,
        "multipliers": [1],
        "num_res_blocks": 1,
        "attention_levels": [],
        "head_channels": 8,
    },
    "train": {"steps": 1, "batch_size": 2, "sample_every": 0},
}


@pytest.fixture(scope="module")
def ae(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ae")
    torch.manual_seed(0)
    Autoencoder(AutoencoderConfig.model_validate(MODEL)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def cache(ae: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    encode(ae, DATA, path, size=SIZE, device="cpu", tile=16)
    return path


def test_encode_runs_in_tiles_and_records_it(ae: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["autoencoder"]["tile"] == 16
    images = read_batch(open_data(DATA, size=SIZE), range(3)).images
    model = load_autoencoder(ae)
    rows = LatentCache.open(cache).read(range(3)).posterior
    torch.testing.assert_close(rows.mean, TiledAutoencoder(model, 16).encode(images).mean, rtol=0, atol=1e-5)
    assert (rows.mean - model.encode(images).mean).abs().max() > 1e-3  # blended latents are others
    assert encode(ae, DATA, cache, size=SIZE, device="cpu", tile=16)["already_complete"]
    assert "tiles of 16 px: encode blended over 4 px" in capsys.readouterr().err


def test_a_finished_cache_of_other_tiles_is_refused(ae: str, cache: Path) -> None:
    with pytest.raises(UsageError, match="finished cache with tile 16, not none"):
        encode(ae, DATA, cache, size=SIZE, device="cpu")
    with pytest.raises(UsageError, match="finished cache with tile 16, not 24"):
        encode(ae, DATA, cache, size=SIZE, device="cpu", tile=24)


def test_reconstruction_records_the_tile(ae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise MissingWeightsError("left out")

    monkeypatch.setattr(evaluate, "InceptionFeatures", missing)
    monkeypatch.setattr(evaluate, "PerceptualDistance", missing)

    def measure(tile: int | None) -> evaluate.Result:
        out = tmp_path / str(tile)
        return evaluate_reconstruction(ae, DATA, out=out, size=SIZE, device="cpu", tile=tile)

    untiled, same, blended = measure(None), measure(SIZE), measure(16)
    assert "tile" not in untiled.protocol["autoencoder"]
    assert blended.protocol["autoencoder"]["tile"] == 16
    assert same.metrics == untiled.metrics != blended.metrics


def test_sampling_in_tiles_is_recorded_and_not_mixed(ae: str, cache: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "samples"
    config = DiffusionRunConfig.model_validate(DENOISER)
    train_diffusion(config, latents=cache, out=run, options=RuntimeOptions(device="cpu"))
    options = {tile: SampleOptions(Sampling("euler", 1), tile=tile, pass_rows=1) for tile in (None, 16, 30)}
    with pytest.raises(UsageError, match="--tile 30"):
        sample(run, out, [7], options[30], device="cpu")
    assert sample(run, out, [7], options[16], device="cpu")["tile"] == 16
    with pytest.raises(UsageError, match="another tile"):
        sample(run, out, [7, 8], options[None], device="cpu")
    whole, pieces = (ImageSampler(run, options[tile], device="cpu").draw([7]) for tile in (None, 16))
    assert whole.shape == pieces.shape == (1, 3, SIZE, SIZE)
    assert not torch.equal(whole, pieces)


def test_a_tile_that_does_not_suit_the_autoencoder_leaves_nothing(ae: str, tmp_path: Path) -> None:
    for run in (lambda: encode(ae, DATA, tmp_path / "new", size=SIZE, tile=30), lambda: reconstruct(ae, tmp_path)):
        with pytest.raises(UsageError, match="--tile 30: give a multiple of the autoencoder's downsampling factor 4"):
            run()
    assert not (tmp_path / "new").exists()


def reconstruct(ae: str, out: Path) -> None:
    evaluate_reconstruction(ae, DATA, out=out / "new", size=SIZE, device="cpu", tile=30)
