"""Temporally agnostic latent injection (Mirage §3.2.1): what a 2D encoder saw of each frame enters the 3D decoder.

A causal 3D encoder mixes frames before it halves them in time, so its features, handed to the decoder, leak one frame
into another (ghosting: Mirage §7, Fig. 6). A 2D encoder sees each frame alone. Its intermediate features z2D_mid are
folded back from the batch into time and enter the last two decoder stages, which have one slice for each output frame
(Table 5: Dec-3 at H/2, Dec-4 at H), each through a Cross-Modal Fusion Block,

    h' = h + s_h · merge(concat(h / s_h, f / s_f))        merge: one 3 x 3 convolution over single frames, zero at start

so that a new block leaves the decoder exactly as it was. In a trained decoder the two streams' scales differ by up to
two orders of magnitude (in the shipped model 23 against .6 and 7 against 1; random weights, as in the demonstration,
say nothing of that); s_h and s_f are their standard deviations, measured once and kept with the block.
DEVIATION (ours): the paper says "concatenation and merging" only. The scales, the residual and the zero start are ours;
the 3 x 3 kernel is ChopGrad B.4's. The Wan variant uses the same block, once, at H/2.

    python -m mirage_min.method.injection
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..networks import weights
from .lora import OutsideStateDict


class CrossModalFusionBlock(OutsideStateDict):
    """CMFB: concatenate and merge. h [B, C, T, H, W], f [B, Cf, T, H, W] -> [B, C, T, H, W], frame by frame."""

    def __init__(self, c: int, c_f: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c, c + c_f, 3, 3))
        self.bias = nn.Parameter(torch.zeros(c))
        self.register_buffer("s_h", torch.ones(()))
        self.register_buffer("s_f", torch.ones(()))

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        """h [B, C, T, H, W], f [B, Cf, T, H, W] -> like h.

        merge is one convolution of h's channels, then f's, with zeros around each frame; frames do not mix. ValueError
        naming both shapes if f does not fit.
        """
        B, C, T, H, W = h.shape
        if f.shape != (B, self.weight.shape[1] - C, T, H, W):
            raise ValueError(f"injected features must be {[B, self.weight.shape[1] - C, T, H, W]}, got {list(f.shape)}")
        s_h, s_f, weight, bias = (v.to(h.dtype) for v in (self.s_h, self.s_f, self.weight, self.bias))
        both = rearrange(torch.cat([h / s_h, f.to(h.dtype) / s_f], dim=1), "b c t h w -> (b t) c h w")
        # h' = h + s_h · merge(concat(h / s_h, f / s_f))
        return h + s_h * rearrange(nnf.conv2d(both, weight, bias, padding=1), "(b t) c h w -> b c t h w", b=B)


def attach(vae: nn.Module, feature_channels: list[int]) -> None:
    """Give a VAE a new fusion block for each place where features enter, finest first; they stay out of its checkpoint.

    feature_channels  of the features, one number for each place, in the order of vae.inject_channels
    ValueError for another number of places.
    """
    channels = vae.inject_channels
    if len(feature_channels) != len(channels):
        raise ValueError(f"this decoder takes features at {len(channels)} places, got {len(feature_channels)}")
    like = next(vae.parameters())
    vae.fusion = nn.ModuleList(CrossModalFusionBlock(c, c_f) for c, c_f in zip(channels, feature_channels))
    vae.fusion.to(like.device)


@torch.no_grad()
def measure_scales(vae: nn.Module, z: Tensor, inject: list[Tensor]) -> list[tuple[float, float]]:
    """Set every block's s_h and s_f to the standard deviations of the h and f that reach it, over all elements and all
    groups of one vae.decode(z [B, C, F, h, w], inject) -> those pairs, finest first. No hook stays on the blocks."""
    measured = {block: (RunningStd(), RunningStd()) for block in vae.fusion}

    def measure(block: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        h, f = args
        std_h, std_f = measured[block]
        std_h.add(h)
        std_f.add(f)
    hooks = [block.register_forward_pre_hook(measure) for block in vae.fusion]
    try:
        vae.decode(z, inject)
    finally:
        for hook in hooks:
            hook.remove()
    for block, (std_h, std_f) in measured.items():
        block.s_h.fill_(std_h.std())
        block.s_f.fill_(std_f.std())
    return [(block.s_h.item(), block.s_f.item()) for block in vae.fusion]


class RunningStd:
    """The standard deviation of numbers that come in parts (Chan, Golub and LeVeque 1983, Eq. 2.1)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: Σ (x − mean)²

    def add(self, x: Tensor) -> None:
        """Add a part, of any shape; measured at least in float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = (v.item() for v in torch.var_mean(wide, correction=0))
        n, d, total = x.numel(), mean - self.mean, self.count + x.numel()
        self.squares += variance * n + d**2 * self.count * n / total
        self.mean += d * n / total
        self.count = total

    def std(self) -> float:
        """The unbiased estimate from all parts so far: the sum of squares over the count less one."""
        return (self.squares / (self.count - 1)) ** 0.5


def state_dict(vae: nn.Module) -> dict[str, Tensor]:
    """{"fusion.0.weight": [C, C + Cf, 3, 3], "fusion.0.s_h": [], …}: all that the blocks have learned or measured."""
    return {f"fusion.{i}.{name}": value.detach() for i, block in enumerate(vae.fusion)
            for name, value in (*block.named_parameters(), *block.named_buffers())}


@torch.no_grad()
def load(vae: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill the blocks from what `state_dict` returns: {"fusion.0.weight": [C, C + Cf, 3, 3], …}.

    ValueError naming the keys or shapes that do not fit.
    """
    mine = state_dict(vae)
    weights.check_match(mine, state, "the file's fusion blocks", "those of this decoder")
    for key, value in mine.items():
        value.copy_(state[key])


if __name__ == "__main__":
    from ..networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig

    torch.manual_seed(0)
    vae = CogVideoXVAE(CogVideoXVAEConfig(block_out_channels=(16, 32, 32, 64), layers_per_block=1, norm_num_groups=8))
    attach(vae, feature_channels=[16, 32])
    z = torch.randn(1, 16, 3, 4, 6)
    inject = [torch.randn(1, 16, 9, 32, 48), torch.randn(1, 32, 9, 16, 24)]
    for name, (s_h, s_f) in zip(("Dec-4", "Dec-3"), measure_scales(vae, z, inject)):
        print(f"{name}: the decoder's stream has std {s_h:.2f}, the 2D features {s_f:.2f}")
    with torch.no_grad():
        print(f"new blocks change the output by {(vae.decode(z, inject) - vae.decode(z)).abs().max():.1e}")
        for block in vae.fusion:
            nn.init.normal_(block.weight, std=0.05)
        h, block = torch.zeros(1, 32, 9, 32, 48), vae.fusion[0]
        before = block(h, inject[0])
        inject[0][:, :, 4] += 1
        moved = (block(h, inject[0]) - before).abs().amax(dim=(0, 1, 3, 4)) > 0
        print("a change in the features of frame 4 changes what enters at frames", moved.nonzero().flatten().tolist())
