"""What it costs, against diffusers on the same weights, turn by turn in one run.

    python -m experiments.speed bytes    # exact live bytes of the official VAEs, on the meta device
    python -m experiments.speed vae      # official VAEs, CPU: seconds, process memory, share of conv3d's peak
    python -m experiments.speed step     # a training step of the small VAE, CPU
    python -m experiments.speed infer    # where infer.py's time goes, shipped model, 480x272 and 960x540
    python -m experiments.speed length   # cost against frames and against pixels, with a plot

Each part adds its figures to docs/speed.json, as speed_gpu.py does. Memory is what a call takes above the weights.
`bytes` counts every storage that lives between two operations, once; what an operation uses inside itself is not
counted. `vae` reads the process's own peak, which has that, too. All but `infer` and `length` need diffusers.
"""

import argparse
import ctypes
import gc
import json
import re
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.systems.mirage import Mirage
from mirage_min.training.memory import Live

ROOT = Path(__file__).parents[1]
GIB = 2**30
COG_VAE = {"down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4}
COG_1_5_VAE = {"block_out_channels": (128, 256, 256, 512), "layers_per_block": 3, "scaling_factor": 0.7}


def official_vaes(device: str) -> dict[str, tuple]:
    """name -> (ours, diffusers') with the same random weights."""
    from tests.torchvision_stub import stub
    stub()
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

    torch.manual_seed(0)
    pairs = {}
    for name, ours, theirs in (("CogVideoX", lambda: CogVideoXVAE(CogVideoXVAEConfig(**COG_1_5_VAE)),
                                lambda: AutoencoderKLCogVideoX(**COG_VAE, **COG_1_5_VAE)),
                               ("Wan", WanVAE, AutoencoderKLWan)):
        with torch.device(device):
            pairs[name] = tuple(make().eval().requires_grad_(False) for make in (ours, theirs))
        pairs[name][0].load_state_dict(pairs[name][1].state_dict())
    return pairs


def their_decode(vae: nn.Module, z: Tensor) -> Tensor:
    return vae.decode(z).sample


def their_encode(vae: nn.Module, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.mean


def calls(pair: tuple, T: int, H: int, W: int, device: str = "cpu") -> dict:
    """(side, what) -> the call."""
    mine, theirs = pair
    x = torch.rand(1, 3, T, H, W, device=device) * 2 - 1
    z = torch.randn(1, 16, (T - 1) // 4 + 1, H // 8, W // 8, device=device)
    return {("ours", "encode"): lambda: mine.encode(x), ("diffusers", "encode"): lambda: their_encode(theirs, x),
            ("ours", "decode"): lambda: mine.decode(z), ("diffusers", "decode"): lambda: their_decode(theirs, z)}


@torch.no_grad()
def bytes_part(args) -> dict:
    """Live bytes of encode and decode at the published size, float32."""
    rows = {}
    for name, pair in official_vaes("meta").items():
        for (side, what), call in calls(pair, *args.size or (17, 480, 832), "meta").items():
            with Live(*pair) as live:
                call()
            rows[f"{name} {what} {side}"] = live.peak / GIB
        for what in ("encode", "decode"):
            a, b = rows[f"{name} {what} ours"], rows[f"{name} {what} diffusers"]
            print(f"{name} {what}: {a:.2f} GiB, diffusers {b:.2f}, ratio {a / b:.2f}")
    return rows


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    return 1024 * int(re.search(name + r":\s*(\d+)", Path("/proc/self/status").read_text())[1])


def timed(call) -> tuple[float, int]:
    """Seconds, and bytes that the process took at most above what it had before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before, start = memory("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - start, memory("VmHWM") - before


def conv_peak() -> float:
    """Operations a second of the best conv3d found here: what this machine gives."""
    best = 0.0
    for c, layout in ((64, torch.channels_last_3d), (128, torch.channels_last_3d), (128, torch.contiguous_format)):
        conv = nn.Conv3d(c, c, 3, padding=1).to(memory_format=layout)
        x = torch.randn(1, c, 4, 64, 64).to(memory_format=layout)
        with torch.no_grad():
            seconds = min(timed(lambda: conv(x))[0] for _ in range(5))
        best = max(best, 2 * 27 * c * c * x[0, 0].numel() / seconds)
    return best


@torch.no_grad()
def vae_part(args) -> dict:
    size, peak = args.size or (9, 256, 384), conv_peak()
    rows = {"conv3d_peak": peak}
    for name, pair in official_vaes("cpu").items():
        seconds, took = defaultdict(list), defaultdict(list)
        every = calls(pair, *size)
        for _ in range(args.repeat):
            for key, call in every.items():
                s, b = timed(call)
                seconds[key].append(s)
                took[key].append(b)
        for what in ("encode", "decode"):
            with FlopCounterMode(display=False) as count:
                every["ours", what]()
            a, b = (min(seconds[side, what]) for side in ("ours", "diffusers"))
            m, n = (min(took[side, what]) for side in ("ours", "diffusers"))
            rows[f"{name} {what}"] = {"size": size, "seconds": [a, b], "bytes": [m, n],
                                      "of_peak": (share := count.get_total_flops() / a / peak)}
            print(f"{name} {what} {size}: {a:.2f} s, diffusers {b:.2f}, ratio {a / b:.2f}; {m / GIB:.2f} GiB, "
                  f"diffusers {n / GIB:.2f}, ratio {m / n:.2f}; {share:.0%} of conv3d's peak")
    return rows


def step_part(args) -> dict:
    """Forward and backward of the shipped VAE's shape: reconstruction of clips, mean squared error."""
    from tests.torchvision_stub import stub
    stub()
    from diffusers import AutoencoderKLCogVideoX

    shape = dict(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
    theirs, mine = AutoencoderKLCogVideoX(**COG_VAE, **shape), CogVideoXVAE(CogVideoXVAEConfig(**shape))
    mine.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, *args.size or (9, 64, 64)) * 2 - 1
    seconds = defaultdict(list)
    for _ in range(args.repeat + 1):
        for side, call in (("ours", lambda: mine.decode(mine.encode(x))),
                           ("diffusers", lambda: their_decode(theirs, their_encode(theirs, x)))):
            start = time.perf_counter()
            (call() - x).square().mean().backward()
            seconds[side].append(time.perf_counter() - start)
    a, b = (min(seconds[side]) for side in ("ours", "diffusers"))
    with FlopCounterMode(display=False) as count:
        mine.decode(mine.encode(x)).square().mean().backward()
    least = count.get_total_flops() / conv_peak()
    print(f"step {list(x.shape)}: {a:.3f} s, diffusers {b:.3f}, ratio {a / b:.2f}; at conv3d's peak all through "
          f"{least:.3f} s, ratio {least / b:.2f}")
    return {"shape": list(x.shape), "seconds": [a, b], "ratio": a / b, "seconds_at_peak": least}


@contextmanager
def stopwatch(model: Mirage, wait=lambda: None):
    """Lends {stage: seconds}, filled while the model runs."""
    spent = defaultdict(float)

    def watch(owner, name, stage):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            wait()
            start = time.perf_counter()
            out = function(*args, **kwargs)
            wait()
            spent[stage] += time.perf_counter() - start
            return out
        setattr(owner, name, watched)
        return lambda: delattr(owner, name)

    undo = [watch(model.vae, "encode_group", "3D encoder"), watch(model, "denoise", "transformer"),
            watch(model, "mids", "2D encoder"), watch(model.vae, "decode_group", "3D decoder")]
    yield spent
    for each in undo:
        each()


def streamed(model: Mirage, T: int, H: int, W: int) -> float:
    """Seconds for T frames of noise, made as they are asked for."""
    start = time.perf_counter()
    for _ in model.stream(torch.rand(3, H, W) * 2 - 1 for _ in range(T)):
        pass
    return time.perf_counter() - start


def infer_part(args) -> dict:
    """infer.py itself on a noise clip: what the model's stages do not take is reading, writing and the rest."""
    import tempfile

    import infer
    from experiments.streaming import noise

    infer.steady_heap()
    rows, load = {}, Mirage.from_pretrained
    model = load(ROOT / "weights")
    infer.Mirage = SimpleNamespace(from_pretrained=lambda *path, **settings: model)
    for H, W in ((272, 480), (540, 960)):
        with tempfile.TemporaryDirectory() as folder, stopwatch(model) as spent:
            clip = noise(Path(folder, "in.mp4"), args.frames, H, W)
            total = timed(lambda: infer.cli([str(clip), f"{folder}/out.mp4", "--device", "cpu"]))[0]
        spent["reading, writing, the rest"] = total - sum(spent.values())
        rows[f"{W}x{H}"] = {"frames": args.frames, "fps": args.frames / total, "share": {
            stage: seconds / total for stage, seconds in spent.items()}}
        print(f"{W}x{H}: {args.frames / total:.2f} frames/s; " + ", ".join(
            f"{stage} {seconds / total:.0%}" for stage, seconds in spent.items()))
    infer.Mirage = Mirage
    return rows


def length_part(args) -> dict:
    """Seconds by frames at 64x96, and a frame's seconds by pixels; docs/speed_length.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    import infer

    infer.steady_heap()
    model = Mirage.from_pretrained(ROOT / "weights")
    streamed(model, 9, 64, 96)
    frames = [T for T in (9, 33, 97, 297, 1001) if T <= max(args.frames, 33)]
    by_frames = [streamed(model, T, 64, 96) for T in frames]
    sizes, by_pixels = [(64, 96), (128, 192), (192, 288), (256, 384)], []
    for H, W in sizes:
        with stopwatch(model) as spent:
            streamed(model, 17, H, W)
        by_pixels.append({stage: seconds / 17 for stage, seconds in spent.items()})
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    axes[0].plot(frames, by_frames, "o-")
    axes[0].set(xlabel="frames, 64x96", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    for stage in by_pixels[0]:
        axes[1].plot([H * W / 1000 for H, W in sizes], [row[stage] for row in by_pixels], "o-", label=stage)
    axes[1].set(xlabel="1000 pixels", ylabel="seconds a frame", xlim=(0, None), ylim=(0, None))
    axes[1].legend()
    fig.savefig(args.out / "speed_length.png", dpi=110)
    for T, seconds in zip(frames, by_frames):
        print(f"{T} frames: {seconds:.2f} s, {1000 * seconds / T:.1f} ms a frame")
    return {"frames": frames, "seconds": by_frames, "sizes": sizes, "seconds_a_frame": by_pixels}


PARTS = {"bytes": bytes_part, "vae": vae_part, "step": step_part, "infer": infer_part, "length": length_part}


def record(path: Path, part: str, figures: dict) -> None:
    """Put a part's figures in the place of its last ones."""
    before = json.loads(path.read_text()) if path.exists() else {}
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    path.write_text(json.dumps(before | {part: figures | about}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS, nargs="+")
    parser.add_argument("--size", type=int, nargs=3, metavar=("T", "H", "W"), help="of the clips of bytes, vae, step")
    parser.add_argument("--frames", type=int, default=33, help="of the clips of infer, and at most those of length")
    parser.add_argument("--repeat", type=int, default=3, help="turns, of which the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for speed.json and the plot")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.part:
        record(args.out / "speed.json", part, PARTS[part](args))
