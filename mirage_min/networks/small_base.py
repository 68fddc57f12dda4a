"""The small networks that stand in for published weights: the classes of CogVideoX, Wan, Cosmos and Stable Diffusion
with small numbers, untrained. train_base.py trains them; train_r3d2.py the UNet, train_online.py Cosmos' transformer.

    python -m mirage_min.networks.small_base         # how many numbers each has
"""

import copy
from dataclasses import replace

import torch

from .dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from .dit_cosmos import CosmosDiT, CosmosDiTConfig
from .dit_wan import WanDiT, WanDiTConfig
from .unet_2d import UNet2D, UNet2DConfig
from .vae_2d import AutoencoderKL, AutoencoderKLConfig
from .vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from .vae_wan import WanVAE, WanVAEConfig

VAE_2D = AutoencoderKLConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=1,
                             latent_channels=4)
VAE = CogVideoXVAEConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=8, layers_per_block=1)
VAE_WAN = WanVAEConfig(base_dim=16, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
VAE_WAN_PATCHES = replace(VAE_WAN, base_dim=32, dim_mult=(1, 2, 2), temperal_downsample=(True, True), in_channels=12,
                          out_channels=12, patch_size=2)
DIT = CogVideoXDiTConfig(num_attention_heads=3, num_layers=6, time_embed_dim=64, text_embed_dim=16,
                         max_text_seq_length=1, sample_height=12, sample_width=18,
                         use_rotary_positional_embeddings=True)
DIT_WAN = WanDiTConfig(num_attention_heads=3, attention_head_dim=64, text_dim=16, freq_dim=64, ffn_dim=768,
                       num_layers=6)

UNET = UNet2DConfig(block_out_channels=(32, 64, 96, 96), attention_head_dim=(1, 2, 3, 3), layers_per_block=1,
                    norm_num_groups=8, cross_attention_dim=16, use_linear_projection=True)
DIT_COSMOS = CosmosDiTConfig(num_attention_heads=3, num_layers=6, text_embed_dim=16, adaln_lora_dim=32,
                             rope_scale=(1.0, 1.0, 1.0), cross_attention=False)


def new_vae_2d(width: float = 1.0) -> AutoencoderKL:
    """width: a factor on the channels."""
    config = copy.copy(VAE_2D)
    config.block_out_channels = tuple(round(c * width) for c in config.block_out_channels)
    return quiet(AutoencoderKL(config))


def new_vae(family: str = "cogvideox", width: float = 1.0, norm_groups: int = 8, z_dim: int = 16,
            patches: bool = False) -> CogVideoXVAE | WanVAE:
    """width: a factor on the channels; norm_groups: of CogVideoX's norms, Wan's have none; z_dim: of Wan's latents;
    patches: Wan's frames enter as patches of 2 x 2 pixels, in place of its stage at full size."""
    if family == "wan":
        config = VAE_WAN_PATCHES if patches else VAE_WAN
        config = replace(config, base_dim=round(config.base_dim * width), z_dim=z_dim,
                         latents_mean=(0.0,) * z_dim, latents_std=(1.0,) * z_dim)
        return quiet(WanVAE(config))
    config = copy.copy(VAE)
    config.block_out_channels = tuple(round(c * width) for c in config.block_out_channels)
    config.norm_num_groups = norm_groups
    return quiet(CogVideoXVAE(config))


@torch.no_grad()
def quiet(vae: AutoencoderKL | CogVideoXVAE | WanVAE) -> AutoencoderKL | CogVideoXVAE | WanVAE:
    """The same with little noise on its latents (std e^-2): with more, a decoder first learns to ignore them."""
    last = vae.encoder.conv_out.conv if isinstance(vae, CogVideoXVAE) else vae.quant_conv
    last.bias.chunk(2)[1].sub_(4)
    return vae


@torch.no_grad()
def new_transformer(family: str = "cogvideox", heads: int = 3, channels: int = 16, layers: int = 6
                    ) -> CogVideoXDiT | WanDiT | CosmosDiT:
    """A transformer that predicts zeros: every block's gates and the output are zero (adaLN-zero, DiT).

    heads, layers: of Wan's, 64 channels a head; the others have three and six. channels: of the latents.
    """
    latents = {"in_channels": channels, "out_channels": channels}
    if family == "cosmos":
        model = CosmosDiT(replace(DIT_COSMOS, **latents))
        layers = [norm.linear_2 for block in model.transformer_blocks for norm in (block.norm1, block.norm3)]
        for layer in (*layers, model.time_embed.t_embedder["linear_2"]):
            layer.weight.chunk(3)[2].zero_()  # of shift, scale, gate
        model.proj_out.weight.zero_()
        return model
    if family == "wan":
        size = {"num_attention_heads": heads, "ffn_dim": 256 * heads, "num_layers": layers}
        model = WanDiT(replace(DIT_WAN, **size, **latents))
        time_proj = model.condition_embedder.time_proj
        for k in (2, 5):  # of shift, scale, gate, for attention and for the feed-forward layers
            time_proj.weight.view(6, -1, time_proj.in_features)[k].zero_()
            time_proj.bias.view(6, -1)[k].zero_()
            for block in model.blocks:
                block.scale_shift_table[:, k].zero_()
        for block in model.blocks:  # cross-attention has no gate
            block.attn2.to_out[0].weight.zero_()
            block.attn2.to_out[0].bias.zero_()
    else:
        model = CogVideoXDiT(replace(DIT, **latents))
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2):  # of shift, scale, gate for the video, then for the text
                for k in (2, 5):
                    norm.linear.weight.view(6, -1, norm.linear.in_features)[k].zero_()
                    norm.linear.bias.view(6, -1)[k].zero_()
    model.proj_out.weight.zero_()
    model.proj_out.bias.zero_()
    return model


@torch.no_grad()
def new_unet() -> UNet2D:
    """A UNet that predicts zeros."""
    unet = UNet2D(UNET)
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    return unet


if __name__ == "__main__":
    networks = {"2D VAE": new_vae_2d(), "3D VAE": new_vae(), "3D VAE, Wan's classes": new_vae("wan"),
                "transformer": new_transformer(), "transformer, Wan's classes": new_transformer("wan"),
                "transformer, Cosmos' class": new_transformer("cosmos"),
                "UNet": new_unet()}
    for name, network in networks.items():
        print(f"{name:28} {sum(p.numel() for p in network.parameters()):9,} numbers")
