"""R3D2 and R3D2-BIG at the published size, random weights: operations, and seconds and memory against diffusers.

    python -m experiments.speed_r3d2 operations bytes        # at 1080x1920, exact, on the meta device: a minute
    python -m experiments.speed_r3d2 seconds                 # at 128x192 on a CPU, float32: minutes
    python -m experiments.speed_r3d2 seconds --device cuda --size 1080 1920          # bfloat16

Each part puts its figures in speed.json, in place of its last ones. An operation is a multiplication or an addition.
`bytes` counts every storage that lives between two operations, once; `seconds` lets both pipelines take turns on the
same weights, and its memory is what a call takes above them. R3D2 reports 18.1 and 5.96 frames a second on an H200 (its
Table 4).
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import common, measuring, published
from experiments.common import GIB, H200_BF16
from mirage_min.systems.r3d2 import R3D2
from mirage_min.training.memory import expected

SYSTEMS = {"R3D2": 18.129, "R3D2-BIG": 5.964}  # and the frames a second that they report on an H200
ATTENTION = ("bmm", "baddbmm", "scaled_dot_product")  # in the names of operations: queries by keys, weights by values


def count(call: Callable[[], object]) -> tuple[float, float]:
    """Operations of a call, and how many of them are attention's products."""
    with FlopCounterMode(display=False) as counter:
        call()
    by_kind = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in by_kind.items() if any(name in str(kind) for name in ATTENTION))
    return counter.get_total_flops(), products


@torch.no_grad()
def count_parts(system: R3D2, H: int, W: int) -> dict[str, float]:
    """{part: operations} of one image."""
    x = torch.empty(1, 3, H, W, device="meta")
    z, features = system.vae.encode_with_features(x)
    unet, attention = count(lambda: system.denoise(z))
    parts = {"encoder": count(lambda: system.vae.encode_with_features(x))[0], "UNet": unet,
             "of it attention's products": attention, "skips": count(lambda: list(system.skips(features)))[0],
             "decoder": count(lambda: system.vae.decode(z))[0]}
    return parts | {"all": count(lambda: system.enhance(x))[0]}


def operations_part(args: argparse.Namespace) -> dict:
    """Floating-point operations of one image, by part, and the frames a second that they allow."""
    rows = {}
    H, W = args.size or (1080, 1920)
    for name, reported in SYSTEMS.items():
        parts = count_parts(published.r3d2(name, "meta"), H, W)
        rows[name] = {"size": [H, W], "operations": parts, "fps_limit": H200_BF16 / parts["all"], "reported": reported}
        print(f"{name} {H}x{W}: " + ", ".join(f"{part} {n / 1e12:.2f}" for part, n in parts.items())
              + f" TFLOP; an H200 at its peak: {H200_BF16 / parts['all']:.0f} frames/s, reported {reported}")
    return rows


@torch.no_grad()
def bytes_part(args: argparse.Namespace) -> dict:
    """GiB alive at once at most, above the weights, float32 on a CPU: attention has no matrix of scores there."""
    rows = {}
    H, W = args.size or (1080, 1920)
    for name in SYSTEMS:
        ours = published.r3d2(name, "meta")
        peaks = []
        for system, call in ((ours, R3D2.enhance), (published.DiffusersR3D2(ours), published.DiffusersR3D2.forward)):
            parts = expected(nn.ModuleList([system]), lambda models, x, _: call(models[0], x), (1, 3, H, W), "cpu")
            peaks.append(parts["passing"] / GIB)
        rows[name] = {"size": [H, W], "GiB": peaks}
        print(f"{name} {H}x{W}: {peaks[0]:.2f} GiB, diffusers {peaks[1]:.2f}, ratio {peaks[0] / peaks[1]:.2f}")
    return rows


def timed(call: Callable[[], object], device: str) -> tuple[float, int]:
    """(seconds, bytes above what there was) of a call."""
    if device == "cpu":
        return measuring.timed(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def seconds_part(args: argparse.Namespace) -> dict:
    """Seconds and bytes of one image, the best of --repeat turns, ours and diffusers' in turn."""
    rows = {}
    H, W = args.size or (128, 192)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    for name in SYSTEMS:
        torch.manual_seed(0)
        ours = published.r3d2(name, args.device, dtype)
        theirs = published.DiffusersR3D2(ours)
        x = torch.rand(1, 3, H, W).mul(2).sub(1).to(args.device, dtype)
        a, b = ours.enhance(x), theirs(x)  # the first call of each chooses kernels
        difference = ((a - b).float().square().mean().sqrt() / b.float().std()).item()
        runs = defaultdict(list)
        for _ in range(args.repeat):
            for side, call in (("ours", ours.enhance), ("diffusers", theirs)):
                runs[side].append(timed(lambda: call(x), args.device))
        (s, m), (t, n) = (map(min, zip(*runs[side])) for side in ("ours", "diffusers"))  # seconds, bytes
        rows[name] = {"size": [H, W], "dtype": str(dtype), "seconds": [s, t], "bytes": [m, n], "rms": difference}
        print(f"{name} {H}x{W} {dtype}: {s:.2f} s, diffusers {t:.2f}, ratio {s / t:.2f}; {m / GIB:.2f} GiB, "
              f"diffusers {n / GIB:.2f}, ratio {m / n:.2f}; they differ by {difference:.1e} of the std")
    return rows


PARTS = {"operations": operations_part, "bytes": bytes_part, "seconds": seconds_part}


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("part", choices=PARTS, nargs="+", help="see above")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the image, multiples of 8")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of seconds (default cpu)")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each; the best one counts (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    return parser


def main(args: argparse.Namespace) -> None:
    measuring.record_parts(args.out / "speed.json", PARTS, args, prefix="r3d2 ")


if __name__ == "__main__":
    common.start(main, flags())
