"""Low-rank adaptation of Linear, Conv2d and (causal) Conv3d layers; several named adapters on one layer.

    h = W x + s · B A x,     A [r, in],  B [out, r],  s = alpha / r

B starts at zero, so a new adapter changes nothing. Mirage has three: Reconstruction-LoRA and Harmonisation-LoRA on the
convolutions of the 3D decoder, and one on the transformer's attention (Mirage §3.2.1, §3.2.2). A convolution's A has
the layer's kernel and its B is 1 x 1 x 1: "2D LoRA with 2D convolutions replaced by causal 3D ones", and since padding
in time belongs to the layer, the adapted layer is as causal as it was.

An adapter lives beside its layer: it trains, moves and copies with the module, but the module's state_dict knows
nothing of it, so that strict loading and save_pretrained work the same before and after `add`.

    python -m mirage_min.method.lora
"""

import json
import re
import types
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)
PEFT_ALPHA = 8.0  # PEFT's default, which is what a checkpoint means that names none: img2img-turbo's, Difix's
METADATA = "lora_adapter_metadata"  # where diffusers looks for alpha in a file's metadata; without, it takes the rank


class Beside(nn.Module):
    """A leaf whose parameters stay out of the state_dict of whatever module it is put into."""

    def _save_to_state_dict(self, *args, **kwargs):
        pass

    def _load_from_state_dict(self, *args, **kwargs):
        pass


class LoRA(Beside):
    """One adapter of one layer. A [r, in] or [r, in, *kernel]; B [out, r] or [out, r, 1, ..., 1], as in PEFT."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        W = layer.weight
        self.scale, self.alpha = alpha / rank, alpha
        self.A = nn.Parameter(torch.empty(rank, *W.shape[1:], device=W.device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, *[1] * (W.dim() - 2), device=W.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def delta(self) -> Tensor:
        """ΔW = s · B A, in the shape of the layer's weight."""
        return self.scale * (self.B.flatten(1) @ self.A.flatten(1)).view(self.B.shape[0], *self.A.shape[1:])


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    """y = W x + bias + Σ s · B A x over the adapters in layer.lora: a Linear adds s · B (A x), a convolution runs once
    with W + Σ delta(). x and y in the layer's own layout."""
    if isinstance(layer, nn.Linear):
        y = nnf.linear(x, layer.weight, layer.bias)
        for lora in layer.lora.values():
            # h = W x + s · B A x
            y = y + lora.scale * nnf.linear(nnf.linear(x, lora.A.to(x.dtype)), lora.B.to(x.dtype))
        return y
    # W' = W + s · B A: a kernel is small beside its activations, so one convolution with the sum is the cheaper way.
    W = layer.weight + sum(lora.delta() for lora in layer.lora.values()).to(layer.weight.dtype)
    return layer._conv_forward(x, W, layer.bias)


def _causal_forward(layer: nn.Module, x: Tensor, old: dict | None, new: dict) -> Tensor:
    return _forward(layer, layer.with_past(x, old, new))


def add(module: nn.Module, name: str, rank: int, alpha: float, targets: Sequence[str] | None = None) -> list[str]:
    """Give every targeted layer of `module` an adapter called `name`; returns the layers' names.

    `targets` are endings of dotted layer names ("to_q", "to_out.0", "conv1.conv"); None is every Linear, Conv2d and
    Conv3d. ValueError if nothing is targeted, a name is taken, or the rank is no positive integer.
    """
    if rank < 1:
        raise ValueError(f"a LoRA needs a rank of at least 1, got {rank}")
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, LAYERS)
             and (targets is None or any(n == t or n.endswith("." + t) for t in targets))]
    if not found:
        raise ValueError(f"LoRA {name!r}: no Linear, Conv2d or Conv3d of {type(module).__name__} ends in {targets}")
    if taken := [layer_name for layer_name, layer in found if name in getattr(layer, "lora", {})]:
        raise ValueError(f"{taken[0]} already has a LoRA called {name!r}")
    for layer_name, layer in found:
        if not hasattr(layer, "lora"):
            layer.lora = nn.ModuleDict()
            layer.forward = types.MethodType(_causal_forward if hasattr(layer, "with_past") else _forward, layer)
        layer.lora[name] = LoRA(layer, rank, alpha)
    return [layer_name for layer_name, _ in found]


def adapters(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LoRA]]:
    """(layer name, layer, adapter) for each layer of `module` that has an adapter called `name`."""
    for layer_name, layer in module.named_modules():
        if isinstance(layer, LAYERS) and name in getattr(layer, "lora", {}):
            yield layer_name, layer, layer.lora[name]


def parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, to train or to freeze."""
    return [p for _, _, lora in adapters(module, name) for p in lora.parameters()]


@torch.no_grad()
def merge(module: nn.Module, name: str) -> None:
    """W <- W + s · B A, for good, and take the adapter away; the last one takes layer.lora and layer.forward along."""
    for _, layer, lora in list(adapters(module, name)):
        layer.weight += lora.delta().to(layer.weight.dtype)
        del layer.lora[name]
        if not layer.lora:  # as if nothing had been added
            del layer.lora, layer.forward


def state_dict(module: nn.Module, name: str) -> dict[str, Tensor]:
    """{"<layer>.lora_A.weight": A, "<layer>.lora_B.weight": B}, the names PEFT and diffusers use."""
    return {f"{layer_name}.lora_{m}.weight": p.detach() for layer_name, _, lora in adapters(module, name)
            for m, p in (("A", lora.A), ("B", lora.B))}


def peft_config(module: nn.Module, name: str) -> str:
    """One adapter as PEFT's LoraConfig describes it, in the JSON that diffusers reads from a file's METADATA."""
    layers, _, (lora, *_) = zip(*adapters(module, name))
    return json.dumps({f"{name}.r": lora.A.shape[0], f"{name}.lora_alpha": lora.alpha,
                       f"{name}.target_modules": layers})


@torch.no_grad()
def load(module: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Fill the adapter `name` from a state_dict; ValueError naming the first keys or shapes that do not fit."""
    mine = state_dict(module, name)
    missing, unexpected = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    shapes = [f"{k}: wanted {list(mine[k].shape)}, given {list(state[k].shape)}"
              for k in mine.keys() & state.keys() if mine[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        raise ValueError(f"LoRA {name!r} of {type(module).__name__} does not fit: "
                         f"{len(missing)} missing {missing[:5]}, {len(unexpected)} unexpected {unexpected[:5]}, "
                         f"{len(shapes)} of another shape {shapes[:5]}")
    for key, p in mine.items():
        p.copy_(state[key])


def unwrap(state: dict[str, Tensor], alpha: float = PEFT_ALPHA) -> dict[str, Tensor]:
    """A checkpoint of a model that PEFT had wrapped -> the plain model's, merged:

        <layer>.base_layer.weight,  <layer>.lora_A.NAME.weight,  <layer>.lora_B.NAME.weight  ->  <layer>.weight

    Other keys stay. ValueError for an A without its B or its layer, or the other way round, and for several names.
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
    if unpaired or len(names) > 1:
        raise ValueError(f"{len(unpaired)} layers do not have their weight, lora_A and lora_B: {unpaired[:5]}"
                         if unpaired else f"wanted one LoRA, got {sorted(names)}")
    for key, pair in found.items():
        W, r = plain[key], len(pair["A"])
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
    print(f"adapted layers {layers}: {count} parameters beside {sum(p.numel() for p in net.parameters()) - count}")
    print(f"B = 0:   largest change {(net(x) - plain).abs().max():.1e}")
    for p in parameters(net, "harmonisation"):
        nn.init.normal_(p, std=0.1)
    adapted = net(x)
    print(f"trained: largest change {(adapted - plain).abs().max():.1e}")
    merge(net, "harmonisation")
    print(f"merged:  largest difference to unmerged {(net(x) - adapted).abs().max():.1e}")
