"""Our seconds and bytes against diffusers' with the same weights, in turns in one run; and where infer.py's time goes.

    python -m experiments.speed bytes    # bytes of the official VAEs, exact, on the meta device: a minute
    python -m experiments.speed vae      # the official VAEs on a CPU: seconds, memory, share of conv3d's best: minutes
    python -m experiments.speed step     # a training step of the small VAE on a CPU: seconds
    python -m experiments.speed infer    # infer.py with the shipped model at 480x272 and 960x540: minutes
    python -m experiments.speed length   # infer.py by frames and by pixels, with a plot: minutes

Each part writes its figures to speed.json and replaces its earlier ones, as speed_gpu does. Memory is what a call takes
on top of the weights. `bytes` counts every storage that is alive between two operations once, but nothing that an
operation allocates and frees itself. `vae` reads the peak of the process, which includes that. `infer` and `length` do
not need diffusers; `vae`, `infer` and `length` need Linux.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import common, measuring, published
from experiments.common import GIB
from experiments.published import their_decode, their_encode
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.systems.mirage import Mirage
from mirage_min.training.memory import LiveBytes

SMALL_VAE = {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}  # as shipped
VAE_SIZES = (9, 96, 144), (17, 96, 144), (9, 160, 240)


def calls(ours: nn.Module, theirs: nn.Module, size: tuple[int, int, int], device: str = "cpu") -> dict:
    """{(side, "encode" or "decode"): a function that runs it} on a random video of T, H, W = size."""
    T, H, W = size
    x = torch.rand(1, 3, T, H, W, device=device) * 2 - 1
    z = torch.randn(1, 16, (T - 1) // 4 + 1, H // 8, W // 8, device=device)
    return {("ours", "encode"): lambda: ours.encode(x), ("diffusers", "encode"): lambda: their_encode(theirs, x),
            ("ours", "decode"): lambda: ours.decode(z), ("diffusers", "decode"): lambda: their_decode(theirs, z)}


@torch.no_grad()
def bytes_part(args: argparse.Namespace) -> dict[str, float]:
    """GiB alive at once in encode and decode at the published size, float32."""
    rows = {}
    for name, (ours, theirs) in published.vaes("meta").items():
        for (side, way), call in calls(ours, theirs, args.size or (17, 480, 832), "meta").items():
            with LiveBytes(ours, theirs) as live:
                call()
            rows[f"{name} {way} {side}"] = live.peak / GIB
        for way in ("encode", "decode"):
            our_peak, their_peak = rows[f"{name} {way} ours"], rows[f"{name} {way} diffusers"]
            print(f"{name} {way}: {our_peak:.2f} GiB, diffusers {their_peak:.2f}, ratio {our_peak / their_peak:.2f}")
    return rows


@torch.no_grad()
def conv_peak() -> float:
    """Operations a second of the fastest of three conv3d: the most that this machine is known to reach."""
    best = 0.0
    for c, layout in ((64, torch.channels_last_3d), (128, torch.channels_last_3d), (128, torch.contiguous_format)):
        conv = nn.Conv3d(c, c, 3, padding=1).to(memory_format=layout)
        x = torch.randn(1, c, 4, 64, 64).to(memory_format=layout)
        seconds = fastest(lambda: conv(x), 5)
        best = max(best, 2 * 27 * c * c * x[0, 0].numel() / seconds)
    return best


def fastest(call: Callable[[], object], turns: int) -> float:
    """Seconds of the fastest of `turns` calls."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of a call; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as count:
        call()
    return count.get_total_flops()


@torch.no_grad()
def vae_part(args: argparse.Namespace) -> dict:
    """Seconds and bytes of the official VAEs at three sizes, or the one of --size: the best of --repeat turns in which
    all calls alternate."""
    peak = conv_peak()
    rows = {"conv3d_peak": peak}
    for size in [args.size] if args.size else VAE_SIZES:
        for name, pair in published.vaes("cpu").items():
            every = calls(*pair, size)
            runs = {key: [] for key in every}
            for _ in range(args.repeat):
                for key, call in every.items():
                    runs[key].append(measuring.timed(call))
            for way in ("encode", "decode"):
                our_seconds, our_bytes = map(min, zip(*runs["ours", way]))
                their_seconds, their_bytes = map(min, zip(*runs["diffusers", way]))
                share = operations(every["ours", way]) / our_seconds / peak
                label = f"{name} {way} {'x'.join(map(str, size))}"
                rows[label] = {"seconds": [our_seconds, their_seconds], "bytes": [our_bytes, their_bytes],
                               "of_peak": share}
                print(f"{label}: {our_seconds:.2f} s, diffusers {their_seconds:.2f}, "
                      f"ratio {our_seconds / their_seconds:.2f}; {our_bytes / GIB:.2f} GiB, "
                      f"diffusers {their_bytes / GIB:.2f}, ratio {our_bytes / their_bytes:.2f}; "
                      f"{share:.0%} of conv3d's peak", flush=True)
    return rows


def step_part(args: argparse.Namespace) -> dict:
    """Seconds of forward and backward through a VAE of the shipped one's shape, with the MSE of reconstructed clips."""
    theirs = published.diffusers().AutoencoderKLCogVideoX(**published.COG_BLOCKS, **SMALL_VAE)
    ours = CogVideoXVAE(CogVideoXVAEConfig(**SMALL_VAE))
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, *args.size or (9, 64, 64)) * 2 - 1
    steps = {"ours": lambda: (ours.decode(ours.encode(x)) - x).square().mean().backward(),
             "diffusers": lambda: (their_decode(theirs, their_encode(theirs, x)) - x).square().mean().backward()}
    seconds = defaultdict(list)
    for _ in range(args.repeat + 1):
        for side, step in steps.items():
            seconds[side].append(fastest(step, 1))
    our_seconds, their_seconds = min(seconds["ours"]), min(seconds["diffusers"])
    ratio = our_seconds / their_seconds
    at_peak = operations(steps["ours"]) / conv_peak()
    print(f"step {list(x.shape)}: {our_seconds:.3f} s, diffusers {their_seconds:.3f}, ratio {ratio:.2f}; at conv3d's "
          f"peak throughout {at_peak:.3f} s, ratio {at_peak / their_seconds:.2f}")
    return {"shape": list(x.shape), "seconds": [our_seconds, their_seconds], "ratio": ratio, "seconds_at_peak": at_peak}


def seconds_of_infer(T: int, H: int, W: int) -> dict[str, float]:
    """{stage: seconds} of infer.py with the shipped model on T frames of noise, without loading the model."""
    stages = measuring.STAGES | {"loading": (Mirage, "from_pretrained")}
    with tempfile.TemporaryDirectory() as folder:
        clip = measuring.noise_clip(Path(folder, "in.mp4"), T, H, W)
        with measuring.stopwatch(stages) as spent:
            start = time.perf_counter()
            measuring.run_script("infer.py", clip, f"{folder}/out.mp4", "--device", "cpu", "--dtype", "float32",
                                 "--set", "change_only=no")
            total = time.perf_counter() - start
    by_stage = {stage: spent[stage] for stage in measuring.STAGES}
    return by_stage | {"reading, writing, the rest": total - sum(spent.values())}


def infer_part(args: argparse.Namespace) -> dict:
    """The share of infer.py's time that each of the model's stages takes, and reading, writing and the rest."""
    rows = {}
    for H, W in ((272, 480), (540, 960)):
        spent = seconds_of_infer(args.frames, H, W)
        total = sum(spent.values())
        shares = {stage: seconds / total for stage, seconds in spent.items()}
        rows[f"{W}x{H}"] = {"frames": args.frames, "fps": args.frames / total, "share": shares}
        print(f"{W}x{H}: {args.frames / total:.2f} frames/s; "
              + ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items()))
    return rows


def length_part(args: argparse.Namespace) -> dict:
    """Seconds by number of frames at 64x96, and seconds a frame by number of pixels; draws speed_length.png."""
    frames = [T for T in (9, 33, 97, 297, 1001) if T <= max(args.frames, 33)]
    sizes = [(64, 96), (128, 192), (192, 288), (256, 384)]
    seconds = [sum(seconds_of_infer(T, 64, 96).values()) for T in frames]
    by_pixels = [{stage: spent / 17 for stage, spent in seconds_of_infer(17, H, W).items()} for H, W in sizes]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(frames, seconds, "o-")
    left.set(xlabel="frames, 64x96", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    for stage in by_pixels[0]:
        right.plot([H * W / 1000 for H, W in sizes], [row[stage] for row in by_pixels], "o-", label=stage)
    right.set(xlabel="1000 pixels", ylabel="seconds a frame", xlim=(0, None), ylim=(0, None))
    right.legend()
    common.save_figure(args.out / "speed_length.png", figure)
    for T, spent in zip(frames, seconds):
        print(f"{T} frames: {spent:.2f} s, {1000 * spent / T:.1f} ms a frame")
    return {"frames": frames, "seconds": seconds, "sizes": sizes, "seconds_a_frame": by_pixels}


PARTS = {"bytes": bytes_part, "vae": vae_part, "step": step_part, "infer": infer_part, "length": length_part}


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("part", choices=PARTS, nargs="+", help="see above")
    parser.add_argument("--size", type=int, nargs=3, metavar=("T", "H", "W"), help="of the clips of bytes, vae, step")
    parser.add_argument("--frames", type=int, default=33, help="of the clips of infer, and at most those of length")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each; the best one counts (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    return parser


def main(args: argparse.Namespace) -> None:
    measuring.record_parts(args.out / "speed.json", PARTS, args)


if __name__ == "__main__":
    common.start(main, flags())
