"""Does a stream cost the same memory at any length, and does one see where windows and tiles meet?

    python -m experiments.streaming --real CLIP.mp4 [--long]     # writes docs/streaming.md and docs/streaming.json

1. Peak memory of infer.py, in a process of its own, above what it had when the model was loaded: 33, 330 and, with
   --long, 3,300 frames of noise at 64x96, the shipped model.
2. Seams: the mean absolute difference between consecutive frames of the result, of 255, where two groups meet at a
   window's border and where they meet inside a window; on a static clip, a toy clip and, if given, a real clip. A clip
   moves more in some frames than in others, so every frame is seen in both places: copies of the first frame put before
   the clip, and cut off again, move the windows and not the groups.
3. How far the results of two such offsets differ.
4. Tiles: the largest and the mean difference to the untiled result, by the margin.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.data.video import Format, Video, writing
from mirage_min.systems.mirage import Mirage

ROOT = Path(__file__).parents[1]
# Runs infer.py and reports the process's memory when the model has been loaded, and the highest from then on, in KiB.
PROBE = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import infer
load = infer.Mirage.from_pretrained
def memory(name):
    return int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
def loaded(*path, **settings):
    model = load(*path, **settings)
    Path("/proc/self/clear_refs").write_text("5")                      # the highest so far is forgotten
    print(memory("VmRSS"))
    return model
infer.Mirage.from_pretrained = loaded
infer.steady_heap()
status = infer.cli(sys.argv[1:])
print(memory("VmHWM"))
sys.exit(status)
"""


def noise(path: Path, T: int, H: int, W: int) -> Path:
    """A clip that compresses badly, so that packets are large."""
    generator = torch.Generator().manual_seed(0)
    with writing(path, Format(W, H)) as out:
        for t in range(T):
            out.write(torch.rand(3, H // 4, W // 4, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
                      * 2 - 1, t, 1)
    return path


def peak(T: int, H: int = 64, W: int = 96) -> float:
    """MiB that infer.py takes at most, above what it had with the model loaded."""
    with tempfile.TemporaryDirectory() as folder:
        clip = noise(Path(folder, "in.mp4"), T, H, W)
        out = subprocess.run([sys.executable, "-c", PROBE, clip, Path(folder, "out.mp4"), "--device", "cpu"], cwd=ROOT,
                             check=True, text=True, stdout=subprocess.PIPE).stdout.split("\n")
    return (int(out[-2]) - int(out[0])) / 1024


def streamed(mirage: Mirage, x: Tensor, **settings) -> Tensor:
    return torch.stack(list(mirage.stream(x.unbind(1), **settings)), dim=1)


def differences(x: Tensor) -> Tensor:
    """[3, T, H, W] -> mean absolute difference of frames 1, 2, … to the one before, of 255: [T - 1]."""
    return x.diff(dim=1).abs().mean(dim=(0, 2, 3)) * 127.5


def seams(mirage: Mirage, x: Tensor, window: int) -> dict:
    """Part 2 and 3 for one clip."""
    T, (_, overlap) = x.shape[1], mirage.patch_and_overlap(window)
    step, length = window - overlap, 8  # a latent is four frames, a group of the decoder two latents
    groups = [g.start for g in mirage.vae.encode_groups(mirage.vae.legal_length(T)) if 0 < g.start < T]
    across, inside, results = defaultdict(list), defaultdict(list), []
    for offset in range(0, step * length, length):  # after `step` of them the windows lie as at first
        y = streamed(mirage, torch.cat([x[:, :1]] * offset + [x], dim=1), window=window)[:, offset:]
        d = differences(y)
        for t in groups:
            k = (t + offset + 3) // 4  # the latent that begins with frame t
            # An overlap's latents and the one behind it follow on one that was made otherwise.
            where = across if k >= step and k % step <= overlap else inside
            where[t].append(d[t - 1])
        results.append(y)
    both = sorted(across.keys() & inside.keys())
    difference = (results[1] - results[0]).abs() * 127.5
    return {"frames": T, "window": window, "overlap": overlap, "borders": len(both), "offsets": len(results),
            "input": float(differences(x)[[t - 1 for t in both]].mean()),
            **{name: float(torch.stack([torch.stack(found[t]).mean() for t in both]).mean())
               for name, found in (("across", across), ("inside", inside))},
            "offset_mean": float(difference.mean()), "offset_p99": float(difference.flatten()[::7].quantile(0.99)),
            "offset_largest": float(difference.max())}


def tiled(mirage: Mirage, x: Tensor, tiles: int, margins: list[int]) -> list[dict]:
    """Part 4: by margin, in latent cells."""
    whole = streamed(mirage, x)
    rows = []
    for margin in margins:
        d = (streamed(mirage, x, tiles=tiles, margin=margin) - whole).abs() * 127.5
        rows.append({"tiles": tiles, "margin": margin, "mean": float(d.mean()), "largest": float(d.max())})
    return rows


REPORT = """# What a stream costs, and whether one sees it

Made by `{command}`; more digits in [streaming.json](streaming.json). The shipped model, float32, CPU.

## Peak memory of infer.py above the loaded model, 64x96

| frames | MiB |
|---|---|
{memory}

## Seams

Mean absolute difference of a frame to the one before, of 255, with windows of {window} latents (the small
model's own have 3, and then every group lies at a border): where two of the
decoder's groups meet at a border of windows, whose latents are blended, and where they meet inside a window. A clip
moves more in some frames than in others; so it is put through {offsets} times, with more and more copies of its first
frame before it, until the windows have lain everywhere: both columns are of the same frames.

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
    """docs/streaming.md"""
    seams, first = result["seams"].items(), next(iter(result["seams"].values()))
    tables = {
        "memory": [f"| {T} | {mib:.1f} |" for T, mib in result["memory"].items()],
        "seams": [f"| {name} | {s['frames']} | {s['across']:.3f} | {s['inside']:.3f} | {s['across'] / s['inside']:.3f} "
                  f"| {s['input']:.3f} |" for name, s in seams],
        "differences": [f"| {name} | {s['offset_mean']:.2f} | {s['offset_p99']:.1f} | {s['offset_largest']:.0f} |"
                        for name, s in seams],
        "tiles": [f"| {name} | {r['tiles']}x{r['tiles']} | {r['margin']} | {r['mean']:.2f} | {r['largest']:.0f} |"
                  for name, rows in result["tiles"].items() for r in rows]}
    return REPORT.format(command=result["command"], window=first["window"], offsets=first["offsets"],
                         **{name: "\n".join(lines) for name, lines in tables.items()})


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.no_memory:
        memory = json.loads((args.out / "streaming.json").read_text())["memory"]
    else:
        memory = {str(T): peak(T) for T in (33, 330, *[3300] * args.long)}
    command = "python -m experiments.streaming" + " --real REAL" * bool(args.real) + " --long" * ("3300" in memory)
    result = {"torch": torch.__version__, "threads": args.threads, "command": command, "memory": memory}
    mirage = Mirage.from_pretrained(ROOT / "weights")
    toy = make_clip(1_000_000, WorldConfig(frames=args.frames)).x_ni
    clips = {"static": toy[:, :1].expand(-1, args.frames, -1, -1), "toy": toy}
    if args.real:
        with Video(args.real) as video:
            x = torch.stack(list(islice(video, args.frames)), dim=1)
        clips["real"] = torch.nn.functional.interpolate(x.movedim(1, 0), (136, 240), mode="bilinear", antialias=True
                                                        ).movedim(0, 1)
    result["seams"] = {name: seams(mirage, x, args.window) for name, x in clips.items()}
    result["tiles"] = {name: tiled(mirage, x[:, :9], 2, [0, 1, 2, 4]) for name, x in clips.items() if name != "static"}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "streaming.md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", type=Path, help="a real clip; it is shrunk to 136x240")
    parser.add_argument("--long", action="store_true", help="measure the memory of 3,300 frames too")
    parser.add_argument("--no-memory", action="store_true", help="leave part 1 as it is")
    parser.add_argument("--frames", type=int, default=97, help="of the clips for seams")
    parser.add_argument("--window", type=int, default=9, help="latents; in smaller ones all groups border on two")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for streaming.md and streaming.json")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    main(parser.parse_args())
