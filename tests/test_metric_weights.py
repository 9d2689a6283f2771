"""Every way to the weights, with small stand-ins served from this machine."""

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wavelatent.common import metric_weights
from wavelatent.common.errors import WavelatentError
from wavelatent.common.metric_weights import (
    SOURCES,
    MissingWeightsError,
    WeightsSource,
    find_weights,
    load_weights,
    tensors_sha256,
)
from wavelatent.common.unpickling import load_array_tree, load_torchscript_tensors
from wavelatent.common.weight_conversions import features_from_flax

ARCHIVE = "stand-in-1.0.tar.gz"


@dataclass
class Server:
    """Serves a folder on this machine and remembers what was asked for."""

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def give(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return f"{self.url}/{name}"


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    served = Server(tmp_path / "served")
    served.folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(served.folder))

        def log_message(self, *_) -> None:
            served.asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        served.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield served
        httpd.shutdown()


@pytest.fixture
def machine(monkeypatch, tmp_path, server) -> Path:
    """A machine without any weights, whose package index is ``server``; returns its cache."""
    for name in ("WAVELATENT_WEIGHTS", "WAVELATENT_OFFLINE", "PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WAVELATENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "metric-weights"


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "features.0.weight": torch.randn(5, 3, 2, 4, generator=generator),
        "features.0.bias": torch.randn(5, generator=generator),
    }


def _standard_file(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save({**tensors, "classifier.1.weight": torch.zeros(2, 2)}, file)
    return file.getvalue()


def _flax_file(tensors: dict[str, torch.Tensor]) -> bytes:
    kernel = tensors["features.0.weight"].permute(2, 3, 1, 0).contiguous().numpy()
    return pickle.dumps({"Net_0": {"Conv_0": {"kernel": kernel, "bias": tensors["features.0.bias"].numpy()}}})


def _archive(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def stand_ins(monkeypatch, server) -> dict[str, WeightsSource]:
    """Both LPIPS backbones as small stand-ins: standard files on the server, one archive carrying both on its index."""
    tensors = {"vgg": _tensors(0), "alex": _tensors(1)}
    members = {f"weights/{name}.ckpt": _flax_file(tensors[name]) for name in tensors}
    archive = _archive(members)
    server.give(f"files/{ARCHIVE}", archive)
    link = f'<html><a href="../../files/{ARCHIVE}#sha256={_sha256(archive)}">{ARCHIVE}</a></html>'
    server.give("simple/stand-in/index.html", link.encode())
    sources = {}
    for name in tensors:
        standard = _standard_file(tensors[name])
        sources[name] = replace(
            SOURCES[name],
            url=server.give(f"models/{name}-file.pth", standard),
            sha256_prefix=_sha256(standard)[:8],
            tensors_sha256=tensors_sha256(tensors[name]),
            carrier=replace(
                SOURCES[name].carrier,
                project="stand-in",
                filename=ARCHIVE,
                sha256=_sha256(archive),
                member=f"weights/{name}.ckpt",
                member_sha256=_sha256(members[f"weights/{name}.ckpt"]),
                convert=lambda content: features_from_flax(content, "Net_0", [0]),
            ),
        )
        monkeypatch.setitem(metric_weights.SOURCES, name, sources[name])
    return sources


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"} if folder.exists() else set()


def test_the_standard_address_comes_first_and_is_asked_once(machine, server, stand_ins):
    loaded = load_weights("vgg")
    assert set(loaded.tensors) == {"features.0.weight", "features.0.bias"}, "the classifier is left out"
    assert loaded.sha256 == stand_ins["vgg"].tensors_sha256
    assert loaded.origin == stand_ins["vgg"].url
    again = load_weights("vgg")
    torch.testing.assert_close(again.tensors, _tensors(0), rtol=0, atol=0)
    assert len(server.asked) == 1
    assert _files(machine) == {"lpips-vgg16.safetensors"}


def test_the_package_index_comes_next_and_one_archive_serves_both_networks(machine, server, stand_ins):
    for name in stand_ins:
        (server.folder / f"models/{name}-file.pth").unlink()
    loaded = load_weights("alex")
    torch.testing.assert_close(loaded.tensors, _tensors(1), rtol=0, atol=0)
    assert loaded.origin == ARCHIVE
    asked = list(server.asked)
    torch.testing.assert_close(load_weights("vgg").tensors, _tensors(0), rtol=0, atol=0)
    assert server.asked == asked
    assert _files(machine) == {"lpips-vgg16.safetensors", "lpips-alexnet.safetensors"}


def test_a_file_with_another_hash_is_refused_wherever_it_comes_from(machine, server, stand_ins):
    server.give("models/vgg-file.pth", _standard_file(_tensors(5)))
    server.give(f"files/{ARCHIVE}", _archive({"weights/vgg.ckpt": _flax_file(_tensors(5))}))
    with pytest.raises(MissingWeightsError, match="not the expected one") as caught:
        load_weights("vgg")
    assert str(caught.value).count("not the expected one") == 2
    assert _files(machine) == set(), "nothing is left behind"


def test_out_of_reach_is_one_line_that_says_what_to_do(machine, server, stand_ins):
    for path in ("models/vgg-file.pth", "simple/stand-in/index.html"):
        (server.folder / path).unlink()
    (server.folder / "simple/stand-in").rmdir()
    with pytest.raises(MissingWeightsError) as caught:
        load_weights("vgg")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "VGG16",
        "answered 404",
        "has no stand-in",
        "doctor --fetch",
        ARCHIVE,
        "vgg-file.pth",
        "WAVELATENT_WEIGHTS",
    ):
        assert part in message


def test_nothing_is_asked_for_offline_or_without_leave(machine, server, stand_ins, monkeypatch):
    assert find_weights("vgg") is None
    with pytest.raises(MissingWeightsError):
        load_weights("vgg", fetch=False)
    monkeypatch.setenv("WAVELATENT_OFFLINE", "1")
    with pytest.raises(MissingWeightsError, match="WAVELATENT_OFFLINE"):
        load_weights("vgg")
    assert server.asked == []


@pytest.mark.parametrize("form", ["standard", "archive"])
def test_an_explicit_folder_goes_before_everything(machine, server, stand_ins, monkeypatch, tmp_path, form):
    load_weights("vgg")
    folder = tmp_path / "mine"
    folder.mkdir()
    source = stand_ins["vgg"]
    name, served = (source.filename, "models/vgg-file.pth") if form == "standard" else (ARCHIVE, f"files/{ARCHIVE}")
    (folder / name).write_bytes((server.folder / served).read_bytes())
    monkeypatch.setenv("WAVELATENT_WEIGHTS", str(folder))
    assert load_weights("vgg").origin == str(folder / name)
    (folder / name).write_bytes(b"something else")
    with pytest.raises(WavelatentError, match="not the published file"):
        load_weights("vgg")
    monkeypatch.setenv("WAVELATENT_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(WavelatentError, match=r"WAVELATENT_WEIGHTS names .*nowhere"):
        load_weights("vgg")


@pytest.mark.parametrize("writable", [True, False])
def test_torch_hubs_own_folder_is_used(machine, server, stand_ins, tmp_path, monkeypatch, writable):
    def write_atomically(path: Path, content: bytes) -> None:
        raise OSError(30, "Read-only file system")

    if not writable:
        monkeypatch.setattr(metric_weights, "write_atomically", write_atomically)
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "vgg-file.pth").write_bytes((server.folder / "models/vgg-file.pth").read_bytes())
    assert load_weights("vgg", fetch=False).origin == str(hub / "vgg-file.pth")
    assert server.asked == []


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_cache_is_fetched_again(machine, server, stand_ins, damage):
    load_weights("vgg")
    path = stand_ins["vgg"].cache_path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-10] if damage == "cut" else content)
    assert find_weights("vgg") is None
    torch.testing.assert_close(load_weights("vgg").tensors, _tensors(0), rtol=0, atol=0)
    assert len(server.asked) == 2


def test_several_at_once_fetch_once_and_all_get_it(machine, server, stand_ins):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(load_weights("vgg").sha256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert found == [stand_ins["vgg"].tensors_sha256] * 4
    assert len(server.asked) == 1


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("WAVELATENT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert metric_weights.cache_folder() == tmp_path / "wavelatent"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert metric_weights.cache_folder() == Path.home() / ".cache" / "wavelatent"


class _Attack:
    def __reduce__(self):
        return os.system, ("echo run > attack.txt",)


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WavelatentError, match=r"asks for (posix|nt|os)\.system"):
        load_array_tree(pickle.dumps({"kernel": np.zeros(2), "x": _Attack()}))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps({"x": _Attack()}, protocol=2))
    with pytest.raises(WavelatentError, match=r"asks for .*\.system"):
        load_torchscript_tensors(file.getvalue())
    assert not (tmp_path / "attack.txt").exists()


def test_torchscript_is_read_without_torchs_own_loader():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, (2, 5)), torch.nn.BatchNorm2d(4))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images)

    net, file = Net(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for buffer in ("running_mean", "running_var"):
            getattr(net.inner[1], buffer).uniform_()
        net.inner[1].num_batches_tracked = None
        torch.jit.save(torch.jit.trace(net.eval(), torch.zeros(1, 3, 6, 7)), file)
    tensors = load_torchscript_tensors(file.getvalue())
    expected = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("tracked")}
    torch.testing.assert_close({name: tensors[name] for name in expected}, expected, rtol=0, atol=0)
