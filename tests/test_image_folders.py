from pathlib import Path

import pytest
from PIL import Image

from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.images import open_data


def write(path: Path, value: int = 0, width: int = 12, height: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, value, value)).save(path)


def test_a_flat_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for value, name in [(30, "c.bmp"), (10, "a.png"), (20, "b.WEBP"), (99, ".hidden.png")]:
        write(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("not an image, and not a bad one")
    data = open_data(str(tmp_path), size=8)
    assert len(data) == 3
    assert data.num_classes == 0
    assert data.label(0) is None
    assert data.image(0).shape == (8, 8, 3)
    assert [int(data.image(i).mean().round(-1)) for i in range(3)] == [10, 20, 30]
    assert data.skipped == []
    assert data.transform["size"] == 8


def test_subfolders_are_classes_when_every_image_is_in_one(tmp_path: Path) -> None:
    write(tmp_path / "dogs" / "deep" / "1.png", 50)
    write(tmp_path / "cats" / "1.png", 10)
    data = open_data(str(tmp_path), size=8)
    assert data.class_names == ["cats", "dogs"]
    assert [data.label(i) for i in range(2)] == [0, 1]
    write(tmp_path / "stray.png")
    assert open_data(str(tmp_path), size=8).num_classes == 0


def test_one_subfolder_is_not_a_class(tmp_path: Path) -> None:
    write(tmp_path / "images" / "1.png")
    assert open_data(str(tmp_path), size=8).num_classes == 0


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert len(open_data(str(tmp_path / "data"), size=8)) == 1


def test_bad_files_are_named_counted_and_skipped(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"{number}.png", number)
    write(tmp_path / "3.png", width=7)
    (tmp_path / "4.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    data = open_data(str(tmp_path), size=8, max_bad_fraction=0.5)
    assert [(file.path, file.reason.split(":")[0]) for file in data.skipped] == [
        ("3.png", "shorter side of 7 pixels is smaller than 8"),
        ("4.png", "unreadable"),
        ("gone.png", "unreadable"),
    ]
    assert [data.image(i)[0, 0, 0] for i in range(len(data))] == [0, 1, 2, 5]


def test_labels_stay_with_their_images_when_files_are_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a" / "small.png", width=3)
    write(tmp_path / "a" / "whole.png", 10)
    write(tmp_path / "b" / "whole.png", 20)
    data = open_data(str(tmp_path), size=8, max_bad_fraction=0.5)
    assert [(data.image(i)[0, 0, 0], data.label(i)) for i in range(2)] == [(10, 0), (20, 1)]


def test_too_many_bad_files_stop_before_anything_starts(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"{number}.png", width=4 + number)
    with pytest.raises(WavelatentError, match=r"^4 of 6 .*\(0\.png: .*; 1\.png: .*; and 1 more\): .*--max-bad"):
        open_data(str(tmp_path), size=8)


def test_exactly_the_allowed_fraction_passes(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.png", width=4 if number == 0 else 9)
    assert len(open_data(str(tmp_path), size=8, max_bad_fraction=0.25)) == 3


def test_no_folder_and_no_images_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected synthetic\[:N\], an image folder"):
        open_data(str(tmp_path / "nothing"))
    (tmp_path / "data.zip").touch()
    with pytest.raises(UsageError, match=r"no images in .* \(found 1 \.zip\): expected .*png"):
        open_data(str(tmp_path))
    with pytest.raises(UsageError, match="is a file"):
        open_data(str(tmp_path / "data.zip"))


def test_the_own_size_is_the_common_shorter_side(tmp_path: Path) -> None:
    write(tmp_path / "1.png", width=12, height=10)
    write(tmp_path / "2.png", width=10, height=11)
    assert open_data(str(tmp_path)).size == 10
    write(tmp_path / "3.png", width=30, height=30)
    with pytest.raises(UsageError, match="from 10 to 30 pixels: name a --size"):
        open_data(str(tmp_path))


def test_an_unknown_filter_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    with pytest.raises(UsageError, match="bicubic"):
        open_data(str(tmp_path), resize_filter="bicubik")


def test_the_fingerprint_follows_content_and_transform_but_not_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "a.png", 1)
        write(tmp_path / folder / "b.png", 2)
    first = open_data(str(tmp_path / "one"), size=8).fingerprint()
    assert open_data(str(tmp_path / "two"), size=8).fingerprint() == first
    assert open_data(str(tmp_path / "one"), size=7).fingerprint() != first
    assert open_data(str(tmp_path / "one"), size=8, resize_filter="box").fingerprint() != first
    write(tmp_path / "two" / "b.png", 3)
    assert open_data(str(tmp_path / "two"), size=8).fingerprint() != first


def test_many_files_are_checked_in_parallel_with_the_same_result(tmp_path: Path) -> None:
    for number in range(260):
        write(tmp_path / f"{number:03d}.png", number % 256, width=5 if number in (100, 101) else 9, height=9)
    data = open_data(str(tmp_path), size=8)
    assert [file.path for file in data.skipped] == ["100.png", "101.png"]
    assert [int(data.image(i)[0, 0, 0]) for i in (99, 100, 257)] == [99, 102, 3]


def test_a_file_that_vanishes_later_is_named(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    data = open_data(str(tmp_path), size=8)
    (tmp_path / "1.png").unlink()
    with pytest.raises(WavelatentError, match=r"1\.png changed during the run"):
        data.image(0)
