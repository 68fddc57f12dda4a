"""A new Wan VAE that begins linear: its encoder as a transform, its decoder as convolutions without their blocks.

An autoencoder that learns both halves at once from nothing settles on a few directions of its latents; the others
never come to hold anything, for no gradient asks for what the decoder does not use yet. So the encoder begins as what
is known to hold the most: layer by layer the principal components of what the layer before passes. All of it can be
linear:

    resnet blocks, attention     add nothing: their last convolutions begin at zero
    Downsample, in space         the principal components of 2 x 2 cells, as many as there are channels
    Downsample, in time          of each pair of frames the means and the differences, those that vary the most
    the last norm and SiLU       nearly linear, for one large constant channel fixes the norm
    the last convolution         the principal components again, each divided by the root of its standard deviation

The decoder has no such solution, for its Upsample repeats cells before it can tell them apart. Its convolutions are
trained. But its blocks add nothing either in the beginning, and without them a step takes half of the time.

DEVIATION: no paper has this; their VAEs are trained for weeks.

    python -m mirage_min.training.transform
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.vae_wan import WanVAE
from ..networks.wan_blocks import Downsample, FrameAttention, ResnetBlock, Upsample

CONSTANT = 64.0  # of the channel that fixes the last norm; a latent cell of white comes to 14
GAMMA = 0.25     # of the last norm: white comes to .4, where SiLU is nearly x / 2
LOGVAR = -6.0    # of the latents: noise of .05
DECODED_CONSTANT = 8.0  # what fixes the decoder's last norm to begin with; from there it is trained


@torch.no_grad()
def begin_as_transform(vae: WanVAE, videos: list[Tensor]) -> None:
    """Set the encoder of a VAE to the transform that suits these videos, each [B, 3, 4k + 1, H, W] in [-1, 1]; let its
    decoder begin without the effect of its blocks.

    ValueError if a latent has more channels than the encoder passes on, or the first layer fewer than a pixel, and if
    no video moves.
    """
    encoder, z_dim = vae.encoder, vae.config.z_dim
    width = encoder.conv_out.in_channels
    if z_dim >= width:
        raise ValueError(f"z_dim must be less than the {width} channels before the latents, got {z_dim}")
    count = encoder.conv_in.in_channels  # channels that carry something
    if vae.config.base_dim < count:
        raise ValueError(f"base_dim must be {count} at least, as many as the values of a patch, got "
                         f"{vae.config.base_dim}")
    if max(x.shape[2] for x in videos) == 1:
        raise ValueError("wanted videos of 5 frames or more among them, got single frames only")
    clear(encoder.conv_in)
    encoder.conv_in.weight[range(count), range(count), -1, 1, 1] = 1
    videos = through(encoder.conv_in, through(encoder.to_patches, videos))
    last = [layer for layer in encoder.down_blocks if isinstance(layer, Downsample)][-1]
    for layer in encoder.down_blocks:
        if isinstance(layer, Downsample):
            count = merge_cells(layer, videos, count, layer.resample[1].out_channels - (layer is last))
            if layer is last:
                layer.resample[1].bias[-1] = CONSTANT
            if layer.time_conv is not None:
                count = merge_frames(layer, [layer.resize(x) for x in videos], count, keep_last=layer is last)
        else:
            pass_on(layer, count)
        videos = through(layer, videos)
    for layer in (*encoder.mid_block.resnets, *encoder.mid_block.attentions):
        pass_on(layer, count)
    encoder.norm_out.gamma.fill_(GAMMA)
    # silu(γ √C h / ‖h‖) ≈ γ √C h / 2 K
    factor = 2 * CONSTANT / (GAMMA * width**0.5)
    std, directions = principal([x[:, :count] for x in videos])
    clear(encoder.conv_out)
    encoder.conv_out.weight[:z_dim, :count, -1, 1, 1] = factor * (directions[:, :z_dim] / std[:z_dim].sqrt()).T
    clear(vae.quant_conv)
    vae.quant_conv.weight[range(z_dim), range(z_dim)] = 1
    vae.quant_conv.bias[z_dim:] = LOGVAR
    begin_without_blocks(vae)


def begin_without_blocks(vae: WanVAE) -> None:
    """Let a decoder pass on the latents as they are, its blocks add nothing, and its last norm be nearly linear."""
    clear(vae.post_quant_conv)
    vae.post_quant_conv.weight[range(vae.config.z_dim), range(vae.config.z_dim)] = 1
    for layer in vae.decoder.modules():
        if isinstance(layer, ResnetBlock | FrameAttention):
            pass_on(layer)
    last = [layer for layer in vae.decoder.modules() if isinstance(layer, Upsample)][-1]
    last.resample[1].bias[-1] = DECODED_CONSTANT


def leave_blocks_out(vae: WanVAE) -> None:
    """Skip the blocks of a decoder from here on, and do not train them, shortcuts apart.

    ValueError if they add anything, and for another network.
    """
    if not isinstance(vae, WanVAE):
        raise ValueError(f"without_blocks: wanted a VAE of Wan's (--family wan), got {type(vae).__name__}")
    for name, block in vae.decoder.named_modules():
        if not isinstance(block, ResnetBlock | FrameAttention):
            continue
        last = block.proj if isinstance(block, FrameAttention) else block.conv2
        if last.weight.any() or last.bias.any():
            raise ValueError(f"without_blocks: wanted blocks that add nothing yet (--set transform=yes), got {name}, "
                             "which was trained")
        shortcut = getattr(block, "conv_shortcut", None) or nn.Identity()
        block.requires_grad_(False)
        shortcut.requires_grad_(True)
        block.forward = lambda x, *caches, shortcut=shortcut: shortcut(x)


def through(layer: Callable, videos: list[Tensor]) -> list[Tensor]:
    """A layer's output for each of the videos."""
    return [layer(x, None, {}) for x in videos]


def clear(conv: nn.Module) -> None:
    """Let a convolution give zeros."""
    conv.weight.zero_()
    conv.bias.zero_()


def pass_on(layer: ResnetBlock | FrameAttention, count: int | None = None) -> None:
    """Let a layer give the first `count` channels as it gets them; None: as many as there are."""
    clear(layer.proj if isinstance(layer, FrameAttention) else layer.conv2)
    shortcut = getattr(layer, "conv_shortcut", None)
    if shortcut is not None:
        count = count or min(shortcut.in_channels, shortcut.out_channels)
        clear(shortcut)
        shortcut.weight[range(count), range(count)] = 1


def merge_cells(layer: Downsample, videos: list[Tensor], count: int, most: int) -> int:
    """Let a layer's convolution give principal components of 2 x 2 cells -> how many: `most`, or all there are."""
    conv = layer.resample[1]
    cells = [rearrange(x[:, :count, :, : x.shape[3] // 2 * 2, : x.shape[4] // 2 * 2],
                       "b c t (h p) (w q) -> b (c p q) t h w", p=2, q=2) for x in videos]
    most = min(most, 4 * count)
    _, directions = principal(cells)
    clear(conv)
    conv.weight[:most, :count, :2, :2] = rearrange(directions[:, :most], "(c p q) n -> n c p q", p=2, q=2)
    return most


def merge_frames(layer: Downsample, videos: list[Tensor], count: int, keep_last: bool) -> int:
    """Let a layer's time_conv give means (a + b) / 2 and differences (b − a) / 2 of pairs of frames, those that vary
    the most -> how many. A mean keeps its channel's place, which the first frame fills by itself. keep_last: the last
    channel is passed on apart from these."""
    conv = layer.time_conv
    pairs = [(x[:, :count, 1::2], x[:, :count, 2::2]) for x in videos if x.shape[2] > 1]
    kinds = [torch.cat([(b + sign * a).movedim(1, 0).flatten(1) / 2 for a, b in pairs], dim=1) for sign in (1, -1)]
    variances = torch.cat([kind.var(dim=1) for kind in kinds])                           # [2 · count]
    places = conv.out_channels - keep_last
    chosen = variances.topk(min(places, 2 * count)).indices
    clear(conv)
    means, differences = chosen[chosen < count].tolist(), chosen[chosen >= count].tolist()
    free = [place for place in range(places) if place not in means]
    for place, i, sign in [(i, i, 1) for i in means] + [(p, i - count, -1) for p, i in zip(free, differences)]:
        conv.weight[place, i, 1], conv.weight[place, i, 2] = sign / 2, 1 / 2             # of the pair; 0 is before it
    if keep_last:
        conv.weight[-1, -1, 1:] = 1 / 2
    return places


def principal(videos: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Videos [B, C, T, H, W] -> the standard deviations [C] of their principal components, largest first, and the
    directions as columns [C, C]."""
    rows = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in videos]).double()
    rows = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    std = variances.clamp(min=1e-12).sqrt().flip(0)  # of videos that have fewer components
    return std.float(), directions.flip(1).float()


if __name__ == "__main__":
    from ..data.toy_world import WorldConfig, make_clip
    from ..networks import small_base

    torch.manual_seed(0)
    clips = [make_clip(seed, WorldConfig(height=48, width=72)).x_gt[None] for seed in range(6)]
    for z_dim in (16, 48):
        vae = small_base.new_vae("wan", z_dim=z_dim)
        begin_as_transform(vae, clips[:5])
        with torch.no_grad():
            std = torch.cat([vae.posterior(x)[0].movedim(1, 0).flatten(1) for x in clips], dim=1).std(dim=1)
        print(f"{z_dim} channels, of standard deviations {std[0]:.2f}, {std[1]:.2f}, {std[2]:.2f} … {std[-1]:.2f}")
