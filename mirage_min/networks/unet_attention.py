"""The transformer inside unet_2d.py: an image's positions attend to each other and to the text.

    x [N, C, h, w] ──norm, project──> tokens [N, hw, C] ──self-attention, text, feed-forward──> project ──> + x

`views` = v lets the tokens of v images attend to each other: Difix's reference view. It needs no further weights and
treats all views alike; with v = 1 this is the published Transformer2DModel.

    python -m mirage_min.networks.unet_attention     # what a second view changes
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf


class Transformer(nn.Module):
    """x + project(block(project(norm(x)))), on the positions of the image as tokens."""

    def __init__(self, c: int, heads: int, c_text: int, groups: int, linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)                  # all other norms of the UNet have 1e-5
        if linear:
            self.proj_in, self.proj_out = nn.Linear(c, c), nn.Linear(c, c)
        else:  # the same arithmetic, with weights [c, c, 1, 1]
            self.proj_in, self.proj_out = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, heads, c_text)])

    def forward(self, x: Tensor, text: Tensor, views: int) -> Tensor:
        """x [N, C, h, w], text [N, L, C_text] -> like x; `views` consecutive images attend to each other, N = b · v."""
        N, C, h, w = x.shape
        y = self.norm(x)
        if isinstance(self.proj_in, nn.Linear):
            y = self.proj_in(rearrange(y, "n c h w -> n (h w) c"))     # [N, hw, C]
            y = self.transformer_blocks[0](y, text, views)
            y = rearrange(self.proj_out(y), "n (h w) c -> n c h w", h=h)
        else:
            y = rearrange(self.proj_in(y), "n c h w -> n (h w) c")     # [N, hw, C]
            y = self.transformer_blocks[0](y, text, views)
            y = self.proj_out(rearrange(y, "n (h w) c -> n c h w", h=h))
        return x + y


class TransformerBlock(nn.Module):
    """Attention of the image to itself, attention to the text, a feed-forward layer; each is added to its input."""

    def __init__(self, c: int, heads: int, c_text: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(c), Attention(c, c, heads)
        self.norm2, self.attn2 = nn.LayerNorm(c), Attention(c, c_text, heads)
        self.norm3, self.ff = nn.LayerNorm(c), FeedForward(c)

    def forward(self, x: Tensor, text: Tensor, views: int) -> Tensor:
        """x [N, hw, C], text [N, L, C_text] -> like x"""
        # All tokens of the views of one scene attend to each other                        Difix, mv_unet.py
        x = rearrange(x, "(b v) l c -> b (v l) c", v=views)
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = rearrange(x, "b (v l) c -> (b v) l c", v=views)            # from here on each view alone
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v, in heads: queries from x, keys and values from y."""

    def __init__(self, c: int, c_y: int, heads: int):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"attention_head_dim: wanted a number of heads that divides {c} channels, got {heads}")
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_y, c, bias=False)
        self.to_v = nn.Linear(c_y, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [N, L, C], y [N, L_y, C_y] -> [N, L, C]"""
        q, k, v = (rearrange(u, "n l (heads d) -> n heads l d", heads=self.heads)
                   for u in (self.to_q(x), self.to_k(y), self.to_v(y)))
        out = nnf.scaled_dot_product_attention(q, k, v)                # [N, heads, L, d]
        return self.to_out[0](rearrange(out, "n heads l d -> n l (heads d)"))


class FeedForward(nn.Module):
    """Two layers with a gate between them, four times as wide inside (GEGLU)."""

    def __init__(self, c: int):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(c, 8 * c)}), "2": nn.Linear(4 * c, c)})

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, C] -> like x"""
        value, gate = self.net["0"]["proj"](x).chunk(2, dim=-1)        # [N, L, 4 C] each
        return self.net["2"](value * nnf.gelu(gate))


if __name__ == "__main__":
    torch.manual_seed(0)
    transformer = Transformer(c=32, heads=2, c_text=24, groups=8, linear=True).eval()
    x, text = torch.randn(2, 32, 5, 7), torch.randn(2, 7, 24)
    with torch.no_grad():
        for views in (1, 2):
            before = transformer(x, text, views)[0]
            other = torch.stack([x[0], -x[1]])
            change = (transformer(other, text, views)[0] - before).abs().mean()
            print(f"views={views}: another second image changes the first one's result by {change:.4f}")
        swapped = transformer(x.flip(0), text.flip(0), views=2).flip(0)
        print(f"both images swapped: largest difference {(swapped - transformer(x, text, views=2)).abs().max():.1e}")
