"""The convolution that PyTorch neglects: the same numbers and gradients, taken where it is faster and nowhere else."""

import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.networks import onednn
from mirage_min.networks.causal_conv import CausalConv3d

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel, stride, padding", [
    ((3, 3, 3), (1, 1, 1), (0, 1, 1)), ((3, 3, 3), (2, 2, 2), (0, 1, 0)), ((1, 3, 3), (1, 1, 1), (0, 0, 1))])
def test_the_numbers_and_the_gradients_are_those_of_float64(kernel, stride, padding, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(1, 5, 4, 9, 11), torch.randn(7, 5, *kernel), torch.randn(7) if bias else None
    given = [t for t in (x, weight, b) if t is not None]
    exact = [t.double().requires_grad_() for t in given]
    wanted = nnf.conv3d(exact[0], *exact[1:], stride=stride, padding=padding)
    given = [t.requires_grad_() for t in given]
    found = onednn.Conv3d.apply(*given, *([] if bias else [None]), stride, padding)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(found)
    wanted_grads = torch.autograd.grad(wanted, exact, upstream.double())
    for grad, exactly in zip(torch.autograd.grad(found, given, upstream), wanted_grads, strict=True):
        torch.testing.assert_close(grad.double(), exactly, rtol=1e-5, atol=1e-4)


def test_only_what_is_asked_for_has_a_gradient():
    x, weight = torch.randn(1, 2, 3, 8, 8, requires_grad=True), torch.randn(4, 2, 3, 3, 3)
    onednn.Conv3d.apply(x, weight, torch.randn(4), (1, 1, 1), (0, 1, 1)).sum().backward()
    assert x.grad is not None and weight.grad is None


def taken_by(x, conv):
    """The operators that a convolution of x runs, by name, from PyTorch's profiler."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        conv(x, None, {})
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("T", [1, 6, 7, 30])  # 32 channels, 96 rows and two frames before them: 20,480 is at T = 4.7
def test_no_clip_is_left_to_the_slow_way(T):
    conv = CausalConv3d(32, 4)
    assert "aten::slow_conv3d" not in taken_by(torch.randn(1, 32, T, 96, 4), conv)
    with torch.backends.mkldnn.flags(enabled=False):  # where a user turned oneDNN off it stays off
        assert "aten::slow_conv3d" in taken_by(torch.randn(1, 32, T, 96, 4), conv)


def test_what_is_no_small_clip_in_float32_goes_the_usual_way():
    weight, x = torch.randn(4, 2, 3, 3, 3), torch.randn(1, 2, 3, 8, 8)
    assert onednn.is_neglected(x, weight)
    assert not onednn.is_neglected(x.expand(2, -1, -1, -1, -1), weight)
    assert not onednn.is_neglected(x.double(), weight)
    assert not onednn.is_neglected(x.bfloat16(), weight)
    assert not onednn.is_neglected(x.to("meta"), weight)
    assert not onednn.is_neglected(x, torch.randn(4, 2, 3, 1, 1))
    assert onednn.is_neglected(torch.randn(1, 20, 8, 128, 1), weight)  # 20 · 8 · 128 = 20,480
    assert not onednn.is_neglected(torch.randn(1, 20, 8, 129, 1), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.is_neglected(x, weight)


def test_what_autograd_keeps_is_the_clip_itself():
    kept = []
    x = torch.randn(1, 2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 2, 3, 3, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        onednn.Conv3d.apply(x, weight, None, (1, 1, 1), (0, 1, 1))
    assert kept == [x.data_ptr(), weight.data_ptr()]
