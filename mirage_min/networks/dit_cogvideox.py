"""The CogVideoX transformer: one latent video and a text in, one prediction out (Mirage §3.2, "Transformer denoiser").

Text tokens and video patches form one sequence and attend to each other; the timestep enters each block as a
shift, a scale and a gate, one triple for the text and one for the video. Three published shapes differ in how a patch
is told its position:

    2b      a sum of sines is added to each patch                             (use_rotary_positional_embeddings false)
    5b      queries and keys are rotated; the clip is stretched over a crop of the 45 x 30 grid it was trained on
    1.5-5b  the same rotation by whole steps, and a patch spans two latents   (patch_size_t = 2)

Attribute names are the published key names. Left out: image-to-video (more input channels, learned positions, "ofs").

    python -m mirage_min.networks.dit_cogvideox      # shapes at even and odd sizes, and what t does
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from . import checked, weights
from .rotary import angles, cached_table, on_grid, rotate, unit


@dataclass
class CogVideoXDiTConfig:
    """The fields of config.json that shape the network; defaults are CogVideoX-2b's."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    max_text_seq_length: int = 226
    num_layers: checked.Depth = 30
    sample_width: int = 90  # latent columns and rows of the training clips: what 5b's rotation is stretched over
    sample_height: int = 60
    patch_size: int = 2
    patch_size_t: int | None = None
    patch_bias: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False


class CogVideoXDiT(nn.Module):
    """Predicts v from a latent video, a timestep and a text.

    Set `activation_checkpointing` to keep only the input of each block for backward and run the block again there.
    """

    CLASS_NAME = "CogVideoXTransformer3DModel"
    Config = CogVideoXDiTConfig
    FIXED = {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_elementwise_affine": True,
        "ofs_embed_dim": None,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": False,
    }
    IGNORED = {"sample_frames", "temporal_compression_ratio"}
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: CogVideoXDiTConfig = CogVideoXDiTConfig()):
        super().__init__()
        if config.in_channels != config.out_channels:
            raise ValueError(f"in_channels must equal out_channels ({config.out_channels}), got {config.in_channels}: "
                             "image-to-video checkpoints take the image as further channels, which is left out here")
        if config.attention_head_dim % 16:
            raise ValueError(f"attention_head_dim must be a multiple of 16, got {config.attention_head_dim}: channels "
                             "are divided among time, rows and columns, and turn in pairs")
        self.config = config
        self.activation_checkpointing = False
        D, patch = config.num_attention_heads * config.attention_head_dim, config.patch_size**2
        self.patch_embed = PatchEmbed(config, D)
        self.time_embedding = TimeEmbedding(D, config.time_embed_dim)
        self.transformer_blocks = nn.ModuleList(Block(config, D) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(D, config.norm_eps)
        self.norm_out = OutputNorm(config, D)
        self.proj_out = nn.Linear(D, config.out_channels * patch * (config.patch_size_t or 1))

    def forward(self, z_t: Tensor, t: int | Tensor, text: Tensor) -> Tensor:
        """z_t [B, C, F, h, w], t in 0 .. 999 as an int or [B], text [B, L, text_embed_dim] -> prediction like z_t.

        Any F, h, w. Where they do not divide into patches, the last row and column are repeated at the end and the
        first latent at the start, and the prediction there is dropped. L is max_text_seq_length: pad the prompt as its
        tokenizer does. ValueError, naming both shapes, where z_t or text has another.
        """
        self._check(z_t, text)
        B, C, F, h, w = z_t.shape
        c = self.config
        p, pt = c.patch_size, c.patch_size_t or 1
        # DEVIATION: the published transformer drops an odd last row or column; here it is kept by repeating it. The
        # repeated first latent is the published rule for patch_size_t (the image-to-video pipeline has it).
        z_t = nnf.pad(z_t, (0, -w % p, 0, -h % p, -F % pt, 0), mode="replicate")
        grid = (z_t.shape[2] // pt, z_t.shape[3] // p, z_t.shape[4] // p)

        time = self.time_embedding(torch.as_tensor(t, device=z_t.device).expand(B), z_t.dtype)
        text, video = self.patch_embed(z_t, text)                      # [B, L, D], [B, f*h*w, D]
        rotation = None
        if c.use_rotary_positional_embeddings:
            base = None if c.patch_size_t else (c.sample_height // p, c.sample_width // p)
            rotation = rotary_table(grid, base, c.attention_head_dim, text.shape[1], z_t.device)
        else:
            scales = (c.temporal_interpolation_scale,) + (c.spatial_interpolation_scale,) * 2
            video = video + sincos_table(grid, scales, video.shape[2], z_t.device).to(video.dtype)

        for block in self.transformer_blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                text, video = checkpoint(block, text, video, time, rotation, use_reentrant=False)
            else:
                text, video = block(text, video, time, rotation)

        video = self.proj_out(self.norm_out(self.norm_final(video), time))
        out = rearrange(video, "b (f h w) (c pt ph pw) -> b c (f pt) (h ph) (w pw)",
                        f=grid[0], h=grid[1], w=grid[2], c=C, ph=p, pw=p)
        return out[:, :, -F:, :h, :w]

    def _check(self, z_t: Tensor, text: Tensor) -> None:
        """ValueError, naming the shapes wanted and given, unless z_t and text fit the config."""
        c = self.config
        if z_t.ndim != 5 or z_t.shape[1] != c.in_channels:
            raise ValueError(f"z_t must be [B, {c.in_channels}, F, h, w], got {list(z_t.shape)}")
        if text.shape != (z_t.shape[0], c.max_text_seq_length, c.text_embed_dim):
            raise ValueError(f"text must be [B={z_t.shape[0]}, max_text_seq_length={c.max_text_seq_length}, "
                             f"text_embed_dim={c.text_embed_dim}], got {list(text.shape)}")


class PatchEmbed(nn.Module):
    """Cuts the latent into patches and maps patches and text to the transformer's width."""

    def __init__(self, config: CogVideoXDiTConfig, D: int):
        super().__init__()
        self.p, self.pt = config.patch_size, config.patch_size_t
        if self.pt is None:
            self.proj = nn.Conv2d(config.in_channels, D, self.p, stride=self.p, bias=config.patch_bias)
        else:  # with a bias whatever patch_bias says, as published
            self.proj = nn.Linear(config.in_channels * self.pt * self.p**2, D)
        self.text_proj = nn.Linear(config.text_embed_dim, D)

    def forward(self, z: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, C, F, h, w], whole patches; text [B, L, text_embed_dim] -> [B, L, D], [B, f*h*w, D]"""
        B = z.shape[0]
        if self.pt is None:
            patches = self.proj(rearrange(z, "b c f h w -> (b f) c h w"))
            video = rearrange(patches, "(b f) d h w -> b (f h w) d", b=B)
        else:
            video = self.proj(rearrange(z, "b c (f pt) (h ph) (w pw) -> b (f h w) (c pt ph pw)",
                                        pt=self.pt, ph=self.p, pw=self.p))
        return self.text_proj(text), video


class TimeEmbedding(nn.Module):
    """Sines and cosines of t, then two layers."""

    def __init__(self, D: int, time_embed_dim: int):
        super().__init__()
        self.D = D
        self.linear_1 = nn.Linear(D, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t [B] -> [B, time_embed_dim]; in float32 up to the cosine: bfloat16 would round 399 to 400."""
        a = angles(t.float(), self.D)                                  # [B, D/2]
        return self.linear_2(nnf.silu(self.linear_1(torch.cat([a.cos(), a.sin()], dim=-1).to(dtype))))


class Block(nn.Module):
    """Joint attention of text and video, then a feed-forward layer, each modulated and gated by the timestep."""

    def __init__(self, config: CogVideoXDiTConfig, D: int):
        super().__init__()
        self.norm1 = ModulatedNorm(config, D)
        self.attn1 = Attention(config, D)
        self.norm2 = ModulatedNorm(config, D)
        self.ff = FeedForward(D)

    def forward(self, text: Tensor, video: Tensor, time: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """text [B, L, D], video [B, N, D], time [B, time_embed_dim], rotation [L + N, d/2] -> text, video"""
        L = text.shape[1]
        # x ← x + gate · attention(norm(x)), text and video in one sequence
        text_in, video_in, text_gate, video_gate = self.norm1(text, video, time)
        y = self.attn1(torch.cat([text_in, video_in], dim=1), rotation)
        text, video = torch.addcmul(text, text_gate, y[:, :L]), torch.addcmul(video, video_gate, y[:, L:])

        # x ← x + gate · feedforward(norm(x))
        text_in, video_in, text_gate, video_gate = self.norm2(text, video, time)
        y = self.ff(torch.cat([text_in, video_in], dim=1))
        return torch.addcmul(text, text_gate, y[:, :L]), torch.addcmul(video, video_gate, y[:, L:])


class ModulatedNorm(nn.Module):
    """Layer norm, shifted and scaled by the timestep, separately for text and video; and the gates for what follows."""

    def __init__(self, config: CogVideoXDiTConfig, D: int):
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 6 * D)
        self.norm = nn.LayerNorm(D, config.norm_eps)

    def forward(self, text: Tensor, video: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """text [B, L, D], video [B, N, D], time [B, time_embed_dim] -> both, moved, and their gates [B, 1, D]"""
        m = self.linear(nnf.silu(time)).unsqueeze(1).chunk(6, dim=-1)  # 6 x [B, 1, D]
        video_shift, video_scale, video_gate, text_shift, text_scale, text_gate = m
        # norm(x) · (1 + scale) + shift
        video = torch.addcmul(video_shift, self.norm(video), 1 + video_scale)
        text = torch.addcmul(text_shift, self.norm(text), 1 + text_scale)
        return text, video, text_gate, video_gate


class OutputNorm(nn.Module):
    """Layer norm of the video tokens, shifted and scaled by the timestep."""

    def __init__(self, config: CogVideoXDiTConfig, D: int):
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * D)
        self.norm = nn.LayerNorm(D, config.norm_eps)

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """video [B, N, D], time [B, time_embed_dim] -> like video"""
        shift, scale = self.linear(nnf.silu(time)).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(video), 1 + scale)


class Attention(nn.Module):
    """Self-attention of the joint sequence; queries and keys are normalised per head, then rotated."""

    def __init__(self, config: CogVideoXDiTConfig, D: int):
        super().__init__()
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.norm_q = nn.LayerNorm(config.attention_head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(config.attention_head_dim, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """x [B, L + N, D], text first; rotation [L + N, d/2] or None -> like x"""
        q, k, v = (rearrange(to(x), "b l (heads d) -> b l heads d", heads=self.heads)
                   for to in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (rearrange(y, "b l heads d -> b heads l d") for y in (q, k, v))
        y = nnf.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(y, "b heads l d -> b l (heads d)"))


class FeedForward(nn.Module):
    """Two layers with a GELU between them, four times as wide inside."""

    def __init__(self, D: int):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(D, 4 * D)}), "2": nn.Linear(4 * D, D)})

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.net["2"](nnf.gelu(self.net["0"]["proj"](x), approximate="tanh"))


def channels_per_axis(dim: int) -> tuple[int, int, int]:
    """How many of a patch's channels encode its time, its row and its column."""
    return dim // 4, dim // 8 * 3, dim // 8 * 3


@cached_table(size=8)
def rotary_table(grid: tuple[int, int, int], base: tuple[int, int] | None, dim: int, text_tokens: int,
                 device: torch.device) -> Tensor:
    """Unit complex numbers [text_tokens + f*h*w, dim/2] that turn the channel pairs of a head.

    base: rows and columns (in patches) of the training grid that the clip is stretched over, or None: whole steps.
    """
    h, w = grid[1:]
    steps = [torch.arange(n, dtype=torch.float32, device="cpu") for n in grid]
    if base is not None:
        (top, left), (bottom, right) = training_window(h, w, *base)
        # As published: the end is scaled, not the span, so a window that does not start at 0 is spread too short.
        steps[1] = torch.linspace(top, bottom * (h - 1) / h, h, device="cpu")
        steps[2] = torch.linspace(left, right * (w - 1) / w, w, device="cpu")
    turn = torch.cat(on_grid(*(angles(s, d) for s, d in zip(steps, channels_per_axis(dim)))), dim=-1)
    return unit(nnf.pad(turn, (0, 0, text_tokens, 0))).to(device)  # text has no position: its angle is 0


def training_window(h: int, w: int, base_h: int, base_w: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest centred window of the base grid with the aspect of h x w: (top, left), (bottom, right)."""
    if h / w > base_h / base_w:
        height, width = base_h, round(base_h / h * w)
    else:
        height, width = round(base_w / w * h), base_w
    top, left = round((base_h - height) / 2), round((base_w - width) / 2)
    return (top, left), (top + height, left + width)


@cached_table(size=2)  # 130 MB each at 2b's own size
def sincos_table(grid: tuple[int, int, int], scales: tuple[float, ...], D: int, device: torch.device) -> Tensor:
    """What 2b adds to each patch, [f*h*w, D]: sines and cosines of its time, then of its column, then of its row."""
    waves = []
    for n, scale, d in zip(grid, scales, channels_per_axis(D)):
        a = angles(torch.arange(n, dtype=torch.float32, device="cpu") / scale, d)
        waves.append(torch.cat([a.sin(), a.cos()], dim=-1))
    time, row, column = on_grid(*waves)
    return torch.cat([time, column, row], dim=-1).to(device)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = CogVideoXDiTConfig(num_attention_heads=3, num_layers=2, time_embed_dim=64, text_embed_dim=32,
                                max_text_seq_length=4, use_rotary_positional_embeddings=True)
    dit = CogVideoXDiT(config).eval()
    text = torch.randn(1, 4, 32)
    with torch.no_grad():
        for size in ((3, 8, 12), (3, 7, 11), (1, 2, 2)):
            z = torch.randn(1, 16, *size)
            print(f"z_t {list(z.shape)} -> prediction {list(dit(z, 199, text).shape)}")
        z = torch.randn(1, 16, 3, 8, 12)
        print(f"t 199 against 999, mean change: {(dit(z, 199, text) - dit(z, 999, text)).abs().mean():.3f}")
