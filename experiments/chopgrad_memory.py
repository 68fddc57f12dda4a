"""What ChopGrad holds for backward, and what it costs: ChopGrad Figs. 6 and 13, and the frames that fit a GPU.

Bytes are counted exactly, by saved-tensor hooks and not from the process: every storage that autograd holds for
backward counts once for as long as it is held, parameters do not count, and the number reported is the peak. So three
things are left out: gradients, the working memory of single operations, and the video itself.

    python -m experiments.chopgrad_memory    # three minutes on one core; writes chopgrad/memory.md, .json and pictures

1. Small random decoders, 9 to 97 frames: plain autograd through decode() against d_trunc 0, 1, 2.
2. A dozen groups, by distance: bytes, CPU seconds and passes through a group, plain and delayed, against autograd.
3. The published decoders at full size in bfloat16, on the meta device, which has shapes and no data: the count is
   exact, nothing runs. The frames that fit are therefore computed, not measured. That device has no fused attention:
   Wan's numbers are 1 (480 x 832) to 2 % (720 x 1280) above those of a GPU that has.
"""

import argparse
import time
from itertools import product

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import common
from experiments.common import GIB
from mirage_min.method import chopgrad
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.training.memory import SavedBytes

LENGTHS, TIMED = range(9, 98, 8), (33, 65, 97)  # frames
FIRST = {"CogVideoX": (9, 8), "Wan": (5, 4)}  # (a, b): from a + b · d_trunc frames on, d_trunc + 1 full groups are held
DOZEN = {"CogVideoX": 97, "Wan": 45}  # frames of a dozen groups


def small_decoder(name: str) -> nn.Module:
    """A random VAE of the published structure with few channels."""
    torch.manual_seed(0)
    if name == "CogVideoX":
        return CogVideoXVAE(CogVideoXVAEConfig(3, 3, (8, 8, 16, 16), layers_per_block=1, norm_num_groups=4))
    return WanVAE(WanVAEConfig(base_dim=8, num_res_blocks=1))


def latents(T: int, h: int, w: int, vae: nn.Module) -> Tensor:
    """Random latents [1, 16, F, h, w] of T frames, with the device and the type of the VAE."""
    p = next(vae.parameters())
    return torch.randn(1, 16, (T - 1) // 4 + 1, h, w, device=p.device, dtype=p.dtype)


def sum_of_squares(x: Tensor, where) -> Tensor:
    """A pixel loss."""
    return x.square().sum()


def step(vae: nn.Module, z: Tensor, method: dict) -> None:
    """Forward and backward by ChopGrad with these settings; {}: by plain autograd, the whole clip in one graph."""
    if method:
        chopgrad.backward(vae, z, sum_of_squares, **method)
    else:
        sum_of_squares(vae.decode(z.detach().requires_grad_()), None).backward()


def peak(vae: nn.Module, z: Tensor, **method) -> int:
    """Peak bytes held for backward in a step."""
    with SavedBytes(vae) as held:
        step(vae, z, method)
    vae.zero_grad()
    return held.peak


def seconds(vae: nn.Module, z: Tensor, repeat: int, **method) -> float:
    """CPU seconds of a step, the best of `repeat`."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        step(vae, z, method)
        times.append(time.process_time() - start)
        vae.zero_grad()
    return min(times)


def by_length(name: str, size: int, repeat: int, lengths=LENGTHS, timed=TIMED) -> dict:
    """Part 1, for latents of size x size cells: `frames`; `bytes` by method and length; `ms_per_frame` by method at the
    lengths `timed`; and by method the `spread`: how far its bytes range, as a fraction, once the window is full."""
    vae = small_decoder(name)
    a, b = FIRST[name]
    methods = {"autograd": {}}
    for delayed, d in product((False, True), (0, 1, 2)):
        methods[f"d={d}{', delayed' * delayed}"] = {"d_trunc": d, "delayed": delayed}
    clips = {T: latents(T, size, size, vae) for T in lengths}
    table = {"frames": list(lengths), "bytes": {}, "timed": timed, "ms_per_frame": {}, "spread": {}}
    for label, method in methods.items():
        held = [peak(vae, z, **method) for z in clips.values()]
        table["bytes"][label] = held
        table["ms_per_frame"][label] = [1e3 * seconds(vae, clips[T], repeat, **method) / T for T in timed]
        if method:
            full = [n for T, n in zip(lengths, held) if T >= a + b * method["d_trunc"]]
            table["spread"][label] = max(full) / min(full) - 1
    return table


def by_distance(name: str, size: int, repeat: int) -> dict:
    """Part 2: bytes, seconds and passes for the first distances, every third and the last, on a dozen groups."""
    vae, T = small_decoder(name), DOZEN[name]
    z = latents(T, size, size, vae)
    N = len(vae.decode_groups(z.shape[2]))
    distances = sorted({0, 1, 2, *range(2, N, 3), N - 1})
    table = {"frames": T, "groups": N, "d_trunc": distances,
             "autograd": {"bytes": peak(vae, z), "seconds": seconds(vae, z, repeat)}}
    for variant in ("plain", "delayed"):
        methods = [{"d_trunc": d, "delayed": variant == "delayed"} for d in distances]
        table[variant] = {"bytes": [peak(vae, z, **method) for method in methods],
                          "seconds": [seconds(vae, z, repeat, **method) for method in methods],
                          "passes": [passes(N, **method) for method in methods]}
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
            about = {"vae": cls.__name__, "size": [H, W], "weights": sum(p.nbytes for p in vae.decoder.parameters())}
            rows.append(about | bytes_at_size(vae, H // 8, W // 8))
    return rows


def bytes_at_size(vae: nn.Module, h: int, w: int) -> dict:
    """{autograd: bytes by frames, d_trunc: {tiles: bytes at d_trunc 0, 1, 2}, cache: bytes of one} on h x w cells."""
    z = latents(25, h, w, vae)
    row = {"autograd": {T: peak(vae, latents(T, h, w, vae)) for T in (1, 9, 17, 25)}, "d_trunc": {}}
    for n in (1, 2, 4):
        tile = z[..., : -(-h // n), : -(-w // n)]  # the largest of n x n
        row["d_trunc"][f"{n}x{n}"] = [peak(vae, tile, d_trunc=d) for d in (0, 1, 2)]
    cache = None
    for group in vae.decode_groups(z.shape[2])[:3]:
        _, cache = vae.decode_group(z[:, :, group], cache)
    return row | {"cache": sum(c.nbytes for c in cache.values())}


def frames_within(row: dict, budget: float) -> int:
    """The longest clip whose graph, with the weights, fits `budget` GiB without ChopGrad: 8k + 1 frames, 1, or none."""
    held, room = row["autograd"], budget * GIB - row["weights"]
    T = 25 + 8 * int((room - held[25]) // (held[25] - held[17]))
    return T if T >= 9 else int(held[1] <= room)


# ---- pictures and tables ---------------------------------------------------------------------------------------------

def draw_lengths(name: str, table: dict) -> Figure:
    """What by_length found."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, held in table["bytes"].items():
        style = "--" if "delayed" in method else "-"
        style = "k-" if method == "autograd" else style
        left.plot(table["frames"], [n / 2**20 for n in held], style, label=method)
        right.plot(table["timed"], table["ms_per_frame"][method], style, label=method)
    left.set(xlabel="frames", ylabel="MiB held for backward", ylim=(0, None), title=f"{name}, small and random")
    right.set(xlabel="frames", ylabel="CPU ms a frame", ylim=(0, None))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_distances(name: str, table: dict) -> Figure:
    """What by_distance found."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for variant in ("plain", "delayed"):
        left.plot(table["d_trunc"], [n / 2**20 for n in table[variant]["bytes"]], "o-", label=variant)
        right.plot(table["d_trunc"], table[variant]["seconds"], "o-", label=variant)
    left.axhline(table["autograd"]["bytes"] / 2**20, color="k", ls="--", label="autograd")
    right.axhline(table["autograd"]["seconds"], color="k", ls="--", label="autograd")
    title = f"{name}, small and random, {table['frames']} frames"
    left.set(xlabel="d_trunc", ylabel="MiB held for backward", title=title, ylim=(0, None))
    right.set(xlabel="d_trunc", ylabel="CPU seconds a step", ylim=(0, None))
    left.legend()
    return figure


def length_table(name: str, table: dict) -> str:
    """What by_length found, in Markdown; of the lengths every other."""
    header = ["", *table["frames"][::2], "spread once full", "ms a frame", "x autograd"]
    base, rows = table["ms_per_frame"]["autograd"][-1], []
    for method, held in table["bytes"].items():
        spread = f"{table['spread'][method]:.2%}" if method in table["spread"] else ""
        ms = table["ms_per_frame"][method][-1]
        rows.append([method, *(f"{n / 2**20:.1f}" for n in held[::2]), spread, f"{ms:.1f}", f"{ms / base:.2f}"])
    return (f"## {name}, small: MiB held for backward, by frames; CPU ms a frame at {table['timed'][-1]} frames\n\n"
            + common.table(header, rows))


def distance_table(name: str, table: dict) -> str:
    """What by_distance found, in Markdown."""
    autograd, rows = table["autograd"], []
    for i, d in enumerate(table["d_trunc"]):
        row = [d]
        for key, scale, digits in (("bytes", 2**20, 1), ("seconds", 1, 2), ("passes", 1, 0)):
            row += [f"{table[variant][key][i] / scale:.{digits}f}" for variant in ("plain", "delayed")]
        rows.append(row)
    header = ["d_trunc", "MiB", "delayed", "seconds", "delayed", "passes", "delayed"]
    return (f"## {name}, small, {table['groups']} groups: MiB, CPU seconds and passes by d_trunc "
            f"(autograd: {autograd['bytes'] / 2**20:.1f} MiB, {autograd['seconds']:.2f} s)\n\n"
            + common.table(header, rows))


def full_size_table(sizes: list[dict]) -> str:
    """What full_size found, in Markdown."""
    header = ["VAE", "size", "9 frames", "25 frames", "fit 24", "fit 80", "tiles", "d=0", "d=1", "d=2",
              "d=1, checkpoint"]
    rows = []
    for row in sizes:
        size, autograd = f"{row['size'][0]}x{row['size'][1]}", row["autograd"]
        whole = [f"{autograd[T] / GIB:.1f}" for T in (9, 25)] + [frames_within(row, budget) for budget in (24, 80)]
        for tiles, held in row["d_trunc"].items():
            caches = 2 * row["cache"] * held[0] / row["d_trunc"]["1x1"][0]  # checkpointing: one graph and two caches
            rows.append([row["vae"], size, *whole, tiles, *(f"{n / GIB:.1f}" for n in (*held, held[0] + caches))])
    return ("## Published decoders, bfloat16, computed: GiB held for backward\n\n"
            "By plain autograd and by d_trunc; the frames of plain autograd that fit 24 and 80 GiB with the decoder's\n"
            "weights.\n\n" + common.table(header, rows) + "\n\nThe last four columns hold for any number of frames.")


def report(result: dict) -> str:
    """The text of memory.md."""
    parts = ["# What ChopGrad holds for backward, and what it costs",
             "Made by `python -m experiments.chopgrad_memory`, which says what is counted; the figures are in "
             "[memory.json](memory.json)."]
    parts += [length_table(name, table) for name, table in result["by_length"].items()]
    parts += [distance_table(name, table) for name, table in result["by_distance"].items()]
    return "\n\n".join([*parts, full_size_table(result["full_size"])]) + "\n"


def main(args: argparse.Namespace) -> None:
    """All three parts, in JSON, tables and pictures."""
    torch.set_num_threads(args.threads)
    result = {"torch": torch.__version__, "threads": args.threads, "size": args.size,
              "by_length": {name: by_length(name, args.size, args.repeat) for name in FIRST},
              "by_distance": {name: by_distance(name, args.size, args.repeat) for name in FIRST},
              "full_size": full_size()}
    folder = args.out / "chopgrad"
    common.save_json(folder / "memory.json", result)
    for name in FIRST:
        lengths, distances = result["by_length"][name], result["by_distance"][name]
        common.save_figure(folder / f"memory_{name.lower()}_by_length.png", draw_lengths(name, lengths))
        common.save_figure(folder / f"memory_{name.lower()}_by_distance.png", draw_distances(name, distances))
    common.save_text(folder / "memory.md", report(result))
    print(report(result))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--size", type=int, default=2, help="rows and columns of the small latents (default 2)")
    parser.add_argument("--repeat", type=int, default=2, help="timed runs; the best one counts (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1); small work is slower on more")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
