"""The sections of the latent health report, in its order: what each asks, and how it is computed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..common.errors import UsageError
from ..stage1_autoencoder.health import LatentData, Section
from ..stage1_autoencoder.health_autoencoder import AUTOENCODER_SECTIONS
from ..stage1_autoencoder.health_latents import LATENT_SECTIONS
from ..stage1_autoencoder.health_measures import usable
from ..stage1_autoencoder.health_passes import Coder, Lpips, Passes
from .learnability import Extractor, Quick, learnability


@dataclass(frozen=True)
class Given:
    """What a section may use.

    Attributes:
        autoencoder: in evaluation mode, on any device.
        data: what it made of the images.
        batch_size: images per pass.
        lpips: None where its weights are not here.
        extractor: of the features of a quick FID; likewise.
    """

    autoencoder: Coder
    data: LatentData
    batch_size: int = 32
    lpips: Lpips | None = None
    extractor: Extractor | None = None


@dataclass(frozen=True)
class Entry:
    """One section.

    Attributes:
        asks: what it asks, in one sentence.
        compute: the section.
        cost: what it takes, where that is more than seconds.
    """

    asks: str
    compute: Callable[[Given], Section]
    cost: str = ""


def _of_latents(name: str) -> Callable[[Given], Section]:
    return lambda given: LATENT_SECTIONS[name](given.data)


def _of_autoencoder(name: str) -> Callable[[Given], Section]:
    return lambda given: AUTOENCODER_SECTIONS[name](
        given.autoencoder, usable(given.data), batch_size=given.batch_size, lpips=given.lpips
    )


def _learnability(given: Given) -> Section:
    quick = Quick(given.extractor, given.autoencoder.decode) if given.extractor else None
    return learnability(usable(given.data), device=Passes(given.autoencoder, given.batch_size).device, quick=quick)


SECTIONS = {
    "scale": Entry(
        "Are the channels of one scale, used to their ends but not beyond, and inside the range of half precision?",
        _of_latents("scale"),
    ),
    "posterior": Entry(
        "How wide is the distribution that the encoder gives, does every channel say anything, and is any of it at "
        "the clamp?",
        _of_latents("posterior"),
    ),
    "gaussianity": Entry(
        "How far are the whitened latents from the standard normal noise that a denoiser starts from?",
        _of_latents("gaussianity"),
    ),
    "correlation": Entry(
        "Does every channel carry something, and something else than the others?", _of_latents("correlation")
    ),
    "spectrum": Entry(
        "Do the latents go from coarse to fine as images do, or is there noise in them that a denoiser must learn?",
        _of_latents("spectrum"),
    ),
    "equivariance": Entry(
        "Is the latent of a moved, mirrored, turned or resized image the moved, mirrored, turned or resized latent?",
        _of_autoencoder("equivariance"),
    ),
    "robustness": Entry(
        "How much of a denoiser's error does the decoder pass on to the picture?", _of_autoencoder("robustness")
    ),
    "locality": Entry(
        "Does a site of the latent describe its own patch, or are there sites that move the whole picture?",
        _of_autoencoder("locality"),
    ),
    "geometry": Entry("On how many dimensions do the latents lie?", _of_latents("geometry")),
    "reconstruction": Entry(
        "What is lost before diffusion begins: in the mean, in a draw, in half precision, at other sizes?",
        _of_autoencoder("reconstruction"),
    ),
    "learnability": Entry(
        "How far does a small denoiser get with these latents in a fixed budget?",
        _learnability,
        cost="trains; --skip learnability leaves it out",
    ),
}


def choose_sections(*, skip: Sequence[str] = (), only: Sequence[str] = ()) -> list[str]:
    """Return the sections that are wanted, in the order of the report.

    Raises:
        UsageError: a name that is none, or nothing left.
    """
    for name in [*skip, *only]:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SECTIONS)}"
            raise UsageError(f"{name}: no such section; {hint}")
    wanted = [name for name in SECTIONS if name not in skip and (not only or name in only)]
    if not wanted:
        raise UsageError("--skip and --only leave no section: give --only those that you want")
    return wanted
