"""The Wan transformer: one latent video and a text in, one prediction out (ChopGrad B.4, C.2).

Video patches attend to each other, then to the text, then pass a two-layer network. Queries and keys are rotated by the
frame, row and column of their patch. The timestep becomes six vectors, two triples of shift, scale and gate; each block
adds its own learned table to them. Norms, shifts and gates are computed in float32.

Wan 2.1's text-to-video 1.3B and 14B and Wan 2.2's TI2V-5B are this one network at three sizes. TI2V-5B also makes
videos from an image: its clean latent replaces the first noised one, at a timestep of 0 (flow.py). Checkpoints
come in two layouts, the original and that of diffusers; names here are the latter's, and `translate_key` and
`translate_config` read the former. Left out: Wan 2.1's image-to-video networks. A side branch is in wan_branch.py.

    python -m mirage_min.networks.dit_wan            # shapes, and what an odd size and a later t do
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from . import checked, wan_names, weights
from .rotary import angles, cached_table, on_grid, rotate, unit


@dataclass
class WanDiTConfig:
    """The fields of config.json that shape the network; defaults are the 14B's."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: checked.Depth = 40
    eps: float = 1e-6

    def __post_init__(self):
        if self.in_channels != self.out_channels:
            raise ValueError("in_channels must equal out_channels (else it is a Wan 2.1 image-to-video model, which is "
                             f"left out here); got {self.in_channels}, {self.out_channels}")


class Embedded(NamedTuple):
    """What the blocks work with; f is 1, or F where each latent has a separate timestep."""

    x: Tensor           # [B, L, D] patches, L = F·⌈h/2⌉·⌈w/2⌉
    text: Tensor        # [B, tokens, D]
    time: Tensor        # [B, f, D]
    modulation: Tensor  # [B, f, 6, D]
    rotation: Tensor    # [L, d/2], complex


class WanDiT(nn.Module):
    """Predicts the flow from a noised latent video. `activation_checkpointing` keeps only the input of each block.

    Published as `WanTransformer3DModel`, and in the original layout as `WanModel`.
    """

    CLASS_NAME = "WanTransformer3DModel"
    Config = WanDiTConfig
    FIXED = {"patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
             "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}
    IGNORED = {"rope_max_seq_len"}  # a size of the published table; here it is as large as the clip
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained
    translate_key, translate_config = staticmethod(wan_names.translate_key), staticmethod(wan_names.translate_config)

    def __init__(self, config: WanDiTConfig = WanDiTConfig()):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        C, D = config.in_channels, config.num_attention_heads * config.attention_head_dim
        self.patch_embedding = nn.Conv3d(C, D, (1, 2, 2), stride=(1, 2, 2))
        self.condition_embedder = ConditionEmbedder(config, D)
        self.blocks = nn.ModuleList(Block(config, D) for _ in range(config.num_layers))
        self.norm_out = WideLayerNorm(D, config.eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, D) / D**0.5)
        self.proj_out = nn.Linear(D, 4 * C)

    def forward(self, z_t: Tensor, t: int | Tensor, text: Tensor, hints: dict[int, Tensor] | None = None) -> Tensor:
        """z_t [B, C, F, h, w], t in 0 .. 1000, text [B, L, text_dim] -> prediction like z_t.

        Any F, h, w: where h or w is odd, the last row or column is repeated and the prediction there dropped. The
        published pipeline has L = 512 and zeros after the prompt.

        t      a number, [B], or [B, F] where each latent has its own
        hints  from a side branch: {layer: what is added after it, [B, patches, D]}
        """
        h, w = z_t.shape[3:]
        x, text, time, modulation, rotation = self.embed(z_t, t, text)
        for i, block in enumerate(self.blocks):
            x = run_block(block, self.activation_checkpointing, x, text, modulation, rotation)
            if hints and i in hints:
                x = x + hints[i]

        shift, scale = (wide(self.scale_shift_table) + wide(time).unsqueeze(2)).unbind(dim=2)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale).to(x.dtype))
        x = rearrange(x, "b (f h w) (ph pw c) -> b c f (h ph) (w pw)", h=-(-h // 2), w=-(-w // 2), ph=2, pw=2)
        return x[..., :h, :w]

    def embed(self, z_t: Tensor, t: int | Tensor, text: Tensor) -> Embedded:
        """What enters the first block; z_t [B, C, F, h, w], t, text as in `forward`. ValueError unless they fit."""
        self._check(z_t, text)
        t = torch.as_tensor(t, device=z_t.device)
        B, _, n = z_t.shape[:3]
        if t.shape not in ((), (1,), (B,), (B, n)):
            raise ValueError(f"t must be a number, [B={B}] or [B={B}, F={n}], got {list(t.shape)}")
        t = t if t.ndim == 2 else t.expand(B).unsqueeze(1)             # [B, f], f = F or 1
        x = self.patch_embedding(even_size(z_t))                       # [B, D, F, ⌈h/2⌉, ⌈w/2⌉]
        rotation = rotary_table(tuple(x.shape[2:]), self.config.attention_head_dim, x.device)
        time, modulation, text = self.condition_embedder(t, text)
        return Embedded(rearrange(x, "b d f h w -> b (f h w) d"), text, time, modulation, rotation)

    def _check(self, z_t: Tensor, text: Tensor) -> None:
        """ValueError, naming the shapes wanted and given, unless z_t and text fit the config."""
        c = self.config
        if z_t.ndim != 5 or z_t.shape[1] != c.in_channels:
            raise ValueError(f"z_t must be [B, {c.in_channels}, F, h, w], got {list(z_t.shape)}")
        if text.ndim != 3 or text.shape[0] != z_t.shape[0] or text.shape[2] != c.text_dim:
            raise ValueError(f"text must be [B={z_t.shape[0]}, L, text_dim={c.text_dim}], got {list(text.shape)}")


class ConditionEmbedder(nn.Module):
    """Brings timestep and text to the transformer's width, and makes the blocks' six modulation vectors."""

    def __init__(self, config: WanDiTConfig, D: int):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayers(config.freq_dim, D)
        self.time_proj = nn.Linear(D, 6 * D)
        self.text_embedder = TwoLayers(config.text_dim, D)

    def forward(self, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t [B, f], text [B, L, text_dim] -> time [B, f, D], modulation [B, f, 6, D], text [B, L, D]"""
        # In float32 whatever the rest: bfloat16 cannot tell 199 from 200.
        a = angles(t.float(), self.freq_dim)                           # [B, f, freq_dim/2]
        waves = torch.cat([a.cos(), a.sin()], dim=-1).to(self.time_embedder.linear_1.weight.dtype)
        time = self.time_embedder(waves, nnf.silu).to(text.dtype)
        modulation = self.time_proj(nnf.silu(time)).unflatten(2, (6, -1))
        return time, modulation, self.text_embedder(text, gelu)


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward; the first and the last shifted, scaled and gated by time."""

    def __init__(self, config: WanDiTConfig, D: int):
        super().__init__()
        self.norm1 = WideLayerNorm(D, config.eps, elementwise_affine=False)
        self.attn1 = Attention(config, D)
        self.norm2 = WideLayerNorm(D, config.eps)
        self.attn2 = Attention(config, D)
        self.norm3 = WideLayerNorm(D, config.eps, elementwise_affine=False)
        self.ffn = FeedForward(D, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, D) / D**0.5)

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor, rotation: Tensor) -> Tensor:
        """x [B, N, D], text [B, L, D], modulation [B, f, 6, D], rotation [N, d/2] -> like x; f is 1, or F."""
        m = (wide(self.scale_shift_table) + wide(modulation)).unbind(dim=2)  # 6 x [B, f, D]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = m
        dtype = x.dtype
        # x ← x + gate · attention(norm(x))
        y = modulate(self.norm1(x), shift, scale).to(dtype)
        x = (x + gated(self.attn1(y, y, rotation), gate)).to(dtype)
        # x ← x + attention(norm(x), text)
        x = x + self.attn2(self.norm2(x).to(dtype), text)
        # x ← x + gate · feedforward(norm(x))
        y = self.ffn(modulate(self.norm3(x), ffn_shift, ffn_scale).to(dtype))
        return (x + gated(y, ffn_gate)).to(dtype)


class Attention(nn.Module):
    """Attention of x to `context`; queries and keys are normalised over all heads at once, and may be rotated."""

    def __init__(self, config: WanDiTConfig, D: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.norm_q, self.norm_k = nn.RMSNorm(D, config.eps), nn.RMSNorm(D, config.eps)
        self.to_out = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x: Tensor, context: Tensor, rotation: Tensor | None = None) -> Tensor:
        """x [B, N, D], context [B, L, D], rotation [N, d/2] or None -> like x"""
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (rearrange(y, "b l (heads d) -> b l heads d", heads=self.heads) for y in (q, k, v))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (rearrange(y, "b l heads d -> b heads l d") for y in (q, k, v))
        y = nnf.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(y, "b heads l d -> b l (heads d)"))


class FeedForward(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, D: int, ffn_dim: int):
        super().__init__()
        up = nn.Module()
        up.proj = nn.Linear(D, ffn_dim)
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(ffn_dim, D)])  # published keys: net.0.proj, net.2

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.net[2](gelu(self.net[0].proj(x)))


class TwoLayers(nn.Module):
    """Two layers, with the caller's activation between them."""

    def __init__(self, d_in: int, D: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(d_in, D), nn.Linear(D, D)

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., d_in] -> [..., D]"""
        return self.linear_2(activation(self.linear_1(x)))


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in float32, or in float64 if its input is; so is what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        weight, bias = (None if p is None else wide(p) for p in (self.weight, self.bias))
        return nnf.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps)


def wide(x: Tensor) -> Tensor:
    """Any tensor, in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens [B, L, D], shifted and scaled by the timestep: [B, f, D], of all tokens (f = 1) or each latent frame's."""
    parts = rearrange(x, "b (f l) d -> b f l d", f=shift.shape[1])
    # x · (1 + scale) + shift
    moved = torch.addcmul(shift.unsqueeze(2), parts, 1 + scale.unsqueeze(2))
    return rearrange(moved, "b f l d -> b (f l) d")


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Tokens [B, L, D] times a gate [B, f, D], of all tokens (f = 1) or each latent frame's."""
    parts = rearrange(x, "b (f l) d -> b f l d", f=gate.shape[1])
    return rearrange(parts * gate.unsqueeze(2), "b f l d -> b (f l) d")


def run_block(block: nn.Module, checkpointing: bool, *inputs: Tensor) -> Tensor:
    """block(*inputs) -> tokens [B, L, D]; with `checkpointing` only the inputs are kept for backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def even_size(z: Tensor) -> Tensor:
    """z [B, C, F, h, w] with an odd last row or column repeated."""
    h, w = z.shape[3:]
    # DEVIATION: the published transformer drops an odd last row or column; this one keeps its size.
    return nnf.pad(z, (0, w % 2, 0, h % 2, 0, 0), mode="replicate")


def gelu(x: Tensor) -> Tensor:
    """Elementwise: GELU by its tanh approximation, as published."""
    return nnf.gelu(x, approximate="tanh")


@cached_table(size=8)
def rotary_table(grid: tuple[int, int, int], dim: int, device: torch.device) -> Tensor:
    """Unit complex numbers [f*h*w, dim/2]: a third of a head's channel pairs encodes the row, a third the column, and
    the remainder, slightly more, the frame."""
    space = dim // 6 * 2
    steps = (torch.arange(n, dtype=torch.float64, device="cpu") for n in grid)
    turns = [angles(s, d) for s, d in zip(steps, (dim - 2 * space, space, space))]
    return unit(torch.cat(on_grid(*turns), dim=-1)).to(device, torch.complex64)


if __name__ == "__main__":
    torch.manual_seed(0)
    dit = WanDiT(WanDiTConfig(num_attention_heads=4, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=128,
                              num_layers=2)).eval()
    text = torch.randn(1, 8, 32)
    with torch.no_grad():
        for size in ((3, 8, 12), (3, 7, 11), (1, 1, 1)):
            z = torch.randn(1, 16, *size)
            print(f"z_t {list(z.shape)} -> prediction {list(dit(z, 200, text).shape)}")
        z = torch.randn(1, 16, 3, 8, 12)
        print(f"t 200 against 999, mean change: {float((dit(z, 200, text) - dit(z, 999, text)).abs().mean()):.3f}")
        each = torch.tensor([[0, 200, 200]])
        print(f"the first latent at 0: {float((dit(z, 200, text) - dit(z, each, text)).abs().mean()):.3f}")
