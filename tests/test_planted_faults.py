"""Autoencoders with one known defect each: the latent health report must name it, and name none where there is none."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavelatent.common.images import open_data, read_batch
from wavelatent.common.latents import Posterior
from wavelatent.common.randomness import generator
from wavelatent.pipelines import health_sections
from wavelatent.pipelines.diagnose import Health, examine, gather
from wavelatent.pipelines.health_sections import SECTIONS, Given
from wavelatent.pipelines.learnability import learnability
from wavelatent.stage1_autoencoder.bottlenecks import BoundedConfig
from wavelatent.stage1_autoencoder.health_autoencoder import AUTOENCODER_SECTIONS

SIZE, COUNT, FACTOR = 32, 96, 2
SITES = SIZE // FACTOR
ROW, COLUMN = 3, 5
DATA = open_data(f"synthetic:{COUNT}", size=SIZE)
DATA.image = functools.cache(DATA.image)  # type: ignore[method-assign]  # painting the faces takes longer than the rest


def same(z: Tensor) -> Tensor:
    return z


@dataclass(frozen=True)
class Defect:
    """What is done to healthy latents ``[B, 3, h, w]``, and undone as far as it can be.

    ``std`` is the posterior's; ``offset`` is added to the latents, and undone by the bias of the decoder's convolution.
    """

    distort: Callable[[Tensor], Tensor] = same
    restore: Callable[[Tensor], Tensor] = same
    std: Callable[[Tensor], Tensor] | None = None
    bound: float | None = None
    offset: float = 0.0


class Codec(nn.Module):
    """Means of 2x2 pixels in a colour space in which the channels have unit variance, and back: linear, local, smooth.

    The colours are the principal ones of the data, turned so that each channel has a share of every one of them.
    """

    def __init__(self, defect: Defect) -> None:
        super().__init__()
        self.defect = defect
        if defect.bound is not None:
            self.config = SimpleNamespace(bottleneck=BoundedConfig(bound=defect.bound, variance=0.5))
        values = F.avg_pool2d(read_batch(DATA, range(COUNT)).images, FACTOR).transpose(0, 1).flatten(1)
        variances, axes = torch.linalg.eigh(values.cov())
        strength = torch.tensor([0.5, 1.25, 1.25])  # the faintest colour has a heavy tail of its own
        turn = torch.eye(3) - 2 / 3
        matrix = turn @ torch.diag((strength / variances).sqrt()) @ axes.T
        self.matrix = nn.Parameter(matrix / (matrix @ values).std(dim=1, keepdim=True))
        self.shift = nn.Parameter(-self.matrix.detach() @ values.mean(dim=1))

    def fingerprint(self) -> str:
        return "of the codec"

    def encode(self, images: Tensor) -> Posterior:
        pooled = F.avg_pool2d(images, FACTOR)
        z = F.conv2d(pooled, self.matrix[:, :, None, None], self.shift).float()
        z = self.defect.distort(z) + self.defect.offset
        return Posterior(z, None if self.defect.std is None else self.defect.std(z))

    def decode(self, latents: Tensor) -> Tensor:
        z = self.defect.restore(latents)
        inverse = torch.linalg.inv(self.matrix)
        pooled = F.conv2d(z, inverse[:, :, None, None], -inverse @ (self.shift + self.defect.offset))
        return F.interpolate(pooled, scale_factor=FACTOR, mode="nearest")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty steps already tell latents that can be learnt from noise."""
    monkeypatch.setattr(health_sections, "learnability", functools.partial(learnability, steps=30))


def health(defect: Defect, *sections: str) -> Health:
    autoencoder = Codec(defect).eval().requires_grad_(False)
    return examine(Given(autoencoder, gather(autoencoder, DATA, range(COUNT))), sections)


def named(found: Health, level: str | None = None) -> dict[str, str]:
    """The texts of the verdicts of a level, by name."""
    return {verdict.name: verdict.text for _, verdict in found.verdicts(level)}


def replaced(z: Tensor, channel: int, value: Tensor) -> Tensor:
    return torch.cat([z[:, :channel], value, z[:, channel + 1 :]], dim=1)


def constant_std(value: float) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.full_like(z, value)


def signs(z: Tensor) -> Tensor:
    """One sign per channel and site, drawn once: it makes any signal white, and undoes itself."""
    drawn = torch.randint(2, (3, 64, 64), generator=generator("signs")) * 2 - 1
    return z * drawn[:, : z.shape[-2], : z.shape[-1]]


def to_one_site(z: Tensor) -> Tensor:
    """Keep each channel's mean over the picture in one site, and only the differences to it in the others."""
    mean = z.mean(dim=(-2, -1))
    local = z - mean[:, :, None, None]
    local[:, :, ROW, COLUMN] = 2 * mean
    return local


def from_one_site(z: Tensor) -> Tensor:
    mean = z[:, :, ROW, COLUMN, None, None] / 2
    restored = z + mean
    restored[:, :, ROW, COLUMN] = mean[..., 0, 0]
    return restored


def position(z: Tensor, *, stretched: bool) -> Tensor:
    """A fixed pattern of `SITES` x `SITES`, stretched or repeated to the size of ``z``."""
    pattern = torch.randn(1, 3, SITES, SITES, generator=generator("position"))
    if stretched:
        return F.interpolate(pattern, z.shape[-2:], mode="nearest")
    return pattern.repeat(1, 1, 4, 4)[..., : z.shape[-2], : z.shape[-1]]


AFFECTED = 1
"""The channel that a defect is planted in."""
SPREAD = torch.tensor([1.0, 50.0, 1.0])[:, None, None]
DEFECTS: dict[str, tuple[str, Defect, str]] = {
    "dead_channel": ("correlation", Defect(lambda z: replaced(z, AFFECTED, 0 * z[:, :1] + 0.3)), "1"),
    "duplicate_channel": ("correlation", Defect(lambda z: replaced(z, 2, -0.9 * z[:, :1])), "2"),
    "unequal_scale": ("scale", Defect(lambda z: z * SPREAD, lambda z: z / SPREAD), "1"),
    "far_from_unit_variance": ("scale", Defect(lambda z: 30 * z, lambda z: z / 30), ""),
    "fp16_overflow": ("scale", Defect(lambda z: 1e5 * z, lambda z: z / 1e5), ""),
    "saturated": (
        "scale",
        Defect(lambda z: torch.tanh(8 * z), lambda z: z.clamp(-0.999, 0.999).atanh() / 8, bound=1.0),
        "",
    ),
    "heavy_tail": (
        "gaussianity",
        Defect(
            lambda z: replaced(z, AFFECTED, (3 * z[:, AFFECTED, None]).sinh() / 20),
            lambda z: replaced(z, AFFECTED, (20 * z[:, AFFECTED, None]).asinh() / 3),
        ),
        "1",
    ),
    "white_spectrum": ("spectrum", Defect(signs, signs), ""),
    "posterior_collapse": (
        "posterior",
        Defect(
            lambda z: replaced(z, AFFECTED, 1e-3 * z[:, AFFECTED, None]),
            std=lambda z: replaced(torch.full_like(z, 0.1), AFFECTED, torch.ones_like(z[:, :1])),
        ),
        "1",
    ),
    "logvar_clamp": ("posterior", Defect(std=constant_std(torch.tensor(-30.0).mul(0.5).exp().item())), ""),
    "not_equivariant": ("equivariance", Defect(signs, signs), ""),
    "fragile_decoder": (
        "robustness",
        Defect(
            lambda z: torch.cat([z.flip(-1), z.flip(-1) + 0.1 * z], dim=1),
            lambda z: (z[:, 3:] - z[:, :3]) / 0.1,
        ),
        "",
    ),
    "global_site": ("locality", Defect(to_one_site, from_one_site), f"(row {ROW}, column {COLUMN})"),
    "poor_reconstruction": ("reconstruction", Defect(restore=lambda z: z.roll(SITES // 2, -1).flip(-2)), ""),
    "sampling_gap": ("reconstruction", Defect(std=constant_std(0.7)), ""),
    "bf16_gap": ("reconstruction", Defect(offset=300.0), ""),
    "resolution_gap": (
        "reconstruction",
        Defect(lambda z: z + position(z, stretched=True), lambda z: z - position(z, stretched=False)),
        "",
    ),
    "hard_to_learn": ("learnability", Defect(lambda z: torch.randn(z.shape, generator=generator("noise"))), ""),
}
"""By the verdict that must name it: the section that it is in, the defect, and the channel or site in the text."""


@pytest.mark.parametrize("name", DEFECTS)
def test_the_planted_fault_is_named(name: str) -> None:
    section, defect, where = DEFECTS[name]
    faults = named(health(defect, section), "fault")
    assert name in faults
    assert where in faults[name]


@pytest.mark.parametrize("section", AUTOENCODER_SECTIONS)
@pytest.mark.parametrize(
    "restore",
    [lambda z: z * torch.nan, lambda z: torch.where(z.abs() > 3, torch.nan, z)],
    ids=["always", "of some latents"],
)
def test_a_decoder_that_is_not_finite_is_never_in_order(restore: Callable[[Tensor], Tensor], section: str) -> None:
    found = health(Defect(restore=restore), section)
    assert found.not_computed == {}
    assert list(named(found)) == list(named(found, "fault")) == ["not_finite_pass"]
    assert "decoded images are not finite" in named(found)["not_finite_pass"]


def test_overflow_in_lower_precision_alone_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Codec.decode

    def overflow(self: Codec, latents: Tensor) -> Tensor:
        return decode(self, latents) * (torch.inf if torch.is_autocast_enabled("cpu") else 1)

    monkeypatch.setattr(Codec, "decode", overflow)
    faults = named(health(Defect(), "reconstruction"), "fault")
    assert list(faults) == ["bf16_gap"]
    assert "what is not finite in bf16" in faults["bf16_gap"]


def test_constant_latents_have_neither_neighbours_nor_a_fragile_decoder() -> None:
    found = named(health(Defect(lambda z: 0 * z), "correlation", "robustness"))
    assert found["spatial_correlation"] == "All channels are constant"
    assert "not defined" in found["fragile_decoder"]


@pytest.mark.parametrize("std", [None, constant_std(0.1)], ids=["deterministic", "gaussian"])
def test_no_fault_is_named_where_there_is_none(std: Callable[[Tensor], Tensor] | None) -> None:
    found = health(Defect(std=std), *SECTIONS)
    assert found.not_computed == {}
    assert named(found, "fault") == {}
    unasked = {"posterior_collapse", "logvar_clamp"} if std is None else set()
    assert set(DEFECTS) - unasked <= set(named(found))
