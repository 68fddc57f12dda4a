"""R3D2: one image at a time, harmonised in one step of Stable Diffusion's UNet (R3D2 §3.2, A.1).

    x_NI ──vae.encode──> z_NI ──denoise_epsilon(unet, t)──> z_DR ──vae.decode──> x_DR
      └───── features of the encoder ──skip convolutions──────────────┘

Every frame of a video is alone: nothing passes from one to the next, which is why R3D2 flickers (its B.2). Three
systems are wired like this. A folder's VAE, and the skip convolutions in its file, say which of them it holds.

    R3D2        AutoencoderTiny (TAESD), three skips, from just before each downsampling. Inferred: R3D2's supplement
                names no VAE, but three places, which TAESD has, and a speed that only TAESD's operations explain
    R3D2-BIG    AutoencoderKL, four skips, from the inputs of the down blocks, as img2img-turbo has them
    Difix       the same; its decoder's weights are stored as a base and a LoRA, which are merged when they are read

A folder is in diffusers' layout: model_index.json, unet/, scheduler/, vae/ with `decoder.skip_conv_1` and so on among
its weights, as nvidia/difix has them; and prompt.safetensors, the text embedding of the fixed prompt, which published
folders lack (encode_prompt.py makes it with their text_encoder/). R3D2's own folder on the hub could not be inspected,
and its timestep and prompt are not known: whatever differs from the above is refused with the file and what was wanted.

    system = R3D2.from_pretrained("nvidia/difix", prompt="prompt.safetensors")
    x_dr = system(x_ni)                                         # [B, 3, T, H, W] in [-1, 1], any size
    for frame in system.stream(frames, batch=4): ...            # [3, H, W], any number of them

    python -m mirage_min.systems.r3d2                           # both VAEs: shapes, sizes, what a frame sees
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..data.video import read_image
from ..method import lora
from ..method.one_step import STEPS, T_MIRAGE, denoise_epsilon
from ..method.schedules import STABLE_DIFFUSION, Epsilon, config_from_schedule, schedule_from_config
from ..method.skips import Skips
from ..networks import checked, frugal, hub, weights
from ..networks.card import write_card
from ..networks.unet_2d import UNet2D
from ..networks.vae_2d import AutoencoderKL
from ..networks.vae_tiny import AutoencoderTiny
from .prompt import PROMPT, read_prompt, write_prompt
from .stream import stream_images

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
CLASS_NAME = "R3D2"
VAES = {kind.CLASS_NAME: kind for kind in (AutoencoderKL, AutoencoderTiny)}
T_OF = {"DifixPipeline": T_MIRAGE}             # the timestep of pipelines whose model_index.json does not say it
DIFIX = {"gamma": 1.0, "ignore_skip": False}   # fields of its VAE's config.json, at the one value that is understood
CELL = 8                                       # pixels to a latent


@dataclass
class Index:
    """What model_index.json says about one of these systems: the library and the class of each part."""

    _class_name: str
    unet: list[str]
    vae: list[str]
    scheduler: list[str]
    t: Annotated[int, checked.Within(0, STEPS - 1)] | None = None


@dataclass
class Options:
    """What can be chosen when a trained system is loaded."""

    batch: Annotated[int, checked.COUNT] = 1                 # frames at once
    reference: str = ""                                      # a picture that is shown with every frame (Difix)
    prompt: str = ""                                         # file with the text embedding; "": the folder's own
    t: Annotated[int, checked.Within(-1, STEPS - 1)] = -1    # the timestep; -1: as model_index.json says


def describes(index: dict) -> bool:
    """Whether a model_index.json is of one of these systems, for infer.py: it names a UNet and a VAE."""
    return {"unet", "vae"} <= index.keys()


class R3D2(nn.Module):
    """A UNet that predicts ε, an image VAE, the skips between its encoder and its decoder, and a fixed prompt."""

    Options = Options

    def __init__(self, unet: UNet2D, vae: nn.Module, skips: Skips, text: Tensor, alpha_bar: Tensor, t: int = T_MIRAGE):
        """text [1, L, D]; alpha_bar [1000], without zero terminal SNR. ValueError unless UNet, VAE and text fit.

        By default a stream takes `batch` frames at once, and shows `reference` [3, H, W] with each.
        """
        super().__init__()
        latents, config = vae.config.latent_channels, unet.config
        if (config.in_channels, config.out_channels) != (latents, latents):
            raise ValueError(f"wanted a UNet for the {latents} latent channels of this VAE, got one that takes "
                             f"{config.in_channels} and returns {config.out_channels}")
        if text.ndim != 3 or len(text) != 1 or text.shape[2] != config.cross_attention_dim:
            raise ValueError(f"wanted a prompt [1, L, {config.cross_attention_dim}], as wide as this UNet takes it, "
                             f"got {list(text.shape)} (encode_prompt.py)")
        self.unet, self.vae, self.skips = unet, vae, skips
        self.alpha_bar, self.t = alpha_bar, t
        self.batch: int = 1
        self.reference: Tensor | None = None
        self.register_buffer("text", text)

    # ---- the method --------------------------------------------------------------------------------------------------

    def forward(self, x_ni: Tensor, reference: Tensor | None = None) -> Tensor:
        """x_ni [B, 3, T, H, W] in [-1, 1], any size -> x_dr of the same shape, not clamped.

        reference: an image [3, H, W] in [-1, 1] that is shown to the UNet with every frame (Difix). ValueError for
        another shape of either.
        """
        if x_ni.ndim != 5 or x_ni.shape[1] != 3:
            raise ValueError(f"wanted [B, 3, T, H, W], got {list(x_ni.shape)}")
        frames = rearrange(x_ni, "b c t h w -> (b t) c h w")
        z_ref = None if reference is None else self.encode_reference(reference, frames)
        return rearrange(self.enhance(frames, z_ref), "(b t) c h w -> b c t h w", b=len(x_ni))

    def enhance(self, frames: Tensor, z_ref: Tensor | None = None) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> the same shape, not clamped. z_ref: as `encode_reference` returns it."""
        H, W = frames.shape[-2:]
        # DEVIATION: the mean of the posterior; Difix and img2img-turbo draw from it
        z_ni, features = self.vae.encode_with_features(pad(frames))
        skips = self.skips(features)
        del features  # the finest is as large as anything in the decoder: it is freed once its skip is made
        z_dr = self.denoise(z_ni, z_ref)
        # x_DR = D[z_DR, skips]                                                             R3D2 A.1
        return self.vae.decode(z_dr, skips)[:, :, :H, :W]

    def denoise(self, z_ni: Tensor, z_ref: Tensor | None = None) -> Tensor:
        """z_NI [N, C, h, w] -> z_DR: one call of the UNet.

        With z_ref [1, C, h, w] each image has a second view, and self-attention is over the tokens of both (Difix).
        """
        views = [z_ni] if z_ref is None else [z_ni, z_ref.expand_as(z_ni)]
        z = rearrange(views, "v n c h w -> (n v) c h w")
        text = self.text.to(z.dtype).expand(len(z), -1, -1)
        z0 = denoise_epsilon(partial(self.unet, views=len(views)), z, self.t, text, self.alpha_bar)
        return z0[:: len(views)]

    def encode_reference(self, reference: Tensor, frames: Tensor) -> Tensor:
        """A reference image [3, H, W] in [-1, 1] -> its latents [1, C, h, w].

        ValueError unless it is as large as the frames [N, 3, H, W].
        """
        if reference.shape != frames.shape[1:]:
            raise ValueError(f"the reference image must have the frames' shape {list(frames.shape[1:])}, "
                             f"got {list(reference.shape)}")
        return self.vae.encode(pad(reference[None].to(frames)))

    @torch.no_grad()
    def stream(self, frames: Iterable[Tensor], batch: int | None = None, reference: Tensor | None = None
               ) -> Iterator[Tensor]:
        """Frames [3, H, W] in [-1, 1] -> as many, clamped, `batch` at a time, in memory independent of their number.

        ValueError for a reference that is not as large as the frames, and for what stream.py refuses.
        """
        batch = self.batch if batch is None else batch
        reference = self.reference if reference is None else reference
        like = next(self.vae.parameters())
        frames = iter(frames)
        z_ref = None
        if reference is not None:
            first = list(islice(frames, 1))
            z_ref = self.encode_reference(reference, torch.stack(first).to(like)) if first else None
            frames = chain(first, frames)
        yield from stream_images(frames, partial(self.enhance, z_ref=z_ref), batch, like)

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_base(cls, base: str | Path, vae: str | Path | None = None, text: Tensor | None = None, t: int = T_MIRAGE,
                  start: float | None = 0.0, device=None, dtype=None) -> "R3D2":
        """What training starts from: folders or hub ids of a Stable Diffusion, or a trained system, and of a VAE.

        vae    an AutoencoderKL or AutoencoderTiny; None: the base's own
        text   [1, L, D]; None: one token of zeros
        start  of all weights of the skip convolutions, if the VAE's file has none; None: it must have them
        """
        place = dict(device=device, dtype=dtype)
        unet = UNet2D.from_pretrained(base, "unet", **place)
        place["dtype"] = next(unet.parameters()).dtype  # all parts compute in one type
        inside = "vae" if vae is None or (Path(vae) / "vae").is_dir() else None
        network, skips = read_vae(base if vae is None else vae, inside, start)
        scheduler = weights.locate(UNet2D, base, "scheduler", SCHEDULER) / SCHEDULER
        alpha_bar = schedule_from_config(weights.read_json(scheduler), Epsilon, file=scheduler)
        text = torch.zeros(1, 1, unet.config.cross_attention_dim) if text is None else text
        network, skips, text = frugal.apply(network).to(**place), skips.to(**place), text.to(**place)
        return cls(frugal.apply(unet), network, skips, text, alpha_bar, t=t).eval()

    @classmethod
    @hub.reads_hub
    def from_pretrained(cls, path: str | Path, prompt: str | Path | None = None, t: int = -1, device=None, dtype=None,
                        batch: int = 1, reference: str | Path | None = None) -> "R3D2":
        """A trained system from its folder or hub id.

        prompt     file with the text embedding (encode_prompt.py); None or "": the folder's own prompt.safetensors
        t          the timestep; -1: as model_index.json says
        reference  a picture file, shown with every frame; None or "": none
        batch      frames that a stream takes at once
        ValueError of one line that names the file, what was wanted and what was found.
        """
        folder = weights.locate(UNet2D, path, None, INDEX)
        index = read_index(folder / INDEX)
        t = index.t if t < 0 else t
        if t is None:
            raise ValueError(f"{folder / INDEX}: says no timestep t, and that of a {index._class_name} is not known: "
                             "give it (Difix was trained at 199, img2img-turbo at 999)")
        file = Path(prompt or folder / PROMPT)
        if not file.exists():
            raise ValueError(f"{file}: no such file; python encode_prompt.py --base {path} --out {PROMPT} makes one, "
                             f"for prompt={PROMPT}")
        text, _ = read_prompt(file)
        system = cls.from_base(path, text=text, t=t, start=None, device=device, dtype=dtype).requires_grad_(False)
        system.batch = batch
        system.reference = read_image(reference) if reference else None
        return system

    def save_pretrained(self, path: str | Path, about: dict | None = None) -> None:
        """Write the folder that from_pretrained reads; a LoRA has to be merged before. about: more for its index."""
        path, vae = Path(path), self.vae
        self.unet.save_pretrained(path / "unet")
        skips = {f"decoder.{key}": tensor for key, tensor in self.skips.state_dict().items()}
        save_json(path / "vae" / weights.CONFIG, weights.config_fields(vae))
        weights.save_tensors(path / "vae" / weights.WEIGHTS, vae.state_dict() | skips, {"format": "pt"})
        schedule = config_from_schedule(STABLE_DIFFUSION)
        save_json(path / "scheduler" / SCHEDULER, schedule)
        write_prompt(path, self.text)
        classes = {"unet": UNet2D.CLASS_NAME, "vae": vae.CLASS_NAME, "scheduler": schedule["_class_name"]}
        parts = {part: ["diffusers", name] for part, name in classes.items()}
        save_json(path / INDEX, {"_class_name": CLASS_NAME, "t": self.t} | parts | (about or {}))
        write_card(path, "R3D2", about=about)


def pad(frames: Tensor) -> Tensor:
    """[N, 3, H, W] with the last row and column repeated up to whole latents, so that the VAEs neither crop nor pad."""
    H, W = frames.shape[-2:]
    return nnf.pad(frames, (0, -W % CELL, 0, -H % CELL), mode="replicate")


def read_index(file: Path) -> Index:
    """model_index.json of a trained system; ValueError naming a part whose class cannot be read."""
    content = weights.read_json(file)
    index = checked.record(Index, content, file)
    for part, classes in (("unet", [UNet2D.CLASS_NAME]), ("vae", list(VAES))):
        given = getattr(index, part)
        if not given or given[-1] not in classes:
            raise ValueError(f"{file}: {part}: wanted the class {' or '.join(classes)}, got {given}")
    index.t = T_OF.get(index._class_name) if index.t is None else index.t
    return index


def read_vae(path: str | Path, subfolder: str | None, start: float | None) -> tuple[nn.Module, Skips]:
    """An image VAE, a LoRA of its decoder merged, and the skips of the same file; new ones (`start`) if it has none.

    ValueError for another class or unknown fields, tensors that do not fit, and missing skips where start is None.
    """
    folder = weights.locate(AutoencoderKL, path, subfolder)
    config = folder / weights.CONFIG
    fields = weights.read_json(config)
    name = fields.get("_class_name")
    if name not in tuple(VAES):  # JSON may have a list there, which a dict cannot look up
        raise ValueError(f"{config}: _class_name: wanted {' or '.join(VAES)}, got {name!r}")
    kind = VAES[name]
    fields.pop("lora_rank", None)  # Difix's; the shapes say it too
    for name, wanted in DIFIX.items():
        if (given := fields.pop(name, wanted)) != wanted:
            raise ValueError(f"{config}: {name}: wanted {wanted}, got {given}")
    vae = weights.without_weights(kind, fields, config)

    state, files = {}, weights.weight_files(kind, folder)
    for file in files:
        state |= weights.load_tensors(file)[0]
    where = " + ".join(map(str, files))
    try:
        state = lora.unwrap(state)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    trained = {key: state.pop(key) for key in list(state) if key.startswith("decoder.skip_conv_")}
    if kind is AutoencoderKL:
        state = {kind.translate_key(key): tensor for key, tensor in state.items()}
    model = f"the model that {config} describes"
    weights.fill(vae, state, where, model)
    skips = Skips(vae.skip_channels(), start or 0.0)
    if trained:
        trained = {key.removeprefix("decoder."): tensor for key, tensor in trained.items()}
        weights.fill(skips, trained, where, model)
    elif start is None:
        raise ValueError(f"{where}: wanted skip convolutions in the decoder (decoder.skip_conv_1.weight, ...), got a "
                         "plain VAE: this is a base, which train_r3d2.py --base starts from")
    return vae.eval(), skips


def save_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically, and make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with weights.whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from ..method.one_step import alpha_bar
    from ..networks.unet_2d import UNet2DConfig
    from ..networks.vae_2d import AutoencoderKLConfig

    torch.manual_seed(0)
    unet = UNet2D(UNet2DConfig(block_out_channels=(16, 32, 64, 64), attention_head_dim=(1, 2, 4, 4), norm_num_groups=8,
                               cross_attention_dim=24))
    kl = AutoencoderKLConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=8)
    x = torch.rand(1, 3, 3, 41, 57) * 2 - 1
    for vae in (AutoencoderTiny(), AutoencoderKL(kl)):
        skips = Skips(vae.skip_channels(), start=0.05)
        system = R3D2(unet, vae, skips, torch.zeros(1, 1, 24), alpha_bar(zero_terminal_snr=False)).eval()
        with torch.no_grad():
            z, features = vae.encode_with_features(pad(x[:, :, 0]))
            y, shown = system(x), system(x, reference=x[0, :, 0])
        print(f"{vae.CLASS_NAME}: x {list(x.shape)} -> z {list(z.shape)} -> x {list(y.shape)}")
        print("  features, finest first:", *(list(f.shape[1:]) for f in features))
        one = torch.stack(list(system.stream(x[0].unbind(1))), dim=1)
        print(f"  one frame at a time: largest difference {(one - y[0].clamp(-1, 1)).abs().max():.0e}; "
              f"with a reference view: mean change {(shown - y).abs().mean():.4f}")
