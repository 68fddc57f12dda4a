"""Low-rank adaptation of Linear, Conv2d and (causal) Conv3d layers; several named adapters on one layer.

    h = W x + s · B A x,     A [r, in],  B [out, r],  s = alpha / r

B starts at zero, so a new adapter changes nothing. Mirage has three: Reconstruction-LoRA and Harmonisation-LoRA on the
convolutions of the 3D decoder, and one on the transformer's attention (Mirage §3.2.1, §3.2.2). A convolution's A has
the layer's kernel and its B is 1 x 1 x 1: "2D LoRA with 2D convolutions replaced by causal 3D ones", and since padding
in time belongs to the layer, the adapted layer is as causal as it was.

An adapted layer is an AdaptedLinear, AdaptedConv2d, AdaptedConv3d or AdaptedCausalConv3d, with its adapters in `.lora`:
`print(model)` shows them, and a debugger steps into their forward. They train, move and copy with the module, but the
module's state_dict does not contain them: strict loading and save_pretrained work the same before and after `add`.

    python -m mirage_min.method.lora
"""

import json
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..networks import weights
from ..networks.causal_conv import Cache, CausalConv3d

PEFT_ALPHA = 8.0  # PEFT's default, for checkpoints that name no alpha: img2img-turbo's, Difix's
METADATA = "lora_adapter_metadata"  # where diffusers looks for alpha in a file's metadata; else it takes the rank


class OutsideStateDict(nn.Module):
    """A leaf whose parameters stay out of the state_dict of whatever module it is put into."""

    def _save_to_state_dict(self, *args, **kwargs):
        pass

    def _load_from_state_dict(self, *args, **kwargs):
        pass


class LoRA(OutsideStateDict):
    """One adapter of one layer. A [r, in] or [r, in, *kernel]; B [out, r] or [out, r, 1, ..., 1], as in PEFT."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        W = layer.weight
        self.scale, self.alpha = alpha / rank, alpha
        self.A = nn.Parameter(torch.empty(rank, *W.shape[1:], device=W.device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, *[1] * (W.dim() - 2), device=W.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def extra_repr(self) -> str:
        """What print(model) says about it."""
        return f"rank={self.A.shape[0]}, alpha={self.alpha:g}"

    def delta(self) -> Tensor:
        """ΔW = s · B A, in the shape of the layer's weight, [out, in] or [out, in, *kernel]."""
        return self.scale * (self.B.flatten(1) @ self.A.flatten(1)).view(self.B.shape[0], *self.A.shape[1:])


class AdaptedLinear(nn.Linear):
    """A Linear and its adapters, .lora = {name: LoRA}."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        y = nnf.linear(x, self.weight, self.bias)
        for lora in self.lora.values():
            # h = W x + s · B A x
            y = y + lora.scale * nnf.linear(nnf.linear(x, lora.A.to(x.dtype)), lora.B.to(x.dtype))
        return y


def adapted_kernel(layer: nn.Conv2d | nn.Conv3d) -> Tensor:
    """W' [out, in, *kernel] of a convolution with adapters; a kernel is small, so adding to it is cheapest."""
    # W' = W + s · B A, added up over the adapters
    return layer.weight + sum(lora.delta() for lora in layer.lora.values()).to(layer.weight.dtype)


class AdaptedConv2d(nn.Conv2d):
    """A Conv2d and its adapters, .lora = {name: LoRA}."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in, H, W] -> [B, out, H', W']"""
        return self._conv_forward(x, adapted_kernel(self), self.bias)


class AdaptedConv3d(nn.Conv3d):
    """A Conv3d and its adapters, .lora = {name: LoRA}."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in, T, H, W] -> [B, out, T', H', W']"""
        return self._conv_forward(x, adapted_kernel(self), self.bias)


class AdaptedCausalConv3d(CausalConv3d):
    """A CausalConv3d and its adapters, .lora = {name: LoRA}."""

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """As CausalConv3d.forward: x [B, in, T, H, W], the frames after those in `old`; writes its tail to `new`."""
        return self.convolve(x, adapted_kernel(self), old, new)


ADAPTED = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d, nn.Conv3d: AdaptedConv3d,
           CausalConv3d: AdaptedCausalConv3d}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


def add(module: nn.Module, name: str, rank: int, alpha: float, targets: Sequence[str] | None = None) -> list[str]:
    """Give every targeted layer of `module` an adapter called `name`; returns the layers' names.

    `targets` are endings of dotted layer names ("to_q", "to_out.0", "conv1.conv"); None is every Linear, Conv2d and
    Conv3d. ValueError if nothing is targeted, a name is taken, a layer is of a subclass (whose forward would be lost),
    or the rank is not a positive integer.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"a LoRA needs a rank of at least 1, a whole number, got {rank!r}")
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, tuple(ADAPTED))
             and (targets is None or any(n == t or n.endswith("." + t) for t in targets))]
    if not found:
        raise ValueError(f"LoRA {name!r}: no Linear, Conv2d or Conv3d of {type(module).__name__} ends in {targets}")
    for layer_name, layer in found:
        if type(layer) not in ADAPTED | PLAIN:
            raise ValueError(f"LoRA {name!r}: wanted {layer_name} to be one of "
                             f"{', '.join(kind.__name__ for kind in ADAPTED)}, got {type(layer).__name__}")
        if type(layer) in PLAIN and name in layer.lora:
            raise ValueError(f"{layer_name} already has a LoRA called {name!r}")
    for _, layer in found:
        if type(layer) in ADAPTED:
            layer.__class__ = ADAPTED[type(layer)]
            layer.lora = nn.ModuleDict()
        layer.lora[name] = LoRA(layer, rank, alpha)
    return [layer_name for layer_name, _ in found]


def adapters(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LoRA]]:
    """(layer name, layer, adapter) for each layer of `module` that has an adapter called `name`."""
    for layer_name, layer in module.named_modules():
        if type(layer) in PLAIN and name in layer.lora:
            yield layer_name, layer, layer.lora[name]


def parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, to train or to freeze."""
    return list(named_parameters(module, name).values())


def named_parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """{"<name>.<layer>.A": A [r, in, …], "<name>.<layer>.B": B [out, r, …]}: the parameters of one adapter."""
    return {f"{name}.{layer_name}.{m}": p for layer_name, _, lora in adapters(module, name)
            for m, p in lora.named_parameters()}


@torch.no_grad()
def merge(module: nn.Module, name: str) -> None:
    """Fold an adapter into the weights, W <- W + s · B A, and remove it; without any, a layer is an ordinary one again.
    """
    for _, layer, lora in list(adapters(module, name)):
        layer.weight += lora.delta().to(layer.weight.dtype)
        del layer.lora[name]
        if not layer.lora:
            del layer.lora
            layer.__class__ = PLAIN[type(layer)]


def state_dict(module: nn.Module, name: str) -> dict[str, Tensor]:
    """{"<layer>.lora_A.weight": A [r, in, …], "<layer>.lora_B.weight": B [out, r, …]}: the names are PEFT's."""
    return {f"{layer_name}.lora_{m}.weight": p.detach() for layer_name, _, lora in adapters(module, name)
            for m, p in (("A", lora.A), ("B", lora.B))}


def peft_config(module: nn.Module, name: str) -> str:
    """One adapter as PEFT's LoraConfig describes it, in the JSON that diffusers reads from a file's METADATA."""
    found = list(adapters(module, name))
    _, _, lora = found[0]
    return json.dumps({f"{name}.r": lora.A.shape[0], f"{name}.lora_alpha": lora.alpha,
                       f"{name}.target_modules": [layer_name for layer_name, _, _ in found]})


@torch.no_grad()
def load(module: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Fill the adapter `name` from what `state_dict` returns; ValueError naming the keys or shapes that do not fit."""
    mine = state_dict(module, name)
    weights.check_match(mine, state, f"the file's LoRA {name!r}", f"that of {type(module).__name__}")
    for key, p in mine.items():
        p.copy_(state[key])


def unwrap(state: dict[str, Tensor], alpha: float = PEFT_ALPHA) -> dict[str, Tensor]:
    """A checkpoint of a model that PEFT had wrapped -> the plain model's, merged:

        <layer>.base_layer.weight,  <layer>.lora_A.NAME.weight,  <layer>.lora_B.NAME.weight  ->  <layer>.weight

    A [r, in, …], B [out, r, …], with s = alpha / r; other keys stay. ValueError for an A without its B or its layer, or
    the other way round, for several names, and for shapes that do not fit.
    """
    plain, found, names = {}, {}, set()
    for key, tensor in state.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.([^.]+)\.weight", key):
            layer, which, name = match.groups()
            found.setdefault(f"{layer}.weight", {})[which] = tensor
            names.add(name)
        else:
            plain[key.replace(".base_layer.", ".")] = tensor
    unpaired = sorted(key for key, pair in found.items() if pair.keys() != {"A", "B"} or key not in plain)
    if unpaired:
        raise ValueError(f"{len(unpaired)} layers do not have their weight, lora_A and lora_B: {unpaired[:5]}")
    if len(names) > 1:
        raise ValueError(f"wanted one LoRA, got {sorted(names)}")
    for key, pair in found.items():
        W, a, b = plain[key], pair["A"].shape, pair["B"].shape
        r = a[0] if a else 0
        if r < 1 or W.ndim < 2 or a[1:] != W.shape[1:] or b != (len(W), r, *[1] * (W.ndim - 2)):
            raise ValueError(f"{key} {list(W.shape)}: does not fit its lora_A {list(a)} and lora_B {list(b)}")
        A, B = (pair[m].flatten(1).to(torch.promote_types(W.dtype, torch.float32)) for m in "AB")
        # W <- W + s · B A
        plain[key] = (W + alpha / r * (B @ A).view(W.shape)).to(W.dtype)
    return plain


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(8, 16, 3), nn.SiLU(), nn.Conv3d(16, 8, (3, 1, 1)))
    x = torch.randn(1, 8, 6, 10, 10)
    plain = net(x)
    layers = add(net, "harmonisation", rank=4, alpha=4)
    count = sum(p.numel() for p in parameters(net, "harmonisation"))
    print(f"adapted layers {layers}: {count} parameters next to {sum(p.numel() for p in net.parameters()) - count}")
    print(f"B = 0:   largest change {(net(x) - plain).abs().max():.1e}")
    for p in parameters(net, "harmonisation"):
        nn.init.normal_(p, std=0.1)
    adapted = net(x)
    print(f"trained: largest change {(adapted - plain).abs().max():.1e}")
    merge(net, "harmonisation")
    print(f"merged:  largest difference to unmerged {(net(x) - adapted).abs().max():.1e}")
