import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wavelatent.common.errors import WavelatentError
from wavelatent.common.mapped_tensors import MappedTensors, allow_open_files


def test_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    saved = {"mean": torch.randn(3, 2, 5), "half": torch.randn(3, 7).half(), "index": torch.tensor([9, -1, 2**40])}
    file = tmp_path / "x.safetensors"
    save_file({**saved, "other": torch.zeros(3, dtype=torch.bfloat16)}, file, metadata={"made": "by a test"})
    mapped = MappedTensors(file)
    assert mapped.tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        assert mapped.tensors[name].dtype == tensor.numpy().dtype
        assert np.array_equal(mapped.tensors[name], tensor.numpy())
        for row in range(3):
            mapped.will_need(name, row)  # of every place in the file, the last included
        with pytest.raises(ValueError, match="read-only"):
            mapped.tensors[name][0] = 0


def test_tensors_that_do_not_begin_at_a_multiple_of_their_size(tmp_path: Path) -> None:
    header = json.dumps({"mean": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}})
    header += " " * (1 + -len(header) % 4)  # a length that is no multiple of 4
    values = np.arange(6, dtype="<f4")
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + values.tobytes())
    assert MappedTensors(file).tensors["mean"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("content", [b"", b"no", b"\xff" * 64, (5).to_bytes(8, "little") + b"{...}"])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(WavelatentError, match=r"x\.safetensors cannot be read"):
        MappedTensors(file)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_the_limit_of_open_files_is_raised_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits, given = (256, 4096), []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: given.append(limit))
    allow_open_files(1000)
    allow_open_files(4000)
    assert given == [(2024, 4096), (4096, 4096)]
    limits = (8192, resource.RLIM_INFINITY)
    allow_open_files(100)
    assert len(given) == 2
    limits = (256, 4096)
    with pytest.raises(WavelatentError, match=r"5000 files .* only 4096"):
        allow_open_files(5000)
