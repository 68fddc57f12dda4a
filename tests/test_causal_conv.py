"""One causal 3D convolution: what it computes, what it remembers, what it may see (ChopGrad §3.1)."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mirage_min.networks.causal_conv import CausalConv3d, name_caches
from tests import small


def slow_causal(x, weight, bias, first, stride):
    """The definition, one output value at a time: y[o, t] = b + sum over taps of w · (x padded in front)[t + tap]."""
    B, C, T, H, W = x.shape
    C_out, _, kt, kh, kw = weight.shape
    front = x[:, :, :1] if first == "repeat" else torch.zeros_like(x[:, :, :1])
    x = torch.cat([front] * (kt - 1) + [x], dim=2)
    x = torch.nn.functional.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
    rows, cols = (H - 1) // stride + 1, (W - 1) // stride + 1
    y = torch.zeros(B, C_out, T, rows, cols, dtype=x.dtype)
    for t, i, j in itertools.product(range(T), range(rows), range(cols)):
        window = x[:, :, t : t + kt, i * stride : i * stride + kh, j * stride : j * stride + kw]
        for o in range(C_out):
            y[:, o, t, i, j] = bias[o] + (window * weight[o]).sum(dim=(1, 2, 3, 4))
    return y


def in_groups(conv, x, plan):
    old, out = None, []
    for piece in x.split(plan, dim=2):
        new = {}
        out.append(conv(piece, old, new))
        old = new
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("first", ["repeat", "zeros"])
@pytest.mark.parametrize("kernel", [3, (3, 1, 1), (1, 3, 3), 1])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_it_equals_the_definition_in_loops(first, kernel, T):
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, kernel, first=first).double()
    x = torch.randn(2, 2, T, 3, 5, dtype=torch.float64)
    wanted = slow_causal(x, conv.weight, conv.bias, first, 1)
    with small.unchanged(x):
        difference = (conv(x, None, {}) - wanted).abs().max()
    assert difference < 1e-12, f"largest difference {difference:.1e} to the loops, allowed 1e-12"


def test_a_stride_in_space_equals_the_loops():
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, 3, stride=(1, 2, 2)).double()
    x = torch.randn(1, 2, 4, 5, 7, dtype=torch.float64)
    difference = (conv(x, None, {}) - slow_causal(x, conv.weight, conv.bias, "zeros", 2)).abs().max()
    assert difference < 1e-12, f"largest difference {difference:.1e} to the loops, allowed 1e-12"


@pytest.mark.parametrize("first", ["repeat", "zeros"])
@pytest.mark.parametrize("kernel", [3, (3, 1, 1), (2, 3, 3), (5, 3, 3)])
@pytest.mark.parametrize("plan", [[1] * 9, [2, 7], [9], [1, 4, 4], [3, 2, 2, 2], [5, 1, 1, 2]])
def test_every_chunk_plan_agrees(first, kernel, plan):
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, kernel, first=first).double()
    x = torch.randn(2, 2, 9, 4, 3, dtype=torch.float64)
    difference = (in_groups(conv, x, plan) - conv(x, None, {})).abs().max()
    assert difference < 1e-12, f"plan {plan}: largest difference {difference:.1e} to the whole, allowed 1e-12"


def test_the_zeros_before_a_single_frame_are_not_multiplied():
    conv, x = CausalConv3d(2, 3).double(), torch.randn(1, 2, 1, 8, 8, dtype=torch.float64)
    counts, cache = [], {}
    for old in (None, {"": torch.zeros(1, 2, 2, 8, 8, dtype=torch.float64)}):
        with torch.no_grad(), FlopCounterMode(display=False) as count:
            conv(x, old, cache)
        counts.append(count.get_total_flops())
    assert counts == [2 * 9 * 2 * 3 * 64, 2 * 27 * 2 * 3 * 64]
    assert torch.equal(cache[""], torch.cat([torch.zeros_like(x), x], dim=2)), "the next frame sees both"


def test_no_output_sees_a_later_frame():
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3)
    x = torch.randn(1, 2, 7, 4, 4)
    changed = x.clone()
    changed[:, :, 3] += 1
    reached = (conv(changed, None, {}) - conv(x, None, {})).abs().amax(dim=(0, 1, 3, 4)) > 0
    assert reached.tolist() == [False, False, False, True, True, True, False]


def test_the_cache_is_new_small_and_the_old_one_untouched():
    conv = CausalConv3d(2, 3)
    conv.key = "conv"
    x = torch.randn(1, 2, 4, 3, 3)
    old, new = {"conv": torch.randn(1, 2, 2, 3, 3)}, {}
    before = old["conv"].clone()
    conv(x, old, new)
    assert torch.equal(old["conv"], before) and new["conv"] is not old["conv"]
    assert torch.equal(new["conv"], x[:, :, -2:])
    assert new["conv"].untyped_storage().nbytes() == new["conv"].nbytes, "the cache keeps a whole group alive"


def test_a_group_of_one_frame_keeps_one_of_the_frames_before():
    conv = CausalConv3d(1, 1)
    old, new = {"": torch.tensor([1.0, 2.0]).view(1, 1, 2, 1, 1)}, {}
    conv(torch.full((1, 1, 1, 1, 1), 3.0), old, new)
    assert new[""].flatten().tolist() == [2.0, 3.0]


def test_a_kernel_without_extent_in_time_has_no_cache():
    new = {}
    CausalConv3d(2, 2, (1, 3, 3))(torch.randn(1, 2, 3, 4, 4), None, new)
    assert new == {}


def test_names_are_the_dotted_names_of_the_layers():
    net = nn.ModuleDict({"a": nn.Sequential(CausalConv3d(1, 1)), "b": CausalConv3d(1, 1)})
    name_caches(net)
    assert net["a"][0].key == "a.0" and net["b"].key == "b"


def test_an_unknown_rule_for_the_first_frame_is_refused():
    with pytest.raises(ValueError, match='"repeat" or "zeros", got \'mirror\''):
        CausalConv3d(1, 1, first="mirror")
