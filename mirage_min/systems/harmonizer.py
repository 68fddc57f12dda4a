"""DiffusionHarmonizer: frame after frame, each in one step and in view of what came out before it (§3.1, Eqs. 1 and 2).

    Î_t = D(F(E(I_t), E(Î_t−1), …, E(Î_t−K)))

E and D are a frozen video VAE, Wan 2.1's; F is a transformer for images, Cosmos-Predict2's, in which all latent frames
attend to each other. No noise is added, the timestep never changes, and the text is null. The same weights can be wired
in two ways, `wiring` in the folder's model_index.json:

    release   what NVIDIA published: the current frame and the K = 4 outputs before it, newest first, are encoded as
              *one video*. The VAE makes two latents of those five frames, the second of all the past, which it sees
              after the current frame. Until there are four outputs, the current frame is alone.
    paper     every frame is encoded by itself: K + 1 latents, or as many as there are outputs yet.

With `change_only` in that file what the VAE loses of the frame is not lost: Î_t = I_t + D(F(…)) − D(E(I_t)).

`enhance_whole` is the method as it is written down. `enhance`, which everything else calls, gives the same numbers with
.51 of the operations of the release (docs/harmonizer.md): it leaves out what cannot reach the current frame.

A cache of keys and values, as in language models, would *not* give the same numbers. There a token never sees what
comes after it. Here the past attends to the current frame, so from the second block on its keys and values change at
each step. (In the first block they stay the same, but that is a thousandth of the work. In the release even the latent
of the past is new at each step, for it is encoded after the current frame.)

    python -m mirage_min.systems.harmonizer            # both wirings: shapes, and that pruning changes no result
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..data.pixels import in_eight_bits
from ..networks import checked, frugal, hub, weights
from ..networks.card import write_card
from ..networks.dit_cosmos import CosmosDiT
from ..networks.vae_wan import WanVAE
from .stream import alike, finished

INDEX, CLASS_NAME = "model_index.json", "Harmonizer"
CELL = 16  # pixels: frames are padded to whole patches of 2 x 2 latents


@dataclass
class Settings:
    """What model_index.json says about a Harmonizer, besides where its parts are."""

    wiring: Literal["release", "paper"] = "release"
    past: Annotated[int, checked.Within(0, 64)] = 4               # K: outputs in view; in the release 4, or a multiple
    sigma: Annotated[float, checked.Within(1e-3, 1e3)] = 0.25     # EDM's; the release calls it timestep 250
    change_only: bool = False     # DEVIATION: the result is the frame and what the transformer changes of it

    def __post_init__(self):
        if self.wiring == "release" and self.past % 4:
            raise ValueError(f"past must be a multiple of 4 in the wiring 'release', got {self.past}: its VAE takes a "
                             "frame and then four at a time")


@dataclass
class Options:
    """What can be chosen when a trained Harmonizer is loaded."""

    wiring: Literal["", "release", "paper"] = ""     # "": as its model_index.json says
    change_only: Literal["", "yes", "no"] = ""       # the same; yes: the frame, and what the transformer changes of it


def describes(index: dict) -> bool:
    """Whether the content of a model_index.json is that of a Harmonizer."""
    return index.get("_class_name") == CLASS_NAME


class Harmonizer(nn.Module):
    """A VAE, a transformer and how they are wired. `past` below: what `remember` keeps of the outputs, newest first."""

    Options = Options

    def __init__(self, vae: WanVAE, dit: CosmosDiT, settings: Settings = Settings()):
        super().__init__()
        self.vae, self.dit, self.settings = vae, dit, settings

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, T, H, W] in [-1, 1], any T >= 1, H and W >= 16 -> the same shape, not clamped.

        Gradients go through each frame's step, and not through the past that it saw. ValueError for another shape.
        """
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"wanted [B, 3, T, H, W], got {list(x.shape)}")
        past, outputs, constants = [], [], self.constants(x)
        for frame in x.unbind(dim=2):
            outputs.append(self.enhance(frame, past, constants))
            past = self.remember(outputs[-1], past)
        return torch.stack(outputs, dim=2)

    # ---- the method ----------------------------------------------------------------------------------------------

    def enhance_whole(self, frame: Tensor, outputs: list[Tensor]) -> Tensor:
        """I_t [B, 3, H, W] and the outputs before it, newest first, of its shape -> Î_t, nothing left out."""
        current, *outputs = (self.pad(y).unsqueeze(2) for y in (frame, *outputs[: self.settings.past]))
        if self.settings.wiring == "release":
            outputs = outputs if len(outputs) == self.settings.past else []
            z = self.vae.encode(torch.cat([current, *outputs], dim=2))                 # [B, C, 1 or 1 + K/4, h, w]
        else:
            z = torch.cat([self.vae.encode(y) for y in (current, *outputs)], dim=2)    # [B, C, 1 + min(t, K), h, w]
        c = self.dit.config
        null = z.new_zeros(len(z), 512, c.text_embed_dim) if c.cross_attention else None
        # ẑ = (1 − τ) z − τ F((1 − τ) z, τ),  τ = σ / (1 + σ)                             (EDM's σ; Cosmos-Predict2)
        t = self.timestep
        z_hat = (1 - t) * z - t * self.dit((1 - t) * z, t, null)
        y = self.vae.decode(z_hat) if self.settings.wiring == "release" else self.vae.decode(z_hat[:, :, :1])
        y = y[:, :, 0, : frame.shape[-2], : frame.shape[-1]]
        return y + self.lost(frame, z) if self.settings.change_only else y

    # ---- the same without what cannot reach the current frame ------------------------------------------------------

    def enhance(self, frame: Tensor, past: list[Tensor], constants: tuple | None = None) -> Tensor:
        """I_t [B, 3, H, W] and `past` -> Î_t, equal to `enhance_whole` up to rounding.

        Left out: attention to the null text, which adds nothing; the past's queries in the last block; and decoding the
        past. `constants` are what the method of that name returns; None: they are computed here.
        """
        with torch.no_grad():  # the VAE is frozen
            z = self.latents(self.pad(frame), past)
        z_hat = self.denoise(z, constants or self.constants(frame))
        y = self.vae.decode(z_hat)[:, :, 0, : frame.shape[-2], : frame.shape[-1]]
        return y + self.lost(frame, z) if self.settings.change_only else y

    @torch.no_grad()
    def lost(self, frame: Tensor, z: Tensor) -> Tensor:
        """I_t − D(E(I_t)) of a frame [B, 3, H, W], the first of the latents z: what the VAE loses of it."""
        return frame - self.vae.decode(z[:, :, :1])[:, :, 0, : frame.shape[-2], : frame.shape[-1]]

    def denoise(self, z: Tensor, constants: tuple | None = None) -> Tensor:
        """z [B, C, F, h, w] of `latents` -> the current frame's ẑ_t [B, C, 1, h, w]."""
        t = self.timestep
        prediction = self.dit.predict((1 - t) * z, constants or self.constants(z), keep=1)
        # ẑ_t = (1 − τ) z_t − τ F((1 − τ) z, τ)_t
        return (1 - t) * z[:, :, :1] - t * prediction

    def latents(self, frame: Tensor, past: list[Tensor]) -> Tensor:
        """A padded frame [B, 3, H, W] and `past` -> z [B, C, F, h, w], the current frame's latent first."""
        current = frame.unsqueeze(2)
        if self.settings.wiring == "paper":
            return torch.cat([self.vae.encode(current), *past], dim=2)     # the past's latents were kept
        if len(past) < self.settings.past:
            return self.vae.encode(current)
        return self.vae.encode(torch.cat([current, *(y.unsqueeze(2) for y in past)], dim=2))

    @torch.no_grad()
    def remember(self, y: Tensor, past: list[Tensor]) -> list[Tensor]:
        """An output [B, 3, H, W] put in front of `past`, which keeps the last K.

        The paper's wiring keeps its latent; the release's the frame as an image file would hold it, in 8 bits, for the
        release reads its own files.
        """
        y = self.pad(y.clamp(-1, 1))
        kept = self.vae.encode(y.unsqueeze(2)) if self.settings.wiring == "paper" else in_eight_bits(y)
        return [kept, *past][: self.settings.past]

    def constants(self, like: Tensor) -> tuple:
        """What the timestep alone decides: the transformer's modulations (CosmosDiT.modulations), in the dtype and on
        the device of `like`."""
        return self.dit.modulations(torch.tensor(self.timestep, device=like.device), like.dtype)

    @property
    def timestep(self) -> float:
        """τ = σ / (1 + σ), the time of a straight path between the data and the noise."""
        return self.settings.sigma / (1 + self.settings.sigma)

    @staticmethod
    def pad(frame: Tensor) -> Tensor:
        """[B, 3, H, W] with the last row and column repeated up to whole patches; ValueError below 16 x 16."""
        H, W = frame.shape[-2:]
        if min(H, W) < CELL:
            raise ValueError(f"wanted frames of at least {CELL}x{CELL}, got {H}x{W}")
        return nnf.pad(frame, (0, -W % CELL, 0, -H % CELL), mode="replicate")

    @torch.no_grad()
    def stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames [3, H, W] in [-1, 1] -> as many, clamped, in memory independent of their number (stream.py).

        The only state is `past`, the last K outputs.
        """
        like, past, constants = next(self.vae.parameters()), [], None
        for number, frame in enumerate(alike(frames)):
            frame = frame[None].to(like.device, like.dtype)
            constants = self.constants(frame) if constants is None else constants
            y = self.enhance(frame, past, constants)
            yield from finished(y, number)
            past = self.remember(y, past)

    # ---- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_base(cls, dit: str | Path, vae: str | Path, device=None, dtype=None, **settings) -> "Harmonizer":
        """Published weights before any training: a Cosmos-Predict2 and a Wan 2.1, folders or hub ids.

        The parts may lie in the subfolders `transformer` and `vae`, as they do on the hub.
        """
        place = dict(device=device, dtype=dtype)
        vae, dit = (part.from_pretrained(name, subfolder(name, folder), **place)
                    for part, name, folder in ((WanVAE, vae, "vae"), (CosmosDiT, dit, "transformer")))
        vae.to(next(dit.parameters()).dtype)  # both compute in one type: NVIDIA's file has a VAE in bfloat16
        return cls(frugal.apply(vae), dit, Settings(**settings)).requires_grad_(False).eval()

    @classmethod
    @hub.reads_hub
    def from_pretrained(cls, path: str | Path, device=None, dtype=None, wiring: str = "", change_only: str = "",
                        **settings) -> "Harmonizer":
        """A trained Harmonizer from its folder or hub id; the options, if given, and `settings` replace what it says.

        ValueError of one line that names the file, if it is not a Harmonizer's or a part is missing or does not fit.
        """
        file = weights.locate(CosmosDiT, path, None, INDEX) / INDEX
        index = weights.read_json(file)
        if not describes(index):
            raise ValueError(f"{file}: wanted _class_name {CLASS_NAME!r}, got {index.get('_class_name')!r}")
        settings |= {"wiring": wiring} if wiring else {}
        settings |= {"change_only": change_only == "yes"} if change_only else {}
        about = asdict(checked.record(Settings, index | settings, file))
        vae = checked.value(str, index.get("vae", "vae"), file, "vae")
        if (Path(path) / vae).is_dir():
            vae = Path(path) / vae
        elif vae == "vae":
            vae = path  # a hub id, where from_base looks into the subfolders
        return cls.from_base(path, vae, device, dtype, **about)

    def save_pretrained(self, path: str | Path, vae: str | None = None) -> None:
        """Write the folder that from_pretrained reads. vae: where the VAE is, relative to the folder or a hub id; None:
        it is written too."""
        path = Path(path)
        self.dit.save_pretrained(path / "transformer")
        if vae is None:
            self.vae.save_pretrained(path / "vae")
        write_index(path, self.settings, vae or "vae")
        write_card(path, "Harmonizer")


def write_index(path: Path, settings: Settings, vae: str = "vae") -> None:
    """model_index.json of a Harmonizer's folder."""
    with weights.whole_file(path / INDEX) as temporary:
        index = {"_class_name": CLASS_NAME, **asdict(settings), "vae": vae}
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def subfolder(name: str | Path, folder: str) -> str | None:
    """Where a part lies: in the folder of that name, on the hub too, unless the name is the part's own folder."""
    return None if (Path(name) / weights.CONFIG).is_file() else folder


if __name__ == "__main__":
    from ..networks.dit_cosmos import CosmosDiTConfig
    from ..networks.vae_wan import WanVAEConfig

    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig(base_dim=8, num_res_blocks=1))
    dit = CosmosDiT(CosmosDiTConfig(num_attention_heads=2, attention_head_dim=24, num_layers=2, text_embed_dim=16,
                                    adaln_lora_dim=8))
    x = torch.rand(1, 3, 7, 40, 60) * 2 - 1
    for wiring in ("release", "paper"):
        harmonizer = Harmonizer(vae, dit, Settings(wiring)).requires_grad_(False).eval()
        y, outputs = harmonizer(x), []
        for t, frame in enumerate(x.unbind(dim=2)):
            whole = harmonizer.enhance_whole(frame, outputs[::-1])
            kept = whole.clamp(-1, 1)
            outputs.append(in_eight_bits(kept) if wiring == "release" else kept)
            z = harmonizer.latents(harmonizer.pad(frame), [])
            print(f"{wiring} {t}: {list(z.shape)}, whole and pruned differ by {(y[:, :, t] - whole).abs().max():.1e}")
