"""Adversarial losses and regularisers against values worked out by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from wavelatent.stage1_autoencoder.gan_losses import (
    GAN_LOSSES,
    LeCam,
    gradient_penalty,
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    logistic_generator,
    mean_over_maps,
    relativistic_discriminator,
    relativistic_generator,
)


def maps(*values: float) -> list[torch.Tensor]:
    """Two logit maps of three images: the values over 2x3 sites, and over one."""
    column = torch.tensor(values).view(-1, 1, 1, 1)
    return [column.expand(-1, 1, 2, 3).clone(), column.clone()]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_every_map_counts_the_same_whatever_its_sites():
    logits = [torch.tensor([[[[2.0, -2.0, 3.0]]]]), torch.tensor([[[[5.0]]]])]
    torch.testing.assert_close(mean_over_maps(logits), torch.tensor([3.0]))


def test_hinge_has_known_values():
    logits = [torch.tensor([[[[2.0, -2.0]]]]), torch.tensor([[[[0.5]]]])]
    torch.testing.assert_close(hinge_generator(logits), torch.tensor([-0.25]))
    # real: relu(1 - 2, 1 + 2) -> mean 1.5, and 0.5; fake: relu(1 + 2, 1 - 2) -> mean 1.5, and 1.5
    torch.testing.assert_close(hinge_discriminator(logits, logits), torch.tensor([(1.0 + 1.5) / 2]))
    assert hinge_discriminator(maps(1.0, 9.0), maps(-1.0, -9.0)).tolist() == [0.0, 0.0]
    assert hinge_discriminator(maps(0.0), maps(0.0)).tolist() == [1.0]


def test_logistic_has_known_values():
    assert logistic_discriminator(maps(0.0), maps(0.0)).tolist() == pytest.approx([math.log(2)])
    expected = [(softplus(-1) + softplus(3)) / 2, (softplus(2) + softplus(-4)) / 2]
    assert logistic_discriminator(maps(1.0, -2.0), maps(3.0, -4.0)).tolist() == pytest.approx(expected)
    assert logistic_generator(maps(3.0, -4.0)).tolist() == pytest.approx([softplus(-3), softplus(4)])


def test_relativistic_has_known_values_and_pairs_image_by_image():
    real, fake = maps(1.0, -2.0, 5.0), maps(1.0, -4.0, 2.0)
    expected = [math.log(2), softplus(-2), softplus(-3)]
    assert relativistic_discriminator(real, fake).tolist() == pytest.approx(expected)
    assert relativistic_generator(fake, real).tolist() == pytest.approx([math.log(2), softplus(2), softplus(3)])


def test_relativistic_pairs_site_by_site():
    real, fake = [torch.tensor([[[[0.0, 2.0]]]])], [torch.tensor([[[[2.0, 0.0]]]])]
    expected = [(softplus(2) + softplus(-2)) / 2]  # log 2 if the sites were averaged first
    assert relativistic_discriminator(real, fake).tolist() == pytest.approx(expected)


def test_relativistic_ignores_what_both_sides_share():
    real, fake = maps(0.3, -1.0), maps(-0.7, 2.0)
    shifted = relativistic_discriminator([m + 11 for m in real], [m + 11 for m in fake])
    torch.testing.assert_close(shifted, relativistic_discriminator(real, fake))


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_each_loss_pulls_the_logits_the_right_way(name):
    loss = GAN_LOSSES[name]
    real, fake = ([m.requires_grad_() for m in maps(0.2, -0.3, 0.1)] for _ in range(2))
    loss.discriminator(real, fake).sum().backward()
    assert all((m.grad < 0).all() for m in real)
    assert all((m.grad > 0).all() for m in fake)
    fake = [m.detach().requires_grad_() for m in fake]
    loss.generator(fake, [m.detach() for m in real]).sum().backward()
    assert all((m.grad < 0).all() for m in fake)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_a_loss_that_does_not_need_the_reals_does_without(name):
    loss = GAN_LOSSES[name]
    if loss.generator_needs_real:
        with pytest.raises(ValueError, match="zip"):
            loss.generator(maps(1.0), ())
    else:
        torch.testing.assert_close(loss.generator(maps(1.0), ()), loss.generator(maps(1.0), maps(-3.0)))


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_half_precision_logits_are_compared_in_float32(name):
    real, fake = ([m.bfloat16() for m in maps(300.0, 5.0)] for _ in range(2))  # 1 + 300 is no bfloat16
    single = GAN_LOSSES[name].discriminator([m.float() for m in real], [m.float() for m in fake])
    assert GAN_LOSSES[name].discriminator(real, fake).dtype == torch.float32
    assert torch.equal(GAN_LOSSES[name].discriminator(real, fake), single)


def test_a_linear_critic_has_half_its_squared_norm_as_penalty_and_the_norm_as_its_gradient():
    weight = torch.linspace(-1, 2, 3 * 4 * 5).view(1, 3, 4, 5).requires_grad_()
    images = torch.randn(6, 3, 4, 5).requires_grad_()
    logits = (images * weight).sum(dim=(1, 2, 3)).view(6, 1, 1, 1)
    penalty = gradient_penalty([logits], images)
    norm = weight.detach().square().sum() / 2
    torch.testing.assert_close(penalty, norm.expand(6))
    penalty.mean().backward()
    torch.testing.assert_close(weight.grad, weight.detach())
    # One more map without a slope halves the mean, and so quarters the penalty.
    torch.testing.assert_close(gradient_penalty([logits, 0 * logits], images), norm.expand(6) / 4)


def test_the_gradient_penalty_wants_images_that_were_watched():
    images = torch.randn(2, 3, 4, 5)
    with pytest.raises(AssertionError, match="require a gradient"):
        gradient_penalty([images.mean(dim=1, keepdim=True)], images)


def test_lecam_is_nothing_until_updated_and_then_the_papers_equation():
    lecam = LeCam(decay=0.9)
    real, fake = maps(1.0, 3.0), maps(-1.0, 0.0)
    assert lecam(real, fake).item() == 0
    lecam.update(torch.tensor(2.0), torch.tensor(-0.5))  # the first sets the anchors
    # real against -0.5: 1.5^2 and 3.5^2; fake against 2: 3^2 and 2^2
    assert lecam(real, fake).item() == pytest.approx((1.5**2 + 3.5**2) / 2 + (3**2 + 2**2) / 2)
    lecam.update(torch.tensor(4.0), torch.tensor(0.5))
    assert lecam.real.item() == pytest.approx(0.9 * 2.0 + 0.1 * 4.0)
    assert lecam.fake.item() == pytest.approx(0.9 * -0.5 + 0.1 * 0.5)


def test_lecam_squares_site_by_site():
    lecam = LeCam()
    lecam.update(torch.tensor(0.0), torch.tensor(0.0))
    logits = [torch.tensor([[[[2.0, -2.0]]]])]
    assert lecam(logits, logits).item() == pytest.approx(8.0)  # 0 if the sites were averaged first


def test_lecam_pulls_the_logits_together_and_may_be_updated_before_the_backward_pass():
    lecam = LeCam()
    lecam.update(torch.tensor(1.0), torch.tensor(-1.0))
    real, fake = ([torch.tensor([[[[value]]]]).requires_grad_()] for value in (1.0, -1.0))
    penalty = lecam(real, fake)
    lecam.update(torch.tensor(5.0), torch.tensor(7.0))
    penalty.backward()
    assert real[0].grad.item() == pytest.approx(4.0)  # 2 * (1 - -1): down
    assert fake[0].grad.item() == pytest.approx(-4.0)


def test_lecam_is_saved_and_loaded():
    lecam = LeCam()
    lecam.update(torch.tensor(1.5), torch.tensor(-2.5))
    state = copy.deepcopy(lecam.state_dict())
    restored = LeCam()
    restored.load_state_dict(state)
    for each in (lecam, restored):
        each.update(torch.tensor(0.0), torch.tensor(1.0))
    assert restored.state_dict() == lecam.state_dict()
    assert isinstance(restored, nn.Module)
    assert list(restored.parameters()) == []
