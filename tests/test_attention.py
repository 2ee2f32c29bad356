"""Explicit attention: the same function and gradients as PyTorch's own, in another order of memory."""

import logging

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from network_gradients import batch_for, gradients

from reg_diffusers.networks.attention import (
    _SlicedAttention,
    attention_bytes,
    prefers_explicit_attention,
    use_explicit_attention,
)

pytestmark = pytest.mark.training


@pytest.mark.parametrize("slice_bytes", [2**23, 3 * 1024, 1])  # all heads at a time, 3, one
@pytest.mark.parametrize("config", [{}, {"resnet_time_scale_shift": "scale_shift"}])  # this has layers without a norm
def test_explicit_attention_is_the_same_function(tiny_unet, monkeypatch, caplog, slice_bytes, config):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr("reg_diffusers.networks.attention._SLICE", slice_bytes)
    unet = tiny_unet(**config)
    before = list(unet.state_dict())
    output, grads = gradients(unet, *batch_for(unet))
    use_explicit_attention(unet)
    assert all(isinstance(m.processor, AttnProcessor) for m in unet.modules() if isinstance(m, Attention))
    explicit_output, explicit_grads = gradients(unet, *batch_for(unet))
    assert not caplog.records  # diffusers warns of processors that take no temb
    torch.testing.assert_close(explicit_output, output, atol=1e-5, rtol=1e-5)
    for name in grads:
        torch.testing.assert_close(explicit_grads[name], grads[name], atol=1e-3, rtol=1e-4, msg=name)
    assert list(unet.state_dict()) == before


@pytest.mark.parametrize("slice_bytes", [2**23, 2 * 5 * 5 * 8, 1])  # all three heads at a time, two, one
def test_the_gradients_of_sliced_attention_are_those_of_finite_differences(monkeypatch, slice_bytes):
    monkeypatch.setattr("reg_diffusers.networks.attention._SLICE", slice_bytes)
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(3, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *heads: _SlicedAttention.apply(*heads, 0.3), heads)


def test_attention_in_bfloat16_is_that_of_its_rounded_inputs(monkeypatch):
    """8 bits: each of two products and a softmax rounds by 2^-9, and so does each of their gradients."""
    monkeypatch.setattr("reg_diffusers.networks.attention._SLICE", 64 * 64 * 2)
    rounded = [torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    *heads, gradient = rounded
    found = _gradients_of(lambda *qkv: _SlicedAttention.apply(*qkv, 0.3), heads, gradient)
    exact = [head.double() for head in heads]
    expected = _gradients_of(lambda q, k, v: (0.3 * q @ k.mT).softmax(-1) @ v, exact, gradient.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 2**-7 * other.norm()


def test_attention_keeps_the_type_of_its_inputs_inside_autocast():
    """As a loop does that calls backward inside it, or hands float32 to the layer."""
    heads = [torch.randn(2, 16, 8) for _ in range(3)]
    plain = _gradients_of(lambda *qkv: _SlicedAttention.apply(*qkv, 0.3), heads, torch.ones(2, 16, 8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = _gradients_of(lambda *qkv: _SlicedAttention.apply(*qkv, 0.3), heads, torch.ones(2, 16, 8))
    assert all(torch.equal(one, other) for one, other in zip(inside, plain, strict=True))


def _gradients_of(function, heads, gradient):
    """The result, and its gradients by each input."""
    heads = [head.detach().clone().requires_grad_() for head in heads]
    result = function(*heads)
    return [result.detach(), *torch.autograd.grad(result, heads, gradient)]


def test_without_gradients_attention_is_the_same(monkeypatch):
    """It keeps no matrix then, and so computes it in another place."""
    monkeypatch.setattr("reg_diffusers.networks.attention._SLICE", 64 * 64 * 4)
    heads = torch.randn(3, 4, 64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = _SlicedAttention.apply(*heads, 0.3)
    assert torch.equal(_SlicedAttention.apply(*heads.detach(), 0.3), expected)
    torch.testing.assert_close(expected, (0.3 * heads[0] @ heads[1].mT).softmax(-1) @ heads[2])


def test_what_follows_explicit_attention_has_the_usual_order_of_memory(tiny_unet, monkeypatch):
    """Else group norm, which follows it, is many times slower on a CPU."""
    unet, seen = tiny_unet(), []
    use_explicit_attention(unet)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, args, output: seen.append(output.is_contiguous()))
    unet(*batch_for(unet))
    monkeypatch.setattr("reg_diffusers.networks.attention._SLICE", 1)
    unet(*batch_for(unet))
    assert seen == [True] * 8


def test_a_softmax_in_bfloat16_is_the_rounded_float32_one():
    """Why no float32 copy of the attention matrix is kept: the numbers would be the same."""
    scores = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(5).bfloat16()
    assert torch.equal(scores.softmax(-1), scores.float().softmax(-1).bfloat16())


@pytest.mark.parametrize("size", [8, (16, 8)])
def test_the_size_of_the_attention_matrix_is_that_of_the_largest_one_made(tiny_unet, size, monkeypatch):
    unet = tiny_unet()
    height, width = (size, size) if isinstance(size, int) else size
    unet.register_to_config(sample_size=size)
    use_explicit_attention(unet)
    sizes = []
    softmax = torch.softmax

    def measured(scores, *args, **kwargs):
        sizes.append(scores.numel() * 2)
        return softmax(scores, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", measured)
    unet(torch.zeros(3, 1, height, width), 0)
    assert len(sizes) == 4 and attention_bytes(unet, 3) == max(sizes)


def test_explicit_attention_is_for_cpus_and_for_matrices_that_stay_small(tiny_unet):
    unet = tiny_unet()  # 2 heads of 16 pixels: 1 KB an image
    assert attention_bytes(unet, 1) == 1024
    assert prefers_explicit_attention(unet, 131072, "cpu", "bf16")
    assert not prefers_explicit_attention(unet, 131073, "cpu", "bf16")
    assert not prefers_explicit_attention(unet, 1, "cpu", "no")
    assert not prefers_explicit_attention(unet, 1, "cuda", "bf16")
    plain = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    assert attention_bytes(plain, 1) == 0 and not prefers_explicit_attention(plain, 1, "cpu", "bf16")
