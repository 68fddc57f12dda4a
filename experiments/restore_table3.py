"""ChopGrad Table 3 in the small: inpainting in one step against a flow model that is sampled in 50.

    python -m experiments.restore_table3 --perceptual DIR

    50 steps    a transformer of the same size, trained to predict the flow from noise to the truth's latents (flow.py),
                all the time on latents, as the paper's VACE is; shift 5
    one step    latents, then latent MSE + 100 LPIPS through the decoder, d_trunc 1 (restorers.py)

The hole has half the height and width. Both start from nothing and take as many steps, and what they give is pasted
into the known pixels alike. The flow model sees the frames with the hole by a convolution over patches, whose tokens
are added after its first block, where VACE has a branch of its own. Operations are of one clip, counted; of one step
the VAE takes most, next to so small a transformer. The paper's numbers are those on Waymo, of 14 billion parameters
that had been trained before.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from experiments import common, restorers, tables
from mirage_min.data import desk
from mirage_min.data.degradations import central_mask
from mirage_min.data.masks import hide
from mirage_min.data.pairs import Pairs
from mirage_min.method import flow
from mirage_min.networks import frugal, small_base, weights
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.training import run
from mirage_min.training.latents import DrawnLatents

COLUMNS = "PSNR", "SSIM", "LPIPS", "DISTS"
PAPER = {"50 steps": dict(zip(COLUMNS, (23.229, 0.804, 0.212, 0.079))),
         "one step": dict(zip(COLUMNS, (25.048, 0.823, 0.192, 0.071)))}
PIXELS = {"lambda_latent": 1.0, "lambda_lpips": 100.0, "lambda_mse": 0.0, "d_trunc": 1}
STEPS, SHIFT, HEADS = 50, 5.0, 2
LR, BATCH = 1e-3, 8  # as the recipe small-inpaint has them on latents
WEIGHTS = "flow.safetensors"


class FlowInpainter(nn.Module):
    """The flow model, with the VAE of the others, which is not in its state_dict."""

    def __init__(self, vae: WanVAE):
        super().__init__()
        self.dit = small_base.new_transformer("wan", HEADS, vae.config.z_dim)
        self.enter = nn.Conv3d(vae.config.z_dim, self.dit.patch_embedding.out_channels, (1, 2, 2), stride=(1, 2, 2))
        self.seen = [vae]  # a list: no submodule

    @property
    def vae(self) -> WanVAE:
        return self.seen[0]

    def predict(self, z: Tensor, t: Tensor, z_in: Tensor) -> Tensor:
        """z_t and what is known, z_in, [B, C, F, h, w] with even h and w, t [B] or [B, F] -> the flow, like z."""
        tokens = rearrange(self.enter(z_in), "b d f h w -> b (f h w) d")
        return self.dit(z, t, z.new_zeros(len(z), 1, self.dit.config.text_dim), {0: tokens})

    def loss(self, z_in: Tensor, z_gt: Tensor, draws: torch.Generator) -> Tensor:
        """The flow's mean squared error, at one random noise level for each clip."""
        sigma = flow.shifted(torch.rand(len(z_gt), generator=draws), SHIFT)
        eps, each = torch.randn(z_gt.shape, generator=draws), sigma.view(-1, 1, 1, 1, 1)
        # z_σ = (1 − σ) z + σ ε,   v(z_σ, 1000 σ) ≈ ε − z
        v = self.predict((1 - each) * z_gt + each * eps, 1000 * sigma, z_in)
        return nnf.mse_loss(v.float(), eps - z_gt)

    @torch.no_grad()
    def forward(self, x_in: Tensor) -> Tensor:
        """x_in [B, 3, T, H, W] with the hole, H and W multiples of 16 -> the same, filled; the noise is always one."""
        z_in = self.vae.encode(x_in)
        noise = torch.randn(z_in.shape, generator=torch.Generator().manual_seed(0))
        x = self.vae.decode(flow.sample(partial(self.predict, z_in=z_in), noise, STEPS, SHIFT))
        return torch.where(central_mask(*x_in.shape[-2:]), x, x_in)


def open_flow(args: argparse.Namespace, folder: Path | None = None) -> FlowInpainter:
    """A new one, or the one that was trained into the folder."""
    vae = frugal.apply(WanVAE.from_pretrained(args.vae, dtype=torch.float32)).requires_grad_(False).eval()
    model = FlowInpainter(vae)
    if folder:
        model.load_state_dict(weights.load_tensors(folder / WEIGHTS)[0])
    return model.eval()


def train_flow(args: argparse.Namespace, seed: int, to: Path) -> None:
    """As many steps as both parts of the other's training, on as many latents as its first part has."""
    torch.manual_seed(seed)
    model, data = open_flow(args), Pairs(args.data, 9, (96, 144))

    def draw(step: int, clips: range) -> tuple[Tensor, Tensor, list[str]]:
        draws = [run.draws(seed, step, k) for k in clips]
        _, x_gt, names = data.batch(draws)
        return hide(x_gt, central_mask(*x_gt.shape[-2:])), x_gt, names

    settings = SimpleNamespace(latent_clips=restorers.latent_clips(args), bf16=desk.bfloat16_is_faster("cpu"))
    latents = DrawnLatents(draw, model.vae, settings, to / "latents.safetensors", {"seed": seed})
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=LR), 2 * args.steps
    bar = tqdm(range(steps), unit="step", disable=None)
    for step in bar:
        draws = run.draws(seed, step)
        z_in, z_gt = latents.batch(BATCH, draws)
        with run.autocast(settings, "cpu"):
            loss = model.loss(z_in, z_gt, draws)
        for group in optimizer.param_groups:
            group["lr"] = LR * run.schedule(step, 50, steps, cosine=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    weights.save_tensors(to / WEIGHTS, model.state_dict())


def operations(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Floating-point operations of model(x)."""
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        model(x)
    return count.get_total_flops()


def main(args: argparse.Namespace) -> None:
    clips, seeds = restorers.held_out(args, "hole", restorers.with_hole), []
    flags = "--recipe", "small-inpaint", "--data", args.data
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "restore_table3" / f"seed_{seed}"
        start = restorers.beginning(args, seed, "inpaint", *flags)
        ours = restorers.continued(args, seed, folder / "model of one step", start, *flags, **PIXELS)
        theirs = tables.once(folder / "model of 50 steps", tables.trained_with(args, vae=args.vae),
                             partial(train_flow, args, seed))
        settings = tables.scored_on(args)
        results = tables.harmonise(clips, folder, {"50 steps": theirs}, settings, partial(open_flow, args))
        results |= tables.harmonise(clips, folder, {"one step": ours}, settings, restorers.read)
        seeds.append(restorers.score(args, clips, results, folder / "scores"))
    model, x_in, z = open_flow(args, theirs), torch.zeros(1, 3, 9, 96, 144), torch.zeros(1, 16, 3, 12, 18)
    counts = {"50 steps": operations(model, x_in), "one step": operations(restorers.read(ours), x_in),
              "of them each call of a transformer": operations(partial(model.predict, z, torch.zeros(1)), z)}
    seeds[0]["remarks"]["operations of a clip"] = ", ".join(f"{name} {n / 1e9:,.1f} G" for name, n in counts.items())
    tables.draw_strip(args.out / "reproduce" / "restore_table3.png", clips, results, (4,))
    tables.report("restore_table3", __doc__, args, {tables.FULL: PAPER}, seeds, more={"operations": counts})


def flags() -> argparse.ArgumentParser:
    return restorers.flags(__doc__, steps=1000, start=False)  # the flow model has nothing to continue


if __name__ == "__main__":
    common.start(main, flags())
