"""encode_prompt.py writes the published pipelines' own embedding of a prompt; every mistake is one line and status 2.

The reference is what CogVideoXPipeline and WanPipeline compute with the same small random text encoder and tokenizer.
"""

import json
import re
import shutil
import sys
from fnmatch import fnmatch

import pytest
import torch

import encode_prompt
from mirage_min.networks import weights
from mirage_min.systems.mirage import Mirage
from tests import small
from tests.torchvision_stub import stub

stub()

from diffusers import CogVideoXPipeline, WanPipeline  # noqa: E402
from diffusers.pipelines.wan.pipeline_wan import prompt_clean  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

L = {"cogvideox": 9, "wan": 512}  # the small CogVideoX is given a length of its own


def save_tokenizer(folder) -> None:
    """A token a word, one for every space, unknown words alike; </s> at the end, as T5 has it."""
    words = ["<pad>", "</s>", "<unk>", " ", "remove", "degradation", "<", "&lt;", "add", "snow"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
                            ).save_pretrained(folder)


def text_encoder(kind: str, d_model: int = 8):
    torch.manual_seed(0)
    Config, Encoder = (UMT5Config, UMT5EncoderModel) if kind == "wan" else (T5Config, T5EncoderModel)
    return Encoder(Config(vocab_size=16, d_model=d_model, d_kv=4, d_ff=16, num_layers=2, num_heads=2)).eval()


@pytest.fixture(scope="module", params=L)
def built(request, tmp_path_factory):
    """(kind, folder with a base that has a text encoder)"""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    (small.save_wan if kind == "wan" else small.save_cogvideox)(folder)
    base = folder / "base"
    if kind == "cogvideox":
        file = base / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_text_seq_length": L[kind]}))
    save_tokenizer(base / "tokenizer")
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
    pipeline = {"wan": WanPipeline, "cogvideox": CogVideoXPipeline}[kind](
        tokenizer=tokenizer, text_encoder=text_encoder(kind), vae=None, transformer=None, scheduler=None)
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


def test_padding_is_attended_to_in_cogvideox_and_zero_in_wan(case, capsys):
    """In so many words: the same tokens in a row that is as long as the text and no longer."""
    kind, folder = case
    assert run(capsys, folder, "--text", "add snow")[0] == 0
    text = weights.load_tensors(folder / "prompt.safetensors")[0]["text"]
    with torch.no_grad():
        alone = text_encoder(kind)(torch.tensor([[8, 3, 9, 1]])).last_hidden_state
    difference = (text[:, :4] - alone).abs().max()
    if kind == "wan":
        assert difference < 1e-6 and not text[:, 4:].any(), f"the text differs by {difference:.1e}"
    else:
        assert difference > 1e-2 and text[:, 4:].abs().min(dim=2).values.min() > 0


def test_the_embedding_is_what_training_and_inference_take(case, capsys):
    kind, folder = case
    assert run(capsys, folder)[0] == 0
    text = weights.load_tensors(folder / "prompt.safetensors")[0]["text"]
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


def test_of_a_hub_id_three_config_files_are_fetched_before_the_text_encoder(case, monkeypatch):
    kind, folder = case
    patterns = []

    def snapshot_download(repo, allow_patterns):
        patterns.extend(allow_patterns)
        return folder / "base"
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert encode_prompt.text_shape("org/name") == (kind == "wan", L[kind], 8)
    encode_prompt.check_encoder("org/name", "umt5" if kind == "wan" else "t5", 8)
    files = [str(file.relative_to(folder / "base")) for file in (folder / "base").rglob("*")]
    fetched = {file for file in files if any(fnmatch(file, pattern) for pattern in patterns)}
    assert fetched == {"vae/config.json", "transformer/config.json", "text_encoder/config.json"}


def spoil(folder, name: str, change):
    """Change a JSON file, or the tensors of a safetensors file, of the text encoder."""
    file = folder / "base" / "text_encoder" / name
    if name.endswith("json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        weights.save_tensors(file, {k: v for k, v in weights.load_tensors(file)[0].items() if k != change},
                             {"format": "pt"})


LAYER = "encoder.block.1.layer.0.SelfAttention.q.weight"
MISTAKES = {
    "no text encoder": (lambda f: (f / "base/text_encoder").rename(f / "gone"), [], "no text_encoder/config.json in"),
    "no tokenizer": (lambda f: (f / "base/tokenizer").rename(f / "gone"), [], "transformers cannot load tokenizer"),
    "no base": (lambda f: (f / "base").rename(f / "gone"), [], "base: no such folder"),
    "another kind": (lambda f: spoil(f, "config.json", {"model_type": "bert"}), [], "wanted model_type .* got bert"),
    "another width": (lambda f: spoil(f, "config.json", {"d_model": 12}), [], "d_model 8, got .* and 12"),
    "a weight missing": (lambda f: spoil(f, "model.safetensors", LAYER), [], f"lacks 1 weights: {LAYER}"),
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


def test_without_transformers_the_line_says_how_to_get_it(case, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, lines = run(capsys, case[1])
    assert status == 2 and "pip install transformers" in lines[0]
