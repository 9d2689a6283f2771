import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.images import open_data
from wavelatent.common.prepared import PreparedFolder
from wavelatent.pipelines import prepare as module
from wavelatent.pipelines.prepare import prepare


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_IMAGES", 4)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Eleven noisy pictures in two classes; the fourth and the last are bad."""
    rng = np.random.default_rng(0)
    for number in range(11):
        path = tmp_path / "photos" / ("ant" if number < 5 else "bee") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (14, 6 if number == 3 else 17, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    path.write_bytes(b"not an image")
    return str(tmp_path / "photos")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(data: str, out: Path, size: int = 8, **options: Any) -> dict[str, Any]:
    return prepare(data, size, out, **{"max_bad_fraction": 0.2, "num_workers": 0, **options})


def test_a_prepared_folder_is_the_same_data(photos: str, tmp_path: Path) -> None:
    result = run(photos, tmp_path / "out")
    assert (result["state"], result["count"], result["size"]) == ("done", 9, 8)
    prepared = open_data(str(tmp_path / "out"))
    direct = open_data(photos, size=8, max_bad_fraction=0.2)
    assert len(prepared) == len(direct) == 9
    for index in range(9):
        assert (prepared.image(index) == direct.image(index)).all()
        assert prepared.label(index) == direct.label(index)
    assert prepared.transform == direct.transform
    assert prepared.class_names == direct.class_names == ["ant", "bee"]
    assert [file.path for file in prepared.skipped] == [file.path for file in direct.skipped]
    assert sorted(contents(tmp_path / "out"))[-1] == "manifest.json"
    with pytest.raises(IndexError):
        prepared.image(9)


def test_the_manifest_says_how_it_was_made(photos: str, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", resize_filter="box")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["spec"] == photos
    assert manifest["transform"] == {"crop": "adm-center", "filter": "box", "size": 8, "background": "white"}
    assert [shard["count"] for shard in manifest["shards"]] == [3, 4, 2]
    assert manifest["skipped"][0]["path"] == "ant/03.png"


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_prepare_killed_in_the_middle_goes_on(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    run(photos, tmp_path / "whole")
    original = module.write_shard

    def killed(root: Path, number: int, *rest: object) -> object:
        if number == stop_at:
            (root / ".images-00009.npy.77").write_bytes(b"half a shard")  # what a killed process leaves
            raise KeyboardInterrupt
        return original(root, number, *rest)

    monkeypatch.setattr(module, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "out")
    with pytest.raises(WavelatentError, match="unfinished: run the same prepare command again"):
        open_data(str(tmp_path / "out"))

    monkeypatch.setattr(module, "write_shard", original)
    original_decode, decoded = module.decode_item, []

    def recorded(*rest: object) -> object:
        decoded.append(rest[-1])
        return original_decode(*rest)

    monkeypatch.setattr(module, "decode_item", recorded)
    assert run(photos, tmp_path / "out")["state"] == "done"
    assert decoded == list(range(4 * stop_at, 11)), "finished shards are not decoded again"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_stops_it_with_the_finished_shards_kept(
    photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run(photos, tmp_path / "whole")
    original_decode, decoded = module.decode_item, []

    def signalled(*rest: object) -> object:
        decoded.append(rest[-1])
        if decoded == list(range(6)):
            os.kill(os.getpid(), number)
        return original_decode(*rest)

    monkeypatch.setattr(module, "decode_item", signalled)
    with pytest.raises(Stopped, match=f"stopped by {number.name} with 4 images finished"):
        run(photos, tmp_path / "out")
    decoded.clear()
    run(photos, tmp_path / "out")
    assert decoded == list(range(4, 11))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_one_does_nothing(photos: str, tmp_path: Path) -> None:
    first = run(photos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = run(photos, tmp_path / "out")
    assert second["state"] == "already done"
    assert second["fingerprint"] == first["fingerprint"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_another_request_is_refused_by_name_and_overwrite_begins_again(photos: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    with pytest.raises(UsageError, match=r"transform .*'size': 8.* not .*'size': 7.*--overwrite"):
        run(photos, out, size=7)
    with pytest.raises(UsageError, match="max_images None, not 4"):
        run(photos, out, max_images=4)
    with pytest.raises(UsageError, match=r"data .*, not synthetic:3"):
        run("synthetic:3", out)
    (Path(photos) / "ant" / "00.png").unlink()
    with pytest.raises(UsageError, match="has changed since"):
        run(photos, out)
    assert run("synthetic:3", out, overwrite=True)["count"] == 3
    assert sorted(contents(out)) == ["images-00000.npy", "labels-00000.npy", "manifest.json"]


def test_an_overwrite_that_was_cut_short_goes_on(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(photos, out)
    unlink = Path.unlink

    def cut(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".npy":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut)
        with pytest.raises(KeyboardInterrupt):
            run("synthetic:3", out, overwrite=True)
    assert "manifest.json" not in contents(out)
    with pytest.raises(UsageError, match="--overwrite"):
        run("synthetic:3", out)
    assert run("synthetic:3", out, overwrite=True)["count"] == 3
    assert sorted(contents(out)) == ["images-00000.npy", "labels-00000.npy", "manifest.json"]


def test_a_folder_of_something_else_is_left_alone(photos: str, tmp_path: Path) -> None:
    before = contents(Path(photos) / "ant")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and not a prepared folder"):
            run("synthetic:3", Path(photos) / "ant", overwrite=overwrite)
    assert contents(Path(photos) / "ant") == before


def test_too_many_bad_files_leave_no_data_set_and_a_higher_limit_goes_on(photos: str, tmp_path: Path) -> None:
    with pytest.raises(WavelatentError, match=r"1 of 11 .*ant/03\.png: 6x14 is smaller than 8"):
        run(photos, tmp_path / "out", max_bad_fraction=0.05)
    with pytest.raises(WavelatentError, match="unfinished"):
        open_data(str(tmp_path / "out"))
    assert run(photos, tmp_path / "out", max_bad_fraction=0.2)["count"] == 9


def test_nothing_usable_is_an_error(photos: str, tmp_path: Path) -> None:
    with pytest.raises(WavelatentError, match="nothing to prepare"):
        run(photos, tmp_path / "out", size=500, max_bad_fraction=1.0)


def test_workers_change_nothing(photos: str, tmp_path: Path) -> None:
    run("synthetic:40", tmp_path / "alone", size=16)
    run("synthetic:40", tmp_path / "helped", size=16, num_workers=2)
    assert contents(tmp_path / "alone") == contents(tmp_path / "helped")


def test_max_images_takes_the_first(photos: str, tmp_path: Path) -> None:
    result = run(photos, tmp_path / "out", max_images=6)
    assert result["count"] == 5
    assert [file["path"] for file in result["skipped"]] == ["ant/03.png"]
    with pytest.raises(UsageError, match="at least 1"):
        run(photos, tmp_path / "out", max_images=0)


def test_the_fingerprint_does_not_depend_on_the_place(photos: str, tmp_path: Path) -> None:
    first = run(photos, tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert open_data(str(tmp_path / "two")).fingerprint() == first["fingerprint"]
    pixel = Path(photos) / "bee" / "06.png"
    Image.new("RGB", (14, 17)).save(pixel)
    assert run(photos, tmp_path / "one")["fingerprint"] != first["fingerprint"]


def test_another_size_than_prepared_is_refused(photos: str, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    assert open_data(str(tmp_path / "out"), size=8).size == 8
    with pytest.raises(UsageError, match="prepared at 8 pixels, not 6"):
        open_data(str(tmp_path / "out"), size=6)
    with pytest.raises(UsageError, match="prepared folder already"):
        run(str(tmp_path / "out"), tmp_path / "again", size=6)


def test_damage_is_found(photos: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(photos, out)
    shard = out / "images-00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WavelatentError, match=r"images-00001\.npy is damaged"):
        run(photos, out)
    shard.write_bytes(whole[:-5])
    with pytest.raises(WavelatentError, match=r"images-00001\.npy is damaged"):
        open_data(str(out))
    shard.unlink()
    with pytest.raises(WavelatentError, match=r"images-00001\.npy is missing"):
        open_data(str(out))
    (out / "manifest.json").write_text('{"format": 1, "autoencoder": {}}')
    with pytest.raises(WavelatentError, match=r"manifest\.json is not the manifest of a prepared folder"):
        open_data(str(out))


def test_only_the_hub_is_streamed(photos: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only hf:NAME"):
        run(photos, tmp_path / "out", streaming=True)


def test_a_missing_source_or_a_file_as_target_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data at"):
        run(str(tmp_path / "nothing"), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        run("synthetic:3", tmp_path / "file")


def test_a_pickled_folder_is_its_place_and_not_its_pixels(photos: str, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    data = PreparedFolder(tmp_path / "out")
    pickled = pickle.dumps(data)
    assert len(pickled) < 1_000
    assert (pickle.loads(pickled).image(3) == data.image(3)).all()
