"""The decoder's options: parameter counts, the inverse Haar transform, the wavelet output and the last layer."""

import numpy as np
import ptwt
import pytest
import torch

from wavelatent.stage1_autoencoder.decoder import MULTIPLIERS, ConvDecoder, ConvDecoderConfig, Upsample
from wavelatent.stage1_autoencoder.wavelets import haar_bands, inverse_haar_bands, wavelet_levels


def decoder(downsampling: int = 4, **options) -> ConvDecoder:
    torch.manual_seed(0)
    options = {"width": "tiny", "num_res_blocks": 1} | options
    return ConvDecoder(ConvDecoderConfig(**options), 5, downsampling)


def test_the_inverse_haar_transform_is_exact_both_ways():
    images, bands = torch.rand(2, 3, 10, 14) * 2 - 1, torch.randn(2, 12, 5, 7)
    torch.testing.assert_close(inverse_haar_bands(haar_bands(images)), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(haar_bands(inverse_haar_bands(bands)), bands, rtol=0, atol=1e-6)


def test_the_inverse_haar_transform_is_ptwts():
    bands = torch.randn(2, 12, 5, 7)
    low, *details = bands.chunk(4, dim=1)
    expected = ptwt.waverec2((low, ptwt.WaveletDetailTuple2d(*details)), "haar")
    torch.testing.assert_close(inverse_haar_bands(bands), expected, rtol=0, atol=1e-6)


def test_the_inverse_haar_transform_has_its_gradient():
    assert torch.autograd.gradcheck(inverse_haar_bands, torch.randn(1, 8, 2, 3, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize("downsampling", MULTIPLIERS)
@pytest.mark.parametrize("output", ["pixels", "wavelet"])
def test_every_downsampling_gives_images(downsampling, output):
    images = decoder(downsampling, output=output, attention=False)(torch.randn(2, 5, 3, 4))
    assert images.shape == (2, 3, 3 * downsampling, 4 * downsampling)


def test_a_downsampling_without_multipliers_is_refused():
    with pytest.raises(ValueError, match="no multipliers for downsampling 6"):
        decoder(6)


def test_the_wavelet_output_has_the_encoders_scale():
    """The last convolution's bands are the ones that the wavelet transform finds in the image."""
    model = decoder(output="wavelet")
    bands = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: bands.append(output))
    images = model(torch.randn(2, 5, 3, 4))
    assert bands[0].shape == (2, 12, 6, 8)
    torch.testing.assert_close(wavelet_levels(images.detach(), 1)[0], bands[0], rtol=0, atol=1e-6)


def test_the_wavelet_output_is_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(output="wavelet")(torch.randn(2, 5, 3, 4)).dtype == torch.float32


def test_the_wavelet_output_drops_the_level_at_image_resolution():
    """Multipliers 1, 2, 4, 4 of width 16 become 2, 4, 4: one upsampling less, every other width as it was."""

    def widths(output: str) -> list[int]:
        model = decoder(8, output=output)
        upsampled = [m.conv.out_channels for m in model.layers if isinstance(m, Upsample)]
        return [*upsampled, model.last_layer.shape[1]]

    assert widths("pixels") == [64, 64, 32, 16]
    assert widths("wavelet") == [64, 64, 32]


@pytest.mark.parametrize("norm", ["group", "smc"])
@pytest.mark.parametrize("output", ["pixels", "wavelet"])
def test_the_last_layer_is_the_last_convolutions_weight(norm, output):
    model = decoder(norm=norm, output=output)
    assert model.last_layer is [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1].weight
    assert model.last_layer.shape == (12 if output == "wavelet" else 3, 16 * (2 if output == "wavelet" else 1), 3, 3)


def test_the_post_quant_convolution_acts_on_the_latents_first():
    with_conv, without, latents = decoder(post_quant_conv=True), decoder(), torch.randn(2, 5, 3, 4)
    extra = {name: value.shape for name, value in with_conv.state_dict().items() if name not in without.state_dict()}
    assert extra == {"post_quant_conv.weight": (5, 5, 1, 1), "post_quant_conv.bias": (5,)}
    without.load_state_dict({name: value for name, value in with_conv.state_dict().items() if name not in extra})
    mixed = torch.nn.functional.conv2d(latents, with_conv.post_quant_conv.weight, with_conv.post_quant_conv.bias)
    torch.testing.assert_close(with_conv(latents), without(mixed))


def test_parameter_counts():
    """Stable Diffusion's decoder, exactly; its 1x1 convolution has 4 * 4 + 4 more."""

    def count(**options) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in ConvDecoder(ConvDecoderConfig(**options), 4, 8).parameters())

    assert count() == 49_490_179
    assert count(post_quant_conv=True) == 49_490_179 + 20
    attention = 2 * 512 + 4 * (512 * 512 + 512)  # GroupNorm, then q, k, v and the output projection
    assert count(attention=False) == 49_490_179 - attention


def test_smc_without_attention_is_free_of_normalisation():
    names = [type(m).__name__ for m in decoder(norm="smc", attention=False).modules()]
    assert not any("Norm" in name or "Attention" in name for name in names)
    assert "SelfModulatedConv2d" in names


def test_gradients_reach_the_wavelet_decoder():
    model = decoder(output="wavelet", norm="smc")
    model(torch.randn(2, 5, 3, 4)).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not np.any(p.grad.numpy())]
    assert dead == []
