"""Published checkpoints that are pickles -> safetensors, in the layouts that this project reads.

    python convert.py diffusion_harmonizer.pkl harmonizer      # then: infer.py --model harmonizer
    python convert.py model.pt cosmos                          # Cosmos-Predict2, NVIDIA's layout -> cosmos/transformer
    python convert.py Wan2.1_VAE.pth wan                       # or Cosmos' tokenizer.pth -> wan/vae
    python convert.py difix.pkl difix                          # img2img-turbo, Difix: one file for each state dict

A pickle can run any code when it is read, so it is read by `torch.load(weights_only=True)` and by nothing else: that
takes tensors, numbers, texts and containers of them, and refuses whatever else the file asks for, by name. TorchScript
is code too, and is refused. What a file is, its keys say. Every entry is written or is named among what was left out.

    Harmonizer        state_dict_unet (net.*) and state_dict_vae; optimiser and averages are left out, and attention to
                      the text, which null text leaves idle
    Cosmos-Predict2   net.*, text-to-image: 0.6B, 2B, 14B
    Wan 2.1 VAE       the original layout
    a state dict      anything else that is tensors by name: the names stay

Exit status: 0 done; 2 the file or a flag is wrong, one line says how, and nothing was written.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mirage_min.data import desk
from mirage_min.data.place import taking_place
from mirage_min.networks import checked, weights
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.systems import harmonizer

State = dict[str, Tensor]
HARMONIZER = "DiffusionHarmonizer"
COSMOS, WAN = "x_embedder.proj.1.weight", "encoder.conv1.weight"  # a key by which each network is known


@dataclass
class Part:
    """One network of a checkpoint: where it goes, what is in it and what was left out, by reason."""

    folder: str
    network: type
    config: object
    state: State
    left_out: Counter = field(default_factory=Counter)


@dataclass
class Checkpoint:
    """What a file is: networks that are known, or state dicts whose names stay, and what of these was left out, by
    reason; and what else it holds."""

    kind: str
    parts: list[Part] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    others: dict = field(default_factory=dict)


# ---- reading ---------------------------------------------------------------------------------------------------------

def read(path: Path) -> dict:
    """The content of a pickle of tensors; ValueError of one line for whatever else the file is."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: is safetensors already")
    if weights.is_lfs_pointer(path):
        raise ValueError(f"{path}: only a Git LFS pointer (git lfs pull)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A file of torch's newer format is mapped: 5 GB of optimiser and averages never come into memory.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"{path}: refused, for it asks for {name[1]}, and only tensors, numbers and texts are read"
                         if name else f"{path}: is no file of torch.save's, or a damaged one") from None
    except Exception as error:  # of a damaged one, whatever the place that it leads to raises
        if "TorchScript" in str(error):
            raise ValueError(f"{path}: is TorchScript, which is code, and is not run") from None
        raise ValueError(f"{path}: truncated, damaged or no checkpoint: {str(error).partition('.')[0]}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: wanted tensors by name, got a {type(content).__name__}")
    return content


def tensors(content: dict, where: str, drop: list[str]) -> tuple[State, Counter]:
    """The tensors of a state dict, and how many other entries it holds: of which type, or dropped by their prefix.

    ValueError if it is not a dict, or if a tensor is not dense.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: wanted tensors by name, got a {type(content).__name__}")
    state, others = {}, Counter()
    for name, v in content.items():
        prefix = next((prefix for prefix in drop if str(name).startswith(prefix)), None)
        if prefix is not None:
            others[f"{prefix}* (--drop)"] += 1
        elif isinstance(v, Tensor):
            if v.layout != torch.strided or v.is_quantized or v.is_meta:
                raise ValueError(f"{where}: {name}: wanted a dense tensor of numbers, got {v.layout}, {v.dtype}, on "
                                 f"{v.device}")
            state[str(name)] = v
        else:
            others[f"type {type(v).__name__}, which is no tensor"] += 1
    return state, others


# ---- one network at a time -------------------------------------------------------------------------------------------

def copies(state: State, key: str) -> list[str]:
    """The prefix of `key` in the names, for every copy of a network that a state dict holds."""
    return [name.removesuffix(key) for name in state if name == key or name.endswith("." + key)]


def cosmos(state: State, where: str, average: bool, text: bool) -> Part:
    """A transformer in NVIDIA's layout; average: the copy `net_ema.`; text: with its attention to a text.

    ValueError unless there is just one such copy, and its tensors fit.
    """
    found, left_out, prefixes = {}, Counter(), copies(state, COSMOS)
    averages = [prefix for prefix in prefixes if "ema" in prefix]
    wanted = averages if average else [prefix for prefix in prefixes if prefix not in averages]
    if len(wanted) != 1:
        raise ValueError(f"{where}: wanted one copy of {'averaged ' * average}weights (--average: the averaged ones), "
                         f"got {', '.join(prefixes)}")
    for name, v in state.items():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len, default="")
        name = name.removeprefix(prefix)
        ours = CosmosDiT.translate_key(name)
        if prefix in prefixes and prefix != wanted[0]:
            left_out[f"{prefix}*, another copy of the weights"] += 1
        elif ours is None:
            left_out[re.search(r"_extra_state|pos_embedder|accum_|net_ema", name)[0]] += 1
        elif not text and re.search(r"\.(attn2|norm2)\.", ours):
            left_out["attention to a text, which is null here"] += 1
        else:
            found[ours] = v
    return checked_part(Part("transformer", CosmosDiT, cosmos_config(found, where, text), found, left_out), where)


def cosmos_config(state: State, where: str, text: bool) -> CosmosDiTConfig:
    """The config that a transformer's shapes tell; ValueError if a tensor is missing. DEVIATION: they do not tell
    rope_scale and max_size, which are those of every text-to-image model of Predict2."""
    def shape(name: str) -> torch.Size:
        if name not in state or state[name].ndim != (1 if "norm_q" in name else 2) or not state[name].numel():
            raise ValueError(f"{where}: a transformer of Cosmos-Predict2 has a {name}, this has none that fits")
        return state[name].shape

    block = "transformer_blocks.0"
    D, columns = shape("patch_embed.proj.weight")
    d = shape(f"{block}.attn1.norm_q.weight")[0]
    numbers = [int(name.split(".")[1]) for name in state if re.match(r"transformer_blocks\.\d+\.", name)]
    return config_of(CosmosDiT, where, dict(
        in_channels=columns // 4 - 1, out_channels=shape("proj_out.weight")[0] // 4, num_attention_heads=D // d,
        attention_head_dim=d, num_layers=max(numbers) + 1, mlp_ratio=shape(f"{block}.ff.net.0.proj.weight")[0] / D,
        text_embed_dim=shape(f"{block}.attn2.to_k.weight")[1] if text else CosmosDiTConfig.text_embed_dim,
        adaln_lora_dim=shape(f"{block}.norm1.linear_1.weight")[0], qk_eps=1e-6, cross_attention=text))


def config_of(network: type, where: str, fields: dict):
    """The network's Config; ValueError for sizes that none has, such as the number of layers a name may claim."""
    return checked.record(network.Config, fields, where, integers=checked.COUNT)


def wan_vae(state: State, where: str) -> Part:
    """Wan 2.1's VAE in the original layout; ValueError unless there is just one, and its tensors fit."""
    prefixes = copies(state, WAN)
    if len(prefixes) != 1:
        raise ValueError(f"{where}: wanted one VAE in Wan's original layout, got {len(prefixes)} tensors {WAN}")
    found = {wan_name(name.removeprefix(prefixes[0])): v for name, v in state.items()}
    base_dim = next(iter(found["encoder.conv_in.weight"].shape), 0)
    config = config_of(WanVAE, where, dict(base_dim=base_dim))
    return checked_part(Part("vae", WanVAE, config, found), where)


UP = [(i, j) for i in range(4) for j in range(3)]  # the decoder's blocks, and their layers before the upsampler
WAN_NAMES = [  # of Wan's original layout: what is replaced by what, in turn
    (r"\.residual\.0\.", ".norm1."), (r"\.residual\.2\.", ".conv1."), (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."), (r"\.shortcut\.", ".conv_shortcut."),
    (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."), (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."), (r"\.head\.2\.", ".conv_out."), (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."), (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    *((rf"^decoder\.upsamples\.{4 * i + 3}\.", f"decoder.up_blocks.{i}.upsamplers.0.") for i in range(3)),
    *((rf"^decoder\.upsamples\.{4 * i + j}\.", f"decoder.up_blocks.{i}.resnets.{j}.") for i, j in UP),
]


def wan_name(name: str) -> str:
    """A tensor's name in Wan's original layout -> in diffusers'; any other name stays."""
    for theirs, ours in WAN_NAMES:
        name = re.sub(theirs, ours, name)
    return name


def checked_part(part: Part, where: str) -> Part:
    """The part, if its tensors are just those that its config asks for; ValueError otherwise."""
    with torch.device("meta"):
        wanted = part.network(part.config).state_dict()
    weights.check_match(wanted, part.state, where, "the model that its first layers describe")
    return part


# ---- which file it is ------------------------------------------------------------------------------------------------

def recognise(content: dict, args: argparse.Namespace) -> Checkpoint:
    """What the keys of a checkpoint say that it is; ValueError if one of its networks is not whole."""
    where, both = str(args.file), ("state_dict_unet", "state_dict_vae")
    if found := [name for name in both if name in content]:
        if len(found) == 1:
            raise ValueError(f"{where}: wanted {both[0]} and {both[1]}, got only {found[0]}")
        others = {name: v for name, v in content.items() if name not in both}
        unet, unet_left_out = tensors(content[both[0]], f"{where}: {both[0]}", args.drop)
        vae, vae_left_out = tensors(content[both[1]], f"{where}: {both[1]}", args.drop)
        if not copies(unet, COSMOS):
            return Checkpoint("img2img-turbo or Difix", states=dict(zip(both, (unet, vae))),
                              left_out=unet_left_out + vae_left_out, others=others)
        parts = [cosmos(unet, f"{where}: {both[0]}", args.average, text=False), wan_vae(vae, f"{where}: {both[1]}")]
        for part, left_out in zip(parts, (unet_left_out, vae_left_out)):
            part.left_out += left_out
        return Checkpoint(HARMONIZER, parts, others=others)

    state, left_out = tensors(content, where, args.drop)
    others = {}
    if not state and isinstance(content.get("state_dict"), dict):
        others = {name: v for name, v in content.items() if name != "state_dict"}
        state, left_out = tensors(content["state_dict"], where, args.drop)
    if not state:
        raise ValueError(f"{where}: holds no tensors by name, but {', '.join(map(str, list(content)[:5]))}")
    if copies(state, COSMOS):
        kind, part = "Cosmos-Predict2", cosmos(state, where, args.average, text=True)
    elif copies(state, WAN) and copies(state, "decoder.upsamples.0.residual.0.gamma"):
        kind, part = "Wan's VAE", wan_vae(state, where)
    else:
        name = weights.WEIGHTS.removesuffix(".safetensors")
        return Checkpoint("a state dict", states={name: state}, left_out=left_out, others=others)
    part.left_out += left_out
    return Checkpoint(kind, [part], others=others)


def write(out: Path, checkpoint: Checkpoint) -> None:
    """All files of a checkpoint into the folder `out`, which appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with taking_place(Path(os.path.realpath(out)), overwrite=False) as temporary:
        temporary.mkdir()
        for part in checkpoint.parts:
            (temporary / part.folder).mkdir()
            weights.save_tensors(temporary / part.folder / weights.WEIGHTS, part.state, {"format": "pt"})
            with torch.device("meta"):
                fields = weights.config_fields(part.network(part.config))
            (temporary / part.folder / weights.CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        about = {key: json.dumps(value) for key, value in checkpoint.others.items() if plain(value)}
        for name, state in checkpoint.states.items():
            weights.save_tensors(temporary / f"{name}.safetensors", state, about or None)
        if checkpoint.kind == HARMONIZER:
            harmonizer.write_index(temporary, harmonizer.Settings("release"))


def plain(value) -> bool:
    """Whether a value is a number, a text or a list of them, as a rank and the names of layers are."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(v, (int, float, str)) for v in values)


def report(state: State) -> str:
    """How many tensors, numbers and of which types."""
    types = Counter(str(v.dtype).removeprefix("torch.") for v in state.values())
    return f"{len(state)} tensors, {sum(v.numel() for v in state.values()):,} numbers, {', '.join(sorted(types))}"


def main(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out}: exists and is no empty folder")
    checkpoint = recognise(read(args.file), args)
    write(args.out, checkpoint)
    desk.say(f"{args.file}: {checkpoint.kind}")
    for part in checkpoint.parts:
        desk.say(f"{args.out / part.folder}: {report(part.state)}")
        for reason, n in sorted(part.left_out.items()):
            desk.say(f"  left out: {n} of {reason}")
    for name, state in checkpoint.states.items():
        desk.say(f"{args.out / name}.safetensors: {report(state)}, their names unchanged")
    for reason, n in sorted(checkpoint.left_out.items()):
        desk.say(f"  left out: {n} of {reason}")
    kept = [key for key, value in checkpoint.others.items() if checkpoint.states and plain(value)]
    if left_out := [str(key) for key in checkpoint.others if key not in kept]:
        desk.say(f"left out: {', '.join(left_out)}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("file", type=Path, help="a .pkl, .pt, .pth, .ckpt or .bin")
    parser.add_argument("out", type=Path, help="folder for the result, new or empty")
    parser.add_argument("--average", action="store_true",
                        help="of a Cosmos transformer the average of its weights (net_ema.) in place of the weights "
                             "(net.), which DiffusionHarmonizer trains and reads")
    parser.add_argument("--drop", metavar="PREFIX", action="append", default=[],
                        help="leave out entries whose names begin so; else an unknown one is refused")
    return parser


def cli(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    return desk.serve("convert.py", lambda: main(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli())
