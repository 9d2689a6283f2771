import io

import numpy as np
import pytest
from PIL import Image

from wavelatent.common.errors import UsageError
from wavelatent.common.transforms import RESIZE_FILTERS, BadImageError, ImageTransform, decode

H, W = 5, 7


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def decoded(image: Image.Image, file_format: str = "PNG", **options: object) -> np.ndarray:
    result = decode(encode(image, file_format, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


def ramp(dtype: type, step: int) -> np.ndarray:
    return (np.arange(H * W).reshape(H, W) * step).astype(dtype)


def test_grey_becomes_three_equal_channels() -> None:
    values = ramp(np.uint8, 7)
    assert (decoded(Image.fromarray(values)) == values[..., None]).all()


def test_one_bit_becomes_black_and_white() -> None:
    values = ramp(np.uint8, 1) % 3 == 0
    assert (decoded(Image.fromarray(values)) == np.where(values, 255, 0)[..., None]).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = ramp(np.uint16, 1927)  # up to 65,518
    for file_format in ("PNG", "TIFF"):
        assert (decoded(Image.fromarray(values), file_format) == np.rint(values / 65535 * 255)[..., None]).all()


def test_palette_colours_are_looked_up() -> None:
    palette = Image.new("P", (W, H))
    palette.putdata((ramp(np.uint8, 1) % 3).ravel().tolist())
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])[ramp(np.uint8, 1) % 3]
    assert (decoded(palette) == expected).all()


def test_transparent_palette_entry_shows_the_white_background() -> None:
    palette = Image.new("P", (W, H), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((2, 3), 0)
    pixels = decoded(palette, transparency=0)
    assert pixels[3, 2].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == [40, 50, 60]


@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (255, (200, 100, 0)), (51, (244, 224, 204))])
def test_alpha_is_composited_on_white(alpha: int, expected: tuple[int, ...]) -> None:
    pixels = decoded(Image.new("RGBA", (W, H), (200, 100, 0, alpha)))
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # 255 + a (c - 255), up to Pillow's rounding


def test_grey_with_alpha_is_composited_on_white() -> None:
    assert np.abs(decoded(Image.new("LA", (W, H), (100, 128))).astype(int) - 177).max() <= 1


def test_cmyk_is_converted() -> None:
    pixels = decoded(Image.new("CMYK", (16, 8), (255, 0, 255, 0)), "JPEG", quality=100)
    assert np.abs(pixels.astype(int) - (0, 255, 0)).max() <= 3


def test_exif_rotation_is_applied() -> None:
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, :8] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees to the right
    pixels = decoded(Image.fromarray(values), exif=exif)
    assert pixels.shape == (16, 8, 3)
    assert (pixels[:8] == 255).all()
    assert (pixels[8:] == 0).all()


def test_floats_and_wide_integers_are_refused_with_the_reason() -> None:
    with pytest.raises(BadImageError, match="floating-point"):
        decode(encode(Image.fromarray(ramp(np.float32, 1)), "TIFF"))
    with pytest.raises(BadImageError, match="32-bit"):
        decode(encode(Image.fromarray(ramp(np.int32, 10_000)), "TIFF"))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(file_format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3)).astype(np.uint8)
    whole = encode(Image.fromarray(noise), file_format)
    with pytest.raises(BadImageError, match="unreadable"):
        decode(whole[: len(whole) // 2])


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(BadImageError, match="not an image"):
        decode(b"a note to myself")
    with pytest.raises(BadImageError, match="not an image"):
        decode(b"")


@pytest.mark.parametrize(("width", "height"), [(20, 9), (9, 20), (9, 9), (10, 9)])
def test_without_resizing_the_crop_is_adms_centre(width: int, height: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    top, left = (height - 9) // 2, (width - 9) // 2
    assert (ImageTransform(9)(Image.fromarray(values)) == values[top : top + 9, left : left + 9]).all()


def test_the_shorter_side_is_resized_before_the_crop() -> None:
    # 24 x 12 halves to 12 x 6 with the box filter: every pixel the mean of four, columns 3 to 8 kept.
    values = np.random.default_rng(0).integers(0, 64, (12, 24, 3)).astype(np.uint8) * 4
    means = values.reshape(6, 2, 12, 2, 3).mean(axis=(1, 3))
    assert np.abs(ImageTransform(6, "box")(Image.fromarray(values)) - means[:, 3:9]).max() <= 0.5


@pytest.mark.parametrize("name", RESIZE_FILTERS)
def test_every_filter_is_antialiased(name: str) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: only the mean may be left
    inner = ImageTransform(8, name)(Image.fromarray(stripes))[:, 2:-2]
    assert np.abs(inner.astype(float) - 127.5).max() <= 4


def test_too_small_is_refused_and_exact_size_is_not() -> None:
    image = Image.new("RGB", (9, 30))
    assert ImageTransform(9)(image).shape == (9, 9, 3)
    with pytest.raises(BadImageError, match="9x30 is smaller than 10"):
        ImageTransform(10)(image)


def test_an_unknown_filter_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'lanczos'"):
        ImageTransform(8, "lancsoz")
    with pytest.raises(UsageError, match="at least 1"):
        ImageTransform(0)


def test_the_record_says_everything() -> None:
    expected = {"crop": "adm-center", "filter": "box", "size": 8, "background": "white"}
    assert ImageTransform(8, "box").record() == expected
