"""More doors of fuzz.py: what training reads."""

import contextlib
import dataclasses
import io
import json
from argparse import Namespace
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

import encode_prompt
import train_online
import train_r3d2
import train_restore
from mirage_min.data import street, vehicles
from mirage_min.data.masks import read_mask
from mirage_min.data.pairs import Pairs
from mirage_min.data.real_clips import RealClips
from mirage_min.data.street_camera import clips_of_known_streets
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from mirage_min.training import checkpoint, watch
from tests import small
from tests.fuzz_changes import Door, any_file, change_file, change_json


def pairs(folder: Path) -> Door:
    """NI-GT pairs and real clips, read as training reads them."""
    x = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    kinds = [({"x_ni": x, "x_gt": x + 9, "boxes": torch.tensor([[2.0, 2, 9, 9]] * 3)}, "pairs"), ({"x": x}, "real")]
    for _, name in kinds:
        (folder / name).mkdir()

    def door(draws: Random) -> object:
        tensors, name = draws.choice(kinds)
        file = folder / name / "a.safetensors"
        change_file(file, save(tensors, {"seed": "1"}), draws)
        if name == "real":
            return RealClips(folder / name, 2).crop((16, 16), torch.Generator().manual_seed(0))
        found = Pairs(folder / name, 2)
        for i in range(len(found)):
            found.read(i, lambda n: 0)
            found.crops(i)
    return door


def training(folder: Path) -> Door:
    """A run's checkpoints and its log."""
    def fresh():
        trained = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in ("a.w", "b.w")}
        return trained, torch.optim.AdamW(trained.values())

    trained, optimizer = fresh()
    sum(p.square().sum() for p in trained.values()).backward()
    optimizer.step()
    checkpoint.save(folder, 3, trained, optimizer, {"lr": 0.1})
    lines = b"".join(json.dumps({"step": i, "seconds": 1.5, "mse": 0.1}).encode() + b"\n" for i in range(4))
    (folder / "log.jsonl").write_bytes(lines)

    def read(path):
        trained, optimizer = fresh()
        with contextlib.redirect_stdout(io.StringIO()):
            checkpoint.resume(path, trained, optimizer, {"lr": 0.1}, 5)
        for p in trained.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        watch.read_lines(path / "log.jsonl")
    return any_file(folder, read)


def online(folder: Path) -> Door:
    """Pairs that know their motion, as train_online.py reads them."""
    x = torch.zeros(3, 4, 32, 32, dtype=torch.uint8)
    flow, recipe = torch.zeros(2, 3, 32, 32, dtype=torch.float16), train_online.RECIPES["paper"]
    pair = {"x_ni": x, "x_gt": x + 9, "flow": flow, "visible": torch.ones(1, 3, 32, 32, dtype=torch.uint8)}

    def door(draws: Random) -> None:
        change_file(folder / "a.safetensors", save(pair, {"seed": "1"}), draws)
        data = Pairs(folder, 4)
        _, x_gt, flow, visible, names = data.moving_batch([torch.Generator().manual_seed(0)])
        train_online.motion(recipe, x_gt, flow, visible, names)
    return door


def restoring(folder: Path) -> Door:
    """Pairs as train_restore.py reads and degrades them, and masks as an inpainting system does."""
    parts, x = small.world(), torch.zeros(3, 5, 32, 32, dtype=torch.uint8)
    flow = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
    system = Restorer(parts.vae, parts.dit, torch.ones(1, 2, 8), flow, Settings("upscale", scale=4))
    small_numbers = dict(batch=1, frames=5, height=32, width=32, real=0.0)
    recipes = [dataclasses.replace(train_restore.RECIPES[name], **small_numbers)
               for name in ("small-upscale", "small-inpaint", "artifacts")]
    whole = save({"x_ni": x, "x_gt": x + 9, "boxes": torch.tensor([[2.0, 2, 9, 9]] * 5)}, {"seed": "1"})
    masks = {}
    for kind in ("png", "jpg", "gif", "tif"):
        Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(folder / f"mask.{kind}")
        masks[f"mask.{kind}"] = (folder / f"mask.{kind}").read_bytes()

    def door(draws: Random) -> None:
        if draws.random() < 0.3:
            name = draws.choice(list(masks))
            change_file(folder / name, masks[name], draws)
            list(read_mask(folder / name, 32, 32))
            return
        change_file(folder / "a.safetensors", whole, draws)
        x_in, x_gt, _ = train_restore.read(Pairs(folder, 5, (32, 32)), system, draws.choice(recipes),
                                           draws.randrange(9), range(1))
        if not x_in.shape == x_gt.shape == (1, 3, 5, 32, 32):
            raise AssertionError(f"{list(x_in.shape)}, {list(x_gt.shape)}")
    return door


def street_pairs(folder: Path) -> Door:
    """A recorded street, what is known of its camera, and of the vehicles in it."""
    known = {"focal": 0.9, "horizon": 0.45, "lanes": [[0, 0], [3, 180]], "sun": [30, 40]}
    corners = [[x, y] for x in (20.0, 60.0) for y in (10.0, 40.0)] * 2
    sights = [{"frame": t, "depth": 9.0, "corners": corners} for t in range(4)]
    cars = {"width": 96, "height": 54, "vehicles": [{"id": 1, "frames": sights}]}
    clip = folder / "drive.safetensors"
    whole = save({"x": torch.full((3, 4, 54, 96), 120, dtype=torch.uint8)})

    def door(draws: Random) -> None:
        kind = draws.randrange(3)
        clip.write_bytes(whole)
        files = {"street": json.dumps(known).encode(), "vehicles": json.dumps(cars).encode()}
        if kind == 0:
            change_file(clip, whole, draws)
        else:
            name = ("street", "vehicles")[kind - 1]
            files[name] = change_json(json.loads(files[name]), draws)
        for name, content in files.items():
            (folder / f"drive.{name}.json").write_bytes(content)
        seeded = torch.Generator().manual_seed(0)
        for found, street_camera in clips_of_known_streets(folder).items():
            street.lengths_of([found])
            if kind == 2:
                vehicles.shoot_vehicle(found, vehicles.vehicles_of(found), (16, 24), 2, seeded)
            else:
                street.make_pair(found, street_camera, (16, 24), 2, seeded)
    return door


def start_r3d2(folder: Path) -> Door:
    """What train_r3d2.py starts from: a system, or its parts and a prompt."""
    small.r3d2(kl=False).save_pretrained(folder)
    (folder.parent / "backbones").mkdir()
    small.save_backbones(folder.parent / "backbones")
    recipe = train_r3d2.RECIPES["r3d2"]

    def read(path: Path) -> None:
        prompt = path / "prompt.safetensors"
        args = Namespace(base=str(path), vae=None, prompt=prompt, perceptual=folder.parent / "backbones", recipe="r3d2")
        train_r3d2.build(args, recipe)
    return any_file(folder, read)


def prompt(folder: Path) -> Door:
    """A base with its tokenizer and text encoder, as encode_prompt.py reads it."""
    from tests import test_prompt

    base = folder / "base"
    small.save_wan(folder)
    test_prompt.save_tokenizer(base / "tokenizer", "<pad>")
    test_prompt.text_encoder("wan").save_pretrained(base / "text_encoder")
    for part in ("vae", "transformer"):
        for file in (base / part).glob("*.safetensors"):
            file.unlink()  # which it does not read
    out = folder.parent / "prompt.safetensors"
    args = Namespace(base=str(base), text="remove degradation", out=out, dtype="auto", device="cpu")

    def read(path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            encode_prompt.main(args)
    return any_file(folder, read)


DOORS = pairs, training, online, restoring, street_pairs, start_r3d2, prompt
