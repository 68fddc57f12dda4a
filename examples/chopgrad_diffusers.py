"""ChopGrad around the VAEs of diffusers: the two adapters below are all that `chopgrad.backward` needs.

    vae = WanGroups(AutoencoderKLWan.from_pretrained(..., subfolder="vae"))
    loss, grad_z = chopgrad.backward(vae, z, loss_fn, d_trunc=1, tiles=(2, 2))
    z.backward(grad_z)

z is what the VAE's own decode() takes, so without the pipeline's normalisation; x comes as the decoder gives it, while
AutoencoderKLWan.decode also clamps it to [-1, 1]: clamp in loss_fn to train on that. diffusers keeps CogVideoX's cache
as nested dicts and Wan's as a list that the decoder fills in place, with the word "Rep" where nothing is remembered
yet; ChopGrad wants a flat dict, new at every call. Left out: Wan 2.2's VAE.

    python -m examples.chopgrad_diffusers   # both VAEs, small and random, one ChopGrad step each
"""

import sys

try:
    import torchvision  # noqa: F401
except Exception:  # built for another torch: diffusers needs none, and does without one that it cannot find
    sys.modules["torchvision"] = None

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor

from mirage_min.method import chopgrad


class CogVideoXGroups:
    """diffusers' AutoencoderKLCogVideoX, two latents at a time; the first group takes a third of an odd number."""

    def __init__(self, vae: AutoencoderKLCogVideoX):
        self.vae = vae

    def decode_groups(self, F: int) -> list[slice]:
        first = F if F < 4 else 2 + F % 2
        return [slice(0, first), *(slice(i, i + 2) for i in range(first, F, 2))]

    def decode_group(self, z_g: Tensor, cache: dict | None = None, inject: None = None) -> tuple[Tensor, dict]:
        z_g = z_g if self.vae.post_quant_conv is None else self.vae.post_quant_conv(z_g)
        x_g, nested = self.vae.decoder(z_g, conv_cache=nest(cache or {}))
        return x_g, flatten(nested)


class WanGroups:
    """diffusers' AutoencoderKLWan (2.1), one latent at a time; an empty tensor stands for "Rep"."""

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae
        self.slots = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())

    def decode_groups(self, F: int) -> list[slice]:
        return [slice(i, i + 1) for i in range(F)]

    def decode_group(self, z_g: Tensor, cache: dict | None = None, inject: None = None) -> tuple[Tensor, dict]:
        slots = [(cache or {}).get(str(i)) for i in range(self.slots)]
        slots = [c if c is None or c.numel() else "Rep" for c in slots]
        x_g = self.vae.decoder(self.vae.post_quant_conv(z_g), feat_cache=slots, feat_idx=[0], first_chunk=not cache)
        return x_g, {str(i): z_g.new_empty(0) if c == "Rep" else c for i, c in enumerate(slots) if c is not None}


def flatten(nested: dict, above: str = "") -> dict[str, Tensor]:
    """{"a": {"b": tensor}} -> {"a.b": tensor}, without the Nones of convolutions that remember nothing."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{above}{key}.")
        elif value is not None:
            flat[above + key] = value
    return flat


def nest(flat: dict[str, Tensor]) -> dict:
    """The inverse of flatten."""
    nested: dict = {}
    for path, value in flat.items():
        *above, key = path.split(".")
        inner = nested
        for name in above:
            inner = inner.setdefault(name, {})
        inner[key] = value
    return nested


if __name__ == "__main__":
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    for vae in (CogVideoXGroups(AutoencoderKLCogVideoX(**small)),
                WanGroups(AutoencoderKLWan(base_dim=8, num_res_blocks=1, z_dim=4))):
        z = torch.randn(1, 4, 7, 4, 6, requires_grad=True)
        loss, grad_z = chopgrad.backward(vae, z, lambda x, where: x.square().sum(), d_trunc=1, tiles=(2, 2))
        z.backward(grad_z)
        name, groups = type(vae.vae).__name__, len(vae.decode_groups(7))
        print(f"{name}: {groups} groups, loss {loss:.1f}, grad z of norm {z.grad.norm():.1f}")
