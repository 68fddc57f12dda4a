"""Two pictures of docs/walkthrough.md, from the project's own code and the small model in weights/.

    python docs/figures.py          # writes docs/walkthrough_*.png and prints the numbers in them
"""

import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

from mirage_min.data.toy_world import WorldConfig, make_clip  # noqa: E402
from mirage_min.method.one_step import alpha_bar  # noqa: E402
from mirage_min.networks.vae_cogvideox import CogVideoXVAE  # noqa: E402

DOCS = Path(__file__).resolve().parent
plt.rcParams.update({"figure.figsize": (4.2, 2.8), "font.size": 8, "savefig.dpi": 110, "savefig.bbox": "tight"})


def schedule() -> None:
    """ᾱ, and the two weights of one step, z0 = √ᾱ z_t − √(1 − ᾱ) v."""
    table = alpha_bar()
    plt.plot(table, label="ᾱ")
    plt.plot(table.sqrt(), label="√ᾱ, weight of z_NI")
    plt.plot((1 - table).sqrt(), label="√(1 − ᾱ), weight of v")
    plt.axvline(199, color="grey", linewidth=0.8)
    plt.text(205, 1.0, "t = 199")
    plt.xlabel("t"), plt.legend(loc="center right")
    plt.savefig(DOCS / "walkthrough_schedule.png"), plt.close()


def influence(vae: CogVideoXVAE, z: torch.Tensor) -> None:
    """|v dx_i / dz_j| for one random v, by groups of the trained decoder: causal, and less the farther back."""
    z, groups, cache = z.requires_grad_(), vae.decode_groups(z.shape[2]), None
    rows = []
    for i, group in enumerate(groups):
        x, cache = vae.decode_group(z[:, :, group], cache)
        g, = torch.autograd.grad(x, z, torch.randn_like(x), retain_graph=True)
        rows.append(torch.stack([g[:, :, other].norm() for other in groups]))
    table = torch.stack(rows) / torch.stack(rows).diag()[:, None]
    print("influence of group j on group i, of its own =", [[f"{v:.3f}" for v in row] for row in table.tolist()])
    plt.imshow(table.clamp_min(1e-6).log10(), vmin=-4, vmax=0)
    plt.xlabel("latents of group j"), plt.ylabel("pixels of group i")
    plt.xticks(range(len(groups))), plt.yticks(range(len(groups)))
    plt.colorbar(label="log10 of influence, own = 1")
    plt.savefig(DOCS / "walkthrough_influence.png"), plt.close()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    small = CogVideoXVAE.from_pretrained(DOCS.parent / "weights" / "base" / "vae", dtype=torch.float32)
    schedule()
    with torch.no_grad():
        latents = small.encode(make_clip(1_000_000, WorldConfig(frames=33)).x_gt[None, :, :, 32:64, 48:96])
    influence(small.requires_grad_(False), latents)
