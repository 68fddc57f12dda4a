"""Does a stream cost the same memory at any length, and does one see where windows and tiles meet?

    python -m experiments.streaming --real CLIP.mp4 [--long]     # an hour on one core; writes streaming.md and .json

1. Peak memory of infer.py above that of a process which has loaded the model: 33, 330 and, with --long, 3,300 frames
   of noise at 64x96, the shipped model. Linux.
2. Seams: the mean absolute difference of a frame to the one before, of 255, where two groups meet at a border of
   windows and where they meet inside a window; on a static clip, a toy clip and, if given, a real one. A clip moves
   more in some frames than in others, so every frame is seen in both places: copies of the first frame, put before the
   clip and cut off again, move the windows and not the groups.
3. How far the results of two such offsets differ.
4. Tiles: the largest and the mean difference to the untiled result, by the margin.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

from experiments import common, measuring
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.data.video import Video
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.stream import overlap

LOADED = ("import sys, experiments.measuring as m; model = m.Mirage.from_pretrained(sys.argv[1]); "
          "print(m.process_memory('VmRSS'))")


def memory_above_model(model: Path, frames: list[int], H: int = 64, W: int = 96) -> dict[str, float]:
    """{frames: MiB} that infer.py takes at most, above what a process takes that has loaded the model."""
    loaded = int(subprocess.run([sys.executable, "-c", LOADED, model], check=True, text=True, cwd=measuring.ROOT,
                                stdout=subprocess.PIPE).stdout)
    found = {}
    for T in frames:
        with tempfile.TemporaryDirectory() as folder:
            clip = measuring.noise_clip(Path(folder, "in.mp4"), T, H, W)
            flags = "--device", "cpu", "--dtype", "float32", "--model", model, "--set", "change_only=no"
            peak = measuring.peak_of_script("infer.py", clip, Path(folder, "out.mp4"), *flags)
        found[str(T)] = (peak - loaded) / 2**20
    return found


def streamed(mirage: Mirage, x: Tensor, **settings) -> Tensor:
    """x [3, T, H, W] through Mirage.stream -> like x."""
    return torch.stack(list(mirage.stream(x.unbind(1), **settings)), dim=1)


def differences(x: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> mean absolute difference of frames 1, 2, … to the one before, of 255: [T - 1]."""
    return x.diff(dim=1).abs().mean(dim=(0, 2, 3)) * 127.5


def seams(mirage: Mirage, x: Tensor, window: int) -> dict:
    """Parts 2 and 3 for one clip x [3, T, H, W] in [-1, 1], in windows of this many latents."""
    T, shared = x.shape[1], overlap(window, mirage.temporal_patch)
    step, length = window - shared, 8  # a latent is four frames, a group of the decoder two latents
    groups = [g.start for g in mirage.vae.encode_groups(mirage.vae.legal_length(T)) if 0 < g.start < T]
    across, inside = defaultdict(list), defaultdict(list)  # {first frame of a group: differences seen there}
    results = []
    for offset in range(0, step * length, length):  # after `step` of them the windows lie as at first
        y = streamed(mirage, torch.cat([x[:, :1]] * offset + [x], dim=1), window=window)[:, offset:]
        d = differences(y)
        for t in groups:
            k = (t + offset + 3) // 4  # the latent that begins with frame t
            # the latents of an overlap, and the one after it, follow a latent that was made otherwise
            at_border = k >= step and k % step <= shared
            there = across if at_border else inside
            there[t].append(d[t - 1])
        results.append(y)
    both = sorted(across.keys() & inside.keys())
    of_borders, of_insides = (float(torch.stack([torch.stack(found[t]).mean() for t in both]).mean())
                              for found in (across, inside))
    difference = (results[1] - results[0]).abs() * 127.5
    some = difference.flatten()[::7]  # torch takes quantiles of 16 million numbers at most
    return {"frames": T, "window": window, "overlap": shared, "borders": len(both), "offsets": len(results),
            "input": float(differences(x)[[t - 1 for t in both]].mean()), "across": of_borders,
            "inside": of_insides, "offset_mean": float(difference.mean()),
            "offset_p99": float(some.quantile(0.99)), "offset_largest": float(difference.max())}


def tiled(mirage: Mirage, x: Tensor, tiles: int, margins: list[int]) -> list[dict]:
    """Part 4 for x [3, T, H, W] in [-1, 1]: {tiles, margin in latent cells, mean, largest difference of 255}."""
    whole, rows = streamed(mirage, x), []
    for margin in margins:
        d = (streamed(mirage, x, tiles=tiles, margin=margin) - whole).abs() * 127.5
        rows.append({"tiles": tiles, "margin": margin, "mean": float(d.mean()), "largest": float(d.max())})
    return rows


REPORT = """# What a stream costs, and whether one sees it

Made by `{command}`; more digits in [streaming.json](streaming.json). The shipped model, float32, CPU, {date}.

## Peak memory of infer.py above the loaded model, 64x96

| frames | MiB |
|---|---|
{memory}

## Seams

Mean absolute difference of a frame to the one before, of 255, where two of the decoder's groups meet: at a border of
windows, whose latents are blended there, and inside a window. Windows have {window} latents; the small model's own
have 3, and then every group lies at a border. A clip moves more in some frames than in others. So it runs {offsets}
times, each time with more copies of its first frame before it, which moves the windows, and both columns are of the
same frames.

| clip | frames | at borders of windows | inside windows | ratio | the input there |
|---|---|---|---|---|---|
{seams}

## Another window offset

The same clip with its first frame put before it 8 times, which moves every border; the difference of the two results,
of 255. It cannot be zero: every window sees other neighbours, and the clip has another beginning.

| clip | mean | 99 % are below | largest |
|---|---|---|---|
{differences}

## Tiles

The difference to the untiled result, of 255, by the margin around each tile. Neither VAE tiles exactly (CogVideoX:
norms over the tile; Wan: attention over the frame), nor does the 2D VAE (norms).

| clip | tiles | margin, latent cells | mean | largest |
|---|---|---|---|---|
{tiles}
"""


def report(result: dict) -> str:
    """The text of streaming.md."""
    seams = result["seams"].items()
    first = next(iter(result["seams"].values()))
    tables = {
        "memory": [f"| {T} | {mib:.1f} |" for T, mib in result["memory"].items()],
        "seams": [f"| {name} | {s['frames']} | {s['across']:.3f} | {s['inside']:.3f} | {s['across'] / s['inside']:.3f} "
                  f"| {s['input']:.3f} |" for name, s in seams],
        "differences": [f"| {name} | {s['offset_mean']:.2f} | {s['offset_p99']:.1f} | {s['offset_largest']:.0f} |"
                        for name, s in seams],
        "tiles": [f"| {name} | {r['tiles']}x{r['tiles']} | {r['margin']} | {r['mean']:.2f} | {r['largest']:.0f} |"
                  for name, rows in result["tiles"].items() for r in rows]}
    return REPORT.format(command=result["command"], date=result["date"], window=first["window"],
                         offsets=first["offsets"], **{name: "\n".join(lines) for name, lines in tables.items()})


def clips(real: Path | None, T: int) -> dict[str, Tensor]:
    """{name: [3, T, H, W]}: a still picture, a toy clip, and a real one at 136x240."""
    toy = make_clip(1_000_000, WorldConfig(frames=T)).x_ni
    found = {"static": toy[:, :1].expand(-1, T, -1, -1), "toy": toy}
    if real:
        with Video(real) as video:
            frames = torch.stack(list(islice(video, T)))
        found["real"] = nnf.interpolate(frames, (136, 240), mode="bilinear", antialias=True).movedim(0, 1)
    return found


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    path = args.out / "streaming.json"
    if args.no_memory:
        memory = json.loads(path.read_text())["memory"]
    else:
        memory = memory_above_model(args.model, [33, 330, 3300] if args.long else [33, 330])
    command = "python -m experiments.streaming" + " --real REAL" * bool(args.real) + " --long" * ("3300" in memory)
    result = {"torch": torch.__version__, "threads": args.threads, "date": datetime.date.today().isoformat(),
              "command": command, "memory": memory}
    mirage, found = Mirage.from_pretrained(args.model), clips(args.real, args.frames)
    result["seams"] = {name: seams(mirage, x, args.window) for name, x in found.items()}
    result["tiles"] = {name: tiled(mirage, x[:, :9], 2, [0, 1, 2, 4]) for name, x in found.items() if name != "static"}
    common.save_json(path, result)
    common.save_text(args.out / "streaming.md", report(result))
    print(report(result))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--model", type=Path, default=Path("weights"), help="folder of a Mirage (default weights)")
    parser.add_argument("--real", type=Path, help="a real clip; it is shrunk to 136x240")
    parser.add_argument("--long", action="store_true", help="measure the memory of 3,300 frames too")
    parser.add_argument("--no-memory", action="store_true", help="keep the last run's part 1")
    parser.add_argument("--frames", type=int, default=97, help="of the clips for seams (default 97)")
    parser.add_argument("--window", type=int, default=9, help="latents (default 9); in smaller windows every group "
                        "lies at a border")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
