import subprocess
import sys

import pytest

from wavelatent.common.torchvision_import import ensure_torchvision, has_compiled_operators

IMPORTS = ["torchvision", "torchvision.transforms.v2", "torchvision.models", "lpips", "torch_fidelity"]


@pytest.mark.parametrize("first_attempt_fails", [False, True])
def test_what_needs_torchvision_imports_in_a_fresh_process(pytestconfig, first_attempt_fails):
    # What a program that met the failure before us leaves behind.
    attempt = "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n" if first_attempt_fails else ""
    code = (
        f"{attempt}import cli\nfrom wavelatent.common.torchvision_import import ensure_torchvision\n"
        f"ensure_torchvision(); ensure_torchvision()\nimport {', '.join(IMPORTS)}\nfrom torchvision import ops\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_networks_run_and_the_library_outlives_a_collection():
    import gc

    import torch

    ensure_torchvision()
    gc.collect()
    assert hasattr(torch.ops.torchvision, "nms")
    import torchvision

    assert torchvision.models.alexnet().features(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 1, 1)


def test_compiled_operators_are_told_from_declared_ones():
    import torch

    ensure_torchvision()
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
    if has_compiled_operators():
        assert torch.ops.torchvision.nms(boxes, scores, 0.5).tolist() == [0]
    else:
        with pytest.raises(NotImplementedError):
            torch.ops.torchvision.nms(boxes, scores, 0.5)
