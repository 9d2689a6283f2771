"""Write two halves of a set of photographs, and spoiled copies of one, as PNG: make_copies.py PHOTOGRAPHS OUT --num N.

PHOTOGRAPHS is a folder of image files of one size. Half ``a`` is the first N of an order drawn from seed 0, half ``b``
the next N; the copies are of ``a``, image by image and under the same names, which are no numbers: those would be taken
for seeds of samples. All are PNG, so that no reader sees how they were made. Files that are there are left as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image, ImageFilter
from PIL.Image import Resampling

SEED = 0
DONE = "copies.json"
EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return what is left of an image after JPEG with Pillow's default subsampling (4:2:0)."""
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=quality)
    return Image.open(content).convert("RGB")


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur with Pillow's Gaussian (three box filters of that variance), sigma in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def through_half(image: Image.Image, down: Resampling, up: Resampling) -> Image.Image:
    """Return an image brought to half its side and back."""
    width, height = image.size
    return image.resize((width // 2, height // 2), down).resize((width, height), up)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg75": partial(jpeg, quality=75),
    "jpeg50": partial(jpeg, quality=50),
    "blur1": partial(blur, sigma=1),
    "blur2": partial(blur, sigma=2),
    "lanczos": partial(through_half, down=Resampling.LANCZOS, up=Resampling.LANCZOS),
    "box": partial(through_half, down=Resampling.BOX, up=Resampling.NEAREST),
}


def main(photographs: Path, out: Path, num: int, halves_only: bool) -> None:
    """Write the folders, and ``copies.json`` last."""
    paths = sorted(path for path in photographs.iterdir() if path.suffix.lower() in EXTENSIONS)
    if len(paths) < 2 * num:
        raise SystemExit(f"{photographs} holds {len(paths)} images, two halves of {num} asked for: lower --num")
    random.Random(SEED).shuffle(paths)
    copies = {} if halves_only else COPIES
    record = {"num": num, "seed": SEED, "of": len(paths), "folders": ["a", "b", *copies]}
    if (out / DONE).is_file():
        if json.loads((out / DONE).read_text()) == record:
            return
        raise SystemExit(f"{out} holds copies that were made otherwise: give another folder, or remove it")
    for name in record["folders"]:
        (out / name).mkdir(parents=True, exist_ok=True)
    size = Image.open(paths[0]).size
    for half, start in (("a", 0), ("b", num)):
        of_half = {"a": {"a": lambda image: image, **copies}, "b": {"b": lambda image: image}}[half]
        for path in paths[start : start + num]:
            write(path, size, {out / name / f"image-{path.stem}.png": change for name, change in of_half.items()})
    (out / DONE).write_text(json.dumps(record) + "\n")


def write(path: Path, size: tuple[int, int], targets: dict[Path, Callable[[Image.Image], Image.Image]]) -> None:
    """Write those copies of one photograph that are not there, each whole or not at all."""
    missing = {target: change for target, change in targets.items() if not target.exists()}
    if not missing:
        return
    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.size != size:
        raise SystemExit(f"{path} is {image.size}, the first one {size}: give photographs of one size")
    for target, change in missing.items():
        part = target.with_name(f".{target.name}.part")
        change(image).save(part, format="PNG", compress_level=1)
        part.replace(target)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, default=5000, help="images in each half")
    parser.add_argument("--halves-only", action="store_true", help="write no copies")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(**vars(parse()))
