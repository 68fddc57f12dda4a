"""The Cosmos-Predict2 transformer: latent frames in, one prediction out (DiffusionHarmonizer §3.1, its backbone).

Patches of 2 x 2 latent cells attend to each other, then to the text, then pass a two-layer network; the timestep moves
the input of each of the three (shift, scale) and weighs its output (gate). No layer has a bias, so a text of zeros, the
"null text" of DiffusionHarmonizer, adds exactly nothing, and `text=None` does not compute it. The 0.6B and the 2B are
this one network at two sizes.

Two layouts of checkpoints are read: diffusers' (`CosmosTransformer3DModel`), whose names are the attribute names here,
and NVIDIA's (`net.*`) by `translate_key`. Left out: video-to-world (a 17th channel), Cosmos 1, Transfer's branches.

    python -m mirage_min.networks.dit_cosmos         # shapes, what null text adds, and an odd size
"""

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from . import checked, weights
from .rotary import angles, cached_table, on_grid, rotate, unit


@dataclass
class CosmosDiTConfig:
    """The fields of config.json that shape the network; defaults are the 0.6B's. The last two are not published."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 20
    attention_head_dim: int = 64
    num_layers: checked.Depth = 20
    mlp_ratio: float = 4.0
    text_embed_dim: int = 1024
    adaln_lora_dim: int = 256
    max_size: tuple[int, ...] = (128, 240, 240)  # latent frames, rows and columns
    rope_scale: tuple[float, ...] = (1.0, 4.0, 4.0)
    qk_eps: float = 1e-5          # in the norms of queries and keys: diffusers' value; NVIDIA's is 1e-6
    cross_attention: bool = True  # False: a network for null text alone, a quarter smaller

    def __post_init__(self):
        if self.in_channels != self.out_channels:
            raise ValueError(f"in_channels must equal out_channels ({self.out_channels}), got {self.in_channels}: "
                             "video-to-world checkpoints take a mask as a further channel, which is left out here")
        if self.attention_head_dim % 2 or self.attention_head_dim < 12:
            raise ValueError(f"attention_head_dim must be even and at least 12, got {self.attention_head_dim}: time, "
                             "rows and columns share it")
        if len(self.max_size) != 3 or len(self.rope_scale) != 3 or min(self.rope_scale) <= 0:
            raise ValueError("max_size and rope_scale must be three numbers above 0, of frames, rows and columns")


class Modulation(NamedTuple):
    """What the timestep does to a sub-layer, each [B or 1, F or 1, 1, D]: a vector for all frames, or one each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None  # the last norm has none

    def first(self, n: int | None) -> "Modulation":
        """The modulation of the first n latent frames; of all if n is None."""
        return Modulation(*(v if v is None else v[:, :n] for v in self))


class CosmosDiT(nn.Module):
    """Predicts from noised latents and a timestep. `activation_checkpointing` keeps only the input of each block."""

    CLASS_NAME = "CosmosTransformer3DModel"
    Config = CosmosDiTConfig
    FIXED = {"patch_size": [1, 2, 2], "concat_padding_mask": True, "extra_pos_embed_type": None,
             "use_crossattn_projection": False, "controlnet_block_every_n": None, "img_context_dim_in": None}
    IGNORED = {"crossattn_proj_in_channels", "encoder_hidden_states_channels", "img_context_num_tokens",
               "img_context_dim_out"}  # sizes of layers that the fields above leave out
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: CosmosDiTConfig = CosmosDiTConfig()):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        C, D = config.in_channels, config.num_attention_heads * config.attention_head_dim
        self.patch_embed = nn.ModuleDict({"proj": linear(4 * (C + 1), D)})  # one channel more: the padding mask
        self.time_embed = TimeEmbedding(D)
        self.transformer_blocks = nn.ModuleList(Block(config, D) for _ in range(config.num_layers))
        self.norm_out = ModulatedNorm(D, config.adaln_lora_dim, vectors=2)
        self.proj_out = linear(D, 4 * C)

    def forward(self, z: Tensor, t: float | Tensor, text: Tensor | None = None, padding_mask: Tensor | None = None
                ) -> Tensor:
        """z [B, C, F, h, w], t in [0, 1], text [B, L, text_embed_dim] -> prediction like z.

        t: a number, [B], or [B, 1, F, 1, 1], a timestep for each latent frame. text None: null text, exactly.
        padding_mask [B or 1, 1, H, W], of any size: 1 where pixels are padding; None: nowhere. Where h or w is odd,
        the last row or column is repeated and the prediction there dropped. ValueError for more than max_size.
        """
        t = torch.as_tensor(t, device=z.device)
        self._check(z, text)
        if t.shape not in ((), z.shape[:1], (z.shape[0], 1, z.shape[2], 1, 1)):
            raise ValueError(f"t must be a number, [B] or [B, 1, F, 1, 1] with z {list(z.shape)}, got {list(t.shape)}")
        return self.predict(z, self.modulations(t, z.dtype), text, padding_mask)

    def predict(self, z: Tensor, modulations: tuple, text: Tensor | None = None, padding_mask: Tensor | None = None,
                keep: int | None = None) -> Tensor:
        """`forward`, with what `modulations` computes from the timestep given.

        keep: predict only the first `keep` latent frames, [B, C, keep, h, w]. They attend to all frames, but the last
        block has queries for them alone. The values are the same.
        """
        self._check(z, text)
        B, C, n, h, w = z.shape
        mask = z.new_zeros(1, 1, h, w) if padding_mask is None else nnf.interpolate(padding_mask.to(z), (h, w))
        x = torch.cat([z, mask.unsqueeze(2).expand(B, 1, n, h, w)], dim=1)         # [B, C+1, F, h, w]
        # DEVIATION: the published transformer fails at odd sizes.
        x = nnf.pad(x, (0, w % 2, 0, h % 2, 0, 0), mode="replicate")
        grid = (n, x.shape[3] // 2, x.shape[4] // 2)
        x = rearrange(x, "b c f (h ph) (w pw) -> b f (h w) (c ph pw)", ph=2, pw=2)
        x = self.patch_embed["proj"](x)                                # [B, F, L, D], L patches to a latent frame
        rotation = rotary_table(grid, self.config.attention_head_dim, self.config.rope_scale, x.device)

        block_modulations, output_modulation = modulations
        for block, m in zip(self.transformer_blocks, block_modulations):
            kept = keep if block is self.transformer_blocks[-1] else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, m, rotation, text, kept, use_reentrant=False)
            else:
                x = block(x, m, rotation, text, kept)                  # [B, F, L, D], in the end [B, keep, L, D]

        x = self.proj_out(self.norm_out(x, output_modulation.first(keep)))
        # Channels last, unlike in the patches that came in.
        x = rearrange(x, "b f (h w) (ph pw c) -> b c f (h ph) (w pw)", h=grid[1], ph=2, pw=2)
        return x[..., :h, :w]

    def modulations(self, t: Tensor, dtype: torch.dtype) -> tuple[list[list[Modulation | None]], Modulation]:
        """t [], [B] or [B, 1, F, 1, 1] -> (the modulations of the three sub-layers of every block, the output's).

        They depend on t alone: where t never changes, they are constants of the network.
        """
        e, temb = self.time_embed(t.reshape(len(t) if t.ndim else 1, -1, 1), dtype)
        return [block.modulations(e, temb) for block in self.transformer_blocks], self.norm_out.modulation(e, temb)

    def _check(self, z: Tensor, text: Tensor | None) -> None:
        """ValueError unless the shapes fit."""
        c = self.config
        if z.ndim != 5 or z.shape[1] != c.in_channels:
            raise ValueError(f"z must be [B, {c.in_channels}, F, h, w], got {list(z.shape)}")
        if any(size > most for size, most in zip(z.shape[2:], c.max_size)):
            raise ValueError(f"z must have at most max_size {list(c.max_size)} latent frames, rows and columns, "
                             f"got {list(z.shape[2:])}")
        if text is not None and not c.cross_attention:
            raise ValueError("text must be None: this network has no cross-attention (cross_attention in its config)")
        if text is not None and (text.ndim != 3 or text.shape[0] != z.shape[0] or text.shape[2] != c.text_embed_dim):
            raise ValueError(f"text must be [B={z.shape[0]}, L, text_embed_dim={c.text_embed_dim}], "
                             f"got {list(text.shape)}")

    @staticmethod
    def translate_key(name: str) -> str | None:
        """A tensor's name in NVIDIA's layout -> its name here; None for what has no effect. Any other name stays.

        Without effect: tables and counters, TransformerEngine's `_extra_state`, and the second copy of all weights,
        an average (`net_ema.`): DiffusionHarmonizer trains and reads the first.
        """
        if name.startswith("net_ema."):
            return None
        block, rest = re.fullmatch(r"(?:net\.)?(blocks\.\d+\.)?(.*)", name).groups(default="")
        if rest in UNUSED or rest.endswith("_extra_state"):
            return None
        layer, _, parameter = rest.rpartition(".")
        if layer not in NAMES:
            return name.removeprefix("net.")
        return ("transformer_" + block if block else "") + f"{NAMES[layer]}.{parameter}"

    @staticmethod
    def translate_config(config: dict) -> dict:
        """config.json as it is; ValueError where a field is missing, since diffusers' defaults are Cosmos 1's."""
        wanted = {field.name for field in fields(CosmosDiTConfig)} - {"qk_eps", "cross_attention"}
        if config.get("_class_name") == CosmosDiT.CLASS_NAME and (missing := sorted(wanted - config.keys())):
            raise ValueError(f"the config of a {CosmosDiT.CLASS_NAME} must have the fields {missing}")
        return config


class TimeEmbedding(nn.Module):
    """The timestep as sines and cosines: normalised, for each norm's layers; and after two layers that norms share."""

    def __init__(self, D: int):
        super().__init__()
        self.D = D
        self.t_embedder = nn.ModuleDict({"linear_1": linear(D, D), "linear_2": linear(D, 3 * D)})
        self.norm = nn.RMSNorm(D, 1e-6)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """t [...] in [0, 1] -> e [..., D], temb [..., 3D]"""
        a = angles(t.float(), self.D)                                  # [..., D/2]
        waves = torch.cat([a.cos(), a.sin()], dim=-1).to(dtype)        # [..., D]
        temb = self.t_embedder["linear_2"](nnf.silu(self.t_embedder["linear_1"](waves)))
        return self.norm(waves), temb


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward; all three shifted, scaled and gated by the timestep."""

    def __init__(self, config: CosmosDiTConfig, D: int):
        super().__init__()
        self.norm1 = ModulatedNorm(D, config.adaln_lora_dim)
        self.attn1 = Attention(config, D, D)
        self.norm2 = ModulatedNorm(D, config.adaln_lora_dim) if config.cross_attention else None
        self.attn2 = Attention(config, D, config.text_embed_dim) if config.cross_attention else None
        self.norm3 = ModulatedNorm(D, config.adaln_lora_dim)
        self.ff = FeedForward(D, int(D * config.mlp_ratio))

    def modulations(self, e: Tensor, temb: Tensor) -> list[Modulation | None]:
        """e [..., D], temb [..., 3D] -> those of the three sub-layers; None where there is no attention to a text."""
        norms = self.norm1, self.norm2, self.norm3
        return [None if norm is None else norm.modulation(e, temb) for norm in norms]

    def forward(self, x: Tensor, m: list[Modulation | None], rotation: Tensor, text: Tensor | None,
                keep: int | None) -> Tensor:
        """x [B, F, L, D], text [B, L', text_embed_dim] -> [B, F or keep, L, D]"""
        y = self.norm1(x, m[0])                                        # [B, F, L, D]
        x = x[:, :keep]                                                # [B, F or keep, L, D]
        m = [None if v is None else v.first(keep) for v in m]
        # x ← x + gate · attention(norm(x))
        x = x + m[0].gate * self.attn1(y[:, :keep], y, rotation)
        # x ← x + gate · attention(norm(x), text)
        if text is not None:
            x = x + m[1].gate * self.attn2(self.norm2(x, m[1]), text[:, None])
        # x ← x + gate · feedforward(norm(x))
        return x + m[2].gate * self.ff(self.norm3(x, m[2]))


class ModulatedNorm(nn.Module):
    """Layer norm, shifted and scaled by the timestep; and the layers that say by how much, D → rank → `vectors` · D."""

    def __init__(self, D: int, rank: int, vectors: int = 3):
        super().__init__()
        self.linear_1, self.linear_2 = linear(D, rank), linear(rank, vectors * D)

    def modulation(self, e: Tensor, temb: Tensor) -> Modulation:
        """e [..., D], temb [..., 3D] -> shift, scale and, of three vectors, gate, each [..., D]"""
        # (shift, scale, gate) = W2 W1 silu(e) + temb; where there are two, the first two of temb
        m = self.linear_2(self.linear_1(nnf.silu(e)))
        m = m + temb[..., : m.shape[-1]]
        return Modulation(*m.chunk(self.linear_2.out_features // e.shape[-1], dim=-1))

    def forward(self, x: Tensor, m: Modulation) -> Tensor:
        """x [B, F, L, D] -> the same shape"""
        # norm(x) · (1 + scale) + shift
        return nnf.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + m.scale) + m.shift


class Attention(nn.Module):
    """Attention of x to a context; queries and keys are normalised head by head, and may be rotated."""

    def __init__(self, config: CosmosDiTConfig, D: int, D_context: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = linear(D, D), linear(D_context, D), linear(D_context, D)
        self.norm_q = nn.RMSNorm(config.attention_head_dim, config.qk_eps)
        self.norm_k = nn.RMSNorm(config.attention_head_dim, config.qk_eps)
        self.to_out = nn.ModuleList([linear(D, D)])

    def forward(self, x: Tensor, context: Tensor, rotation: Tensor | None = None) -> Tensor:
        """x [B, F, L, D], context [B, F', L', D'] -> like x: every token of x attends to the whole context."""
        q, k, v = (rearrange(y, "b f l (heads d) -> b (f l) heads d", heads=self.heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotation is not None:
            q, k = rotate(q, rotation[: q.shape[1]], halves=True), rotate(k, rotation, halves=True)
        q, k, v = (rearrange(y, "b l heads d -> b heads l d") for y in (q, k, v))
        y = nnf.scaled_dot_product_attention(q, k, v)                  # [B, heads, F*L, d]
        return self.to_out[0](rearrange(y, "b heads (f l) d -> b f l (heads d)", f=x.shape[1]))


class FeedForward(nn.Module):
    """Two layers with a GELU between them, the exact one."""

    def __init__(self, D: int, inner: int):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": linear(D, inner)}), "2": linear(inner, D)})

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.net["2"](nnf.gelu(self.net["0"]["proj"](x)))


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A linear layer without bias, as all in this network."""
    return nn.Linear(d_in, d_out, bias=False)


@cached_table(size=8)
def rotary_table(grid: tuple[int, int, int], dim: int, scale: tuple[float, ...], device: torch.device) -> Tensor:
    """Unit complex numbers [f*h*w, dim/2] that turn the channel pairs of a head: by a patch's frame, row and column.

    scale: how many times as long, high and wide as in the first training a clip may be (NTK).
    """
    space = dim // 6 * 2
    turns = []
    for n, d, s in zip(grid, (dim - 2 * space, space, space), scale):
        # angle_i = place / θ^(2i/d),  θ = 10⁴ · scale^(d/(d − 2))
        frequencies = 1.0 / (10000.0 * s ** (d / (d - 2))) ** (torch.arange(0, d, 2, device="cpu") / d)
        turns.append(torch.outer(torch.arange(n, dtype=torch.float32, device="cpu"), frequencies))
    return unit(torch.cat(on_grid(*turns), dim=-1)).to(device)


# NVIDIA's layout: {its layer: ours}, first those within "blocks.<i>.", then the others; and what has no effect.
PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q",
               "k_norm": "norm_k"}
NAMES = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in PROJECTIONS.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in PROJECTIONS.items()},
    **{f"adaln_modulation_{theirs}.{i}": f"{ours}.linear_{i}" for i in (1, 2)
       for theirs, ours in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))},
    "mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2",
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.linear": "proj_out",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
}
UNUSED = {"pos_embedder.seq", "pos_embedder.dim_spatial_range", "pos_embedder.dim_temporal_range",
          "accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration", "accum_train_in_hours"}


if __name__ == "__main__":
    torch.manual_seed(0)
    dit = CosmosDiT(CosmosDiTConfig(num_attention_heads=4, attention_head_dim=24, num_layers=2, text_embed_dim=32,
                                    adaln_lora_dim=16)).eval()
    with torch.no_grad():
        for size in ((1, 8, 12), (2, 7, 11), (1, 1, 1)):
            z = torch.randn(1, 16, *size)
            print(f"z {list(z.shape)} -> prediction {list(dit(z, 0.2).shape)}")
        text = torch.randn(1, 7, 32)
        for name, given in (("null text", torch.zeros_like(text)), ("a text", text)):
            print(f"{name} against none, largest change: {(dit(z, 0.2, given) - dit(z, 0.2)).abs().max():.2g}")
