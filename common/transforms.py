"""The one recorded transform: encoded bytes of any common format to a square uint8 RGB image.

Rotate by EXIF, bring to 8-bit RGB, resize the shorter side with a named antialiasing filter, cut the centre. What was
done is a dictionary that goes into every manifest and protocol, because a FID between differently resized images is
not a FID (Parmar et al. 2022, arXiv 2104.11222).
"""

from __future__ import annotations

import difflib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UsageError

RESIZE_FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Filters that Pillow widens when it shrinks, so all are antialiased; nearest is not among them."""

BACKGROUND = "white"
"""What a transparent image is composited on."""


class BadImageError(Exception):
    """A file that cannot become a training image; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class ImageTransform:
    """ADM centre crop to ``size`` pixels with a named filter.

    The geometry is ADM's ``center_crop_arr`` (Dhariwal & Nichol 2021): the shorter side becomes ``size``, the other
    keeps the aspect ratio (rounded), and the crop starts at ``(side - size) // 2``. ADM first halves large images with
    a box filter; here ``resize_filter`` does the whole reduction, so that the filter on record is the filter used.
    """

    size: int
    resize_filter: str = "lanczos"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size must be at least 1 pixel, not {self.size}")
        if self.resize_filter not in RESIZE_FILTERS:
            raise UsageError(_unknown_filter(self.resize_filter))

    def record(self) -> dict[str, object]:
        """Return the transform as it stands in manifests and protocols."""
        return {"crop": "adm-center", "filter": self.resize_filter, "size": self.size, "background": BACKGROUND}

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Crop and resize an RGB image: uint8 ``[size, size, 3]``. Raises `BadImageError` if it is too small."""
        if min(image.size) < self.size:
            raise BadImageError(f"{image.width}x{image.height} is smaller than {self.size}")
        scale = self.size / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        if (width, height) != image.size:
            image = image.resize((width, height), RESIZE_FILTERS[self.resize_filter])
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return np.asarray(image)[top : top + self.size, left : left + self.size].copy()


def decode(payload: bytes) -> Image.Image:
    """Decode an image file's bytes to an upright 8-bit RGB image. Raises `BadImageError` with the reason.

    The first frame of an animation; an embedded colour profile is not applied.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that is not used, or a size that is within the limit
            with Image.open(io.BytesIO(payload)) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("unreadable: not an image, or of a format that Pillow does not know") from error
    except Exception as error:  # Pillow's plugins raise almost anything on a damaged file
        raise BadImageError(f"unreadable: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring any Pillow mode to 8-bit RGB: 16-bit is scaled by 255/65535, alpha is composited on white.

    Raises `BadImageError` for 32-bit integers and floats, which have no agreed range.
    """
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no agreed range: convert the file to 8 or 16 bits")
    if image.mode.startswith("I"):
        return _sixteen_bit_to_rgb(image)
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), foreground).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    """Scale a 16-bit grey image, which some versions of Pillow open in the 32-bit mode ``I``."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("32-bit integer pixels have no agreed range: convert the file to 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")


def _unknown_filter(name: str) -> str:
    nearest = difflib.get_close_matches(name.lower(), RESIZE_FILTERS, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown resize filter {name!r}: choose from {', '.join(RESIZE_FILTERS)}{hint}"
