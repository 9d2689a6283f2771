"""What every denoiser network must do, and its options against plain float32."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from wavelatent.stage2_diffusion.networks import DENOISERS, DenoiserConfig, build_network

LAYOUT = {"channels": 16, "multipliers": (1, 2), "num_res_blocks": 1, "attention_levels": (1,), "head_channels": 8}
EVERY_KIND = pytest.mark.parametrize("kind", sorted(DENOISERS))


def config_of(kind, **options):
    return TypeAdapter(DenoiserConfig).validate_python({"kind": kind, **LAYOUT, **options})


def build(kind, in_channels=5, num_classes=3, **options):
    """A small network in which nothing is at zero, so that every part matters."""
    torch.manual_seed(0)
    network = build_network(config_of(kind, **options), in_channels, num_classes)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return network


def inputs(batch=2, channels=5, height=4, width=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x, torch.linspace(-1.5, 1.0, batch), torch.arange(batch) % 3


def output_and_gradient(network, *arguments):
    """The output, and the gradients of all parameters in one vector."""
    network.zero_grad()
    output = network(*arguments)
    output.float().sin().sum().backward()
    return output.detach().float(), torch.cat([p.grad.flatten() for p in network.parameters()])


def relative_errors(results, exact_results):
    """How far output and gradient are from the exact ones, in relative norms."""
    pairs = zip(results, exact_results, strict=True)
    return [((value - exact).norm() / exact.norm()).item() for value, exact in pairs]


@EVERY_KIND
def test_the_kind_decides_what_is_built(kind):
    config = config_of(kind)
    assert config.kind == kind
    network = build_network(config, 5)
    assert type(network) is DENOISERS[kind]
    assert (network.config, network.num_classes, network.gradient_checkpointing) == (config, 0, False)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValidationError, match="kind"):
        config_of("transformer")


@EVERY_KIND
@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (3, 5, 6, 2), (1, 32, 2, 4)])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_any_latents_keep_their_shape_and_gradients_reach_every_parameter(kind, shape, num_classes):
    network = build(kind, in_channels=shape[1], num_classes=num_classes)
    x, noise_label, labels = inputs(*shape)
    output = network(x, noise_label, labels if num_classes else None)
    assert output.shape == x.shape
    output.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@EVERY_KIND
def test_a_new_network_returns_zero(kind):
    assert not build_network(config_of(kind), 5)(*inputs()[:2]).any()


@EVERY_KIND
def test_samples_do_not_mix(kind):
    network = build(kind).eval()
    x, noise_label, labels = inputs(batch=3)
    alone = [network(x[i : i + 1], noise_label[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x, noise_label, labels), torch.cat(alone), rtol=1e-4, atol=1e-4)


@EVERY_KIND
def test_noise_level_and_class_change_the_output(kind):
    network = build(kind).eval()
    x = inputs(batch=1)[0].expand(4, -1, -1, -1)
    first, other_noise, other_class, no_class = network(
        x, torch.tensor([0.1, 0.2, 0.1, 0.1]), torch.tensor([0, 0, 1, 3])
    )
    for other in (other_noise, other_class, no_class):
        assert not torch.allclose(first, other, atol=1e-3)
    torch.testing.assert_close(network(x[:1], torch.tensor([0.1]))[0], no_class, rtol=1e-4, atol=1e-4)


@EVERY_KIND
def test_labels_for_a_network_without_classes_are_refused(kind):
    with pytest.raises(ValueError, match="without classes"):
        build(kind, num_classes=0)(*inputs())


@EVERY_KIND
def test_a_size_that_cannot_be_halved_says_how_to_fix_it(kind):
    network = build(kind)
    network.check_size(4, 6)
    with pytest.raises(ValueError, match="divide by 2"):
        network(*inputs(width=7))


@EVERY_KIND
@pytest.mark.parametrize("wrong", [{"attention_levels": (2,)}, {"head_channels": 24}, {"channels": 0}])
def test_configurations_that_cannot_be_built_are_refused(kind, wrong):
    with pytest.raises(ValidationError):
        config_of(kind, **wrong)


@EVERY_KIND
def test_attention_equals_an_explicit_softmax(kind, monkeypatch):
    network = build(kind)
    fused = output_and_gradient(network, *inputs())
    calls = []

    def explicit(q, k, v):
        calls.append(q.shape)
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", explicit)
    plain = output_and_gradient(network, *inputs())
    assert calls
    assert max(relative_errors(fused, plain)) < 1e-5


@EVERY_KIND
def test_bf16_autocast_is_close_to_float32(kind):
    network = build(kind)
    exact = output_and_gradient(network, *inputs())
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    output, gradient = relative_errors(output_and_gradient(network, *inputs()), exact)
    assert 0 < output < 0.02
    assert 0 < gradient < 0.05


@EVERY_KIND
def test_gradient_checkpointing_changes_no_bit_even_with_dropout(kind):
    network = build(kind, dropout=0.5)
    results = []
    for network.gradient_checkpointing in (False, True):
        torch.manual_seed(2)
        results.append(output_and_gradient(network, *inputs()))
    plain, checkpointed = results
    assert torch.equal(plain[0], checkpointed[0])
    assert torch.equal(plain[1], checkpointed[1])
    torch.manual_seed(3)
    assert not torch.equal(plain[0], network(*inputs())), "the dropout was not at work"


@EVERY_KIND
def test_channels_last_gives_the_output_and_gradient_of_the_plain_layout(kind):
    network = build(kind)
    feature_maps = []
    network.stem.register_forward_hook(lambda module, arguments, output: feature_maps.append(output))
    fast = output_and_gradient(network, *inputs())
    network.channels_last = False
    plain = output_and_gradient(network, *inputs())
    assert [x.is_contiguous() for x in feature_maps] == [False, True]
    assert max(relative_errors(fast, plain)) < 1e-5


@EVERY_KIND
def test_a_traced_network_gives_the_same_output_and_gradient(kind):
    """What `torch.compile` traces, forward and backward, in one graph; the kernels it would generate are left out.

    Those take minutes to build on a CPU.
    """
    network = build(kind)
    plain = output_and_gradient(network, *inputs())
    network.compile(backend="aot_eager", fullgraph=True)
    assert max(relative_errors(output_and_gradient(network, *inputs()), plain)) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY_KIND
def test_a_compiled_network_gives_the_same_output_and_gradient(kind):
    network, arguments = build(kind).cuda(), [argument.cuda() for argument in inputs()]
    plain = output_and_gradient(network, *arguments)
    network.compile(fullgraph=True)
    assert max(relative_errors(output_and_gradient(network, *arguments), plain)) < 1e-2  # TF32 in either
