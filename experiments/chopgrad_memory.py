"""What ChopGrad holds for backward, and what it costs: ChopGrad Figs. 6 and 13, and the frames that fit a GPU.

Bytes are counted exactly, by saved-tensor hooks and not from the process: every storage that autograd holds for
backward counts once for as long as it is held, parameters do not count, and the number reported is the peak. So three
things are left out: gradients, the working memory of single operations, and the video itself.

    python -m experiments.chopgrad_memory    # some three minutes on one core; writes JSON and PNG to docs/chopgrad

1. Small random decoders, 9 to 97 frames: plain autograd through decode() against d_trunc 0, 1, 2.
2. A dozen groups, by distance: bytes, CPU seconds and passes through a group, plain and delayed, against autograd.
3. The published decoders at full size in bfloat16, on the meta device, which has shapes and no data: the count is
   exact, nothing runs. The frames that fit are therefore computed, not measured. That device has no fused attention:
   Wan's numbers are 1 (480 x 832) to 2 % (720 x 1280) above those of a GPU that has.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from mirage_min.method import chopgrad
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.training.memory import Held

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

LENGTHS, TIMED = range(9, 98, 8), (33, 65, 97)  # frames
FIRST = {"CogVideoX": (9, 8), "Wan": (5, 4)}  # (a, b): from a + b * d_trunc frames on, d_trunc + 1 full groups are held
GIB = 2**30


def small(name: str) -> nn.Module:
    """A random decoder of the published structure with few channels."""
    torch.manual_seed(0)
    if name == "CogVideoX":
        return CogVideoXVAE(CogVideoXVAEConfig(3, 3, (8, 8, 16, 16), layers_per_block=1, norm_num_groups=4))
    return WanVAE(WanVAEConfig(base_dim=8, num_res_blocks=1))


def square(x: Tensor, where) -> Tensor:
    return x.square().sum()


def autograd(vae: nn.Module, z: Tensor) -> None:
    """The baseline: no ChopGrad, the whole clip in one graph."""
    square(vae.decode(z.detach().requires_grad_()), None).backward()


def peak(vae: nn.Module, z: Tensor, **how) -> int:
    """Peak bytes held, by ChopGrad or, without `how`, by plain autograd."""
    with Held(vae) as held:
        chopgrad.backward(vae, z, square, **how) if how else autograd(vae, z)
    vae.zero_grad()
    return held.peak


def seconds(vae: nn.Module, z: Tensor, repeat: int, **how) -> float:
    """CPU seconds of one step, the best of `repeat`."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        chopgrad.backward(vae, z, square, **how) if how else autograd(vae, z)
        times.append(time.process_time() - start)
        vae.zero_grad()
    return min(times)


def latents(T: int, h: int, w: int, like: nn.Module) -> Tensor:
    p = next(like.parameters())
    return torch.randn(1, 16, (T - 1) // 4 + 1, h, w, device=p.device, dtype=p.dtype)


def by_length(name: str, size: int, repeat: int) -> dict:
    """Part 1: frames; bytes by method and length; ms a frame by method at the lengths timed; and for each method the
    spread: how far its bytes range, as a fraction, once the window is full.
    """
    vae, (a, b) = small(name), FIRST[name]
    methods = {"autograd": {}} | {f"d={d}{', delayed' * delayed}": {"d_trunc": d, "delayed": delayed}
                                  for delayed in (False, True) for d in (0, 1, 2)}
    table = {"frames": list(LENGTHS), "bytes": {}, "timed": TIMED, "ms_per_frame": {}, "spread": {}}
    for method, how in methods.items():
        clips = {T: latents(T, size, size, vae) for T in LENGTHS}
        table["bytes"][method] = held = [peak(vae, z, **how) for z in clips.values()]
        table["ms_per_frame"][method] = [1e3 * seconds(vae, clips[T], repeat, **how) / T for T in TIMED]
        if how:
            full = [bytes for T, bytes in zip(LENGTHS, held) if T >= a + b * how["d_trunc"]]
            table["spread"][method] = max(full) / min(full) - 1
    return table


def by_distance(name: str, size: int, repeat: int) -> dict:
    """Part 2: bytes, seconds and passes for the first distances, every third and the last, on a dozen groups."""
    vae, T = small(name), {"CogVideoX": 97, "Wan": 45}[name]
    z = latents(T, size, size, vae)
    N = len(vae.decode_groups(z.shape[2]))
    distances = sorted({0, 1, 2, *range(2, N, 3), N - 1})
    table = {"frames": T, "groups": N, "d_trunc": distances,
             "autograd": {"bytes": peak(vae, z), "seconds": seconds(vae, z, repeat)}}
    for variant in ("plain", "delayed"):
        hows = [{"d_trunc": d, "delayed": variant == "delayed"} for d in distances]
        table[variant] = {"bytes": [peak(vae, z, **how) for how in hows],
                          "seconds": [seconds(vae, z, repeat, **how) for how in hows],
                          "passes": [passes(N, **how) for how in hows]}
    return table


def passes(N: int, d_trunc: int, delayed: bool) -> int:
    """Backward passes through one group: each of N losses reaches up to d_trunc groups back."""
    d = min(d_trunc, N - 1)
    return (N - d) * (d + 1) if delayed else N * (d + 1) - d * (d + 1) // 2


def full_size() -> list[dict]:
    """Part 3: exact bytes at the published sizes, bfloat16, whole decoder trainable."""
    rows = []
    for cls in (CogVideoXVAE, WanVAE):
        with torch.device("meta"):
            vae = cls().to(torch.bfloat16)
        for H, W in ((480, 832), (720, 1280)):
            h, w = H // 8, W // 8
            z = latents(25, h, w, vae)
            row = {"vae": cls.__name__, "size": [H, W], "weights": sum(p.nbytes for p in vae.decoder.parameters()),
                   "autograd": {T: peak(vae, latents(T, h, w, vae)) for T in (1, 9, 17, 25)}, "d_trunc": {}}
            for rows_cols in ((1, 1), (2, 2), (4, 4)):
                tile = z[..., : -(-h // rows_cols[0]), : -(-w // rows_cols[1])]  # the largest of them
                row["d_trunc"]["%dx%d" % rows_cols] = [peak(vae, tile, d_trunc=d) for d in (0, 1, 2)]
            cache = None
            for g in vae.decode_groups(z.shape[2])[:3]:
                _, cache = vae.decode_group(z[:, :, g], cache)
            row["cache"] = sum(c.nbytes for c in cache.values())
            rows.append(row)
    return rows


def frames_within(row: dict, budget: float) -> int:
    """The longest clip whose graph, with the weights, fits `budget` GiB without ChopGrad: 8k + 1 frames, 1, or none."""
    held, room = row["autograd"], budget * GIB - row["weights"]
    T = 25 + 8 * int((room - held[25]) // (held[25] - held[17]))
    return T if T >= 9 else int(held[1] <= room)


def plot_lengths(name: str, table: dict, path: Path) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for method in table["bytes"]:
        style = "k-" if method == "autograd" else "--" if "delayed" in method else "-"
        axes[0].plot(table["frames"], [b / 2**20 for b in table["bytes"][method]], style, label=method)
        axes[1].plot(table["timed"], table["ms_per_frame"][method], style, label=method)
    axes[0].set(xlabel="frames", ylabel="MiB held for backward", ylim=(0, None), title=f"{name}, small and random")
    axes[1].set(xlabel="frames", ylabel="CPU ms a frame", ylim=(0, None))
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_distances(name: str, table: dict, path: Path) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for variant in ("plain", "delayed"):
        axes[0].plot(table["d_trunc"], [b / 2**20 for b in table[variant]["bytes"]], "o-", label=variant)
        axes[1].plot(table["d_trunc"], table[variant]["seconds"], "o-", label=variant)
    axes[0].axhline(table["autograd"]["bytes"] / 2**20, color="k", ls="--", label="autograd")
    axes[1].axhline(table["autograd"]["seconds"], color="k", ls="--", label="autograd")
    title = f"{name}, small and random, {table['frames']} frames"
    axes[0].set(xlabel="d_trunc", ylabel="MiB held for backward", title=title, ylim=(0, None))
    axes[1].set(xlabel="d_trunc", ylabel="CPU seconds a step", ylim=(0, None))
    axes[0].legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def print_tables(result: dict) -> None:
    for name, table in result["by_length"].items():
        print(f"\n### {name}, small: MiB held for backward, by frames; CPU ms a frame at {LENGTHS[-1]} frames\n")
        print("| | " + " | ".join(map(str, table["frames"][::2])) + " | spread once full | ms a frame | x autograd |")
        print("|---" * (len(table["frames"][::2]) + 4) + "|")
        base = table["ms_per_frame"]["autograd"][-1]
        for method, held in table["bytes"].items():
            ms, spread = table["ms_per_frame"][method][-1], table["spread"].get(method)
            print(f"| {method} | " + " | ".join(f"{b / 2**20:.1f}" for b in held[::2])
                  + f" | {'' if spread is None else f'{spread:.2%}'} | {ms:.1f} | {ms / base:.2f} |")
    for name, table in result["by_distance"].items():
        print(f"\n### {name}, small, {table['groups']} groups: MiB, CPU seconds and passes by d_trunc "
              f"(autograd: {table['autograd']['bytes'] / 2**20:.1f} MiB, {table['autograd']['seconds']:.2f} s)\n")
        print("| d_trunc | MiB | delayed | seconds | delayed | passes | delayed |\n|---|---|---|---|---|---|---|")
        for i, d in enumerate(table["d_trunc"]):
            print(f"| {d} | " + " | ".join(f"{table[v][key][i] / scale:.{digits}f}" for key, scale, digits in (
                ("bytes", 2**20, 1), ("seconds", 1, 2), ("passes", 1, 0)) for v in ("plain", "delayed")) + " |")
    print("\n### Published decoders, bfloat16, computed: GiB held for backward by plain autograd and by d_trunc; the\n"
          "frames of plain autograd that fit 24 and 80 GiB beside the decoder's weights\n")
    print("| VAE | size | 9 frames | 25 frames | fit 24 | fit 80 | tiles | d=0 | d=1 | d=2 | d=1, checkpoint |")
    print("|---" * 11 + "|")
    for row in result["full_size"]:
        for tiles, held in row["d_trunc"].items():
            caches = 2 * row["cache"] * held[0] / row["d_trunc"]["1x1"][0]
            print(f"| {row['vae']} | {row['size'][0]}x{row['size'][1]} | {row['autograd'][9] / GIB:.1f} | "
                  f"{row['autograd'][25] / GIB:.1f} | {frames_within(row, 24)} | {frames_within(row, 80)} | {tiles} | "
                  + " | ".join(f"{b / GIB:.1f}" for b in held) + f" | {(held[0] + caches) / GIB:.1f} |")
    print("\nThe last four columns hold for any number of frames. Checkpointing: one graph and two caches.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/chopgrad"), help="folder for memory.json and pictures")
    parser.add_argument("--size", type=int, default=2, help="height and width of the small decoders' latents, in cells")
    parser.add_argument("--repeat", type=int, default=2, help="timed runs of each, of which the best counts")
    parser.add_argument("--threads", type=int, default=1, help="of torch; small work is slower on more")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("CogVideoX", "Wan")
    result = {"torch": torch.__version__, "threads": args.threads, "size": args.size,
              "by_length": {name: by_length(name, args.size, args.repeat) for name in names},
              "by_distance": {name: by_distance(name, args.size, args.repeat) for name in names},
              "full_size": full_size()}
    for name in names:
        plot_lengths(name, result["by_length"][name], args.out / f"memory_{name.lower()}_by_length.png")
        plot_distances(name, result["by_distance"][name], args.out / f"memory_{name.lower()}_by_distance.png")
    (args.out / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    print_tables(result)
