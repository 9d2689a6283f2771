"""The building blocks without a gradient, where they write over their own tensors, against them with one."""

import pytest
import torch

from wavelatent.common.nn import ResBlock, SelfAttention, add_to_new, fast_layout, silu_of_new


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("block", "embedding"),
    [
        (ResBlock(12, 12), None),
        (ResBlock(12, 20, dropout=0.5), None),
        (ResBlock(12, 8, embedding_channels=7), maps(2, 7)),
        (SelfAttention(12), None),
        (SelfAttention(12, head_channels=4), None),
    ],
)
def test_without_a_gradient_the_output_is_the_same_and_the_input_stays(block, embedding):
    block.eval()
    x = maps(2, 12, 5, 6)
    inputs = (x,) if embedding is None else (x, embedding)
    kept = [tensor.clone() for tensor in inputs]
    expected = block(*inputs).detach()
    with torch.no_grad():
        contiguous = block(*inputs)
        channels_last = block(fast_layout(x), *inputs[1:])
    torch.testing.assert_close(contiguous, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(channels_last, expected, rtol=1e-5, atol=1e-5)
    for tensor, copy in zip(inputs, kept, strict=True):
        assert torch.equal(tensor, copy)


def test_the_layout_changes_only_where_no_gradient_is_recorded():
    x = maps(2, 3, 4, 5)
    assert fast_layout(x) is x
    with torch.no_grad():
        changed = fast_layout(x)
        assert fast_layout(changed).data_ptr() == changed.data_ptr()  # once is enough
    assert changed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(changed, x)


def test_in_place_forms_reuse_the_new_tensor_and_equal_the_plain_ones():
    x, branch = maps(2, 3), maps(2, 3) + 1
    expected_sum, expected_silu = x + branch, torch.nn.functional.silu(x)
    assert add_to_new(x, branch) is not branch
    with torch.no_grad():
        total, activated = add_to_new(x, branch.clone()), silu_of_new(x.clone())
        mixed = add_to_new(x, branch.bfloat16())
    torch.testing.assert_close(total, expected_sum)
    torch.testing.assert_close(activated, expected_silu)
    assert mixed.dtype == torch.float32  # what the plain sum promotes to
