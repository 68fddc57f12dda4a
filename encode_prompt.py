"""Encode the fixed prompt, once, with the base's own text encoder (Mirage §4.1: "remove degradation").

    python encode_prompt.py --base THUDM/CogVideoX1.5-5B --out prompt.safetensors
    python train_vae.py --base THUDM/CogVideoX1.5-5B --prompt prompt.safetensors ...

The text encoder is needed here and nowhere else: training takes the file that this writes (`text` [1, L, D], float32)
and keeps it with the adapters. Tokens and padding are those of each base's published pipeline:

    CogVideoX               T5     L = 226    the padding is encoded as well, and the text attends to it
    Wan 2.1                 UMT5   L = 512    the text is cleaned first, attends to itself alone, and zeros follow it
    SD-Turbo, SD 2.1, 1.5   CLIP   L = 77     the padding is encoded as well, after the text; for R3D2 and Difix

CLIP's padding differs between checkpoints (SD 2.x has "!", SD 1.x the end of text), and every padded position with it:
the checkpoint's own tokenizer decides, and its token is printed.

Needs transformers. Exit status: 0 done; 2 something is wrong, and one line says what.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import html
import os
import re
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mirage_min.data import desk
from mirage_min.networks import hub, weights
from mirage_min.networks.dit_cogvideox import CogVideoXDiT
from mirage_min.networks.dit_wan import WanDiT
from mirage_min.networks.unet_2d import UNet2D


class Kind(NamedTuple):
    """A kind of text encoder, and the network of its base that reads what it writes."""

    encoder: str               # transformers' class
    width: str                 # the field of its config.json that says how wide the text is
    network: type[nn.Module]
    folder: str                # of the network, in the base
    taken: str                 # the field of its config.json that says how wide a text it takes
    L: int | None              # tokens; None: the network's max_text_seq_length


KINDS = {  # by model_type in the text encoder's config.json
    "t5": Kind("T5EncoderModel", "d_model", CogVideoXDiT, folder="transformer", taken="text_embed_dim", L=None),
    "umt5": Kind("UMT5EncoderModel", "d_model", WanDiT, folder="transformer", taken="text_dim", L=512),
    "clip_text_model": Kind("CLIPTextModel", "hidden_size", UNet2D, folder="unet", taken="cross_attention_dim", L=77),
}


def main(args: argparse.Namespace) -> None:
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ValueError(f"{args.out}: wanted a file in a folder that exists")
    args.device = desk.choose_device(args.device)
    kind, L = text_shape(args.base)
    transformers = import_transformers()
    tokenizer = load(transformers.AutoTokenizer, args.base, "tokenizer")
    with refusing(args.base, "use the tokenizer"):
        tokens = tokenize(tokenizer, args.text, L, kind)
    if (count := tokens.input_ids.shape[1]) > L:  # DEVIATION: the published pipelines warn, and cut it off
        raise ValueError(f"the text has {count} tokens, this base takes at most {L}")
    encoder, report = load(getattr(transformers, KINDS[kind].encoder), args.base, "text_encoder",
                           torch_dtype=args.dtype, use_safetensors=True, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # transformers fills these with random numbers
        raise ValueError(f"{args.base}: text_encoder lacks {len(missing)} weights: {', '.join(missing[:5])}")
    largest, known = int(tokens.input_ids.max()), encoder.get_input_embeddings().num_embeddings
    if largest >= known:
        raise ValueError(f"{args.base}: the tokenizer has a token {largest}, the text_encoder knows 0 to {known - 1}")
    with refusing(args.base, "run the text_encoder"):
        text = encode(encoder.eval().to(args.device), tokens.to(args.device), kind)
    if not text.isfinite().all():
        raise ValueError(f"{args.base}: what the text_encoder makes of the text is not finite (its weights, --dtype)")
    base = os.path.relpath(args.base, args.out.parent) if Path(args.base).is_dir() else args.base
    weights.save_tensors(args.out, {"text": text.float()}, {"text": args.text, "base": base})
    desk.say(f"{args.out}: {args.text!r} as {list(text.shape)}, padded with token {tokenizer.pad_token_id} "
             f"({tokenizer.pad_token!r})")


def import_transformers():
    """The package transformers; ValueError tells one that is not installed from one that fails to import."""
    if find_spec("transformers") is None:
        raise ValueError("needs transformers (pip install transformers sentencepiece protobuf)")
    try:
        import torchvision  # noqa: F401
    except Exception:  # built for another torch, say: text needs none, and transformers does without one it cannot find
        sys.modules["torchvision"] = None
    try:
        import transformers

        for name in ("AutoTokenizer", *(kind.encoder for kind in KINDS.values())):
            getattr(transformers, name)  # they are imported only when they are asked for
        transformers.utils.logging.set_verbosity_error()  # a weight that is missing is one line of ours
    except Exception as error:  # whatever one of its many dependencies raises
        raise ValueError(f"transformers is installed but cannot be imported: {error}") from error
    return transformers


def text_shape(base: str) -> tuple[str, int]:
    """The kind of a base's text encoder and the number of its tokens, L; of a hub id two config.json are fetched.

    ValueError if the kind is unknown, or if its width is not what the base's network takes: transformers would only
    warn.
    """
    about, where = read_config(base, "text_encoder")
    name = about.get("model_type")
    if name not in tuple(KINDS):  # JSON may have a list there, which a dict cannot look up
        raise ValueError(f"{where}: wanted model_type {', '.join(KINDS)}, got {name}")
    kind = KINDS[name]
    network = weights.read_config(kind.network, *read_config(base, kind.folder))
    wanted, given = getattr(network, kind.taken), about.get(kind.width)
    if given != wanted:
        raise ValueError(f"{where}: wanted {kind.width} {wanted}, which the {kind.folder} takes, got {given}")
    return name, kind.L or network.max_text_seq_length


def read_config(base: str, part: str) -> tuple[dict, Path]:
    """config.json of one part of the base, and where it is."""
    # named with its folder, so that of a hub id this file alone is fetched and no weights
    where = weights.locate(None, base, None, f"{part}/config.json") / part / "config.json"
    return weights.read_json(where), where


def load(cls, base: str, part: str, **settings):
    """One part of the base by transformers, which takes folders and hub ids; whatever goes wrong is a ValueError."""
    with refusing(base, f"load {part}"):
        name, revision = hub.split(base) if hub.is_id(base) and not Path(base).is_dir() else (base, None)
        return cls.from_pretrained(name, subfolder=part, revision=revision, **settings)


@contextmanager
def refusing(base: str, task: str):
    """Whatever transformers raises in here is a ValueError of one line: a file of the base made it fail."""
    try:
        yield
    except Exception as error:  # it has many ways to fail, and every version its own classes
        raise ValueError(f"{base}: transformers cannot {task}: {error}") from error


def tokenize(tokenizer, text: str, L: int, kind: str):
    """text -> input_ids and attention_mask [1, L], padded on the right, or longer if the text is."""
    text = clean(text) if kind == "umt5" else text
    return tokenizer(text, padding="max_length", max_length=L, return_tensors="pt")


@torch.no_grad()
def encode(encoder, tokens, kind: str) -> Tensor:
    """input_ids and attention_mask [1, L] -> text [1, L, D], the last hidden state (CLIP's has its last norm)."""
    if kind != "umt5":
        return encoder(tokens.input_ids).last_hidden_state
    return encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask[..., None]


def clean(text: str) -> str:
    """As Wan's pipeline: broken Unicode repaired, HTML entities resolved twice, runs of white space made one space.

    ValueError for text beyond ASCII where ftfy, which repairs it, is missing.
    """
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        if not text.isascii():
            raise ValueError(f"{text!r} is not plain ASCII: Wan then needs ftfy (pip install ftfy)") from None
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def cli(argv: list[str] | None = None) -> int:
    """Run; on an error say it in one line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("--base", required=True, help="folder or hub id of CogVideoX, Wan or Stable Diffusion")
    parser.add_argument("--text", default="remove degradation", help="may be empty (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("prompt.safetensors"), help="file (default: %(default)s)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the text encoder (default: auto, as its config.json says)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if there is one, else cpu")
    return desk.serve("encode_prompt.py", lambda: main(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli())
