"""A Restorer's folder: a base's, in diffusers' layout, and what it was trained for.

    model_index.json       the class Restorer, the task, t, scale and window; and where the VAE is, if not in vae/
    transformer/           a CogVideoXDiT or a WanDiT, trained whole
    vae/, scheduler/       as the base has them
    prompt.safetensors     `text` [1, L, D], the embedding of the one prompt

A DOVE checkpoint is a CogVideoX1.5 folder that says nothing of a task: `task=dove` says it. The functions here are
methods of Restorer.

    python -m mirage_min.systems.restore_folder [MODEL]         # what a folder was trained for
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn

from ..method.one_step import STEPS, T_WAN
from ..networks import checked, frugal, hub, weights
from ..networks.card import write_card
from ..networks.checked import COUNT, Within
from .mirage_folder import SCHEDULER, read_base
from .prompt import PROMPT, read_prompt, write_prompt

if TYPE_CHECKING:
    from .restore import Restorer

INDEX, CLASS_NAME = "model_index.json", "Restorer"
PIPELINES = ("CogVideoXPipeline", "WanPipeline")  # bases, which do not say what they were trained for


@dataclass
class Settings:
    """What model_index.json says of a Restorer, besides where its VAE is."""

    task: Literal["upscale", "artifacts", "inpaint"]
    t: Annotated[int, Within(0, STEPS - 1)] = T_WAN
    scale: Annotated[int, Within(1, 16)] = 1         # of `upscale`: the output's size over the input's
    window: Annotated[int, Within(3, 1000)] = 9      # latents that the transformer sees at once in a stream

    def __post_init__(self):
        if self.scale != 1 and self.task != "upscale":
            raise ValueError(f"scale: the task {self.task!r} keeps the size: wanted 1, got {self.scale}")


DOVE = Settings("upscale", t=399, scale=4, window=7)  # it was trained on 25 frames, which are 7 latents


@dataclass
class Options:
    """What can be chosen when a trained Restorer is loaded."""

    task: Literal["", "dove", "upscale", "artifacts", "inpaint"] = ""    # "": as its model_index.json says
    t: Annotated[int, Within(-1, STEPS - 1)] = -1                        # -1: the same
    scale: Annotated[int, Within(0, 16)] = 0                             # 0: the same
    prompt: str = ""                         # file with the text embedding; "": the folder's own
    window: Annotated[int, Within(0)] = 0    # latents that the transformer sees at once; 0: as it says
    tiles: Annotated[int, COUNT] = 1         # rows and columns into which large frames are cut for the VAE
    margin: Annotated[int, Within(0)] = 8    # latent cells around each of them


def describes(index: dict) -> bool:
    """Whether the content of a model_index.json is that of a Restorer, or of a base that can be one."""
    return index.get("_class_name") in (CLASS_NAME, *PIPELINES)


def from_base(cls: type["Restorer"], base: str | Path, settings: Settings, text: Tensor | None = None,
              vae: str | Path | None = None, device=None, dtype=None, tiles: int = 1, margin: int = 8) -> "Restorer":
    """A base, folder or hub id, with the settings of a task.

    text           [1, L, D]; None: zeros
    vae            folder or hub id of another VAE
    tiles, margin  of its streams
    ValueError unless base and text fit.
    """
    network, dit, schedule = read_base(base, device, dtype, vae)
    text = empty_text(dit) if text is None else text
    restorer = cls(frugal.apply(network), dit, text.to(device), schedule, settings, tiles, margin)
    return restorer.requires_grad_(False).eval()


@hub.reads_hub
def from_pretrained(cls: type["Restorer"], path: str | Path, device=None, dtype=None, task: str = "", t: int = -1,
                    scale: int = 0, prompt: str | Path = "", window: int = 0, tiles: int = 1, margin: int = 8
                    ) -> "Restorer":
    """A trained Restorer from its folder or hub id; the other arguments are Options.

    ValueError of one line that names the file, what was wanted and what was found.
    """
    folder = weights.locate(nn.Module, path, None, INDEX)
    file, index = folder / INDEX, weights.read_json(folder / INDEX)
    settings = asdict(read_settings(file, index, task, scale))
    settings |= {"t": t} if t >= 0 else {}
    settings |= {"window": window} if window else {}
    settings = checked.record(Settings, settings, file)
    prompt = Path(prompt or folder / PROMPT)
    if not prompt.exists():
        raise ValueError(f'{prompt}: no such file; python encode_prompt.py --base {path} --text "" --out {PROMPT} '
                         f"makes one, for prompt={PROMPT}")
    vae = index.get("vae") if index.get("_class_name") == CLASS_NAME else None  # of a pipeline it is a class
    if vae is not None and (folder / checked.value(str, vae, file, "vae")).is_dir():
        vae = folder / vae
    text, _ = read_prompt(prompt)
    return cls.from_base(path, settings, text, vae, device, dtype, tiles, margin)


def read_settings(file: Path, index: dict, task: str, scale: int) -> Settings:
    """What a folder was trained for: as its index says or, of a bare base, as `task` and `scale` do.

    task   "": as the index says
    scale  0: as the index says, or as is usual for the task
    ValueError if neither says a task, and for a task or a scale that the folder was not trained for.
    """
    if index.get("_class_name") in PIPELINES:
        if not task:
            raise ValueError(f"{file}: a {index['_class_name']}, which does not say what it was trained for: a DOVE "
                             "checkpoint takes --set task=dove, and train_restore.py makes others")
        if task == "dove" and index["_class_name"] != PIPELINES[0]:
            raise ValueError(f"{file}: DOVE's is a {PIPELINES[0]}, got a {index['_class_name']}")
        known = asdict(DOVE) if task == "dove" else {"task": task}
        return checked.record(Settings, known | ({"scale": scale} if scale else {}), file)
    settings = checked.record(Settings, index, file)
    if task not in ("", settings.task) or scale not in (0, settings.scale):
        raise ValueError(f"{file}: was trained for task={settings.task} and scale={settings.scale}, got "
                         f"task={task or settings.task} and scale={scale or settings.scale}")
    return settings


def empty_text(dit: nn.Module) -> Tensor:
    """Zeros [1, L, D] as a text for this transformer: L is CogVideoX's fixed length, and 1 for Wan, which takes any."""
    c = dit.config
    if hasattr(c, "max_text_seq_length"):
        return torch.zeros(1, c.max_text_seq_length, c.text_embed_dim)
    return torch.zeros(1, 1, c.text_dim)


def save_pretrained(restorer: "Restorer", path: str | Path, vae: str | None = None, about: dict | None = None) -> None:
    """Write the folder that from_pretrained reads.

    vae    where the VAE is, relative to the folder or a hub id; None: it is written too
    about  more for the index
    """
    path = Path(path)
    restorer.dit.save_pretrained(path / "transformer")
    if vae is None:
        restorer.vae.save_pretrained(path / "vae")
    write_prompt(path, restorer.text)
    index = {"_class_name": CLASS_NAME} | asdict(restorer.settings) | ({"vae": vae} if vae else {}) | (about or {})
    write_json(path / "scheduler" / SCHEDULER, restorer.schedule)
    write_json(path / INDEX, index)
    write_card(path, "Restorer", about=about)


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file atomically, and make the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with weights.whole_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import sys

    for folder in sys.argv[1:]:
        print(read_settings(Path(folder, INDEX), weights.read_json(Path(folder, INDEX)), "", 0))
    published = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    trained = {"_class_name": CLASS_NAME} | asdict(Settings("inpaint"))
    for name, index, task, scale in (("DOVE", published, "dove", 0), ("DOVE", published, "", 0),
                                     ("trained", trained, "", 0), ("trained", trained, "upscale", 4)):
        try:
            print(f"{name}, task={task!r}, scale={scale}: {read_settings(Path(INDEX), index, task, scale)}")
        except ValueError as error:
            print(f"{name}, task={task!r}, scale={scale}: refused, {error}")
