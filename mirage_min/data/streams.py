"""DiffusionHarmonizer's five streams of training pairs, each a way of degrading a clip (§3.2, §4).

    isp           the object is developed by another camera, in its mask                                 (Eq. 3; isp.py)
    relighting    the object is lit by another sun and sky; what it does to the street is left
    shadows       the object's shadow is taken away; in made-up scenes the sun may be anywhere
    reinsertion   the object is put back from outside: in another light and without its shadow. In made-up scenes all
                  around it is a reconstruction, and the object a generated one, aligned as in build_pairs.py
    artifacts     the scene is fitted with 3D Gaussians (reconstruct.py) that see too little of it, and filmed again:
                  `sparse`, every n-th frame alone; `shifted`, what a first fit shows of a path to the side;
                  `one camera`, another one's frames; `stopped`, after 25 to 75 % of the steps

A stream is a function (shot, draws) -> Sample: one draw for all frames, and `did` says what was drawn. A shot is a
made-up scene; or a car rendered into a recorded street, for all streams but artifacts (shots.py); or a recorded
vehicle, for the ISP and relighting (vehicles.py). A shot that a stream cannot use, because the object is too small,
say, is a ValueError; the command then draws another.

    python -m mirage_min.data.streams --out data/streams --count 400                            # made-up scenes
    python -m mirage_min.data.streams --out data/streams --count 400 --clips data/real/train    # recorded streets
    python -m mirage_min.data.streams                     # all of them, small: streams.png, degraded | clean

A pair is a file as data/pairs.py reads it, with the object's `actor` and `boxes` and, of a made-up scene, exact `flow`
and `visible` (toy_world.Clip).
"""

if __name__ == "__main__":
    from . import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

from ..method.camera import Camera
from ..networks.weights import load_tensors
from . import desk, reconstruct, street, toy_render, toy_scene, toy_world
from .insertion import align_asset, composite
from .isp import develop_object
from .photometric import integer, uniform
from .pixels import from_bytes, to_uint8
from .scene import read_scene
from .shots import Sample, StreetShot, ToyShot, save_sample, toy_shot
from .splat import Gaussians, load_ply, render
from .street_camera import Street, clips_of_known_streets
from .toy_light import Light, sample_light
from .toy_world import WorldConfig, height_x_width
from .vehicles import RecordedShot, Vehicles, shoot_vehicle, vehicles_of
from .video import Video

LEAST_SHADOW = 0.0008  # share of the clip's pixels that the object must darken
DARKER = 2 / 127.5     # by how much, at least
SHIFT = (0.5, 1.5)     # metres to the side; Difix, whose drives are longer, has 1 to 6
TURN = (4.0, 10.0)     # degrees between the camera that is fitted and the one that is shown
PIXELS = 40            # of all frames to a Gaussian
KINDS = "sparse", "shifted", "one camera", "stopped"
Shot = ToyShot | StreetShot | RecordedShot
UPRIGHT = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # x right, y down, z ahead -> ahead, left, up


def another_light(draws: Generator) -> Light:
    """A sun from anywhere and a sky, as an asset may be lit by."""
    return sample_light(lambda low, high: float(uniform(draws, low, high)), elevation=(20, 70), sun=(0.3, 1.8),
                        sky=(0.4, 1.1), tint=0.15, exposure=(0.7, 1.35))


def angles(light: Light) -> dict[str, float]:
    """Where a sun is, in degrees: azimuth from straight ahead to the right, and elevation."""
    x, y, z = light.to_sun.tolist()
    return {"azimuth": math.degrees(math.atan2(x, z)), "elevation": math.degrees(math.asin(-y)),
            "exposure": light.exposure}


# ---- four streams about an object ------------------------------------------------------------------------------------

def isp(shot: Shot, draws: Generator) -> Sample:
    """The object developed by another camera."""
    sample = shot.pair(relit=False, shadowed=True)
    degraded, did = develop_object(sample.clean, sample.actor, draws)
    return replace(sample, degraded=degraded, did=did)


def relighting(shot: Shot, draws: Generator) -> Sample:
    """The object in another light, with its own shadow. DEVIATION: the paper's are images, by DiffusionRenderer."""
    light = another_light(draws)
    if isinstance(shot, RecordedShot):
        sample = shot.in_light(light)
    else:
        sample = replace(shot, scene=replace(shot.scene, naive=light)).pair(relit=True, shadowed=True)
    return replace(sample, did=angles(light))


def shadows(shot: Shot, draws: Generator) -> Sample:
    """The object without its shadow. Made-up scenes are lit anew, recorded streets as they were. ValueError if the
    shadow is too small to see.

    DEVIATION: the paper's suns also differ in width; these are points, for between half a degree and three the edge of
    a car's shadow is narrower than a pixel here.
    """
    if isinstance(shot, ToyShot):
        light = replace(another_light(draws), exposure=1.0)
        light = replace(light, sun=light.sun * 1.5, sky=light.sky * 0.6)
        shot = replace(shot, scene=replace(shot.scene, light=light))
    sample = shot.pair(relit=False, shadowed=False)
    share = float(((sample.degraded - sample.clean).mean(dim=0) > DARKER).float().mean())
    if share < LEAST_SHADOW:
        raise ValueError(f"wanted a shadow on {LEAST_SHADOW:.2%} of the pixels at least, got {share:.2%}")
    return replace(sample, did=angles(shot.scene.light) | {"share": share})


def reinsertion(shot: Shot, draws: Generator) -> Sample:
    """The object put back from outside, in another light and without its shadow."""
    light = another_light(draws)
    shot = replace(shot, scene=replace(shot.scene, naive=light))
    sample = reinserted(shot) if isinstance(shot, ToyShot) else shot.pair(relit=True, shadowed=False)
    return replace(sample, did=angles(light))


@torch.no_grad()
def reinserted(shot: ToyShot) -> Sample:
    """A made-up scene as Gaussians, its actor as a generated asset in the light `scene.naive`, over what was filmed.

    ValueError if the actor is not inside the image all the time.
    """
    T, H, W = shot.config.frames, shot.config.height, shot.config.width
    with tempfile.TemporaryDirectory() as folder:
        toy_scene.write_folder(Path(folder), shot.scene, shot.config)
        made = read_scene(Path(folder))
        asset = load_ply(Path(folder, "asset.ply"))
        with Video(made.video) as video:
            clean = torch.stack(list(video), dim=1)
    track = made.tracks[1]
    inside = track.visible & (track.box[:, :2] > 0).all(1) & (track.box[:, 2:] < torch.tensor([W, H])).all(1)
    if not inside.all():
        raise ValueError("wanted an actor that is inside the image in all frames")
    insertion = align_asset(made, asset, UPRIGHT, 1, range(T), bar=tqdm(disable=True))["full"]
    frames, alphas = [], []
    for t, camera in enumerate(made.cameras):
        front = insertion.render(t, camera, track.pose[t])
        frame, alpha = composite(render(made.at(t, without=1), camera), front, float(track.size[t].min()))
        frames.append(frame * 2 - 1)
        alphas.append(alpha)
    motion = toy_render.motion(shot.scene, shot.config)
    return Sample(torch.stack(frames, dim=1), clean, torch.stack(alphas, dim=1), insertion.aligned_boxes(),
                  flow=motion.flow, visible=motion.visible)


# ---- artifacts of a reconstruction -----------------------------------------------------------------------------------

def artifacts(shot: Shot, draws: Generator, kind: str | None = None, steps: int = 60) -> Sample:
    """The scene, at rest, as shown by Gaussians that saw too little of it; `kind` is one of KINDS, drawn if None.

    ValueError for another kind, and for a shot that is not a made-up scene.
    """
    if not isinstance(shot, ToyShot):
        raise ValueError("artifacts want a made-up scene: a recording's camera path is not known")
    bodies = [replace(body, pose=body.pose[:1].expand_as(body.pose)) for body in shot.scene.bodies]
    scene, config = replace(shot.scene, bodies=bodies), shot.config
    clip = toy_world.render(scene, config)
    size, K = (config.height, config.width), toy_render.intrinsics(config)
    true = reconstruct.cameras_of(scene.c2w, K, size)
    kind = kind or KINDS[integer(draws, len(KINDS))]
    points = max(100, clip.x_gt[0].numel() // PIXELS)
    did = {"kind": kind, "points": points, "steps": steps}

    def fitted(x: Tensor, depth: Tensor, cameras: list[Camera], steps: int) -> Gaussians:
        frames, depths = x.unbind(1), depth[0].unbind(0)
        g = reconstruct.back_project(frames, depths, cameras, points, draws)
        return reconstruct.fit(g, frames, cameras, steps, draws)

    if kind == "sparse":
        n = 2 + integer(draws, 3)
        did["every"] = n
        g = fitted(clip.x_gt[:, ::n], clip.depth[:, ::n], true[::n], steps)
    elif kind == "shifted":
        shift = side(draws, *SHIFT)
        did["shift"] = shift
        first = fitted(clip.x_gt, clip.depth, true, steps)
        cameras = reconstruct.cameras_of(moved_aside(scene.c2w, shift, 0.0), K, size)
        g = fitted(*reconstruct.film(first, cameras), cameras, steps)
    elif kind == "one camera":
        shift, turn = side(draws, 0.3, 1.0), side(draws, *TURN)
        did |= {"shift": shift, "turn": turn}
        path = moved_aside(scene.c2w, shift, turn)
        other = toy_world.render(replace(scene, c2w=path), config)
        g = fitted(other.x_gt, other.depth, reconstruct.cameras_of(path, K, size), steps)
    elif kind == "stopped":
        did["steps"] = round(steps * float(uniform(draws, 0.25, 0.75)))
        g = fitted(clip.x_gt, clip.depth, true, did["steps"])
    else:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    x, _ = reconstruct.film(g, true)
    return Sample(x, clip.x_gt, clip.actor, clip.boxes, flow=clip.flow, visible=clip.visible, did=did)


def side(draws: Generator, low: float, high: float) -> float:
    """A number from low to high, to the left (below 0) or to the right."""
    return float(uniform(draws, low, high)) * (1 - 2 * integer(draws, 2))


def moved_aside(c2w: Tensor, shift: float, turn: float) -> Tensor:
    """A path [T, 4, 4] moved by `shift` metres to its right and turned by `turn` degrees to the right."""
    a = math.radians(turn)
    step = torch.tensor([[math.cos(a), 0, math.sin(a), shift], [0, 1, 0, 0], [-math.sin(a), 0, math.cos(a), 0],
                         [0, 0, 0, 1]])
    return c2w @ step


STREAMS = {"isp": isp, "relighting": relighting, "shadows": shadows, "reinsertion": reinsertion, "artifacts": artifacts}
OF_STREETS = ("isp", "relighting", "shadows", "reinsertion")
OF_VEHICLES = ("isp", "relighting")


# ---- files -----------------------------------------------------------------------------------------------------------

def draw_sheet(rows: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """A picture: the middle frames of pairs (degraded, clean), each [3, T, H, W] in [-1, 1], a row for each."""
    middle = [torch.cat([x[:, x.shape[1] // 2] for x in pair], dim=2) for pair in rows]
    Image.fromarray(to_uint8(torch.cat(middle, dim=1))).save(path)


@dataclass(frozen=True)
class Job:
    """One pair to be made: a file is a function of it."""

    stream: str
    seed: int
    frames: int
    size: tuple[int, int]
    clip: Path | None = None                 # None: a made-up scene
    street: Street | None = None             # of the clip
    vehicles: Vehicles | None = None         # that were recorded in it

    def name(self) -> str:
        """The file's name without its suffix."""
        return f"{self.stream}_{self.clip.stem if self.clip else 'toy'}_{self.seed:06d}"


def make(job: Job) -> Sample:
    """The pair of a job: the first of up to 50 shots that its stream can use. ValueError if there is none."""
    reasons = []
    for attempt in range(50):
        draws = torch.Generator().manual_seed(job.seed * 64 + attempt)
        try:
            return STREAMS[job.stream](shot_of(job, draws), draws)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"{job.name()}: no shot in 50 is of use: {reasons[-1]}")


def shot_of(job: Job, draws: Generator) -> Shot:
    """A made-up scene; or a piece of the clip with a rendered car in it or, for half of what OF_VEHICLES names, a
    recorded one."""
    if job.clip is None:
        return toy_shot(draws, WorldConfig(job.frames, *job.size))
    if job.stream in OF_VEHICLES and job.vehicles and integer(draws, 2):
        return shoot_vehicle(job.clip, job.vehicles, job.size, job.frames, draws)
    return StreetShot(**vars(street.shoot(job.clip, job.street, job.size, job.frames, draws)))


def write(job: Job, folder: Path) -> None:
    """Write the job's file, unless it exists; on one thread, since every worker is a process."""
    torch.set_num_threads(1)
    path = folder / f"{job.name()}.safetensors"
    if not path.exists():
        save_sample(make(job), path, job.stream)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What the command line asks for: the streams in turn, recorded clips drawn by their lengths. ValueError if
    artifacts are asked of recorded clips."""
    streets = clips_of_known_streets(args.clips) if args.clips else {}
    clips, lengths = list(streets), street.lengths_of(streets)
    vehicles = {clip: vehicles_of(clip) for clip in clips}
    names = args.streams or (OF_STREETS if clips else list(STREAMS))
    if clips and "artifacts" in names:
        raise ValueError("artifacts want made-up scenes: leave --clips out, or artifacts out of --streams")
    jobs = []
    for i in range(args.count):
        seed, clip = args.first_seed + i, None
        if clips:
            clip = clips[int(torch.multinomial(lengths, 1, generator=torch.Generator().manual_seed(seed)))]
        jobs.append(Job(names[seed % len(names)], seed, args.frames, args.size, clip, street=streets.get(clip),
                        vehicles=vehicles.get(clip)))
    return jobs


def demonstrate() -> None:
    """Every stream on a small made-up scene."""
    rows = []
    for stream in STREAMS:
        sample = make(Job(stream, 1, 2, (48, 72)))
        mse = float((sample.degraded - sample.clean).square().mean()) / 4
        did = {k: round(v, 2) if isinstance(v, float) else v for k, v in sample.did.items() if k != "matrix"}
        print(f"{stream:12} {-10 * math.log10(mse):5.1f} dB: {did}")
        rows.append((sample.degraded, sample.clean))
    draw_sheet(rows, Path("streams.png"))
    print("streams.png: degraded | clean")


def main(args: argparse.Namespace) -> None:
    """A folder of pairs with a contact sheet of the first ones; or, without a folder, a demonstration."""
    if not args.out:
        return demonstrate()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(args)
    desk.share(write, [(job, args.out) for job in jobs], args.workers, "pair")
    shown = [load_tensors(args.out / f"{job.name()}.safetensors")[0] for job in jobs[:10]]
    draw_sheet([(from_bytes(pair["x_ni"]), from_bytes(pair["x_gt"])) for pair in shown], args.out / "streams.png")
    desk.say(f"{len(jobs)} pairs in {args.out}; the first {len(shown)} in {args.out / 'streams.png'}: degraded | clean")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--out", type=Path, help="folder for the pairs; without it, one of each stream is shown")
    parser.add_argument("--clips", type=Path, help="recorded streets (real_clips.py); default: made-up scenes")
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), help="which, in turn (default: all there are)")
    parser.add_argument("--count", type=int, default=100, help="how many (default 100); those that exist are kept")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--size", type=height_x_width, default=(96, 144), help="rows x columns (default 96x144)")
    parser.add_argument("--frames", type=int, default=9, help="frames of a pair (default 9)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    args = parser.parse_args()
    if min(args.count, args.frames, args.workers, *args.size) < 1 or args.first_seed < 0:
        parser.error("count, frames, workers and size must be at least 1, first-seed 0 or more")
    sys.exit(desk.serve("streams", lambda: main(args), lambda: "; the pairs that are whole stay"))
