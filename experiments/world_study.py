"""The other Mirage, the world model (arXiv 2606.09828), in the small: what is its latent memory good for?

    python -m experiments.world_study readout cost --vae VAE             # a minute: no generator is needed
    python -m experiments.world_study loop ablations moving --perceptual DIR     # five minutes of one core

readout    frame 0 of a drive is remembered and read at frame t, without a generator: the latent memory, the cloud of
           coloured points rendered and encoded, and frame 0's latent as it is. Error: mean square to the latent of
           frame t over that latent's variance, on cells that both memories know. PSNR: of these cells decoded
cost       bytes of the memory; milliseconds of a processor for a chunk's readout and for an update, best of three
loop       out and back again, generated from the first frame: no memory, the latent memory, the RGB cloud, and the true
           latents as a ceiling. _C: the last frame against the given one; "seen": pixels of cells that frame 0 shows
           (for LPIPS, the others are those of the truth). Way back: the frames after the farthest, against the truth
ablations  the same with the paper's ablations (Tables 3, 4), and with the release's lift and scatter
moving     cars move; the way out is true, the way back is generated, with and without the dynamic filter

Scenes are held out, and frames 96x144. A seed is a set of scenes and of noise; figures are mean ± deviation over seeds.
What needs a model of its own is left out by name where none is given: a single stage (train_world.py lora on a base,
without stage branch), and no mask (--set mask=no). Depth is the renderer's. Results are recorded part
by part in world_study.json; world_study.md, .png and, by `loop`, _strip.png are made of what is there.
"""

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from experiments import common, measuring, tables, world_report
from experiments.world_memories import (
    Known,
    NoMemory,
    PixelLift,
    Release,
    ReleaseAnyOrder,
    RgbCloud,
    TrueLatents,
    as_kind,
    known_cells,
    render,
)
from mirage_min.data import toy_world
from mirage_min.data.toy_world import Clip, WorldConfig
from mirage_min.method import latent_memory, metrics
from mirage_min.method.camera import Camera
from mirage_min.method.latent_memory import Memory, pixel_frame
from mirage_min.method.perceptual import Lpips
from mirage_min.networks import small_base
from mirage_min.networks.dit_wan import WanDiT
from mirage_min.networks.imagenet import Features
from mirage_min.systems.observe import ToyDepth
from mirage_min.systems.world import State, World, WorldSettings, fill, pad, padded
from mirage_min.systems.world_folder import new_branch, read_vae

FIRST_SCENE = 1_100_000  # seeds that no training and no other score used
DISTANCES = 0, 2, 4, 8, 16
SIZE = 96, 144
CHUNKS = 8  # of the longest rollout whose cost is measured
LOOPS = {"no memory": NoMemory, "latent memory": World, "RGB cloud": RgbCloud, "true latents": TrueLatents}


# ---- scenes and models -----------------------------------------------------------------------------------------------

@cache
def make(scene: int, frames: int, path: str, static: bool) -> tuple[Clip, list[Camera]]:
    """A toy clip and its cameras."""
    config = WorldConfig(frames, *SIZE, path=path, static=static)
    clip = toy_world.make_clip(scene, config)
    return clip, [Camera.from_pose(clip.K, pose, config.width, config.height) for pose in clip.c2w]


def scenes(args: argparse.Namespace, seed: int) -> range:
    """The scenes of a seed."""
    first = FIRST_SCENE + seed * args.scenes
    return range(first, first + args.scenes)


def read_world(folder: Path, args: argparse.Namespace) -> World:
    """A trained world model. One frame is shared by two chunks, so that a path is a whole number of chunks."""
    world = World.from_pretrained(folder, dtype=torch.float32, shared=1, steps=args.steps)
    step = pixel_frame(world.settings.latents - 1)
    if (args.frames - 1) % (2 * step):
        raise ValueError(f"--frames: wanted 1 + a multiple of {2 * step}, whole chunks out and back, got {args.frames}")
    return world


def untrained(args: argparse.Namespace) -> World:
    """For what needs no generator: of --vae, or of --model, its VAE, around random transformers."""
    if args.vae:
        vae = read_vae(args.vae, dtype=torch.float32)
    else:
        vae = World.from_pretrained(args.model, dtype=torch.float32).vae
    C = vae.config.z_dim
    dit = WanDiT(replace(small_base.DIT_WAN, in_channels=C, out_channels=C, num_layers=1))
    text = torch.zeros(1, 1, dit.config.text_dim)
    return World(vae, dit, new_branch(dit, 1), text, WorldSettings(latents=3)).requires_grad_(False).eval()


def by_seed(rows: list[list[dict]]) -> dict:
    """Of each seed its scenes' figures -> {figure: [mean over the scenes, for each seed]}, those that are nan left
    out."""
    found = {}
    for key in rows[0][0]:
        seeds = [[row[key] for row in scenes if not math.isnan(row[key])] for scenes in rows]
        found[key] = [math.fsum(values) / len(values) for values in seeds if values]
    return found


# ---- without a generator ---------------------------------------------------------------------------------------------

@torch.no_grad()
def read_at(world: World, cloud: World, clip: Clip, path: list[Camera], t: int) -> dict[str, float]:
    """The figures of `readout` for frame t of a clip."""
    x, geometry = pad(clip.x_gt[None, :, [0]]), Known(clip, path)(clip.x_gt[:, [0]], path[:1])
    latents, colours = (kind.update(kind.blank(x), x, [0], geometry, path[:1]) for kind in (world, cloud))
    first, true = world.vae.encode(x), world.vae.encode(pad(clip.x_gt[None, :, [t]]))
    h, w = true.shape[-2:]
    z, mask = world.shown(latents, [path[t]], true).split([true.shape[1], 1], dim=1)
    picture, seen = render(colours, padded(path[t]))
    again, known = world.vae.encode(picture[None, :, None]), known_cells(seen, h, w)[None, :, None]
    both = (mask * known).expand_as(true) > 0

    def error(z: Tensor) -> float:
        return float((z - true)[both].square().mean() / true.var())

    def decoded(z: Tensor) -> float:
        y = world.vae.decode(torch.where(both, z, true))[..., : SIZE[0], : SIZE[1]]
        where = pixels(both[0, :1], y.shape[-2:])[None]
        return float(metrics.psnr(y.clamp(-1, 1), clip.x_gt[None, :, [t]], where))
    return {"cells, latent": float(mask.mean()), "cells, RGB": float(known.mean()), "latent": error(z),
            "RGB": error(again), "no warp": error(first), "PSNR latent": decoded(z), "PSNR RGB": decoded(again),
            "PSNR true": decoded(true)}


def pixels(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells [1, F, h, w], those of padded frames -> their pixels [1, F, H, W]."""
    H, W = size
    p = -(-H // 16) * 16 // cells.shape[-2]
    return cells.repeat_interleave(p, dim=2).repeat_interleave(p, dim=3)[..., :H, :W]


def readout(args: argparse.Namespace) -> dict:
    """By distance in frames."""
    world = untrained(args)
    cloud = as_kind(RgbCloud, world)
    found = {}
    for t in DISTANCES:
        rows = [[read_at(world, cloud, *make(scene, max(DISTANCES) + 1, "drive", True), t)
                 for scene in scenes(args, seed)] for seed in range(args.seeds)]
        found[str(t)] = by_seed(rows)
    return {"distances": found}


def milliseconds(call: Callable[[], object]) -> float:
    """Processor time of a call, the best of three: on a busy machine the clock says little."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


@torch.no_grad()
def cost(args: argparse.Namespace) -> dict:
    """Of both memories by frames, on the way through one scene, whose true frames are remembered."""
    world, step = untrained(args), 8
    clip, path = make(FIRST_SCENE, 1 + CHUNKS * step, "out_and_back", True)
    scene = toy_world.sample_scene(FIRST_SCENE, WorldConfig(len(path), *SIZE, path="out_and_back", static=True))
    observe, rows = ToyDepth(scene), []
    kinds = {"latent": world, "RGB": as_kind(RgbCloud, world)}
    frame = clip.x_gt[:, 0]
    first = observe(frame[:, None], path[:1])
    memories = {name: kind.start(frame, first, path[0]).memory for name, kind in kinds.items()}
    for t in range(0, CHUNKS * step, step):
        x, cameras = pad(clip.x_gt[None, :, t : t + step + 1]), path[t : t + step + 1]
        z, at = world.vae.encode(x), [4, 8]
        geometry = observe(x[0, :, at], [cameras[i] for i in at])
        row = {"frames": t + step + 1}
        for name, kind in kinds.items():
            change = partial(kind.update, memories[name], x, [1, 2], geometry, [cameras[i] for i in at])
            row[f"update, {name}"] = milliseconds(change)
            memories[name] = memory = change()
            row[f"read, {name}"] = milliseconds(partial(kind.control, memory, cameras, z))
            row[f"bytes, {name}"] = sum(v.untyped_storage().nbytes() for v in (memory.points, memory.features))
            row[f"points, {name}"] = len(memory)
        rows.append(row)
    return {"rows": rows, "decode": milliseconds(partial(world.vae.decode, z)),
            "depth": milliseconds(partial(observe, x[0, :, at], [cameras[i] for i in at]))}


# ---- with one --------------------------------------------------------------------------------------------------------

def rollout(world: World, clip: Clip, path: list[Camera], observe: Known, seed: int) -> Tensor:
    """The video [3, T, H, W] along the path, from the clip's first frame."""
    if isinstance(world, TrueLatents):
        world.clip, world.path = clip.x_gt, path
    frame, draws = clip.x_gt[:, 0], Generator().manual_seed(seed)
    chunks = world.generate(frame, observe(frame[:, None], path[:1]), path, observe, draws)
    return torch.cat([frame[:, None], *(x[0] for _, x in chunks)], dim=1)


def seen_first(world: World, clip: Clip, path: list[Camera]) -> Tensor:
    """Which pixels of each frame are in cells that show what frame 0 does, [1, T, H, W] bool."""
    h, w = world.vae.encode(pad(clip.x_gt[None, :, [0]])).shape[-2:]
    memory = latent_memory.add(Memory.empty(1), torch.ones(1, h, w), fill(clip.depth[0, 0], path[0]), padded(path[0]))
    cells = torch.stack([latent_memory.read(memory, padded(camera), h, w)[1] for camera in path], dim=1)
    return pixels(cells, SIZE) > 0


@torch.no_grad()
def judge(x: Tensor, clip: Clip, seen: Tensor, lpips: Lpips) -> dict:
    """The figures of `loop` for one video x [3, T, H, W]."""
    y, half = clip.x_gt, x.shape[1] // 2

    def psnr(frames: list[int], target: Tensor, where: Tensor | None = None) -> float:
        where = None if where is None else where[None, :, frames]
        return float(metrics.psnr(x[None, :, frames], target[None], where))

    def distance(last: Tensor) -> float:
        return float(metrics.lpips(last[None, :, None], y[None, :, [0]], lpips))
    last, back = [x.shape[1] - 1], list(range(half + 1, x.shape[1]))
    return {"PSNR_C": psnr(last, y[:, [0]]), "PSNR_C, seen": psnr(last, y[:, [0]], seen),
            "LPIPS_C": distance(x[:, -1]), "LPIPS_C, seen": distance(torch.where(seen[:, -1], x[:, -1], y[:, 0])),
            "way back": psnr(back, y[:, back]), "way back, seen": psnr(back, y[:, back], seen)} | {
            f"frame {t}": psnr([t], y[:, [t]], seen) for t in range(1, x.shape[1])}


def run(args: argparse.Namespace, methods: dict[str, tuple[World, dict]], kept: dict | None = None) -> dict:
    """Each method, a world and settings of Known, on all scenes of all seeds -> {method: figures}. kept: the first
    scene's videos go there."""
    lpips, found = Lpips(Features("alex", args.perceptual)), {}
    for name, (world, settings) in methods.items():
        rows = []
        for seed in range(args.seeds):
            rows.append([])
            for scene in scenes(args, seed):
                clip, path = make(scene, args.frames, "out_and_back", True)
                x = rollout(world, clip, path, Known(clip, path, seed=scene, **settings), seed)
                rows[-1].append(judge(x, clip, seen_first(world, clip, path), lpips))
                if kept is not None and scene == FIRST_SCENE:
                    kept[name] = x
        found[name] = by_seed(rows)
        print(f"{name}: {', '.join(f'{key} {tables.cell(found[name][key], None)}' for key in world_report.SCORES)}")
    return found


def loop(args: argparse.Namespace) -> dict:
    """The four memories; draws the film strip."""
    world, videos = read_world(args.model, args), {}
    found = run(args, {name: (as_kind(kind, world), {}) for name, kind in LOOPS.items()}, videos)
    videos["truth"] = make(FIRST_SCENE, args.frames, "out_and_back", True)[0].x_gt
    world_report.draw_strip(args.out / "world_study_strip.png", videos)
    return {"methods": found}


def ablations(args: argparse.Namespace) -> dict:
    """The latent memory with one thing changed."""
    world = read_world(args.model, args)
    methods = {"pixel lift": (as_kind(PixelLift, world), {}),
               "mask always 1, not retrained": (as_kind(World, world, mask=False), {}),
               "depth off by 2 %": (world, {"noise": 0.02}), "depth off by 5 %": (world, {"noise": 0.05}),
               "the release's lift and scatter, writes in order": (as_kind(Release, world), {}),
               "the same, writes in any order": (as_kind(ReleaseAnyOrder, world), {})}
    left_out = []
    for name, folder in (("single stage", args.single_stage), ("mask always 1, in training too", args.unmasked)):
        if folder:
            methods[name] = read_world(folder, args), {}
        else:
            left_out.append(name)
    return {"methods": run(args, methods), "left out": left_out}


@torch.no_grad()
def after_true_frames(world: World, clip: Clip, path: list[Camera], observe: Known) -> State:
    """The state in the middle of a path, all frames up to it being the clip's."""
    step, new = pixel_frame(world.settings.latents - 1), list(range(1, world.settings.latents))
    state = world.start(clip.x_gt[:, 0], observe(clip.x_gt[:, [0]], path[:1]), path[0])
    for t in range(0, len(path) // 2, step):
        x, cameras = pad(clip.x_gt[None, :, t : t + step + 1]), [path[t + pixel_frame(f)] for f in new]
        memory = world.update(state.memory, x, new, observe(x[0], cameras), cameras)
        state = State(memory, x[:, :, -1:], cameras[-1:])
    return state


@torch.no_grad()
def filtered(world: World, clip: Clip, path: list[Camera], seed: int) -> dict[str, float]:
    """The figures of `moving` for one scene."""
    half, states, videos = len(path) // 2, {}, {}
    for name, moving in (("with", True), ("without", False)):
        observe, draws = Known(clip, path, moving), Generator().manual_seed(seed)
        state = states[name] = after_true_frames(world, clip, path, observe)
        chunks, done = [], half + 1
        while done < len(path):
            state, x = world.step(state, path[done : done + world.room(state)], observe, draws)
            chunks.append(x)
            done += x.shape[2]
        videos[name] = torch.cat(chunks, dim=2)                        # [1, 3, half, H, W]
    like, back = world.vae.encode(states["with"].past), path[half + 1 :]
    a, b = (world.shown(states[name].memory, back, like) for name in ("with", "without"))
    still = clip.moving[None, :, half + 1 :] == 0
    changed = pixels((a != b).any(dim=1), SIZE)[None] & still
    truth = clip.x_gt[None, :, half + 1 :]
    return {f"{place}, {name}": float(metrics.psnr(x, truth, where)) for name, x in videos.items()
            for place, where in (("what is at rest", still), ("cells that the filter changes", changed))} | {
            "cells": float(changed.double().mean())}


def moving(args: argparse.Namespace) -> dict:
    """The dynamic filter."""
    world = read_world(args.model, args)
    return by_seed([[filtered(world, *make(scene, args.frames, "out_and_back", False), seed)
                     for scene in scenes(args, seed)] for seed in range(args.seeds)])


PARTS = {"readout": readout, "cost": cost, "loop": loop, "ablations": ablations, "moving": moving}


def said(args: argparse.Namespace, part: str) -> str:
    """The command that makes a part, without the paths of this machine."""
    flags = [f"--scenes {args.scenes} --seeds {args.seeds}"] if part != "cost" else []
    if part in ("loop", "ablations", "moving"):
        flags.append(f"--frames {args.frames} --steps {args.steps}")
    if part in ("readout", "cost") and args.vae:
        flags.append("--vae VAE")
    return " ".join(["python -m experiments.world_study", part, *flags])


def main(args: argparse.Namespace) -> None:
    if args.perceptual is None and {"loop", "ablations"} & set(args.part):
        raise ValueError("loop and ablations: wanted --perceptual DIR, the networks of LPIPS")
    file = args.out / "world_study.json"
    today = datetime.date.today().isoformat()

    def dated(part: str, args: argparse.Namespace) -> dict:
        return {"command": said(args, part), "date": today} | PARTS[part](args)
    measuring.record_parts(file, {part: partial(dated, part) for part in PARTS}, args)
    world_report.write(args.out, json.loads(file.read_text()))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("part", choices=PARTS, nargs="+", help="see above")
    parser.add_argument("--model", type=Path, default=Path("weights/world"), help="default weights/world")
    parser.add_argument("--vae", type=Path, help="the VAE of readout and cost (default: the model's)")
    parser.add_argument("--single-stage", type=Path, metavar="DIR", help="one trained in a single stage")
    parser.add_argument("--unmasked", type=Path, metavar="DIR", help="one trained with --set mask=no")
    parser.add_argument("--perceptual", type=Path, metavar="DIR", help="AlexNet, for the LPIPS of loop and ablations")
    parser.add_argument("--scenes", type=int, default=2, help="of a seed (default 2)")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--frames", type=int, default=17, help="of a path out and back (default 17)")
    parser.add_argument("--steps", type=int, default=8, help="of denoising (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
