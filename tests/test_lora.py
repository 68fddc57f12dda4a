"""LoRA: nothing at first, the same merged and unmerged, and adapters that know nothing of each other."""

import copy

import pytest
import torch
from torch import nn

from mirage_min.method import lora
from mirage_min.networks.causal_conv import CausalConv3d, name_caches
from tests.torchvision_stub import stub


class Net(nn.Module):
    """One layer of every kind; the causal one is given its past."""

    def __init__(self):
        super().__init__()
        self.conv3d, self.conv2d = CausalConv3d(2, 4), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.linear, self.thin = nn.Linear(6, 5), nn.Conv3d(4, 4, (3, 1, 1), groups=2)
        name_caches(self)

    def forward(self, x, old=None, new=None):
        h = self.conv3d(x, old, {} if new is None else new)
        h = self.thin(torch.cat([h, h, h], dim=2))[:, :, :1]
        return self.linear(self.conv2d(h[:, :, 0]).flatten(2).transpose(1, 2))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def x():
    return torch.randn(2, 2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fill(net, name, seed=2):
    draws = torch.Generator().manual_seed(seed)
    for p in lora.parameters(net, name):
        p.data = 0.3 * torch.randn(p.shape, generator=draws, dtype=torch.float64)


def test_with_b_zero_nothing_changes(net, x):
    before = net(x)
    assert lora.add(net, "a", rank=3, alpha=6) == ["conv3d", "conv2d", "linear", "thin"]
    assert torch.equal(net(x), before)


def test_a_linear_layer_computes_wx_plus_s_b_a_x():
    layer = nn.Linear(7, 5).double()
    lora.add(layer_in := nn.Sequential(layer), "a", rank=3, alpha=6)
    fill(layer_in, "a")
    A, B = layer.lora["a"].A, layer.lora["a"].B
    x = torch.randn(4, 7, dtype=torch.float64)
    wanted = torch.stack([layer.weight @ v + layer.bias + (6 / 3) * (B @ (A @ v)) for v in x])
    difference = (layer(x) - wanted).abs().max()
    assert difference < 1e-12, f"largest difference {difference:.1e}, allowed 1e-12"


@pytest.mark.parametrize("kind, kernel", [(nn.Conv2d, (3, 3)), (nn.Conv3d, (3, 3, 3)), (nn.Conv3d, (3, 1, 1))])
def test_a_convolution_computes_the_two_convolutions_one_after_the_other(kind, kernel):
    """W * x + s · (B 1x1 * (A * x)): the side path by definition, where the code adds BA to the kernel."""
    torch.manual_seed(0)
    layer = kind(2, 5, kernel, padding=1, stride=2).double()
    plain = copy.deepcopy(layer)
    lora.add(nn.Sequential(layer), "a", rank=3, alpha=12)
    fill(nn.Sequential(layer), "a")
    x = torch.randn(2, 2, *[7] * len(kernel), dtype=torch.float64)
    conv = torch.nn.functional.conv2d if kind is nn.Conv2d else torch.nn.functional.conv3d
    side = conv(conv(x, layer.lora["a"].A, padding=1, stride=2), layer.lora["a"].B)
    difference = (layer(x) - (plain(x) + 4.0 * side)).abs().max()
    assert difference < 1e-12, f"largest difference {difference:.1e}, allowed 1e-12"


def test_merged_equals_unmerged_and_leaves_no_trace(net, x):
    keys = set(net.state_dict())
    lora.add(net, "a", rank=3, alpha=6)
    fill(net, "a")
    before = net(x)
    lora.merge(net, "a")
    difference = (net(x) - before).abs().max()
    assert difference < 1e-12, f"largest difference {difference:.1e}, allowed 1e-12"
    assert set(net.state_dict()) == keys and not any("lora" in n for n, _ in net.named_modules())
    assert type(net.conv3d) is CausalConv3d and type(net.linear) is nn.Linear


def test_print_shows_the_adapters_and_a_copy_has_its_own(net, x):
    lora.add(net, "a", rank=3, alpha=6)
    text = str(net)
    for line in ("(conv3d): AdaptedCausalConv3d(", "(thin): AdaptedConv3d(", "(conv2d): AdaptedConv2d(",
                 "(linear): AdaptedLinear(", "(a): LoRA(rank=3, alpha=6)"):
        assert line in text, f"{line} is not in {text}"
    before, other = net(x), copy.deepcopy(net)
    fill(other, "a")
    assert torch.equal(net(x), before) and not torch.allclose(other(x), before)
    lora.merge(other, "a")
    assert type(other.conv3d) is CausalConv3d and type(net.conv3d) is lora.AdaptedCausalConv3d


def test_a_layer_with_a_forward_of_its_own_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    net = nn.Sequential(nn.Linear(2, 2), Doubled(2, 2))
    with pytest.raises(ValueError, match="wanted 1 to be one of Linear, Conv2d, Conv3d, CausalConv3d, got Doubled"):
        lora.add(net, "a", rank=1, alpha=1)
    assert type(net[0]) is nn.Linear, "a refusal must leave the other layers alone"


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d"])
def test_adapters_add_up_and_are_trained_and_merged_each_by_itself(net, x, kind):
    plain = net(x)
    lora.add(net, "a", rank=2, alpha=2, targets=[kind])
    lora.add(net, "b", rank=3, alpha=6, targets=[kind])
    fill(net, "a", 1)
    only_a = net(x)
    fill(net, "b", 2)
    both = net(x)
    for p in lora.parameters(net, "a"):
        p.data.zero_()
    only_b = net(x)
    difference = ((both - plain) - (only_a - plain) - (only_b - plain)).abs().max()
    assert difference < 1e-12, f"one layer's adapters do not add up: {difference:.1e}"
    fill(net, "a", 1)
    net.requires_grad_(False)
    for p in lora.parameters(net, "b"):
        p.requires_grad_()
    net(x).sum().backward()
    assert all(p.grad is not None for p in lora.parameters(net, "b"))
    assert all(p.grad is None for p in lora.parameters(net, "a")) and getattr(net, kind).weight.grad is None
    lora.merge(net, "a")
    assert torch.allclose(net(x), both, atol=1e-12) and list(getattr(net, kind).lora) == ["b"]


def test_an_adapted_causal_convolution_stays_causal_and_agrees_over_chunks():
    torch.manual_seed(0)
    net = nn.ModuleDict({"c": CausalConv3d(2, 3, first="repeat")}).double()
    name_caches(net)
    lora.add(net, "a", rank=2, alpha=2)
    fill(net, "a")
    x = torch.randn(1, 2, 7, 4, 4, dtype=torch.float64)
    whole, cache = net["c"](x, None, {}), {}
    first = net["c"](x[:, :, :3], None, cache)
    rest = net["c"](x[:, :, 3:], cache, {})
    assert torch.allclose(torch.cat([first, rest], dim=2), whole, atol=1e-12)
    later = x.clone()
    later[:, :, 4:] += 1
    assert torch.equal(net["c"](later, None, {})[:, :, :4], whole[:, :, :4])


def test_the_base_state_dict_does_not_know_of_adapters(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lora.add(net, "a", rank=2, alpha=2)
    fill(net, "a")
    kept = lora.state_dict(net, "a")["linear.lora_A.weight"].clone()
    assert net.state_dict().keys() == before.keys()
    net.load_state_dict(before, strict=True)
    assert torch.equal(lora.state_dict(net, "a")["linear.lora_A.weight"], kept)
    A = lora.parameters(net, "a")[0]
    assert any(p is A for p in net.parameters()), "an adapter must move and train with its module"


def test_state_dict_and_load_are_inverse_in_peft_names_and_shapes(net, x):
    lora.add(net, "a", rank=2, alpha=4)
    fill(net, "a")
    state = lora.state_dict(net, "a")
    assert state["conv3d.lora_A.weight"].shape == (2, 2, 3, 3, 3)
    assert state["conv3d.lora_B.weight"].shape == (4, 2, 1, 1, 1)
    assert state["linear.lora_A.weight"].shape == (2, 6) and state["linear.lora_B.weight"].shape == (5, 2)
    other = copy.deepcopy(net)
    fill(other, "a", 9)
    assert not torch.allclose(other(x), net(x))
    lora.load(other, "a", state)
    assert torch.equal(other(x), net(x))


def test_a_state_that_does_not_fit_is_refused_by_name(net):
    lora.add(net, "a", rank=2, alpha=4, targets=["linear"])
    message = (r"LoRA 'a' \(2 tensors\) does not fit that of Net \(2 tensors\): 1 missing: linear.lora_A.weight; "
               r"1 unexpected: x; 1 wrongly shaped: linear.lora_B.weight \(wanted \[5, 2\], got \[5, 3\]\)")
    with pytest.raises(ValueError, match=message):
        lora.load(net, "a", {"x": torch.zeros(1), "linear.lora_B.weight": torch.zeros(5, 3)})


def test_targets_are_endings_of_dotted_names(net):
    outer = nn.ModuleDict({"block": net, "my_linear": nn.Linear(2, 2)})
    assert lora.add(outer, "a", rank=1, alpha=1, targets=["linear"]) == ["block.linear"]


@pytest.mark.parametrize("call, message", [
    (lambda net: lora.add(net, "a", rank=0, alpha=1), "at least 1, a whole number, got 0"),
    (lambda net: lora.add(net, "a", rank=1.5, alpha=1), "at least 1, a whole number, got 1.5"),
    (lambda net: lora.add(net, "a", rank=1, alpha=1, targets=["nowhere"]), "ends in ..nowhere"),
    (lambda net: [lora.add(net, "a", rank=1, alpha=1) for _ in range(2)], "already has a LoRA called 'a'")])
def test_bad_calls_are_refused(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(net)


def test_a_name_that_one_layer_has_already_changes_no_other(net):
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    lora.add(layers, "a", rank=1, alpha=1, targets=["1"])
    with pytest.raises(ValueError, match="1 already has a LoRA called 'a'"):
        lora.add(layers, "a", rank=1, alpha=1)
    assert [name for name, _, _ in lora.adapters(layers, "a")] == ["1"]


def test_peft_computes_the_same_from_the_same_tensors():
    """PEFT's own Linear and Conv2d, with alpha other than rank."""
    stub()
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(9, 5)).double()
    ours = copy.deepcopy(base)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=12, target_modules=["0", "2"])).double()
    lora.add(ours, "a", rank=3, alpha=12)
    fill(ours, "a")
    state = {f"base_model.model.{k}".replace(".weight", ".default.weight"): v
             for k, v in lora.state_dict(ours, "a").items()}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    difference = (ours(x) - theirs(x)).abs().max()
    assert difference < 1e-12 and (ours(x) - base[2](base[1](base[0](x)))).abs().max() < 1e-6, f"{difference:.1e}"


def test_a_checkpoint_that_peft_wrapped_is_merged_with_the_scale_that_peft_had():
    stub()
    peft = pytest.importorskip("peft", reason="needs the package peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 5, 1, bias=False), nn.Flatten(2),
                        nn.Linear(16, 4)).double()
    config = peft.LoraConfig(r=4, target_modules=["0", "2", "4"], init_lora_weights="gaussian")  # names no alpha
    wrapped = peft.inject_adapter_in_model(config, copy.deepcopy(net), adapter_name="vae_skip")
    for name, p in wrapped.named_parameters():
        if ".lora_" in name:
            p.data = 0.3 * torch.randn_like(p)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    state = wrapped.state_dict()
    assert "0.base_layer.weight" in state and "0.lora_A.vae_skip.weight" in state
    net.load_state_dict(lora.unwrap(state))
    torch.testing.assert_close(net(x), wrapped(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("a.lora_A.skip.weight"), r"1 layers .*\['a.weight'\]"),
    (lambda state: state.pop("a.lora_B.skip.weight"), r"1 layers .*\['a.weight'\]"),
    (lambda state: state.pop("a.base_layer.weight"), r"1 layers .*\['a.weight'\]"),
    (lambda state: state.update({"a.lora_A.more.weight": torch.ones(2, 3), "a.lora_B.more.weight": torch.ones(4, 2)}),
     r"wanted one LoRA, got \['more', 'skip'\]"),
    (lambda state: state.update({"a.lora_A.skip.weight": torch.ones(0, 3), "a.lora_B.skip.weight": torch.ones(4, 0)}),
     r"a.weight \[4, 3\]: does not fit its lora_A \[0, 3\]"),
    (lambda state: state.update({"a.lora_A.skip.weight": torch.tensor(1.0)}), r"does not fit its lora_A \[\]"),
    (lambda state: state.update({"a.lora_A.skip.weight": torch.ones(2, 5)}), r"lora_A \[2, 5\] and lora_B \[4, 2\]"),
    (lambda state: state.update({"a.lora_B.skip.weight": torch.ones(1, 2)}), r"lora_A \[2, 3\] and lora_B \[1, 2\]")])
def test_an_unpaired_or_second_adapter_in_a_wrapped_checkpoint_is_refused(change, message):
    state = {"a.base_layer.weight": torch.ones(4, 3), "a.base_layer.bias": torch.ones(4), "b.weight": torch.ones(1),
             "a.lora_A.skip.weight": torch.ones(2, 3), "a.lora_B.skip.weight": torch.ones(4, 2)}
    merged = lora.unwrap(state, alpha=2.0)
    assert merged.keys() == {"a.weight", "a.bias", "b.weight"}
    assert torch.equal(merged["a.weight"], torch.full((4, 3), 3.0)), "W + 2/2 · B A, ones of rank 2"
    change(state)
    with pytest.raises(ValueError, match=message):
        lora.unwrap(state)
