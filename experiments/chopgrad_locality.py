"""How little the past matters to a decoder: temporal locality, truncation, tiles (ChopGrad §3.2, Figs. 3 to 5, 7).

    python -m experiments.chopgrad_locality --vae weights/base/vae clip.mp4 ...  # trained weights, real or toy clips
    python -m experiments.chopgrad_locality                                          # random weights: the control

Three measurements on latents z = encode(clip), written as JSON and PNG to docs/chopgrad, printed as tables:

1. Influence of latent group j on the pixels of group i (Eq. 2), as the Frobenius norm of the Jacobian dx_i / dz_j,
   from random probes v: E |J^T v|^2 = |J|_F^2. By distance i - j, with the mean and the fit C exp(-alpha D) (Eq. 3),
   least squares on the logarithm of the mean. Locality is learned: random weights are here for comparison only.
2. Gradient of a pixel loss by d_trunc against full backpropagation (Eq. 6): of z, absolute and relative (Frobenius),
   and of the decoder's parameters, normalised mean absolute error and cosine (Fig. 4 has the backbone's).
3. Tiles against the whole frame, by margin: pixels (difference / standard deviation), gradient of z at d_trunc 1.
   What is left at large margins is no border effect: CogVideoX's GroupNorm and Wan's attention see less of the frame.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.chopgrad_memory import small
from mirage_min.data.video import read_clip
from mirage_min.method import chopgrad
from mirage_min.method.perceptual import Features, Lpips
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.networks.vae_wan import WanVAE

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

VAES = {cls.CLASS_NAME: cls for cls in (CogVideoXVAE, WanVAE)}


def load_vae(folder: Path) -> nn.Module:
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    if name not in VAES:
        raise ValueError(f"{folder} must hold one of {sorted(VAES)}, got {name}")
    return VAES[name].from_pretrained(folder, dtype=torch.float32)


def load_clip(path: Path, vae: nn.Module, T: int, H: int, W: int) -> Tensor:
    """The first frames of a video, at most T and as many as the VAE keeps -> [1, 3, T', H, W]"""
    x = read_clip(path)[:, :T]
    if vae.legal_length(x.shape[1]) != x.shape[1]:
        T = next(n for n in range(x.shape[1], 0, -1) if vae.legal_length(n) == n)
        x = x[:, :T]
    return F.interpolate(x.movedim(0, 1), (H, W), mode="area").movedim(0, 1)[None]


# ---- 1. influence ---------------------------------------------------------------------------------------------------


def influence(vae: nn.Module, z: Tensor, probes: int) -> list[tuple[int, float]]:
    """(distance i - j, |dx_i / dz_j|_F) for every pair of groups j <= i."""
    z, groups, samples, decoded, cache = z.detach().requires_grad_(), vae.decode_groups(z.shape[2]), [], [], None
    for g in groups:
        x_g, cache = vae.decode_group(z[:, :, g], cache)
        decoded.append(x_g)
    for i, x_i in enumerate(decoded):
        squares = torch.zeros(i + 1)
        for _ in range(probes):
            grad_z, = torch.autograd.grad((x_i * torch.randn_like(x_i)).sum(), z, retain_graph=True)
            squares += torch.stack([grad_z[:, :, g].square().sum() for g in groups[: i + 1]]) / probes
        # L_{i<-j} = |J_ij|                                                             ChopGrad Eq. 2
        samples += [(i - j, math.sqrt(square)) for j, square in enumerate(squares.tolist())]
    return samples


def exponential_fit(means: list[float]) -> dict[str, float]:
    """C, alpha and R^2 of C exp(-alpha D) through the means at D = 0, 1, ..., in the logarithm  (ChopGrad Eq. 3)."""
    y, D = torch.tensor(means).log(), torch.arange(len(means), dtype=torch.float32)
    slope = ((D - D.mean()) * (y - y.mean())).sum() / (D - D.mean()).square().sum()
    log_c = y.mean() - slope * D.mean()
    residual = (y - log_c - slope * D).square().sum() / (y - y.mean()).square().sum()
    return {"C": log_c.exp().item(), "alpha": -slope.item(), "R2": 1 - residual.item()}


# ---- 2. truncation --------------------------------------------------------------------------------------------------


def gradients(vae: nn.Module, z: Tensor, loss_fn, **how) -> tuple[Tensor, Tensor]:
    """(grad z, the gradients of all decoder parameters in one vector) of one ChopGrad step."""
    vae.zero_grad()
    _, grad_z = chopgrad.backward(vae, z, loss_fn, **how)
    return grad_z, torch.cat([p.grad.flatten() for p in vae.decoder.parameters() if p.grad is not None])


def truncation(vae: nn.Module, z: Tensor, loss_fn) -> list[dict[str, float]]:
    """How gradients at each d_trunc differ from those of full backpropagation."""
    (full_z, full_p), rows, N = gradients(vae, z, loss_fn, d_trunc=None), [], len(vae.decode_groups(z.shape[2]))
    for d in sorted({*range(min(4, N)), *range(5, N, 3), N - 1}):
        grad_z, grad_p = gradients(vae, z, loss_fn, d_trunc=d, delayed=True)
        # |dL/dz - dL_trunc/dz|                                                         ChopGrad Eq. 6
        error = (grad_z - full_z).norm().item()
        rows.append({"d_trunc": d, "z_absolute": error, "z_relative": error / full_z.norm().item(),
                     "z_cosine": F.cosine_similarity(grad_z.flatten(), full_z.flatten(), dim=0).item(),
                     "parameters_nmae": ((grad_p - full_p).abs().mean() / full_p.abs().mean()).item(),
                     "parameters_cosine": F.cosine_similarity(grad_p, full_p, dim=0).item()})
    return rows


def pixel_losses(x_gt: Tensor, perceptual: Path | None) -> dict:
    """{name: loss_fn}: mean squared error and, where its weights are at hand, LPIPS on SqueezeNet."""
    def mse(x: Tensor, where) -> Tensor:
        return (x - x_gt[where]).square().sum() / x_gt.numel()

    if perceptual is None:
        return {"mse": mse}
    net = Lpips(Features("squeeze", perceptual))

    def lpips(x: Tensor, where) -> Tensor:
        x, y = (v.movedim(2, 1).flatten(0, 1) for v in (x, x_gt[where]))
        return net(x, y).sum() / x_gt.shape[2]
    return {"mse": mse, "lpips": lpips}


# ---- 3. tiles -------------------------------------------------------------------------------------------------------


def tiling(vae: nn.Module, z: Tensor, x_gt: Tensor, tiles: tuple[int, int]) -> list[dict[str, float]]:
    """How pixels and gradients of tiles differ from those of the whole frame, by margin, on the first three groups."""
    z = z[:, :, : vae.decode_groups(z.shape[2])[:3][-1].stop]
    x_gt = x_gt[:, :, : vae.encode_groups(x_gt.shape[2])[:3][-1].stop]

    def step(**how) -> tuple[Tensor, Tensor]:
        x_dr = torch.empty_like(x_gt)

        def loss_fn(x: Tensor, where) -> Tensor:
            x_dr[where] = x.detach()
            return (x - x_gt[where]).square().sum() / x_gt.numel()
        return x_dr, gradients(vae, z, loss_fn, d_trunc=1, **how)[0]

    (whole_x, whole_g), rows, margin = step(), [], 0
    while 2 * margin < max(z.shape[3:]):
        x, g = step(tiles=tiles, margin=margin)
        rows.append({"margin": margin, "pixels_rms": ((x - whole_x).square().mean().sqrt() / whole_x.std()).item(),
                     "pixels_max": ((x - whole_x).abs().max() / whole_x.std()).item(),
                     "z_relative": ((g - whole_g).norm() / whole_g.norm()).item(),
                     "z_cosine": F.cosine_similarity(g.flatten(), whole_g.flatten(), dim=0).item()})
        margin = 2 * margin or 1
    return rows


# ---- out ------------------------------------------------------------------------------------------------------------


def measure(vae: nn.Module, clips: list[Tensor], probes: int, tiles: tuple[int, int], perceptual: Path | None) -> dict:
    """All three on every clip; clips' rows are averaged, influences pooled."""
    samples, rows, tile_rows = [], {}, []
    for n, x in enumerate(clips):
        with torch.no_grad():
            z = vae.encode(x)
        print(f"clip {n + 1} of {len(clips)}: {list(x.shape)}, {len(vae.decode_groups(z.shape[2]))} groups", flush=True)
        samples += influence(vae, z, probes)
        for name, loss_fn in pixel_losses(x, perceptual).items():
            rows.setdefault(name, []).append(truncation(vae, z, loss_fn))
        tile_rows.append(tiling(vae, z, x, tiles))
    distances = sorted({d for d, _ in samples})
    means = [sum(v for d, v in samples if d == D) / sum(d == D for d, _ in samples) for D in distances]
    return {"samples": samples, "mean": means, "fit": exponential_fit(means) if len(means) > 2 else None,
            "truncation": {name: average(tables) for name, tables in rows.items()}, "tiles": average(tile_rows)}


def average(tables: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Rows of several clips averaged; rows that not all of them have are left out."""
    return [{key: sum(row[key] for row in same) / len(same) for key in same[0]} for same in zip(*tables)]


def plot(result: dict, title: str, path: Path) -> None:
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.semilogy(*zip(*result["samples"]), ".", color="0.7", label="samples")
    left.semilogy(result["mean"], "o-", label="mean")
    if result["fit"]:
        C, alpha, R2 = result["fit"].values()
        left.semilogy([C * math.exp(-alpha * D) for D in range(len(result["mean"]))], "k--",
                      label=f"{C:.3g} exp(-{alpha:.2f} D), R² {R2:.3f}")
    left.set(xlabel="distance in groups", ylabel="influence |J|", title=title)
    for name, rows in result["truncation"].items():
        for key in ("z_relative", "parameters_nmae"):
            middle.plot([r["d_trunc"] for r in rows], [r[key] for r in rows], "o-", label=f"{name}: {key}")
    middle.set(xlabel="d_trunc", ylabel="error against full backpropagation", ylim=(0, None))
    for key in ("pixels_rms", "z_relative"):
        right.plot([r["margin"] for r in result["tiles"]], [r[key] for r in result["tiles"]], "o-", label=key)
    right.set(xlabel="margin in cells", ylabel="tiles against the whole frame", ylim=(0, None))
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def print_tables(result: dict, title: str) -> None:
    print(f"\n### {title}\n\nInfluence by distance: " + ", ".join(f"{m:.3g}" for m in result["mean"]))
    if result["fit"]:
        print("Fit C exp(-alpha D): " + ", ".join(f"{name} {value:.4g}" for name, value in result["fit"].items()))
    for name, rows in [*result["truncation"].items(), ("tiles", result["tiles"])]:
        print(f"\n| {name}: " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        for row in rows:
            print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")


def main(args) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vaes = {args.label: load_vae(args.vae)} if args.vae else {
        f"random_{name.lower()}": small(name) for name in ("CogVideoX", "Wan")}
    args.out.mkdir(parents=True, exist_ok=True)
    for label, vae in vaes.items():
        H, W = args.size
        clips = [load_clip(path, vae, args.frames, H, W) for path in args.clips] or [
            torch.rand(1, 3, vae.legal_length(args.frames), H, W) * 2 - 1]
        result = measure(vae.eval(), clips, args.probes, args.tiles, args.perceptual)
        about = {"clips": [list(x.shape) for x in clips], "probes": args.probes, "tiles": args.tiles}
        (args.out / f"locality_{label}.json").write_text(json.dumps(about | result) + "\n")
        plot(result, label, args.out / f"locality_{label}.png")
        print_tables(result, f"{label}, {len(clips)} clips of {list(clips[0].shape[2:])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clips", nargs="*", type=Path, help="videos or folders of images; none: noise")
    parser.add_argument("--vae", type=Path, help="folder of a CogVideoX or Wan VAE; none: small random ones")
    parser.add_argument("--label", default="trained", help="what the files and the pictures are called")
    parser.add_argument("--frames", type=int, default=97, help="of each clip, at most")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="of the frames")
    parser.add_argument("--probes", type=int, default=2, help="random cotangents for each influence")
    parser.add_argument("--tiles", type=int, nargs=2, default=(2, 2), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--perceptual", type=Path, help="folder with SqueezeNet's weights: adds LPIPS as a loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("docs/chopgrad"))
    main(parser.parse_args())
