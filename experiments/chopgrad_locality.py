"""How little the past matters to a decoder: temporal locality, truncation, tiles (ChopGrad §3.2, Figs. 3 to 5, 7).

    python -m experiments.chopgrad_locality --vae VAE --backbone weights/world          # small Wan, made-up clips
    python -m experiments.chopgrad_locality --vae weights/base/vae --backbone weights/base --label trained clip.mp4 ...
    python -m experiments.chopgrad_locality --random                                    # random weights: the control

It measures on latents z = encode(clip), takes minutes a clip, and writes chopgrad/locality_LABEL.md, .json and .png.

1. The influence of latent group j on the pixels of group i (Eq. 2): the Frobenius norm of the Jacobian dx_i / dz_j,
   estimated with random probes v, E |J^T v|^2 = |J|_F^2. It is given by distance D = i - j, with the mean and the fit
   C exp(-alpha D) (Eq. 3), by least squares on the logarithm of the mean. Locality is learned: random weights are for
   comparison only.
2. The gradient of a pixel loss by d_trunc, against full backpropagation (Eq. 6): for z the absolute and the relative
   error (Frobenius), for the decoder's parameters the normalised mean absolute error and the cosine.
3. The same for all parameters of a --backbone, under MSE and averaged over the clips. The backbone sees the clips
   without detail: at a fourth of their size and enlarged again (Fig. 4).
4. Tiles against the whole frame, by margin: pixels (difference / standard deviation) and the gradient of z at
   d_trunc 1. The difference left at large margins is no border effect: CogVideoX's GroupNorm and Wan's attention see
   less of the frame.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as nnf

from experiments import common
from experiments.chopgrad_memory import small_decoder
from experiments.model_card import FIRST_SEED
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.data.video import read_clip
from mirage_min.method import chopgrad
from mirage_min.method.perceptual import Lpips
from mirage_min.method.schedules import WAN
from mirage_min.networks.imagenet import Features
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.networks.weights import read_json
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from mirage_min.systems.world import World

VAES = {cls.CLASS_NAME: cls for cls in (CogVideoXVAE, WanVAE)}


def load_vae(folder: Path) -> nn.Module:
    """A CogVideoX or Wan VAE from its folder, in float32; ValueError if it holds another model."""
    name = read_json(folder / "config.json").get("_class_name")
    if name not in VAES:
        raise ValueError(f"{folder}: wanted one of {sorted(VAES)}, got {name}")
    return VAES[name].from_pretrained(folder, dtype=torch.float32)


def load_clip(path: Path, vae: nn.Module, T: int, H: int, W: int) -> Tensor:
    """The first frames of a video, at most T and as many as the VAE takes without padding -> [1, 3, T', H, W]."""
    x = read_clip(path)[:, :T]
    legal = [n for n in range(1, x.shape[1] + 1) if vae.legal_length(n) == n]
    return nnf.interpolate(x[:, : legal[-1]].movedim(0, 1), (H, W), mode="area").movedim(0, 1)[None]


def made_up_clips(vae: nn.Module, count: int, T: int, H: int, W: int) -> list[Tensor]:
    """`count` held-out toy clips [1, 3, T', H, W], with T frames or a few more, as many as the VAE takes."""
    config = WorldConfig(frames=vae.legal_length(T), height=H, width=W)
    return [make_clip(FIRST_SEED + i, config, extras=False).x_gt[None] for i in range(count)]


# ---- 1. influence ----------------------------------------------------------------------------------------------------

def influence(vae: nn.Module, z: Tensor, probes: int) -> list[tuple[int, float]]:
    """(distance i - j, |dx_i / dz_j|_F) of every pair of groups j <= i, for latents z [1, C, F, h, w]."""
    z = z.detach().requires_grad_()
    groups = vae.decode_groups(z.shape[2])
    decoded, cache = [], None
    for group in groups:
        x_g, cache = vae.decode_group(z[:, :, group], cache)
        decoded.append(x_g)
    samples = []
    for i, x_i in enumerate(decoded):
        squares = torch.zeros(i + 1)  # |J_ij|^2 = E |J_ij^T v|^2 for normal v, here the mean over probes
        for _ in range(probes):
            v = torch.randn_like(x_i)
            grad_z = torch.autograd.grad((x_i * v).sum(), z, retain_graph=True)[0]
            squares += torch.stack([grad_z[:, :, group].square().sum() for group in groups[: i + 1]]) / probes
        # L_{i<-j} = |J_ij|                                                             ChopGrad Eq. 2
        samples += [(i - j, math.sqrt(square)) for j, square in enumerate(squares.tolist())]
    return samples


def exponential_fit(means: list[float]) -> dict[str, float]:
    """C, alpha and R² of C exp(-alpha D) through the means at D = 0, 1, ..., by least squares in the logarithm."""
    y = torch.tensor(means).log()
    D = torch.arange(len(means), dtype=torch.float32)
    # log mean(D) = log C - alpha D                                                     ChopGrad Eq. 3
    slope = ((D - D.mean()) * (y - y.mean())).sum() / (D - D.mean()).square().sum()
    log_c = y.mean() - slope * D.mean()
    residual = (y - log_c - slope * D).square().sum() / (y - y.mean()).square().sum()
    return {"C": log_c.exp().item(), "alpha": -slope.item(), "R2": 1 - residual.item()}


# ---- 2. truncation ---------------------------------------------------------------------------------------------------

def gradients(vae: nn.Module, z: Tensor, loss_fn: Callable, **settings) -> tuple[Tensor, Tensor]:
    """One ChopGrad step -> the gradient of z, and those of all decoder parameters in one vector."""
    vae.zero_grad()
    _, grad_z = chopgrad.backward(vae, z, loss_fn, **settings)
    return grad_z, torch.cat([p.grad.flatten() for p in vae.decoder.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors of one shape."""
    # float64: in float32 a sum over millions of parameters is off by 1e-3
    return nnf.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def truncation(vae: nn.Module, z: Tensor, loss_fn: Callable) -> list[dict[str, float]]:
    """How gradients at each d_trunc differ from those of full backpropagation."""
    full_z, full_p = gradients(vae, z, loss_fn, d_trunc=None)
    rows = []
    for d in distances(vae, z.shape[2]):
        grad_z, grad_p = gradients(vae, z, loss_fn, d_trunc=d, delayed=True)
        # |dL/dz - dL_trunc/dz|                                                         ChopGrad Eq. 6
        error = (grad_z - full_z).norm().item()
        rows.append({"d_trunc": d, "z_absolute": error, "z_relative": error / full_z.norm().item(),
                     "z_cosine": cosine(grad_z, full_z),
                     "parameters_nmae": nmae(grad_p, full_p), "parameters_cosine": cosine(grad_p, full_p)})
    return rows


def distances(vae: nn.Module, F: int) -> list[int]:
    """The values of d_trunc to try for F latents: 0 to 3, from there every third, and the largest."""
    N = len(vae.decode_groups(F))
    return sorted({*range(min(4, N)), *range(5, N, 3), N - 1})


def nmae(a: Tensor, b: Tensor) -> float:
    """Normalised mean absolute error: the mean of |a - b| over the mean of |b|."""
    return ((a - b).abs().mean() / b.abs().mean()).item()


def mse_to(x_gt: Tensor) -> Callable[[Tensor, object], Tensor]:
    """loss_fn of chopgrad.backward: a piece's share of the mean squared error to x_gt [1, 3, T, H, W]."""
    return lambda x, where: (x - x_gt[where]).square().sum() / x_gt.numel()


def lpips_to(x_gt: Tensor, perceptual: Path) -> Callable[[Tensor, object], Tensor]:
    """loss_fn of chopgrad.backward: a piece's share of the mean LPIPS; SqueezeNet's weights are in `perceptual`."""
    net = Lpips(Features("squeeze", perceptual))

    def loss_fn(x: Tensor, where) -> Tensor:
        frames = [v.movedim(2, 1).flatten(0, 1) for v in (x, x_gt[where])]
        return net(*frames).sum() / x_gt.shape[2]
    return loss_fn


# ---- 3. the backbone -------------------------------------------------------------------------------------------------

def backbone(restorer: Restorer, clips: list[Tensor]) -> list[dict[str, float]]:
    """How the transformer's gradients at each d_trunc differ from those of full backpropagation.

    A gradient is the mean over clips [1, 3, T, H, W], of all parameters.
    """
    vae = restorer.vae
    params = list(restorer.dit.requires_grad_().parameters())
    F = min((x.shape[2] - 1) // 4 + 1 for x in clips)
    mean = {d: 0.0 for d in (None, *distances(vae, F))}  # gradients by d_trunc
    for x in clips:
        with torch.no_grad():
            z_in = vae.encode(without_detail(x))
        z_out = restorer.denoise(z_in)
        for d in mean:
            _, grad_z = chopgrad.backward(vae, z_out, mse_to(x), d_trunc=d, delayed=d is not None)
            grads = torch.autograd.grad(z_out, params, grad_z, retain_graph=True, materialize_grads=True)
            mean[d] = mean[d] + torch.cat([g.flatten() for g in grads]) / len(clips)
    full = mean.pop(None)
    return [{"d_trunc": d, "backbone_nmae": nmae(g, full), "backbone_cosine": cosine(g, full)}
            for d, g in mean.items()]


def read_backbone(folder: Path, vae: Path) -> Restorer:
    """A base, a restorer, or a world model's transformer with its own VAE, as a remover of artifacts.

    ValueError or OSError of one line if the folder is none of these.
    """
    settings, index = Settings("artifacts"), folder / "model_index.json"
    if index.exists() and read_json(index).get("_class_name") == "World":
        world = World.from_pretrained(folder, dtype=torch.float32)
        return Restorer(world.vae, world.dit, world.text, WAN, settings).requires_grad_(False).eval()
    return Restorer.from_base(folder, settings, vae=vae, dtype=torch.float32)


def without_detail(x: Tensor) -> Tensor:
    """x [1, 3, T, H, W] shrunk to a fourth of its size and enlarged again."""
    frames = nnf.interpolate(x[0].transpose(0, 1), scale_factor=0.25, mode="area")
    return nnf.interpolate(frames, x.shape[-2:], mode="bilinear").transpose(0, 1)[None]


# ---- 4. tiles --------------------------------------------------------------------------------------------------------

def decoded_and_gradient(vae: nn.Module, z: Tensor, x_gt: Tensor, **settings) -> tuple[Tensor, Tensor]:
    """One ChopGrad step at d_trunc 1 -> the pixels it decodes, like x_gt, and the gradient of z."""
    x_dr = torch.empty_like(x_gt)
    mse = mse_to(x_gt)

    def loss_fn(x: Tensor, where) -> Tensor:
        x_dr[where] = x.detach()
        return mse(x, where)

    grad_z, _ = gradients(vae, z, loss_fn, d_trunc=1, **settings)
    return x_dr, grad_z


def tiling(vae: nn.Module, z: Tensor, x_gt: Tensor, tiles: tuple[int, int]) -> list[dict[str, float]]:
    """How pixels and gradients of tiles differ from those of the whole frame, by margin, on the first three groups."""
    latents = vae.decode_groups(z.shape[2])[:3]
    frames = vae.encode_groups(x_gt.shape[2])[:3]
    z, x_gt = z[:, :, : latents[-1].stop], x_gt[:, :, : frames[-1].stop]
    whole_x, whole_g = decoded_and_gradient(vae, z, x_gt)
    rows, margin = [], 0
    while 2 * margin < max(z.shape[3:]):
        x, g = decoded_and_gradient(vae, z, x_gt, tiles=tiles, margin=margin)
        error = (x - whole_x) / whole_x.std()
        rows.append({"margin": margin, "pixels_rms": error.square().mean().sqrt().item(),
                     "pixels_max": error.abs().max().item(),
                     "z_relative": ((g - whole_g).norm() / whole_g.norm()).item(), "z_cosine": cosine(g, whole_g)})
        margin = 2 * margin or 1
    return rows


# ---- all of them -----------------------------------------------------------------------------------------------------

def measure(vae: nn.Module, clips: list[Tensor], probes: int, tiles: tuple[int, int], perceptual: Path | None) -> dict:
    """Measurements 1, 2 and 4 on every clip [1, 3, T, H, W]: influences are pooled, the other rows averaged."""
    samples, tables, tile_tables = [], {}, []
    for n, x in enumerate(clips):
        with torch.no_grad():
            z = vae.encode(x)
        print(f"clip {n + 1} of {len(clips)}: {list(x.shape)}, {len(vae.decode_groups(z.shape[2]))} groups", flush=True)
        losses = {"mse": mse_to(x)}
        if perceptual:
            losses["lpips"] = lpips_to(x, perceptual)
        samples += influence(vae, z, probes)
        for name, loss_fn in losses.items():
            tables.setdefault(name, []).append(truncation(vae, z, loss_fn))
        tile_tables.append(tiling(vae, z, x, tiles))
    means = means_by_distance(samples)
    fit = exponential_fit(means) if len(means) > 2 else None
    return {"samples": samples, "mean": means, "fit": fit,
            "truncation": {name: average(of_clips) for name, of_clips in tables.items()}, "tiles": average(tile_tables)}


def means_by_distance(samples: list[tuple[int, float]]) -> list[float]:
    """The mean influence at distance 0, 1, ..."""
    by_distance = {}
    for distance, value in sorted(samples):
        by_distance.setdefault(distance, []).append(value)
    return [sum(values) / len(values) for values in by_distance.values()]


def average(tables: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Rows of several clips averaged; rows that some of them lack are left out."""
    return [{key: sum(row[key] for row in same) / len(same) for key in same[0]} for same in zip(*tables)]


def draw_locality(result: dict, title: str) -> Figure:
    """Panels: influence by distance, gradient errors by d_trunc, the backbone's if measured, tiles by margin."""
    panels = 4 if "backbone" in result else 3
    figure = Figure(figsize=(4.3 * panels, 3.8), layout="constrained")
    left, middle, *more, right = figure.subplots(1, panels)
    left.semilogy(*zip(*result["samples"]), ".", color="0.7", label="samples")
    left.semilogy(result["mean"], "o-", label="mean")
    if result["fit"]:
        C, alpha, R2 = result["fit"].values()
        left.semilogy([C * math.exp(-alpha * D) for D in range(len(result["mean"]))], "k--",
                      label=f"{C:.3g} exp(-{alpha:.2f} D), R² {R2:.3f}")
    left.set(xlabel="distance in groups", ylabel="influence |J|", title=title)
    for name, rows in result["truncation"].items():
        for key in ("z_relative", "parameters_nmae"):
            middle.plot([row["d_trunc"] for row in rows], [row[key] for row in rows], "o-", label=f"{name}: {key}")
    middle.set(xlabel="d_trunc", ylabel="error against full backpropagation", ylim=(0, None))
    for axis in more:
        rows = result["backbone"]
        for key in ("backbone_nmae", "backbone_cosine"):
            axis.plot([row["d_trunc"] for row in rows], [row[key] for row in rows], "o-", label=key)
        axis.set(xlabel="d_trunc", ylabel="gradients of the backbone's parameters", ylim=(0, None))
    for key in ("pixels_rms", "z_relative"):
        right.plot([row["margin"] for row in result["tiles"]], [row[key] for row in result["tiles"]], "o-", label=key)
    right.set(xlabel="margin in cells", ylabel="tiles against the whole frame", ylim=(0, None))
    for axis in (left, middle, *more, right):
        axis.legend(fontsize=8)
    return figure


def report(result: dict, label: str) -> str:
    """The text of locality_LABEL.md."""
    sizes = ", ".join("x".join(map(str, shape[2:])) for shape in result["clips"])
    rows_by_columns = "x".join(map(str, result["tiles_of"]))
    parts = [f"# Temporal locality, truncation and tiles: {label}",
             f"Made by `python -m experiments.chopgrad_locality`; more digits in locality_{label}.json. Clips of "
             f"{sizes} (frames, rows, columns), {result['probes']} random probes for each influence, "
             f"{rows_by_columns} tiles.",
             "Influence by distance: " + ", ".join(f"{mean:.3g}" for mean in result["mean"])]
    if result["fit"]:
        fit = ", ".join(f"{name} {value:.4g}" for name, value in result["fit"].items())
        parts.append(f"Fit C exp(-alpha D): {fit}")
    tables = result["truncation"] | {"tiles": result["tiles"]}
    if "backbone" in result:
        tables["backbone, mse"] = result["backbone"]
    for name, rows in tables.items():
        first, *header = rows[0]
        cells = [[f"{value:.4g}" for value in row.values()] for row in rows]
        parts.append(common.table([f"{name}: {first}", *header], cells))
    return "\n\n".join(parts) + "\n"


def main(args: argparse.Namespace) -> None:
    """Every measurement on each VAE: JSON, tables and a picture."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.random and args.backbone:
        raise ValueError("--backbone wants the VAE that it was trained with: leave out --random")
    if args.random:
        vaes = {f"random_{name.lower()}": small_decoder(name) for name in ("CogVideoX", "Wan")}
    else:
        vaes = {args.label: load_vae(args.vae)}
    size = args.frames, *args.size
    for label, vae in vaes.items():
        if args.clips:
            clips = [load_clip(path, vae, *size) for path in args.clips]
        elif args.random:
            clips = [torch.rand(1, 3, vae.legal_length(args.frames), *args.size) * 2 - 1]
        else:
            clips = made_up_clips(vae, 2, *size)
        result = {"clips": [list(x.shape) for x in clips], "probes": args.probes, "tiles_of": args.tiles}
        result |= measure(vae.eval(), clips, args.probes, args.tiles, args.perceptual)
        if args.backbone:
            result["backbone"] = backbone(read_backbone(args.backbone, args.vae), clips)
        folder = args.out / "chopgrad"
        common.save_json(folder / f"locality_{label}.json", result)
        common.save_figure(folder / f"locality_{label}.png", draw_locality(result, label))
        common.save_text(folder / f"locality_{label}.md", report(result, label))
        print(report(result, label))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("clips", nargs="*", type=Path, help="videos or folders of images; none: two made-up ones")
    parser.add_argument("--vae", type=Path, default=Path("weights/vae_wan"),
                        help="folder of a CogVideoX or Wan VAE (default weights/vae_wan)")
    parser.add_argument("--random", action="store_true", help="small random VAEs of both kinds instead, on noise")
    parser.add_argument("--label", default="trained_wan", help="LABEL in the files' names (default trained_wan)")
    parser.add_argument("--backbone", type=Path,
                        help="folder of a transformer for this VAE: a base, a restorer or a world model")
    parser.add_argument("--frames", type=int, default=97, help="of each clip, at most (default 97)")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="of the frames")
    parser.add_argument("--probes", type=int, default=2, help="random probes for each influence (default 2)")
    parser.add_argument("--tiles", type=int, nargs=2, default=(2, 2), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--perceptual", type=Path, help="folder with SqueezeNet's weights: adds LPIPS as a loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
