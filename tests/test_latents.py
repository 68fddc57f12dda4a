"""mirage_min/training/latents.py: latents of clips that are encoded once."""

from types import SimpleNamespace

import torch
from torch import nn

from mirage_min.training import run
from mirage_min.training.latents import DrawnLatents


class Mean(nn.Module):
    """A VAE whose latents are means over 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def encode(self, x):
        return nn.functional.avg_pool3d(x * self.w, (1, 8, 8))


def test_latents_are_of_draws_that_no_step_takes_of_this_seed_or_the_next_and_are_kept(tmp_path):
    recipe, drawn = SimpleNamespace(latent_clips=5, seed=4, bf16=False), []

    def draw(step, clips):
        generators = [run.draws(recipe.seed, step, k) for k in clips]
        drawn.extend(draws.initial_seed() for draws in generators)
        x = torch.rand(1, 3, 2, 16, 16, generator=generators[0])
        return x, 1 - x, ["a"]
    latents = DrawnLatents(draw, Mean(), recipe, tmp_path / "z.safetensors", {"run": 1})
    taken = {run.draws(seed, step, k).initial_seed()
             for seed in (3, 4, 5) for step in range(3000) for k in (0, 1, 4_098)}
    assert len(drawn) == len(set(drawn)) == 5 and not taken & set(drawn)
    z_in, z_gt = latents.batch(64, torch.Generator().manual_seed(0))
    assert z_in.shape == (64, 3, 2, 2, 2) and (z_in + z_gt - 1).abs().max() < 2e-3, "pairs stay together"
    assert len(z_in.unique(dim=0)) == 5
    again = DrawnLatents(None, Mean(), recipe, tmp_path / "z.safetensors", {"run": 1})
    assert torch.equal(again.z, latents.z), "read, and not made again"
