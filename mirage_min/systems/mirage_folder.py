"""A Mirage's folder: what its two stages trained, and where the base is that they were trained on.

    stage_a.safetensors    fusion blocks, Reconstruction-LoRA          metadata: About, below; ranks, alphas, the recipe
    stage_h.safetensors    transformer LoRA, Harmonisation-LoRA        metadata: the same, and t and window
    prompt.safetensors     `text` [1, L, D], the embedding of the one prompt

Bases are published folders or hub ids. What a file holds is checked as it is loaded: numbers are finite, scales and
alphas positive, t a step of the schedule; ValueError naming the file and the tensor or field. The functions here are
methods of Mirage.

    python -m mirage_min.systems.mirage_folder [MODEL]          # what the stage files of a folder hold
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn

from ..method import injection, lora
from ..method.one_step import STEPS, T_MIRAGE, T_WAN
from ..method.schedules import schedule_from_config
from ..networks import checked, frugal, hub, weights
from ..networks.checked import COUNT, Within
from ..networks.dit_cogvideox import CogVideoXDiT
from ..networks.dit_wan import WanDiT
from ..networks.vae_2d import AutoencoderKL
from ..networks.vae_cogvideox import CogVideoXVAE
from ..networks.vae_wan import WanVAE
from .harmonizer import subfolder
from .prompt import PROMPT, read_prompt

if TYPE_CHECKING:
    from .mirage import Mirage

STAGE_A, STAGE_H = "stage_a.safetensors", "stage_h.safetensors"
SCHEDULER = "scheduler_config.json"
RECONSTRUCTION, HARMONISATION, TRANSFORMER = "reconstruction", "harmonisation", "transformer"  # the three LoRAs
BASES = {VAE.CLASS_NAME: (VAE, DiT) for VAE, DiT in ((CogVideoXVAE, CogVideoXDiT), (WanVAE, WanDiT))}
Alpha = Annotated[float, Within(1e-6, 1e4)]


@dataclass
class Options:
    """What can be chosen when a trained Mirage is loaded."""

    base: str = ""                           # folder or hub id of what it was trained on; "": as its stage A says
    vae2d: str = ""                          # the same for the AutoencoderKL
    window: Annotated[int, Within(0)] = 0    # latents that the transformer sees at once; 0: as its stage H says
    tiles: Annotated[int, COUNT] = 1         # rows and columns into which large frames are cut for the VAEs
    margin: Annotated[int, Within(0)] = 8    # latent cells around each of them
    change_only: bool = True                 # infer.py adds the transformer's change to the input; no: Figure 2


@dataclass
class About:
    """What a stage file's metadata may say, besides how it was made."""

    system: Literal["Mirage"] = "Mirage"
    base: str = ""
    vae2d: str = ""
    t: Annotated[int, Within(0, STEPS - 1)] | None = None
    window: Annotated[int, Within(1, 1000)] | None = None


@dataclass
class Peft:
    """What PEFT says about an adapter, as far as it decides the result."""

    lora_alpha: Alpha | None = None
    target_modules: list[str] | None = None
    use_rslora: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)


# ---- loading ---------------------------------------------------------------------------------------------------------

def from_base(cls: type["Mirage"], base: str | Path, vae2d: str | Path | None, text: Tensor | None = None, device=None,
              dtype=None, **settings) -> "Mirage":
    """Published weights with new fusion blocks, which change nothing yet: where training starts.

    base      folder or hub id of a CogVideoX or a Wan, with subfolders vae, transformer and scheduler
    vae2d     folder or hub id of an AutoencoderKL, for CogVideoX; None for Wan, whose own encoder supplies the features
    text      [1, L, D], the prompt's embedding; zeros if not given
    settings  t, window and so on, of Mirage()
    ValueError if a part is missing or of another class, vae2d is missing or not wanted, or the prompt does not fit.
    """
    wan = family(base)[0] is WanVAE
    if wan and vae2d:
        raise ValueError(f"{base} is Wan, whose own encoder supplies the 2D features: wanted no AutoencoderKL (--vae2d "
                         f"''), got {vae2d}")
    if not wan and not vae2d:
        raise ValueError(f"{base} is CogVideoX, for which an AutoencoderKL supplies the 2D features (--vae2d)")

    place = dict(dtype=dtype, device=device)
    vae, dit, schedule = read_base(base, **place)
    alpha_bar = schedule_from_config(schedule)
    vae2d = None if wan else AutoencoderKL.from_pretrained(vae2d, **place)

    c = dit.config
    shape = (1, 512, c.text_dim) if wan else (1, c.max_text_seq_length, c.text_embed_dim)
    text = torch.zeros(shape) if text is None else text
    if text.shape != shape:
        raise ValueError(f"{base} takes a prompt of {list(shape)}, given {list(text.shape)} (encode_prompt.py)")
    settings = {"t": T_WAN if wan else T_MIRAGE} | settings
    mirage = cls(vae, dit, vae2d, text.to(device), alpha_bar, **settings)
    frugal.apply(vae)
    return mirage.requires_grad_(False).eval()


def family(base: str | Path) -> tuple[type[nn.Module], type[nn.Module]]:
    """The classes of a base's VAE and transformer. ValueError unless its folder or hub id holds one of BASES."""
    file = weights.locate(nn.Module, base, subfolder(base, "vae")) / weights.CONFIG
    name = weights.read_json(file).get("_class_name")
    if name not in tuple(BASES):  # JSON may have a list there, which a dict cannot look up
        raise ValueError(f"{file}: wanted _class_name {' or '.join(map(repr, BASES))}, got {name!r}")
    return BASES[name]


def read_base(base: str | Path, device=None, dtype=None, vae: str | Path | None = None
              ) -> tuple[nn.Module, nn.Module, dict]:
    """A base's VAE, its transformer, and what its scheduler_config.json says. vae: where another VAE is."""
    vae = base if vae is None else vae
    VAE, DiT = family(vae)
    vae = VAE.from_pretrained(vae, subfolder(vae, "vae"), dtype=dtype, device=device)
    dit = DiT.from_pretrained(base, "transformer", dtype=dtype, device=device)
    file = weights.locate(nn.Module, base, "scheduler", SCHEDULER) / SCHEDULER
    schedule = weights.read_json(file)
    schedule_from_config(schedule, file=file)
    return vae, dit, schedule


@hub.reads_hub
def from_pretrained(cls: type["Mirage"], path: str | Path, base: str | Path | None = None,
                    vae2d: str | Path | None = None, device=None, dtype=None, window: int = 0, tiles: int = 1,
                    margin: int = 8, change_only: bool = False) -> "Mirage":
    """A trained Mirage from its folder, with stage H if there is one; the other arguments are Options, but Figure 2
    itself unless change_only is given.

    The base may come from the hub; base="org/name@revision" says at which revision.
    ValueError of one line that names the file, if one is missing, damaged, or does not fit the base.
    """
    path = Path(path)
    stages = {name: weights.load_tensors(path / name) for name in (STAGE_A, STAGE_H)
              if name == STAGE_A or (path / name).exists()}
    about = {name: checked.metadata(About, texts, path / name) for name, (_, texts) in stages.items()}
    a, h = about[STAGE_A], about.get(STAGE_H, About())
    text, _ = read_prompt(path / PROMPT)
    if not (base or a.base):
        raise ValueError(f"{path / STAGE_A}: does not say on what base it was trained (--base)")

    settings = {"t": h.t, "window": window or h.window}
    settings = {key: value for key, value in settings.items() if value is not None}
    mirage = cls.from_base(base or seen_from(path, a.base), vae2d or seen_from(path, a.vae2d), text, device=device,
                           dtype=dtype, tiles=tiles, margin=margin, change_only=change_only, **settings)
    for name, (tensors, texts) in stages.items():
        mirage.load_stage(tensors, texts, path / name)
    return mirage.to(device)


def seen_from(folder: Path, name: str) -> str | Path:
    """The base that a stage file names: the folder of that name in the stage's own, if there is one, else the name."""
    return folder / name if name and (folder / name).is_dir() else name


# ---- adapters --------------------------------------------------------------------------------------------------------

def add_lora(mirage: "Mirage", name: str, rank: int, alpha: float, targets: list[str] | None = None) -> None:
    """Add a LoRA: the transformer's to its layers whose names end in `targets`, by default its attention; the others
    to every convolution of the 3D decoder."""
    if name == TRANSFORMER:
        lora.add(mirage.dit, name, rank, alpha, targets or ("to_q", "to_k", "to_v", "to_out.0"))
    else:
        lora.add(mirage.vae.decoder, name, rank, alpha)


def adapters(mirage: "Mirage", name: str) -> nn.Module:
    """The module that carries the adapter `name`."""
    return mirage.dit if name == TRANSFORMER else mirage.vae.decoder


def save_stage(mirage: "Mirage", path: Path, names: list[str], about: dict[str, str], fusion: bool = False) -> None:
    """Write adapters (and the fusion blocks) with what is needed to load them, atomically."""
    tensors = injection.state_dict(mirage.vae) if fusion else {}
    about = {"system": "Mirage"} | about
    for name in names:
        module = mirage.adapters(name)
        tensors |= {f"{name}.{key}": p for key, p in lora.state_dict(module, name).items()}
        adapter = next(lora.adapters(module, name))[2]
        about |= {f"{name}.rank": str(adapter.A.shape[0]), f"{name}.alpha": str(adapter.alpha)}
        if name == TRANSFORMER:  # the one that diffusers can load too
            about[lora.METADATA] = lora.peft_config(module, name)
    weights.save_tensors(path, tensors, about)


def load_stage(mirage: "Mirage", tensors: dict[str, Tensor], about: dict[str, str], file: str | Path = "adapters"
               ) -> None:
    """The inverse of save_stage; the transformer's LoRA may also come from diffusers, on any of its layers.

    tensors, about  what load_tensors read of `file`, which errors name
    ValueError for numbers that are not finite, scales that are not positive, and keys or shapes that do not fit.
    """
    check_numbers(tensors, file)
    peft = read_peft(about, file)
    parts = {"fusion": {}, RECONSTRUCTION: {}, HARMONISATION: {}, TRANSFORMER: {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part not in parts:  # written by diffusers' save_lora_adapter; its save_lora_weights adds the prefix
            part, rest = TRANSFORMER, key
        parts[part][rest] = tensor
    alphas = {TRANSFORMER: peft.lora_alpha}
    for name in parts:
        if f"{name}.alpha" in about:
            alphas[name] = checked.value(Alpha, checked.parse(about[f"{name}.alpha"]), file, f"{name}.alpha")

    try:
        for name, state in parts.items():
            if state and name == "fusion":
                injection.load(mirage.vae, {f"fusion.{key}": tensor for key, tensor in state.items()})
            elif state:
                ranks = [len(A) for key, A in state.items() if key.endswith(".lora_A.weight") and A.ndim]
                rank = min(ranks, default=1)  # where they differ, lora.load refuses the others by name
                targets = peft.target_modules if name == TRANSFORMER else None
                mirage.add_lora(name, rank, alphas.get(name) or rank, targets)
                lora.load(mirage.adapters(name), name, state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    mirage.requires_grad_(False)


def read_peft(about: dict[str, str], file: str | Path) -> Peft:
    """What a file's metadata says about the transformer's adapter; ValueError if it has more than one scale."""
    fields = checked.parse(about.get(lora.METADATA, "{}"))
    if isinstance(fields, dict):
        fields = {key.removeprefix(f"{TRANSFORMER}."): value for key, value in fields.items()}
    peft = checked.record(Peft, fields, file, lora.METADATA)
    if peft.use_rslora or peft.alpha_pattern:
        raise ValueError(f"{file}: wanted a LoRA with one scale, alpha / rank, not with use_rslora or alpha_pattern")
    return peft


def check_numbers(tensors: dict[str, Tensor], file: str | Path) -> None:
    """ValueError naming the first tensor that is not of finite floating-point numbers, or the first scale s_h or s_f
    that is not positive."""
    for key, tensor in tensors.items():
        weights.check_finite(key, tensor, file)
        if key.endswith((".s_h", ".s_f")) and not (tensor > 0).all():
            raise ValueError(f"{file}: {key}: wanted a positive scale, got {tensor.tolist()}")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="What the stage files of a Mirage hold.")
    parser.add_argument("model", nargs="?", type=Path, default=Path(__file__).parents[2] / "weights",
                        help="folder of a Mirage (default weights)")
    folder = parser.parse_args().model
    try:
        for name in (STAGE_A, STAGE_H):
            tensors, about = weights.load_tensors(folder / name)
            print(name, checked.metadata(About, about, folder / name))
            counts = Counter()
            for key, tensor in tensors.items():
                counts[key.partition(".")[0]] += tensor.numel()
            for part, numbers in counts.items():
                print(f"  {part:<15} {numbers:>9,} numbers   alpha {about.get(f'{part}.alpha', 'none')}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
