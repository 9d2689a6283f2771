import pytest
import torch

from wavelatent.common.precision import full_float32

CPU = torch.device("cpu")


def settings() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_it_turns_autocast_and_tf32_off_and_puts_them_back(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        a, b = torch.randn(3, 5), torch.randn(5, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_float32(CPU):
                assert settings() == (False, "highest")
                assert (a @ b).dtype == torch.float32
            assert (a @ b).dtype == torch.bfloat16
        assert settings() == (True, "medium")
        with pytest.raises(KeyboardInterrupt), full_float32(CPU):
            raise KeyboardInterrupt
        assert settings() == (True, "medium")
    finally:
        torch.set_float32_matmul_precision(before)
