"""Tiles: exact where the receptive field is bounded, blended by a partition of unity elsewhere, bounded memory."""

import itertools

import pytest
import torch
from torch import nn

from wavelatent.common.errors import UsageError
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from wavelatent.stage1_autoencoder.smc import SelfModulatedConv2d
from wavelatent.stage1_autoencoder.tiling import TiledAutoencoder, blended_spans, exact_spans, receptive_radius, tiled

SMC = {"norm": "smc", "attention": False}
LITEVAE = {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1}
KL = {"kind": "kl", "width": 8, "multipliers": (1, 1, 2), "num_res_blocks": 1, "attention": False}


def build(encoder: dict = LITEVAE, decoder: dict = SMC, **options) -> Autoencoder:
    torch.manual_seed(0)
    decoder = {"width": "tiny", "num_res_blocks": 1} | decoder
    config = {"encoder": encoder, "decoder": decoder, "channels": 5} | options
    return Autoencoder(AutoencoderConfig.model_validate(config)).eval().requires_grad_(False)


def without_norms(model: Autoencoder) -> Autoencoder:
    """Take the encoder's norms away: convolutions with strides and one-sided padding remain."""
    for block in list(model.encoder.modules()):
        for name, child in block.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(block, name, nn.Identity())
    return model


def images(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 5, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("output", ["pixels", "wavelet"])
@pytest.mark.parametrize("levels", [1, 3])
def test_a_decoder_of_convolutions_is_seamless(output, levels):
    """Sides that the tiles do not divide; the last tile of a row is a single site."""
    model = build(LITEVAE | {"levels": levels}, SMC | {"output": output})
    z = latents(25, 33)
    tiles = TiledAutoencoder(model, 8 * model.downsampling)
    assert 8 < tiles.decode_margin < 16
    difference = (tiles.decode(z) - model.decode(z)).abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize("bottleneck", ["kl", "bounded"])
def test_an_encoder_of_convolutions_is_seamless(bottleneck):
    """With strided convolutions that pad on the right and at the bottom only."""
    model = without_norms(build(KL, bottleneck={"kind": bottleneck}))
    x = images(100, 132)
    tiles = TiledAutoencoder(model, 32)
    whole, pieces = model.encode(x), tiles.encode(x)
    assert 4 < tiles.encode_margin < 16
    torch.testing.assert_close(pieces.mean, whole.mean, rtol=0, atol=1e-5)
    assert pieces.deterministic == whole.deterministic == (bottleneck == "bounded")
    if whole.std is not None:
        torch.testing.assert_close(pieces.std, whole.std, rtol=0, atol=1e-5)


def test_the_margin_is_the_sum_over_the_layers():
    """Every 3x3 convolution reaches one position further, at its own resolution; a part of a site counts as one."""
    model = build(LITEVAE, {"norm": "smc", "attention": False, "num_res_blocks": 2})
    reach, resolution = 0.0, 1
    for layer in model.decoder.layers:
        if type(layer).__name__ == "Upsample":
            resolution *= 2
        kernels = [m for m in layer.modules() if isinstance(m, SelfModulatedConv2d | nn.Conv2d)]
        reach += sum(m.weight.shape[-1] // 2 for m in kernels) / resolution
    assert reach == 16.5
    assert TiledAutoencoder(model, 16).decode_margin == 17


def test_a_smaller_margin_would_show():
    model = build()
    tiles = TiledAutoencoder(model, 32)
    tiles.__dict__["decode_margin"] = tiles.decode_margin // 2
    z = latents(25, 33)
    assert (tiles.decode(z) - model.decode(z)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("encoder", "decoder", "encode_exact", "decode_exact"),
    [
        (LITEVAE, SMC, False, True),
        (LITEVAE | {"wavelet": "db2"}, {"attention": False}, False, False),
        (KL, {"norm": "smc"}, False, False),
        (LITEVAE, {}, False, False),
    ],
)
def test_the_regime_follows_from_the_network(encoder, decoder, encode_exact, decode_exact):
    tiles = TiledAutoencoder(build(encoder, decoder), 32)
    assert (tiles.encode_margin is not None) == encode_exact
    assert (tiles.decode_margin is not None) == decode_exact
    expected = "exact with a margin of 52 px" if decode_exact else "blended over 8 px"
    assert tiles.describe("encode", "decode") == f"tiles of 32 px: encode blended over 8 px, decode {expected}"


def test_the_receptive_radius_of_known_layers():
    def radius(*layers: nn.Module) -> int | None:
        return receptive_radius(nn.Sequential(*layers), torch.zeros(2), 1, 1)

    assert radius(nn.Conv2d(2, 3, 1)) == 0
    assert radius(nn.Conv2d(2, 3, 5, padding=2), nn.SiLU(), nn.Conv2d(3, 2, 3, padding=1)) == 3
    assert radius(nn.Conv2d(2, 2, (1, 7), padding=(0, 3))) == radius(nn.Conv2d(2, 2, (7, 1), padding=(3, 0))) == 3
    assert radius(nn.ZeroPad2d((0, 4, 0, 0)), nn.Conv2d(2, 2, (1, 5))) == 4
    zero = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.zeros_(zero.weight)
    assert radius(zero) == 1  # by the layer, not by the weights it has now


def test_what_has_no_bounded_receptive_field():
    def radius(*layers: nn.Module) -> int | None:
        return receptive_radius(nn.Sequential(*layers), torch.zeros(2), 1, 1)

    assert radius(nn.GroupNorm(1, 2)) is None
    assert radius(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")) is None  # wraps around the whole image
    assert radius(nn.Conv2d(2, 2, 3, padding=40, dilation=40)) is None

    class Swallowing(nn.Module):
        def forward(self, x):
            return x.nan_to_num()

    assert radius(Swallowing()) is None


@pytest.mark.parametrize("length", [8, 9, 11, 12, 13, 23, 40])
@pytest.mark.parametrize("tile", [4, 5, 8, 12])
def test_the_ramps_are_a_partition_of_unity(length, tile):
    overlap, scale = tile // 4, 3
    total = torch.zeros(length * scale)
    spans = blended_spans(length, tile, overlap, scale)
    for span in spans:
        total[span.keep(scale)] += span.weights
        assert span.stop - span.start == min(tile, length)
        assert (span.weights > 0).all()
    torch.testing.assert_close(total, torch.ones(length * scale))
    assert all(a.stop - b.start >= overlap for a, b in itertools.pairwise(spans))


def test_the_ramps_are_linear():
    first, second = blended_spans(14, 8, 2, 1)
    assert (first.start, second.start) == (0, 6)
    torch.testing.assert_close(first.weights, torch.tensor([1, 1, 1, 1, 1, 1, 0.75, 0.25]))
    torch.testing.assert_close(second.weights, torch.tensor([0.25, 0.75, 1, 1, 1, 1, 1, 1]))


def test_exact_spans_read_their_margin_within_the_image_only():
    spans = exact_spans(20, 8, 3, 2)
    assert [(s.start, s.stop) for s in spans] == [(0, 8), (8, 16), (16, 20)]
    assert [s.read(1) for s in spans] == [slice(0, 11), slice(5, 19), slice(13, 20)]
    assert [s.crop(2) for s in spans] == [slice(0, 16), slice(6, 22), slice(6, 14)]


def test_blending_is_exact_where_the_tiles_agree():
    """A network without any reach, put together as blended tiles: mean and deviation come out as they are."""

    class Pointwise(nn.Module):
        def forward(self, x):
            return torch.cat([x.mean(dim=1, keepdim=True).expand(-1, 5, -1, -1), x[:, :1].expand(-1, 5, -1, -1)], dim=1)

    model = build()
    model.encoder = nn.Sequential(nn.AvgPool2d(4), Pointwise())
    tiles = TiledAutoencoder(model, 16)
    tiles.__dict__["encode_margin"] = None
    x = images(36, 60)
    whole, pieces = model.encode(x), tiles.encode(x)
    torch.testing.assert_close(pieces.mean, whole.mean)
    torch.testing.assert_close(pieces.std, whole.std)
    assert whole.std.std() > 0.01


@pytest.mark.parametrize("encoder", [LITEVAE | {"wavelet": "db2"}, KL], ids=["db2", "kl"])
def test_blended_tiles_of_both_directions(encoder):
    """Where a single tile reaches, the result is that tile's."""
    model = build(encoder, {})
    tiles = TiledAutoencoder(model, 32)
    posterior = tiles.encode(images(72, 100))
    assert posterior.mean.shape == posterior.std.shape == (2, 5, 18, 25)
    assert (posterior.std > 0).all()
    smooth = torch.nn.functional.interpolate(latents(2, 3), size=(18, 25), mode="bicubic", align_corners=True)
    decoded = tiles.decode(smooth)
    assert decoded.shape == (2, 3, 72, 100)
    expected = model.decode(smooth[..., :8, :8])  # the first tile, where no other one reaches
    torch.testing.assert_close(decoded[..., :8, :8], expected[..., :8, :8])


@pytest.mark.parametrize("decoder", [SMC, {}], ids=["exact", "blended"])
def test_a_tile_as_large_as_the_image_changes_nothing(decoder):
    model = build(decoder=decoder)
    tiles = TiledAutoencoder(model, 48)
    assert torch.equal(tiles.encode(images(36, 48)).mean, model.encode(images(36, 48)).mean)
    assert torch.equal(tiles.decode(latents(9, 12)), model.decode(latents(9, 12)))


@pytest.mark.parametrize(("decoder", "side"), [(SMC, 16 + 2 * 52), ({}, 16)], ids=["exact", "blended"])
def test_no_network_sees_more_than_a_tile(decoder, side):
    """The largest tensor of any layer is that of a tile, with its margins where they are exact, at any image size."""
    model = build(decoder=decoder)
    tiles = TiledAutoencoder(model, 16)
    sides: set[int] = set()

    def watch(module, inputs, output):
        if isinstance(output, torch.Tensor):
            sides.update(output.shape[-2:])

    z, x = latents(34, 41, batch=1), images(136, 164)[:1]
    assert tiles.decode_margin is None or tiles.decode_margin * 4 == 52  # measured before the hooks are there
    for module in model.modules():
        module.register_forward_hook(watch)
    with torch.no_grad():
        tiles.encode(x)
        assert max(sides) == 8  # half the tile: the first wavelet level
        tiles.decode(z)
    assert max(sides) == side


def test_tiles_under_autocast_are_added_up_in_float32():
    model = build(decoder={})
    tiles = TiledAutoencoder(model, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior, decoded = tiles.encode(images(24, 40)), tiles.decode(latents(6, 10))
        assert decoded.dtype == model.decode(latents(6, 10)).dtype
        assert posterior.mean.dtype == torch.float32
    assert decoded.isfinite().all()


def test_what_the_tiled_autoencoder_keeps():
    model = build()
    tiles = tiled(model, 16)
    assert tiled(model, None) is model
    assert tiles.fingerprint() == model.fingerprint()
    assert (tiles.downsampling, tiles.latent_channels, tiles.latent_shape(24)) == (4, 5, (5, 6, 6))
    with pytest.raises(ValueError, match="divide"):
        tiles.encode(images(36, 50))


@pytest.mark.parametrize(("tile", "hint"), [(30, "such as 32"), (12, "such as 16"), (0, "such as 16"), (-16, "16")])
def test_a_tile_that_does_not_suit_the_network_is_refused(tile, hint):
    with pytest.raises(UsageError, match=f"--tile {tile}: .*downsampling factor 4, .*{hint}"):
        TiledAutoencoder(build(), tile)
