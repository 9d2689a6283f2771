"""DINOv2 features, with a tiny network of random weights in the library's own format."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wavelatent.common.dinov2 import MEAN, STD, Dinov2Features, normalised
from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.torchvision_import import ensure_torchvision

IMAGES = torch.randint(0, 256, (3, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers", reason="the extra dinov2 is not installed")
    ensure_torchvision()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, patch_size=56, image_size=112)
    Dinov2Model(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_features_are_the_normalised_class_token(folder):
    from transformers import Dinov2Model

    network = Dinov2Model.from_pretrained(folder).eval()
    features = Dinov2Features(str(folder))
    assert (features.name, features.dim) == ("dinov2-vit-12x2-56-cls", 12)
    with torch.no_grad():
        expected = network(normalised(IMAGES)).last_hidden_state[:, 0]
    torch.testing.assert_close(features(IMAGES), expected)
    torch.testing.assert_close(features(IMAGES[1:2]), expected[1:2], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(IMAGES), features(IMAGES).float())
        torch.testing.assert_close(features(IMAGES), expected)


def test_the_hash_is_of_weights_and_architecture(folder, tmp_path):
    from transformers import Dinov2Model

    first = Dinov2Features(str(folder)).weights_sha256
    assert Dinov2Features(str(folder)).weights_sha256 == first
    network = Dinov2Model.from_pretrained(folder)
    network.config.num_attention_heads = 6
    network.save_pretrained(tmp_path / "heads")
    assert Dinov2Features(str(tmp_path / "heads")).weights_sha256 != first
    network.config.num_attention_heads = 3
    next(network.parameters()).data.add_(1e-3)
    network.save_pretrained(tmp_path / "weights")
    assert Dinov2Features(str(tmp_path / "weights")).weights_sha256 != first


def test_the_resize_is_pillows_bicubic():
    images = 100 + IMAGES[:1] // 5  # Pillow also clamps between its two passes
    pixels = images[0].permute(1, 2, 0).numpy()
    resized = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    expected = (torch.from_numpy(resized) - torch.tensor(MEAN)) / torch.tensor(STD)
    mine = normalised(images)[0].permute(1, 2, 0).double()
    assert (mine - expected).abs().max() < 1.01 / 255 / min(STD), "one step of uint8 at most"
    assert (mine - expected).abs().mean() < 0.3 / 255 / min(STD)


def test_what_is_no_dinov2_is_refused_by_name(folder, tmp_path):
    from transformers import ViTConfig

    with pytest.raises(WavelatentError, match=r"--dinov2 .*nowhere is no folder or hub id within reach"):
        Dinov2Features(str(tmp_path / "nowhere"))
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UsageError, match="is a vit: give a DINOv2"):
        Dinov2Features(str(tmp_path / "vit"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(WavelatentError, match=r"--dinov2 .*tiny is no folder of a transformers Dinov2Model"):
        Dinov2Features(str(folder))


def test_weights_that_are_missing_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WavelatentError, match=r"lacks the weights layernorm\.weight"):
        Dinov2Features(str(folder))


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'wavelatent\[dinov2\]'"):
        Dinov2Features("facebook/dinov2-large")
