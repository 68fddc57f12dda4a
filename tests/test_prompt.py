"""encode_prompt.py writes the published pipelines' own embedding of a prompt; every mistake is one line and status 2.

The reference is what CogVideoXPipeline and WanPipeline compute with the same small random text encoder and tokenizer.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import encode_prompt
from mirage_min.networks import weights
from mirage_min.networks.unet_2d import UNet2D, UNet2DConfig
from mirage_min.systems.mirage import Mirage
from tests import small
from tests.torchvision_stub import stub

stub()

from diffusers import CogVideoXPipeline, StableDiffusionPipeline, WanPipeline  # noqa: E402
from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

ROOT = Path(__file__).parents[1]
L = {"cogvideox": 9, "wan": 512, "sd": 77}  # the small CogVideoX has its own length
NETWORK = {"cogvideox": "transformer", "wan": "transformer", "sd": "unet"}
MODEL_TYPE = {"cogvideox": "t5", "wan": "umt5", "sd": "clip_text_model"}
PAD = {"cogvideox": "<pad>", "wan": "<pad>", "sd": "snow"}  # SD 2.x pads with a word too, "!"


def save_tokenizer(folder, pad: str, more: int = 0) -> None:
    """A token a word, one for every space, unknown words alike; </s> at the end, as T5 has it."""
    words = ["<pad>", "</s>", "<unk>", " ", "remove", "degradation", "<", "&lt;", "add", "snow"]
    words += [f"more{i}" for i in range(more)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="</s>", unk_token="<unk>",
                            model_max_length=77).save_pretrained(folder)


def text_encoder(kind: str, d_model: int = 8):
    torch.manual_seed(0)
    if kind == "sd":
        return CLIPTextModel(CLIPTextConfig(vocab_size=16, hidden_size=d_model, intermediate_size=16, eos_token_id=1,
                                            num_hidden_layers=2, num_attention_heads=2, pad_token_id=9)).eval()
    Config, Encoder = (UMT5Config, UMT5EncoderModel) if kind == "wan" else (T5Config, T5EncoderModel)
    return Encoder(Config(vocab_size=16, d_model=d_model, d_kv=4, d_ff=16, num_layers=2, num_heads=2)).eval()


@pytest.fixture(scope="module", params=L)
def built(request, tmp_path_factory):
    """(kind, folder with a base that has a text encoder)"""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    base = folder / "base"
    if kind == "sd":
        UNet2D(UNet2DConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
                            attention_head_dim=1, cross_attention_dim=8)).save_pretrained(base / "unet")
    else:
        (small.save_wan if kind == "wan" else small.save_cogvideox)(folder)
    if kind == "cogvideox":
        file = base / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_text_seq_length": L[kind]}))
    save_tokenizer(base / "tokenizer", PAD[kind])
    text_encoder(kind).save_pretrained(base / "text_encoder")
    return kind, folder


@pytest.fixture
def case(built, tmp_path):
    """The same in a folder of the test's own, to write in and to spoil."""
    kind, folder = built
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return kind, tmp_path


def run(capsys, folder, *argv):
    """The script's status and its error line, where it wrote one."""
    capsys.readouterr()
    status = encode_prompt.cli(["--base", str(folder / "base"), "--out", str(folder / "prompt.safetensors"), *argv])
    return status, capsys.readouterr().err.splitlines()[-1:]


def published(kind: str, folder, text: str):
    """The published pipeline's [1, L, D]."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base" / "tokenizer")
    parts = dict(tokenizer=tokenizer, text_encoder=text_encoder(kind), vae=None, scheduler=None)
    if kind == "sd":
        pipeline = StableDiffusionPipeline(**parts, unet=None, safety_checker=None, feature_extractor=None,
                                           requires_safety_checker=False)
        with torch.no_grad():
            return pipeline.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)[0]
    pipeline = {"wan": WanPipeline, "cogvideox": CogVideoXPipeline}[kind](**parts, transformer=None)
    with torch.no_grad():
        return pipeline.encode_prompt(text, do_classifier_free_guidance=False, device="cpu",
                                      max_sequence_length=L[kind])[0]


@pytest.mark.parametrize("text", [None, "", "remove", "add snow remove snow", "  add\t&amp;lt; \n snow "])
def test_the_prompt_is_embedded_as_by_the_published_pipeline(case, capsys, text):
    kind, folder = case
    assert run(capsys, folder, *([] if text is None else ["--text", text]))[0] == 0
    tensors, about = weights.load_tensors(folder / "prompt.safetensors")
    text = "remove degradation" if text is None else text
    wanted = published(kind, folder, text)
    assert tensors.keys() == {"text"} and tensors["text"].shape == wanted.shape == (1, L[kind], 8)
    difference = (tensors["text"] - wanted).abs().max()
    assert difference <= 1e-6, f"largest difference {difference:.1e}, allowed 1e-6"
    assert about == {"text": text, "base": "base"}
    other = published(kind, folder, "snow")
    assert (other - wanted).abs().max() > 1e-2, "the text must matter, or the comparison says nothing"


def test_padding_is_attended_to_in_cogvideox_encoded_in_clip_and_zero_in_wan(case, capsys):
    """In so many words: the same tokens in a row that is as long as the text and no longer. CLIP's text does not see
    what comes after it, but the padding is encoded."""
    kind, folder = case
    assert run(capsys, folder, "--text", "add snow")[0] == 0
    text = weights.load_tensors(folder / "prompt.safetensors")[0]["text"]
    with torch.no_grad():
        alone = text_encoder(kind)(torch.tensor([[8, 3, 9, 1]])).last_hidden_state
    difference = (text[:, :4] - alone).abs().max()
    if kind == "wan":
        assert difference < 1e-6 and not text[:, 4:].any(), f"the text differs by {difference:.1e}"
    elif kind == "sd":
        assert difference < 1e-6 and text[:, 4:].abs().min(dim=2).values.min() > 0, f"the text differs by {difference}"
    else:
        assert difference > 1e-2 and text[:, 4:].abs().min(dim=2).values.min() > 0


def test_the_embedding_is_what_training_and_inference_take(case, capsys):
    kind, folder = case
    assert run(capsys, folder)[0] == 0
    text = weights.load_tensors(folder / "prompt.safetensors")[0]["text"]
    if kind == "sd":
        unet = UNet2D.from_pretrained(folder / "base" / "unet")
        with torch.no_grad():
            assert unet(torch.zeros(1, 4, 8, 8), 199, text).shape == (1, 4, 8, 8)
        return
    vae2d = None if kind == "wan" else folder / "vae_2d"
    mirage = Mirage.from_base(folder / "base", vae2d, text)
    assert Mirage.from_base(folder / "base", vae2d).text.shape == text.shape, "the zeros that stand in for it"
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        assert mirage(x).shape == x.shape


@pytest.mark.parametrize("text", ["a  b\n", "&amp;lt;&quot;", "\t", "x &lt; y &amp; z"])
def test_text_is_cleaned_as_in_the_published_wan_pipeline(text):
    assert encode_prompt.clean(text) == prompt_clean(text)


def test_text_beyond_ascii_is_cleaned_with_ftfy():
    pytest.importorskip("ftfy", reason="needs ftfy")
    for text in ("“snow”", "schÃ¶n", "ｆｕｌｌ", "a\u00a0b"):
        assert encode_prompt.clean(text) == prompt_clean(text)


def test_text_beyond_ascii_without_ftfy_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match="pip install ftfy"):
        encode_prompt.clean("“snow”")


def test_of_a_hub_id_two_config_files_are_fetched_before_the_text_encoder(case, monkeypatch):
    kind, folder = case
    patterns = []

    def snapshot_download(repo, allow_patterns, **where):
        patterns.extend(allow_patterns)
        return folder / "base"
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert encode_prompt.text_shape("org/name") == (MODEL_TYPE[kind], L[kind])
    files = [str(file.relative_to(folder / "base")) for file in (folder / "base").rglob("*")]
    fetched = {file for file in files if any(fnmatch(file, pattern) for pattern in patterns)}
    assert fetched == {"text_encoder/config.json", f"{NETWORK[kind]}/config.json"}


def poison(folder):
    """The last norm's scale has become NaN."""
    file = folder / "base" / "text_encoder" / "model.safetensors"
    tensors = weights.load_tensors(file)[0]
    name = next(key for key in tensors if re.search("final_layer_?norm.weight", key))
    weights.save_tensors(file, {k: v * (torch.nan if k == name else 1) for k, v in tensors.items()}, {"format": "pt"})


def spoil(folder, name: str, change):
    """Change a JSON file of the text encoder, or drop one of its attention's tensors."""
    file = folder / "base" / "text_encoder" / name
    if name.endswith("json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        tensors = weights.load_tensors(file)[0]
        dropped = next(key for key in tensors if re.search(change, key))
        weights.save_tensors(file, {k: v for k, v in tensors.items() if k != dropped}, {"format": "pt"})


LAYER = "[01].*[qkvo]\\w*.weight"  # an attention's, whatever it is called
MISTAKES = {
    "no text encoder": (lambda f: (f / "base/text_encoder").rename(f / "gone"), [], "no text_encoder/config.json in"),
    "no tokenizer": (lambda f: (f / "base/tokenizer").rename(f / "gone"), [], "transformers cannot load tokenizer"),
    "no base": (lambda f: (f / "base").rename(f / "gone"), [], "base: no such folder"),
    "another kind": (lambda f: spoil(f, "config.json", {"model_type": "bert"}), [], "wanted model_type .* got bert"),
    "a list of kinds": (lambda f: spoil(f, "config.json", {"model_type": ["t5"]}), [],
                        r"wanted model_type .* got \['t5'\]"),
    "another width": (lambda f: spoil(f, "config.json", {"d_model": 12, "hidden_size": 12}), [],
                      r"wanted (d_model|hidden_size) 8, which the (transformer|unet) takes, got 12"),
    "a weight missing": (lambda f: spoil(f, "model.safetensors", LAYER), [], f"lacks 1 weights: .*{LAYER}"),
    "another tokenizer": (lambda f: save_tokenizer(f / "base" / "tokenizer", "<unk>", more=40), ["--text", "more39"],
                          r"has a token \d\d, the text_encoder knows 0 to 15"),
    "NaN": (poison, [], "what the text_encoder makes of the text is not finite"),
    "half a file": (lambda f: (p := f / "base/text_encoder/model.safetensors").write_bytes(p.read_bytes()[:999]), [],
                    "transformers cannot load text_encoder"),
    "a long text": (lambda f: None, ["--text", "snow" + " snow" * 299], "has 600 tokens, this base takes at most"),
    "no folder": (lambda f: None, ["--out", "nowhere/prompt.safetensors"], "a file in a folder that exists"),
    "no such device": (lambda f: None, ["--device", "abacus"], "--device abacus: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(case, capsys, mistake):
    _, folder = case
    spoiling, argv, message = MISTAKES[mistake]
    spoiling(folder)
    status, lines = run(capsys, folder, *argv)
    assert status == 2 and lines[0].startswith("encode_prompt.py: "), lines
    assert re.search(message, lines[0]), lines[0]
    assert not list(folder.glob("prompt.safetensors*"))


@pytest.mark.parametrize("step, said", [("tokenize", "use the tokenizer"), ("encode", "run the text_encoder")])
def test_what_transformers_raises_at_work_is_one_line_too(case, capsys, monkeypatch, step, said):
    """A spoilt number in a JSON file may only tell when the tokenizer or the text encoder runs."""
    _, folder = case

    def fail(*args):
        raise IndexError("index out of range\nin self")
    monkeypatch.setattr(encode_prompt, step, fail)
    status, lines = run(capsys, folder)
    assert status == 2 and len(lines) == 1, lines
    assert f"base: transformers cannot {said}: index out of range" in lines[0]


def test_the_token_that_pads_is_the_tokenizers_own_and_is_printed(case, capsys):
    kind, folder = case
    assert encode_prompt.cli(["--base", str(folder / "base"), "--out", str(folder / "p.safetensors")]) == 0
    number = {"cogvideox": 0, "wan": 0, "sd": 9}[kind]
    assert f"padded with token {number} ({PAD[kind]!r})" in capsys.readouterr().out


def test_without_transformers_the_line_says_how_to_get_it(case, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, lines = run(capsys, case[1])
    assert status == 2 and "pip install transformers" in lines[0]


def command(folder, packages):
    """encode_prompt.py as a command that finds these packages first -> (its status, stdout, stderr)."""
    done = subprocess.run([sys.executable, ROOT / "encode_prompt.py", "--base", folder / "base", "--out",
                           folder / "prompt.safetensors"], env=os.environ | {"PYTHONPATH": str(packages)},
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("built", ["cogvideox", "sd"], indirect=True)  # T5 and CLIP; Wan's is a T5 too
def test_a_torchvision_that_is_broken_is_done_without(built, tmp_path):
    """As next to a torch of another build: RuntimeError, operator torchvision::nms does not exist."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('no such operator')")
    status, out, err = command(built[1], tmp_path)
    assert status == 0 and "'remove degradation' as" in out, err


@pytest.mark.parametrize("built", ["cogvideox"], indirect=True)  # before any text encoder is read
def test_a_transformers_that_is_broken_is_not_said_to_be_absent(built, tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('libx.so.1 is missing')")
    status, out, err = command(built[1], tmp_path)
    assert status == 2 and err == ("encode_prompt.py: transformers is installed but cannot be imported: libx.so.1 is "
                                   "missing\n"), err
