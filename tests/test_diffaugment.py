"""DiffAugment: the paper's ranges, one draw per image and the same for its reconstruction, and gradients throughout."""

import pytest
import torch

from wavelatent.stage1_autoencoder.diffaugment import diff_augment
from wavelatent.stage1_autoencoder.gan_losses import gradient_penalty

POLICIES = ("color", "translation", "cutout")


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def augment(x: torch.Tensor, *policies: str, seed: int = 0, parts: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return diff_augment(x, policies, parts)


def test_no_policy_is_the_identity():
    x = images(2, 3, 5, 7)
    assert diff_augment(x, ()) is x


@pytest.mark.parametrize("size", [(17, 24), (1, 1), (2, 3)])
@pytest.mark.parametrize("policies", [*[(p,) for p in POLICIES], POLICIES], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_shape_and_type_stay(policies, size, dtype):
    x = images(4, 3, *size).to(dtype)
    augmented = augment(x, *policies)
    assert augmented.shape == x.shape
    assert augmented.dtype == dtype
    assert augmented.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
def test_images_have_draws_of_their_own_that_follow_the_global_generator(policy):
    x = images(1, 3, 17, 24).expand(6, -1, -1, -1)
    once, again, other = (augment(x, policy, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len({tuple(image.flatten().tolist()) for image in once}) > 1


@pytest.mark.parametrize("policies", [*[(p,) for p in POLICIES], POLICIES], ids="+".join)
def test_an_image_and_its_reconstruction_share_their_draws(policies):
    x = images(3, 3, 17, 24)
    real, fake = augment(torch.cat([x, x]), *policies, parts=2).chunk(2)
    assert torch.equal(real, fake)
    with pytest.raises(AssertionError, match="3 images do not make 2 equal parts"):
        diff_augment(x, policies, parts=2)


def test_color_is_affine_in_the_papers_ranges():
    # On a grey image only brightness acts: saturation and contrast turn about a mean that is the image itself.
    shifts = augment(torch.zeros(200, 3, 2, 3), "color")
    assert torch.allclose(shifts, shifts[:, :1, :1, :1].expand_as(shifts), atol=1e-6)
    assert -0.5 <= shifts.min() < -0.45
    assert 0.45 < shifts.max() <= 0.5
    # Pure colour, whose channels and pixels have mean 0: the spread is scaled by saturation times contrast.
    colour = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(400, -1, 2, 3)
    spread = augment(colour, "color").std(dim=1)[:, 0, 0]
    assert spread.min() < 0.1
    assert 2.0 < spread.max() <= 3.0
    # Light and dark without colour: contrast alone.
    light = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2).expand(400, 3, 3, 2)
    contrast = (lambda a: (a[..., 0] - a[..., 1])[:, 0, 0] / 2)(augment(light, "color"))
    assert 0.5 - 1e-5 <= contrast.min() < 0.55
    assert 1.45 < contrast.max() <= 1.5 + 1e-5


def test_translation_moves_whole_pixels_and_fills_with_zeros():
    height, width = 24, 32
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position = torch.stack([rows, columns, torch.full_like(rows, 7)]).float() + 1  # zero stands for "outside"
    moved = augment(position.expand(300, -1, -1, -1), "translation")
    inside = moved[:, 2] > 0
    shifts = []
    for dim, grid in enumerate((rows, columns)):
        shift = grid + 1 - moved[:, dim]
        each = [s[keep].unique() for s, keep in zip(shift, inside, strict=True)]
        assert all(len(e) == 1 for e in each)  # every pixel of an image moves alike
        shifts.append(torch.cat(each).int().unique().tolist())
    assert shifts == [list(range(-3, 4)), list(range(-4, 5))]  # an eighth of each side
    assert (moved[~inside[:, None].expand_as(moved)] == 0).all()


def test_cutout_takes_a_rectangle_of_half_the_sides():
    cut = augment(torch.ones(300, 3, 10, 16), "cutout") == 0
    assert torch.equal(cut[:, 0], cut[:, 1])
    heights, widths = cut[:, 0].any(dim=2).sum(dim=1), cut[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(cut[:, 0].sum(dim=(1, 2)), heights * widths)  # a full rectangle
    assert heights.max() == 5
    assert widths.max() == 8
    assert heights.min() >= 2  # its centre is in the image, so at most half of it leaves on a side
    assert cut.float().mean().item() == pytest.approx(0.19, abs=0.03)  # a quarter, less what leaves the image
    assert cut[:, 0].any(dim=0).all()  # everywhere, now and then


@pytest.mark.parametrize("policies", [*[(p,) for p in POLICIES], POLICIES], ids="+".join)
def test_gradients_flow_and_can_be_differentiated_again(policies):
    x = images(4, 3, 17, 24).requires_grad_()
    weight = torch.randn(1, 3, 17, 24).requires_grad_()
    logits = (augment(x, *policies) * weight).square().mean(dim=1, keepdim=True)
    gradient_penalty([logits], x).mean().backward()
    assert weight.grad.abs().sum() > 0
    assert (x.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
