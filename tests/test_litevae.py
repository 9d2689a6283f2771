"""The LiteVAE encoder beyond what every encoder keeps: shared extraction, the order of its levels, its wavelets."""

import pytest
import torch
from torch import nn

from wavelatent.stage1_autoencoder.litevae import LiteVAEConfig, LiteVAEEncoder

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1


def encoder(**options) -> LiteVAEEncoder:
    torch.manual_seed(0)
    return LiteVAEEncoder(LiteVAEConfig.model_validate({"size": "s", "num_res_blocks": 1} | options), 10)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sharing_leaves_one_extraction_net_and_counts_it_once():
    shared, apart = encoder(shared_extraction=True), encoder()
    one = parameters(apart.extract[0])
    assert parameters(apart) - parameters(shared) == 2 * one
    assert {name.split(".")[1] for name in shared.state_dict() if name.startswith("extract")} == {"0"}


def test_shared_extraction_equals_three_nets_with_the_same_weights():
    shared, apart = encoder(shared_extraction=True), encoder()
    apart.aggregate.load_state_dict(shared.aggregate.state_dict())
    for net in apart.extract:
        net.load_state_dict(shared.extract[0].state_dict())
    out, copied = shared(IMAGES), apart(IMAGES)
    torch.testing.assert_close(out, copied, rtol=0, atol=0)
    out.square().sum().backward()
    copied.square().sum().backward()
    total = sum(net.stem.weight.grad for net in apart.extract)
    torch.testing.assert_close(shared.extract[0].stem.weight.grad, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_each_number_of_levels_halves_the_sides_so_often(levels, shared):
    net = encoder(levels=levels, shared_extraction=shared)
    assert net(IMAGES).shape == (2, 10, 16 // 2**levels, 24 // 2**levels)
    assert net.config.downsampling == 2**levels


def test_another_wavelet_is_another_function_of_the_image():
    haar, db2 = encoder(), encoder(wavelet="db2")
    db2.load_state_dict(haar.state_dict())  # a wavelet has no weights
    assert (haar(IMAGES) - db2(IMAGES)).abs().max() > 1e-3


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_without_a_gradient_the_arithmetic_is_the_same(wavelet):
    net = encoder(wavelet=wavelet).eval()
    expected = net(IMAGES).detach()
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), expected, rtol=1e-5, atol=1e-5)
