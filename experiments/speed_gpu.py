"""The whole pipeline at CogVideoX1.5-5B's size on a GPU, random weights, bfloat16, beside diffusers' parts.

    python -m experiments.speed_gpu      # adds its figures to docs/speed.json

For each size of video: frames a second, memory above the weights, the seconds of each stage, and the frames a second
that the counted operations would allow an H200 at its peak. Needs diffusers and an NVIDIA GPU.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.speed import COG_1_5_VAE, COG_VAE, GIB, ROOT, record, stopwatch, their_decode, their_encode, timed
from mirage_min.method.one_step import alpha_bar
from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.systems.mirage import Mirage

COG_1_5_DIT = dict(num_attention_heads=48, num_layers=42, sample_width=300, sample_height=300, patch_size_t=2,
                   patch_bias=False, use_rotary_positional_embeddings=True)
SD_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
SIZES = [(9, 512, 768), (49, 480, 832), (49, 720, 1280), (49, 1080, 1920)]  # frames, rows, columns
H200_BF16 = 989e12  # dense operations a second, as NVIDIA states them


def large(device: str) -> Mirage:
    """Mirage on CogVideoX1.5-5B with random weights, in bfloat16."""
    table = alpha_bar()  # not on the device: on "meta" it would have no values to pick one from
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Mirage(CogVideoXVAE(CogVideoXVAEConfig(**COG_1_5_VAE)), CogVideoXDiT(CogVideoXDiTConfig(**COG_1_5_DIT)),
                       AutoencoderKL(AutoencoderKLConfig(**SD_VAE)), torch.zeros(1, 226, 4096), table)
    torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def diffusers_pipeline(device: str):
    """The same put together from diffusers: encode, one call of the transformer, decode. It has no place for the 2D
    encoder's features, so that it does less: neither they nor the fusion blocks are computed."""
    from tests.torchvision_stub import stub
    stub()
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        vae = AutoencoderKLCogVideoX(**COG_VAE, **COG_1_5_VAE).eval().requires_grad_(False)
        dit = CogVideoXTransformer3DModel(**COG_1_5_DIT).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)

    def forward(x: Tensor) -> Tensor:
        z = their_encode(vae, x) * 0.7
        F = z.shape[2]
        padded = torch.cat([z[:, :, : F % 2], z], dim=2)
        holder = SimpleNamespace(transformer=dit, vae_scale_factor_spatial=8)
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            holder, x.shape[3], x.shape[4], padded.shape[2], torch.device(device))
        text = torch.zeros(1, 226, 4096, dtype=x.dtype, device=device)
        v = dit(padded.transpose(1, 2), text, torch.tensor([199], device=device), image_rotary_emb=rotary,
                return_dict=False)[0].transpose(1, 2)[:, :, -F:]
        a = float(alpha_bar()[199])
        return their_decode(vae, (a**0.5 * z - (1 - a) ** 0.5 * v) / 0.7)
    return forward


@torch.no_grad()
def measure() -> dict:
    rows, model = {}, large("cuda")
    theirs = diffusers_pipeline("cuda")
    counted = large("meta")
    weigh = torch.cuda.memory_allocated()
    for T, H, W in SIZES:
        x = torch.rand(T, 3, H, W).mul(2).sub(1)
        clip = x.movedim(0, 1)[None].to("cuda", torch.bfloat16)[..., : H // 16 * 16, : W // 16 * 16]
        with FlopCounterMode(display=False) as count:
            counted(torch.empty_like(clip, device="meta"))
        row = {"flops": count.get_total_flops(), "fps_limit": T * H200_BF16 / count.get_total_flops()}
        for side, call in (("ours", lambda: list(model.stream(iter(x)))), ("diffusers", lambda: theirs(clip))):
            try:
                for _ in range(2):  # the first run chooses kernels
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    call()
                    torch.cuda.synchronize()
                row[side] = {"fps": T / (time.perf_counter() - start),
                             "GiB": (torch.cuda.max_memory_allocated() - weigh) / GIB}
            except torch.OutOfMemoryError:
                row[side] = "out of memory"
        with stopwatch(model, torch.cuda.synchronize) as spent:
            row["seconds_staged"] = timed(lambda: list(model.stream(iter(x))))[0]  # waits between stages
        row["stages"] = dict(spent)
        rows[f"{T}x{H}x{W}"] = row
        print(f"{T}x{H}x{W}: {row}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for speed.json (default docs)")
    args = parser.parse_args()
    if torch.cuda.is_available():
        args.out.mkdir(parents=True, exist_ok=True)
        record(args.out / "speed.json", "gpu", measure() | {"gpu": torch.cuda.get_device_name()})
    else:
        print("skipped: it needs an NVIDIA GPU that this torch can use")
