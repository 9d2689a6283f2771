"""The building blocks without a gradient, where they write over their own tensors, against them with one."""

import pytest
import torch
import torch.nn.functional as F

from wavelatent.common.nn import (
    ChannelsLastConv2d,
    ResBlock,
    SelfAttention,
    add_to_new,
    attention,
    fast_layout,
    group_norm,
    silu_of_new,
)


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


def same_gradients(first, second, *inputs, tolerance=1e-5):
    """Both functions' outputs, and the gradients of a fixed sum of them, agree."""
    results = []
    for function in (first, second):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        weights = maps(*out.shape).to(out.dtype)
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def plain_block(block, x, embedding):
    """The residual block as its docstring states it."""
    h = block.conv1(F.silu(F.group_norm(x, block.norm1.num_groups, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = F.group_norm(h, block.norm2.num_groups, block.norm2.weight, block.norm2.bias, 1e-6)
    scale, shift = block.modulation(embedding).chunk(2, dim=1)
    h = h * (1 + scale[..., None, None]) + shift[..., None, None]
    return block.skip(x) + block.conv2(F.silu(h))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_modulated_block_is_the_plain_form_in_either_layout(layout):
    plain, block = ResBlock(12, 8, embedding_channels=7), ResBlock(12, 8, embedding_channels=7)
    block.load_state_dict(plain.state_dict())
    block.to(memory_format=layout)
    same_gradients(
        lambda x, e: plain_block(plain, x, e),
        lambda x, e: block(x.contiguous(memory_format=layout), e),
        maps(2, 12, 5, 6),
        maps(3, 7)[:2],
    )


def test_attention_takes_either_layout_and_is_the_plain_product():
    block = SelfAttention(12, head_channels=4)

    def plain(x):
        q, k, v = block.qkv(block.norm(x)).reshape(2, 3, 3, 4, 30).unbind(1)  # [B, heads, c, N]
        weights = (q.transpose(2, 3) @ k / 4**0.5).softmax(-1)
        return x + block.out((v @ weights.transpose(2, 3)).reshape(2, 12, 5, 6))

    for layout in (torch.contiguous_format, torch.channels_last):
        same_gradients(plain, lambda x, layout=layout: block(x.contiguous(memory_format=layout)), maps(2, 12, 5, 6))


def test_half_precision_attention_and_normalisation_are_float32_rounded_once():
    q, k, v = (maps(3, 2, 4, 6, 5)[i].bfloat16() for i in range(3))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v), exact.bfloat16())
    norm, x = group_norm(12), maps(2, 12, 5, 6).bfloat16()
    expected = F.group_norm(x.float(), norm.num_groups, eps=1e-6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_a_channels_last_convolution_is_the_plain_one(kernel, stride):
    conv = ChannelsLastConv2d(6, 8, kernel, stride, kernel // 2)

    def plain(x, weight, bias):
        return F.conv2d(x, weight.transpose(1, 2).unflatten(2, (kernel, kernel)), bias, stride, kernel // 2)

    def ours(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, x)

    same_gradients(plain, ours, maps(2, 6, 5, 7), conv.weight.detach(), conv.bias.detach())


def test_a_channels_last_convolution_is_saved_as_a_plain_one():
    plain, ours = torch.nn.Conv2d(6, 8, 3, padding=1), ChannelsLastConv2d(6, 8, 3, padding=1)
    ours.load_state_dict(plain.state_dict())
    x = maps(2, 6, 5, 7)
    torch.testing.assert_close(ours(x), plain(x))
    state = ours.state_dict()
    assert torch.equal(state["weight"], plain.weight)
    other = ChannelsLastConv2d(6, 8, 3, padding=1)
    other.load_state_dict(state)
    assert torch.equal(other.weight, ours.weight)
