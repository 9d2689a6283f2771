import pytest
import torch

from wavelatent.common.denoising import expand_like
from wavelatent.stage2_diffusion.guidance import autoguidance, classifier_free

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.5, 2.0])
LABELS = torch.tensor([1, 4])


class Counted:
    """A denoiser whose output tells the class it was asked for, and which counts its calls."""

    def __init__(self, quality=1.0):
        self.quality, self.calls = quality, []

    def __call__(self, x, sigma, labels=None):
        self.calls.append(labels)
        centre = torch.zeros(len(x)) if labels is None else labels.to(x)
        return (x + self.quality * expand_like(centre + 1, x)) / (1 + expand_like(sigma, x) ** 2)


def test_classifier_free_guidance_extrapolates_from_the_unconditional_output():
    denoise = Counted()
    guided = classifier_free(denoise, 3.0)(X, SIGMA, LABELS)
    conditional, unconditional = Counted()(X, SIGMA, LABELS), Counted()(X, SIGMA)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional))
    assert [labels is None for labels in denoise.calls] == [False, True]


@pytest.mark.parametrize("labels", [None, LABELS])
def test_autoguidance_extrapolates_from_the_weaker_model(labels):
    denoise, weaker = Counted(), Counted(quality=0.4)
    guided = autoguidance(denoise, weaker, 2.5)(X, SIGMA, labels)
    strong, weak = Counted()(X, SIGMA, labels), Counted(quality=0.4)(X, SIGMA, labels)
    torch.testing.assert_close(guided, weak + 2.5 * (strong - weak))
    assert denoise.calls == weaker.calls == [labels]


def test_a_weight_of_one_is_the_denoiser_itself():
    denoise, weaker = Counted(), Counted()
    assert classifier_free(denoise, 1.0, (0.1, 3.0)) is denoise
    assert autoguidance(denoise, weaker, 1.0) is denoise


def test_a_weight_of_zero_is_the_worse_output():
    torch.testing.assert_close(classifier_free(Counted(), 0.0)(X, SIGMA, LABELS), Counted()(X, SIGMA))


def test_outside_the_interval_only_the_conditional_denoiser_acts():
    """Kynkäänniemi et al. 2024: the interval is open below and closed above."""
    denoise = Counted()
    limited, everywhere = classifier_free(denoise, 3.0, (0.5, 2.0)), classifier_free(Counted(), 3.0)
    for level, acts in [(0.4, False), (0.5, False), (0.6, True), (2.0, True), (2.1, False)]:
        denoise.calls.clear()
        sigma = torch.full((2,), level)
        expected = everywhere if acts else Counted()
        assert torch.equal(limited(X, sigma, LABELS), expected(X, sigma, LABELS))
        assert len(denoise.calls) == 1 + acts


def test_each_row_is_judged_by_its_own_level():
    out = autoguidance(Counted(), Counted(quality=0.4), 3.0, (1.0, 9.0))(X, SIGMA)
    everywhere = autoguidance(Counted(), Counted(quality=0.4), 3.0)(X, SIGMA)
    assert torch.equal(out[0], Counted()(X, SIGMA)[0])
    assert torch.equal(out[1], everywhere[1])


def test_classifier_free_guidance_without_labels_says_so():
    with pytest.raises(ValueError, match="needs labels"):
        classifier_free(Counted(), 2.0)(X, SIGMA)
