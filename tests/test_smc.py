"""Self-modulated convolution against its equation: unit norm per output map, whatever the weights and scales."""

import torch

from wavelatent.stage1_autoencoder.smc import SelfModulatedConv2d, SMCResBlock


def layer() -> SelfModulatedConv2d:
    torch.manual_seed(0)
    conv = SelfModulatedConv2d(5, 7)
    with torch.no_grad():
        conv.scale.copy_(torch.rand(5) * 3 + 0.1)
        conv.weight.mul_(11)
    return conv


def test_every_output_map_has_a_kernel_of_unit_norm():
    norms = layer().modulated_weight().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(7))


def test_it_is_the_papers_equation():
    conv, x = layer(), torch.randn(2, 5, 6, 9)
    with torch.no_grad():
        conv.gain.fill_(1.7)
        conv.bias.copy_(torch.arange(7.0))
        expected = torch.zeros(7, 5, 3, 3)
        for o in range(7):
            scaled = torch.stack([conv.scale[i] * conv.weight[o, i] for i in range(5)])
            expected[o] = scaled / torch.sqrt((scaled**2).sum() + 1e-8)
        reference = 1.7 * torch.nn.functional.conv2d(x, expected, padding=1) + torch.arange(7.0)[:, None, None]
    torch.testing.assert_close(conv(x), reference)


def test_white_noise_keeps_unit_variance_and_the_weights_scale_does_not_matter():
    conv, x = layer(), torch.randn(4, 5, 32, 48)
    before = conv(x)
    assert abs(before[..., 1:-1, 1:-1].std().item() - 1) < 0.05
    with torch.no_grad():
        conv.weight.mul_(0.01)
    torch.testing.assert_close(conv(x), before, rtol=1e-3, atol=1e-4)


def test_the_block_has_no_normalisation_layer_and_a_plain_skip():
    block = SMCResBlock(4, 6)
    kinds = [type(m) for m in block.modules()]
    assert not any("Norm" in kind.__name__ for kind in kinds)
    assert type(block.skip) is torch.nn.Conv2d
    assert kinds.count(SelfModulatedConv2d) == 2
    assert block(torch.randn(2, 4, 5, 7)).shape == (2, 6, 5, 7)
