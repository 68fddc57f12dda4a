"""VAEs and the UNet in little memory where no gradient is asked for: the same numbers, in pieces and in place.

    frugal.apply(vae)        # once, after injection.attach; the networks' own files stay the reference

With gradients the plain forwards run and nothing changes. Without, the image VAE activates and adds in place, the
UNet's feed-forward layers take an image's tokens in pieces, and the causal VAEs do more, on tall frames:
  - a norm, its SiLU and its convolution run by bands of rows (bands.py), and a residual sum overwrites a block's input;
  - layers that see single frames, and in Wan all layers at the full frame rate, run frame by frame;
  - a group takes over the cache that the group before it handed on, so that one cache is held and not two.

So a hook that keeps a block's input without a copy sees it change; hook a VAE that is not frugal. Weights, keys and
adapters are the plain VAE's.

    python -m mirage_min.networks.frugal     # both ways on one clip: how far apart they are
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import unet_attention, vae_2d, vae_cogvideox, vae_wan, vae_wan22, wan_blocks
from .bands import TakenCache, is_tall, norm_of, normed_conv
from .causal_conv import Cache, CausalConv3d

TOKENS = 4096  # of an image that a feed-forward layer takes at a time


def apply(network: nn.Module) -> nn.Module:
    """Give the layers of a network their frugal classes, in place, and return it. Doing so twice changes nothing more.

    Layers of other classes stay as they are.
    """
    for layer in [*network.modules()]:
        layer.__class__ = FRUGAL.get(type(layer), type(layer))
    for block in getattr(network, "fusion", None) or ():
        if not isinstance(block, FusionBlock):
            block.__class__ = with_frugal(type(block), FusionBlock)
    return network


def with_frugal(plain: type, frugal: type) -> type:
    """A class with the methods of `frugal` over those of `plain`, which run where gradients are asked for."""
    return type(f"Frugal{plain.__name__}", (frugal, plain), {})


# ---- the cache -------------------------------------------------------------------------------------------------------

class SingleUseCache(dict):
    """The cache of a frugal group. The next group empties it, unless gradients are on; after that nobody can read it.

    To continue one video twice, give each group a plain dict of clones: {key: c.clone() for key, c in cache.items()}.
    """

    used = False


def take_over(cache: Cache | None) -> Cache | None:
    """A cache {key: [B, C, T', H, W]} as a group may read it: a SingleUseCache is emptied, any other left alone.

    ValueError if another group has taken it over before: its tensors are gone.
    """
    if not isinstance(cache, SingleUseCache):
        return cache
    if cache.used:
        raise ValueError("this cache was taken over by the group after it: a frugal VAE's cache can be continued once "
                         "(clone its tensors before, to continue twice)")
    if torch.is_grad_enabled():
        return cache
    taken = TakenCache(cache)
    cache.clear()
    cache.used = True
    return taken


def hand_on(cache: Cache) -> Cache:
    """The cache that a group made, as its caller gets it: single-use, unless gradients are on."""
    return cache if torch.is_grad_enabled() else SingleUseCache(cache)


class VAE:
    """The groups of any of the VAEs, with caches that are taken over."""

    def posterior_group(self, x_g: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor, Cache]:
        """The VAE's own posterior_group, frames [B, 3, T, H, W] -> (mean, log-variance, cache); empties `cache`.

        ValueError if `cache` was used before.
        """
        mean, logvar, new = super().posterior_group(x_g, take_over(cache))
        return mean, logvar, hand_on(new)

    def decode_group(self, z_g: Tensor, cache: Cache | None = None,
                     inject: list[Tensor] | None = None) -> tuple[Tensor, Cache]:
        """The VAE's own decode_group, latents [B, C, F, h, w] -> (frames [B, 3, T, H, W], cache); empties `cache`.

        ValueError if `cache` was used before.
        """
        x_g, new = super().decode_group(z_g, take_over(cache), inject)
        return x_g, hand_on(new)


# ---- frame by frame --------------------------------------------------------------------------------------------------

def each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer that sees single frames, on x [B, C, T, H, W] frame by frame -> [B, C', T, H', W']."""
    out = None
    for t in range(x.shape[2]):
        y = layer(x[:, :, t : t + 1])                                  # [B, C', 1, H', W']
        if out is None:
            B, C, _, H, W = y.shape
            out = y.new_empty(B, x.shape[2], H, W, C).movedim(-1, 1)
        out[:, :, t : t + 1] = y
    return out


class Resize:
    """Downsample or Upsample of either VAE."""

    def resize(self, x: Tensor) -> Tensor:
        """The change of height and width, [B, C, T, H, W] -> [B, C', T, H', W']; tall frames one by one."""
        if torch.is_grad_enabled() or not is_tall(x):
            return super().resize(x)
        return each_frame(super().resize, x)


class FusionBlock:
    """The Cross-Modal Fusion Block; on tall frames its result overwrites h."""

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        """h and f [B, C, T, H, W] and [B, C_f, T, H, W] -> like h; tall frames one by one, each written over h's."""
        if torch.is_grad_enabled() or not is_tall(h) or h.shape[2] == 1:
            return super().forward(h, f)
        for t in range(h.shape[2]):
            frame = slice(t, t + 1)
            h[:, :, frame] = super().forward(h[:, :, frame], f[:, :, frame])
        return h


def run_by_frames(layers: list[Callable], x: Tensor, old: Cache | None, new: Cache) -> Tensor:
    """Layers that keep the frame rate, in turn, x [B, C, T, H, W] -> [B, C', T, H', W'].

    On tall frames all of them run on one frame before the next, so no layer's output is held for all frames. `old` and
    `new` as in CausalConv3d.forward.
    """
    done: list[Tensor] = []
    frame_new: Cache = {}
    for frame in x.split(1, dim=2) if is_tall(x) else [x]:
        frame_new = {}
        for layer in layers:
            frame = layer(frame, old, frame_new)
        done.append(frame)
        old = TakenCache(frame_new)
    new.update(frame_new)
    return torch.cat(done, dim=2)


# ---- the networks ----------------------------------------------------------------------------------------------------

def causal(layer: nn.Module) -> CausalConv3d:
    """The convolution itself: CogVideoX has it one name deeper, as `.conv`."""
    return layer if isinstance(layer, CausalConv3d) else layer.conv


def run_block(block: nn.Module, x: Tensor, z: tuple[Tensor, ...], old: Cache | None, new: Cache) -> Tensor:
    """x + conv(silu(norm(conv(silu(norm(x)))))), x [B, C, T, H, W], without gradients; on tall frames made in x.

    z: what the norms are given besides x, nothing or CogVideoX's latents [B, C_z, F, h, w].
    """
    h = normed_conv(norm_of(block.norm1, x, *z), causal(block.conv1), x, old, new)
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    return normed_conv(norm_of(block.norm2, h, *z), causal(block.conv2), h, old, new, onto=x)


def run_output(half: nn.Module, x: Tensor, z: tuple[Tensor, ...], old: Cache | None, new: Cache) -> Tensor:
    """The end of an encoder or decoder, conv(silu(norm(x))), [B, C, T, H, W] -> [B, C', T, H, W], without gradients."""
    return normed_conv(norm_of(half.norm_out, x, *z), causal(half.conv_out), x, old, new)


class CogVideoXBlock:
    """CogVideoX's ResnetBlock."""

    def forward(self, x: Tensor, z: tuple[Tensor, ...], old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W], as the plain block's."""
        if torch.is_grad_enabled():
            return super().forward(x, z, old, new)
        return run_block(self, x, z, old, new)


class CogVideoXHalf:
    """CogVideoX's Encoder or Decoder."""

    def output(self, x: Tensor, z: tuple[Tensor, ...], old: Cache | None, new: Cache) -> Tensor:
        """conv(silu(norm(x))), [B, C, T, H, W] -> [B, C', T, H, W]."""
        if torch.is_grad_enabled():
            return super().output(x, z, old, new)
        return run_output(self, x, z, old, new)


class WanBlock:
    """Wan's ResnetBlock."""

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W], as the plain block's."""
        if torch.is_grad_enabled():
            return super().forward(x, old, new)
        return run_block(self, x, (), old, new)


class WanHalf:
    """What Wan's Encoder and Decoder share."""

    def output(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """conv(silu(norm(x))), [B, C, T, H, W] -> [B, C', T, H, W]."""
        if torch.is_grad_enabled():
            return super().output(x, old, new)
        return run_output(self, x, (), old, new)


class WanEncoder(WanHalf):
    """Wan's Encoder: the layers before the first change of the frame rate run frame by frame."""

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """Frames [B, C, T, H, W] -> the posterior's moments [B, C', F, h, w], as the plain encoder's."""
        if torch.is_grad_enabled():
            return super().forward(x, old, new)
        full_rate, lower = self.layers_by_rate()
        x = run_by_frames(full_rate, x, old, new)
        for layer in lower:
            x = layer(x, old, new)
        return x


class WanDecoder(WanHalf):
    """Wan's Decoder: the layers after the last change of the frame rate run frame by frame."""

    def forward(self, z: Tensor, old: Cache | None, new: Cache, fusion: nn.ModuleList | None = None,
                inject: list[Tensor] | None = None) -> Tensor:
        """Latents [B, C, F, h, w] -> frames [B, C', T, H, W], as the plain decoder's; `fusion[0]` takes inject[0]."""
        if torch.is_grad_enabled():
            return super().forward(z, old, new, fusion, inject)
        lower, full_rate = self.layers_by_rate()
        h = z
        for layer in lower:
            h = layer(h, old, new)
        if inject is not None:
            h = fusion[0](h, inject[0])
        return run_by_frames(full_rate, h, old, new)


# ---- the image VAE ---------------------------------------------------------------------------------------------------

class ImageBlock:
    """AutoencoderKL's ResnetBlock."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C', H, W]; x is left as it was."""
        if torch.is_grad_enabled():
            return super().forward(x)
        h = nnf.silu(self.norm1(x), inplace=True)
        h = self.conv1(h)
        h = nnf.silu(self.norm2(h), inplace=True)
        h = self.conv2(h)
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class ImageDecoder:
    """AutoencoderKL's Decoder: a skip is added in place."""

    @staticmethod
    def add_skip(x: Tensor, skip: Tensor | None) -> Tensor:
        """x + skip, both [N, C, H, W], written over x; x itself where skip is None. ValueError if the shapes differ."""
        if torch.is_grad_enabled() or skip is None:
            return vae_2d.add_skip(x, skip)
        vae_2d.check_skip(x, skip)
        return x.add_(skip)


# ---- the UNet --------------------------------------------------------------------------------------------------------

class FeedForward:
    """The UNet's feed-forward layer, whose inner width is eight times that of a token."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, C] -> like x; TOKENS of an image at a time."""
        if torch.is_grad_enabled():
            return super().forward(x)
        forward = super().forward
        return torch.cat([forward(tokens) for tokens in x.split(TOKENS, dim=1)], dim=1)


FRUGAL = {plain: with_frugal(plain, frugal) for plain, frugal in {
    vae_cogvideox.CogVideoXVAE: VAE, vae_wan.WanVAE: VAE, vae_wan22.Wan22VAE: VAE,
    vae_cogvideox.Encoder: CogVideoXHalf, vae_cogvideox.Decoder: CogVideoXHalf,
    vae_wan.Encoder: WanEncoder, vae_wan.Decoder: WanDecoder,
    vae_wan22.Encoder: WanEncoder, vae_wan22.Decoder: WanDecoder,
    vae_cogvideox.ResnetBlock: CogVideoXBlock, wan_blocks.ResnetBlock: WanBlock,
    vae_cogvideox.Downsample: Resize, vae_cogvideox.Upsample: Resize,
    wan_blocks.Downsample: Resize, wan_blocks.Upsample: Resize,
    vae_2d.ResnetBlock: ImageBlock, vae_2d.Decoder: ImageDecoder,
    unet_attention.FeedForward: FeedForward}.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.rand(1, 3, 9, 128, 16) * 2 - 1  # high and narrow: two bands of rows
    cogvideox = vae_cogvideox.CogVideoXVAEConfig(block_out_channels=(32,) * 4, latent_channels=4, layers_per_block=1,
                                                 norm_num_groups=8)
    for vae in (vae_cogvideox.CogVideoXVAE(cogvideox),
                vae_wan.WanVAE(vae_wan.WanVAEConfig(base_dim=16, num_res_blocks=1))):
        with torch.no_grad():
            z = vae.encode(x)
            y = vae.decode(z)
            name = type(vae).__name__
            apply(vae)
            print(f"{name} and {type(vae).__name__}: z differs by {(vae.encode(x) - z).abs().max():.1e}, "
                  f"x by {(vae.decode(z) - y).abs().max():.1e}")
