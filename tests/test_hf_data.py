import io
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.images import open_data
from wavelatent.pipelines import prepare as module
from wavelatent.pipelines.prepare import prepare


def png(number: int, side: int = 9) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 3, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "SHARD_IMAGES", 4)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A parquet data set of 11 rows: an image column called photo, a class column; row 3 is too small."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {
        "name": [f"row {number}" for number in range(11)],
        "photo": [{"bytes": png(number, 5 if number == 3 else 9), "path": None} for number in range(11)],
        "label": [number % 2 for number in range(11)],
    }
    features = Features({"name": Value("string"), "photo": ImageFeature(), "label": ClassLabel(names=["even", "odd"])})
    (tmp_path / "table").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "table" / "train.parquet"))
    return f"hf:{tmp_path / 'table'}"


def test_a_table_is_read_with_its_classes(table: str) -> None:
    data = open_data(table, size=8, max_bad_fraction=0.1)
    assert len(data) == 10
    assert [(file.path, file.reason) for file in data.skipped] == [
        ("row 3", "shorter side of 5 pixels is smaller than 8")
    ]
    assert data.class_names == ["even", "odd"]
    assert [data.label(i) for i in range(5)] == [0, 1, 0, 0, 1]
    assert data.image(9).shape == (8, 8, 3)
    assert open_data(table + ":train", size=8, max_bad_fraction=0.1).fingerprint() == data.fingerprint()


def test_an_image_folder_of_datasets_is_the_same_as_our_own(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(png(number + len(name)))
    through_datasets = open_data(f"hf:{tmp_path / 'photos'}", size=8)
    ours = open_data(str(tmp_path / "photos"), size=8)
    assert through_datasets.class_names == ["cat", "dog"]
    assert through_datasets.fingerprint() == ours.fingerprint()


def test_streaming_prepares_the_same_folder(table: str, tmp_path: Path) -> None:
    mapped = prepare(table, 8, tmp_path / "mapped", max_bad_fraction=0.1, num_workers=0)
    streamed = prepare(table, 8, tmp_path / "streamed", max_bad_fraction=0.1, streaming=True)
    for key in ("count", "fingerprint", "skipped", "class_names"):
        assert mapped[key] == streamed[key]
    assert prepare(table, 8, tmp_path / "few", max_bad_fraction=0.5, streaming=True, max_images=6)["count"] == 5


def test_an_archive_of_files_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with ZipFile(tmp_path / "photos" / "train.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", png(number))
    spec = f"hf:{tmp_path / 'photos'}"
    mapped = prepare(spec, 8, tmp_path / "mapped", num_workers=0)
    assert prepare(spec, 8, tmp_path / "streamed", streaming=True)["fingerprint"] == mapped["fingerprint"]


@pytest.mark.parametrize("missing", [None, -1])
def test_rows_without_a_class(tmp_path: Path, missing: int | None) -> None:
    """A split without any, as of a test set, is data without classes; one with some has to have them all."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    images = [{"bytes": png(number), "path": None} for number in range(3)]
    for name, labels in (("none", [missing] * 3), ("some", [1, missing, 0])):
        (tmp_path / name).mkdir()
        table = Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(str(tmp_path / name / "train.parquet"))
    data = open_data(f"hf:{tmp_path / 'none'}", size=8)
    assert (data.class_names, data.num_classes, data.label(0)) == ([], 0, None)
    for streaming in (False, True):
        with pytest.raises(WavelatentError, match="row 1 has no class"):
            prepare(f"hf:{tmp_path / 'some'}", 8, tmp_path / f"out {streaming}", num_workers=0, streaming=streaming)


def test_a_stream_goes_on_where_it_was_cut(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepare(table, 8, tmp_path / "whole", max_bad_fraction=0.1, streaming=True)
    original = module.write_shard

    def killed(root: Path, number: int, *rest: object) -> object:
        if number == 1:
            raise KeyboardInterrupt
        return original(root, number, *rest)

    monkeypatch.setattr(module, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(table, 8, tmp_path / "out", max_bad_fraction=0.1, streaming=True)
    monkeypatch.setattr(module, "write_shard", original)
    result = prepare(table, 8, tmp_path / "out", max_bad_fraction=0.1, streaming=True)
    assert (result["state"], result["fingerprint"]) == ("done", expected["fingerprint"])


def test_a_wrong_split_names_those_there_are(table: str) -> None:
    with pytest.raises(UsageError, match=r"test.*train"):
        open_data(table + ":test")


def test_no_image_column_names_those_there_are(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "words").mkdir()
    Dataset.from_dict({"text": ["a"], "score": [1.0]}).to_parquet(str(tmp_path / "words" / "train.parquet"))
    with pytest.raises(UsageError, match=r"no image column; its columns are text \(Value\), score \(Value\)"):
        open_data(f"hf:{tmp_path / 'words'}")


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot open") as caught:
        open_data(f"hf:{tmp_path / 'nothing'}")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"hf:NAME\[:SPLIT\]"):
        open_data("hf:")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'someone/faces' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(WavelatentError, match="cannot reach the Hugging Face hub for 'someone/faces'"):
        open_data("hf:someone/faces:train")
