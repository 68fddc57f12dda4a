"""Encode the fixed prompt, once, with the base's own text encoder (Mirage §4.1: "remove degradation").

    python encode_prompt.py --base THUDM/CogVideoX1.5-5B --out prompt.safetensors
    python train_vae.py --base THUDM/CogVideoX1.5-5B --prompt prompt.safetensors ...

The text encoder is needed here and nowhere else: training takes the file that this writes (`text` [1, L, D], float32)
and keeps it beside the adapters. Tokens and padding are those of each base's published pipeline:

    CogVideoX   T5     L = 226    the padding is encoded as well, and the text attends to it
    Wan 2.1     UMT5   L = 512    the text is cleaned first, attends to itself alone, and zeros follow it

Needs transformers. Exit status: 0 done; 2 something is wrong, and one line says what.
"""

import argparse
import html
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from mirage_min.networks import weights
from mirage_min.networks.dit_cogvideox import CogVideoXDiT
from mirage_min.networks.dit_wan import WanDiT
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.training import run


def main(args: argparse.Namespace) -> None:
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ValueError(f"{args.out}: wanted a file in a folder that exists")
    args.device = run.choose_device(args.device)
    try:
        from transformers import AutoTokenizer, T5EncoderModel, UMT5EncoderModel
    except ImportError as error:
        raise ValueError(f"needs transformers (pip install transformers sentencepiece protobuf): {error}") from error

    wan, L, D = text_shape(args.base)
    tokens = tokenize(load(AutoTokenizer, args.base, "tokenizer"), args.text, L, wan)
    check_encoder(args.base, "umt5" if wan else "t5", D)  # before it is fetched, as the largest part of a base
    encoder, report = load(UMT5EncoderModel if wan else T5EncoderModel, args.base, "text_encoder",
                           torch_dtype=args.dtype, use_safetensors=True, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # transformers fills these with random numbers
        raise ValueError(f"{args.base}: text_encoder lacks {len(missing)} weights: {', '.join(missing[:5])}")
    text = encode(encoder.eval().to(args.device), tokens.to(args.device), wan)
    base = os.path.relpath(args.base, args.out.parent) if Path(args.base).is_dir() else args.base
    weights.save_tensors(args.out, {"text": text.float()}, {"text": args.text, "base": base})
    print(f"{args.out}: {args.text!r} as {list(text.shape)}")


def text_shape(base: str) -> tuple[bool, int, int]:
    """What the base's transformer wants: (whether it is Wan's, L, D)."""
    def config(cls, part: str) -> tuple[dict, Path]:
        # named with its folder, so that of a hub id this file alone is fetched and no weights
        where = weights.locate(cls, base, None, f"{part}/config.json") / part / "config.json"
        return weights.read_json(where), where

    wan = config(WanVAE, "vae")[0].get("_class_name") == WanVAE.CLASS_NAME
    DiT = WanDiT if wan else CogVideoXDiT
    c = weights.read_config(DiT, *config(DiT, "transformer"))
    return (True, 512, c.text_dim) if wan else (False, c.max_text_seq_length, c.text_embed_dim)


def check_encoder(base: str, kind: str, D: int) -> None:
    """Raise unless the base's text encoder is of this kind and width; transformers would go on with a warning."""
    where = weights.locate(None, base, None, "text_encoder/config.json") / "text_encoder" / "config.json"
    config = weights.read_json(where)
    if (given := (config.get("model_type"), config.get("d_model"))) != (kind, D):
        raise ValueError(f"{where}: wanted model_type {kind} and d_model {D}, got {given[0]} and {given[1]}")


def load(cls, base: str, part: str, **settings):
    """One part of the base by transformers, which takes folders and hub ids; whatever goes wrong is a ValueError."""
    try:
        return cls.from_pretrained(base, subfolder=part, **settings)
    except Exception as error:  # it has many ways to fail, and every version its own classes
        raise ValueError(f"{base}: transformers cannot load {part}: {error}") from error


def tokenize(tokenizer, text: str, L: int, wan: bool):
    """text -> input_ids and attention_mask [1, L], padded on the right; a longer text is a ValueError."""
    text = clean(text) if wan else text
    # DEVIATION: the published pipelines warn, and cut a longer text off
    if (count := len(tokenizer(text).input_ids)) > L:
        raise ValueError(f"the text has {count} tokens, this base takes at most {L}")
    return tokenizer(text, padding="max_length", max_length=L, return_tensors="pt")


@torch.no_grad()
def encode(encoder, tokens, wan: bool) -> Tensor:
    """input_ids and attention_mask [1, L] -> text [1, L, D]"""
    if not wan:
        return encoder(tokens.input_ids).last_hidden_state
    return encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * tokens.attention_mask[..., None]


def clean(text: str) -> str:
    """As Wan's pipeline: broken Unicode mended, HTML entities resolved twice, runs of white space to one space."""
    try:
        import ftfy

        text = ftfy.fix_text(text)
    except ImportError:
        if not text.isascii():
            raise ValueError(f"{text!r} is not plain ASCII: Wan then needs ftfy (pip install ftfy)") from None
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def cli(argv: list[str] | None = None) -> int:
    """Run; on an error say it in one line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, help="folder or hub id of CogVideoX or Wan")
    parser.add_argument("--text", default="remove degradation", help="may be empty (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("prompt.safetensors"), help="file (default: %(default)s)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the text encoder (default: auto, as its config.json says)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if it is there, else cpu")
    try:
        main(parser.parse_args(argv))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print("encode_prompt.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
