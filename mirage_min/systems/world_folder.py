"""A world model's folder: what is in it, and how it is read and written (the loop itself: world.py).

    model_index.json       the class World, the settings of the loop, and where the VAE is, if not in vae/
    transformer/           a WanDiT, its LoRA merged
    branch/                a WanBranch, whose control is a latent and its mask
    vae/                   a WanVAE or Wan22VAE; or model_index.json names another folder, seen from this one, or an id
    prompt.safetensors     `text`, the encoded prompt (encode_prompt.py)

    world = World.from_pretrained("my_world", steps=10)         # and other fields of WorldSettings

No such folder is published: train_world.py writes one. It starts from a published Wan, whose layout is the same without
the branch.

    python -m mirage_min.systems.world_folder        # a small random world model, written and read
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..networks import checked, frugal, hub, weights
from ..networks.card import write_card
from ..networks.dit_wan import WanDiT
from ..networks.vae_wan import WanVAE
from ..networks.vae_wan22 import Wan22VAE
from ..networks.wan_branch import WanBranch, WanBranchConfig
from .harmonizer import subfolder
from .prompt import PROMPT, read_prompt, write_prompt

CLASS_NAME, INDEX = "World", "model_index.json"


def describes(index: dict) -> bool:
    """Whether the content of a model_index.json is that of a world model."""
    return index.get("_class_name") == CLASS_NAME


@hub.reads_hub
def from_pretrained(cls, path: str | Path, device=None, dtype=None, **settings) -> nn.Module:
    """A trained world model from its folder or hub id; `settings` of cls.Options replace what it says.

    ValueError of one line that names the file, what was wanted and what was found.
    """
    folder = weights.locate(WanDiT, path, None, INDEX)
    file = folder / INDEX
    index = weights.read_json(file)
    if not describes(index):
        raise ValueError(f"{file}: wanted _class_name {CLASS_NAME!r}, got {index.get('_class_name')!r}")
    settings = asdict(checked.record(cls.Options, index | settings, file))
    vae = checked.value(str, index.get("vae", "vae"), file, "vae")
    if (folder / vae).is_dir():
        vae = folder / vae
    elif vae == "vae":
        vae = path  # a hub id, in whose subfolder it is
    text = read_prompt(folder / PROMPT)[0] if (folder / PROMPT).exists() else None
    return cls.from_base(path, path, vae, text, device=device, dtype=dtype, **settings)


def from_base(cls, base: str | Path, branch: str | Path | int, vae: str | Path | None = None,
              text: Tensor | None = None, device=None, dtype=None, **settings) -> nn.Module:
    """A world model from parts, each a folder or hub id: a Wan, a branch and, if not that Wan's, a VAE.

    branch    or a number n: a new one, which changes nothing yet, with a hint after one layer in every n
    text      [1, L, D]; None: one token of zeros
    settings  of cls.Options
    ValueError as in weights.from_pretrained, and unless text and branch fit the transformer.
    """
    place = dict(device=device, dtype=dtype)
    dit = WanDiT.from_pretrained(base, subfolder(base, "transformer"), **place)
    if isinstance(branch, int):
        steer = new_branch(dit, branch)
    else:
        steer = WanBranch.from_pretrained(branch, subfolder(branch, "branch"), **place)
    text = torch.zeros(1, 1, dit.config.text_dim) if text is None else text
    if text.ndim != 3 or len(text) != 1 or text.shape[2] != dit.config.text_dim:
        raise ValueError(f"wanted a prompt [1, L, {dit.config.text_dim}], as wide as this transformer takes it, "
                         f"got {list(text.shape)} (encode_prompt.py)")
    like = next(dit.parameters())
    network = read_vae(base if vae is None else vae, **place).to(like)  # both compute in one type
    return cls(network, dit, steer.to(like), text.to(like), cls.Options(**settings)).requires_grad_(False).eval()


def new_branch(dit: WanDiT, every: int) -> WanBranch:
    """A branch for a transformer, random and with hints of zero, which come after its layers 0, every, 2 every, ..."""
    layers = tuple(range(0, dit.config.num_layers, every))
    return WanBranch(WanBranchConfig(**vars(dit.config), vace_layers=layers,
                                     vace_in_channels=dit.config.in_channels + 1))


def save_pretrained(self: nn.Module, path: str | Path, vae: str | None = None, about: dict | None = None) -> None:
    """Write the folder that from_pretrained reads; a LoRA has to be merged before.

    vae    where the VAE is, relative to the folder or a hub id; None: it is written too
    about  more for the index
    """
    path = Path(path)
    self.dit.save_pretrained(path / "transformer")
    self.branch.save_pretrained(path / "branch")
    if vae is None:
        self.vae.save_pretrained(path / "vae")
    write_prompt(path, self.text)
    index = {"_class_name": CLASS_NAME, **asdict(self.settings), "vae": vae or "vae"} | (about or {})
    with weights.whole_file(path / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    write_card(path, "World", about=about)


def read_vae(path: str | Path, device=None, dtype=None) -> WanVAE | Wan22VAE:
    """Wan 2.1's or 2.2's VAE, as its config.json says: from its own folder or hub id, or from one that has it in vae/.
    """
    inside = subfolder(path, "vae")
    config = weights.read_json(weights.locate(WanVAE, path, inside) / weights.CONFIG)
    kind = Wan22VAE if config.get("is_residual") else WanVAE
    return frugal.apply(kind.from_pretrained(path, inside, device=device, dtype=dtype))


if __name__ == "__main__":
    import tempfile

    from ..networks import small_base
    from .world import World, WorldSettings

    dit = small_base.new_transformer("wan")
    branch = new_branch(dit, every=3)
    world = World(small_base.new_vae("wan"), dit, branch, torch.zeros(1, 1, 16), WorldSettings(latents=3))
    with tempfile.TemporaryDirectory() as folder:
        world.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*.*")):
            print(f"{file.relative_to(folder)}: {file.stat().st_size:,} bytes")
        again, other = World.from_pretrained(folder), World.from_pretrained(folder, steps=5)
        print(f"read again: {again.settings}; with steps=5: {other.settings}")
