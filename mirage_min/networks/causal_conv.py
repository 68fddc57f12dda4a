"""The causal 3D convolution and its explicit cache (ChopGrad §3.1, Eq. 1).

A video VAE processes a video group by group. Its convolutions look only at the past, so between two groups a
convolution whose kernel spans kt frames keeps only the last kt - 1 frames of its input. They are the cache,

    z_{i,m+1}, z^c_{i,m} = D_m(Concat(z^c_{i-1,m}, z_{i,m}))                                        (ChopGrad Eq. 1)

a plain dict {layer name: tensor} that is passed in and handed out. No module remembers anything, so a group can be
recomputed (checkpointing), a cache can be detached (ChopGrad), and two videos can be decoded side by side.

    python -m mirage_min.networks.causal_conv        # the cache at work: chunk plans agree, and what one change reaches
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from . import onednn

Cache = dict[str, Tensor]  # {dotted layer name: its last kt - 1 input frames, [B, C, kt - 1, H, W]}


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that pads time on the left only: output frame t sees input frames t - kt + 1 .. t.

    `first` is what comes before the first frame of a video: "repeat" (copies of that frame: CogVideoX) or "zeros"
    (Wan). Space is padded with zeros to `padding`, as in nn.Conv3d, which also gives the parameters. ValueError for
    another `first`.
    """

    def __init__(self, c_in: int, c_out: int, kernel=3, stride=1, padding=None, first: str = "zeros", bias=True):
        if first not in ("repeat", "zeros"):
            raise ValueError(f'first must be "repeat" or "zeros", got {first!r}')
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        if padding is None:
            padding = kernel[1] // 2, kernel[2] // 2
        super().__init__(c_in, c_out, kernel, stride=stride, padding=(0, *padding), bias=bias)
        self.first = first
        self.key = ""  # set by name_caches

    def with_past(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, kt-1+T, H, W]: x with the frames before it; its tail goes into `new`.

        Those frames are old[self.key], or what `first` says if `old` is None or empty. The last kt - 1 frames of the
        result become new[self.key], in new storage; `old` is left alone. Where kt is 1 there is no cache, and the
        result is x.
        """
        past = self.kernel_size[0] - 1
        if past == 0:
            return x
        if old:
            before = [old[self.key]]                                   # [B, C, kt-1, H, W]
        else:
            before = [x[:, :, :1] if self.first == "repeat" else torch.zeros_like(x[:, :, :1])] * past
        x = torch.cat([*before, x], dim=2)                             # [B, C, kt-1+T, H, W]
        new[self.key] = x[:, :, -past:].clone()  # clone: a slice would keep the whole group's storage alive
        return x

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W], the frames after those in `old` -> [B, C', T', H', W']; writes its own tail to `new`."""
        return self.convolve(x, self.weight, old, new)

    def convolve(self, x: Tensor, weight: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """forward, with another weight [C', C, kt, kh, kw] than its own."""
        # z_{i,m+1}, z^c_{i,m} = D_m(Concat(z^c_{i-1,m}, z_{i,m}))                                   ChopGrad Eq. 1
        seen = self.with_past(x, old, new)
        if not old and self.first == "zeros" and x.shape[2] == 1:
            seen, weight = x, weight[:, :, -1:]  # the rest of the kernel sees zeros: two thirds of the work
        return self._conv_forward(seen, weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """nn.Conv3d's own, x [B, C, T, H, W] -> [B, C', T', H', W'], by the faster of a CPU's two ways."""
        if onednn.is_neglected(x, weight):
            return onednn.Conv3d.apply(x, weight, bias, self.stride, self.padding)
        return super()._conv_forward(x, weight, bias)


def name_caches(module: nn.Module) -> None:
    """Give every CausalConv3d in `module` its dotted name as `key`, under which it finds its own past."""
    for name, layer in module.named_modules():
        if isinstance(layer, CausalConv3d):
            layer.key = name


def in_groups(step: Callable, *pieces: list) -> list[Tensor]:
    """A causal network on a clip, group by group: each group starts from the cache that the one before it left.

    step    (piece, cache, *other pieces) -> (results …, cache), where the first group's cache is None
    pieces  for each of step's arguments, what it is given in each group
    -> each result of all groups, joined in time: [B, C, T, H, W]
    """
    cache, results = None, []
    for piece, *others in zip(*pieces, strict=True):
        *result, cache = step(piece, cache, *others)
        results.append(result)
    return [torch.cat(parts, dim=2) for parts in zip(*results)]


def cut(x: Tensor, groups: list[slice]) -> list[Tensor]:
    """x [B, C, T, H, W] -> the frames of each group, [B, C, T_g, H, W]."""
    return [x[:, :, group] for group in groups]


def cut_features(inject: list[Tensor] | None, groups: list[slice]) -> list[list[Tensor] | None]:
    """2D features of a whole clip, each [B, C, T, H, W] -> those of each group; one None a group if there are none."""
    if inject is None:
        return [None] * len(groups)
    return [[m[:, :, group] for m in inject] for group in groups]


def each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An image layer [N, C, H, W] -> [N, C', H', W'], on every frame of x [B, C, T, H, W] -> [B, C', T, H', W']."""
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    return rearrange(layer(frames), "(b t) c h w -> b c t h w", b=x.shape[0])


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": CausalConv3d(2, 4), "b": CausalConv3d(4, 1)})
    name_caches(net)

    def run(x: Tensor, plan: list[int]) -> Tensor:
        old, out = None, []
        for group in x.split(plan, dim=2):
            new: Cache = {}
            out.append(net["b"](net["a"](group, old, new), old, new))
            old = new
        return torch.cat(out, dim=2)

    with torch.no_grad():
        x = torch.randn(1, 2, 9, 8, 8)
        whole = run(x, [9])
        for plan in ([1] * 9, [1, 4, 4], [3, 2, 2, 2]):
            print(f"chunks {plan}: largest difference to the whole {(run(x, plan) - whole).abs().max():.1e}")
        x[:, :, 4] += 1
        reached = (run(x, [9]) - whole).abs().amax(dim=(0, 1, 3, 4)) > 0
        print("a change of frame 4 reaches frames", reached.nonzero().flatten().tolist())
