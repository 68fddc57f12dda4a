"""Adapters on disk: diffusers reads what a stage saved and computes the same from it, and the other way round.

The reference is diffusers' own transformer with PEFT's LoRA layers in it.
"""

import json
from pathlib import Path

import pytest
import torch

from mirage_min.method import lora
from mirage_min.networks import weights
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, TRANSFORMER
from tests import small
from tests.torchvision_stub import stub

stub()

from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, WanPipeline, WanTransformer3DModel  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict  # noqa: E402

WEIGHTS = Path(__file__).parents[1] / "weights"
RANK, ALPHA = 3, 12.0  # whoever takes alpha = rank is wrong by a factor of four
PIPELINES = {"cogvideox": CogVideoXPipeline, "wan": WanPipeline}
TRANSFORMERS = {"cogvideox": CogVideoXTransformer3DModel, "wan": WanTransformer3DModel}


@pytest.fixture(scope="module", params=PIPELINES)
def base(request, tmp_path_factory):
    """(kind, folder with a small random base)"""
    folder = tmp_path_factory.mktemp(request.param)
    small.save_wan(folder) if request.param == "wan" else small.save_cogvideox(folder, patch_size_t=None)
    return request.param, folder


def our_mirage(kind: str, folder: Path) -> Mirage:
    return Mirage.from_base(folder / "base", None if kind == "wan" else folder / "vae_2d", dtype=torch.float64)


def their_transformer(kind: str, folder: Path):
    return TRANSFORMERS[kind].from_pretrained(folder / "base" / "transformer", torch_dtype=torch.float64).eval()


def their_pipeline(kind: str, transformer):
    return PIPELINES[kind](tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)


def save_ours(mirage: Mirage, file: Path, about: dict[str, str]) -> None:
    """A stage H whose two adapters have random weights and different ranks and alphas."""
    torch.manual_seed(3)
    for name, rank, alpha in ((TRANSFORMER, RANK, ALPHA), (HARMONISATION, 2, 1.0)):
        mirage.add_lora(name, rank, alpha)
        for p in lora.parameters(mirage.adapters(name), name):
            torch.nn.init.normal_(p, std=0.5)
    mirage.save_stage(file, [TRANSFORMER, HARMONISATION], about)


def add_theirs(transformer, **options) -> None:
    """PEFT's adapter on layers that we would not have chosen, its weights as random as ours."""
    torch.manual_seed(3)
    options = dict(r=RANK, lora_alpha=ALPHA, target_modules=["to_k", "net.2"], init_lora_weights=False) | options
    transformer.add_adapter(LoraConfig(**options))
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.5)


def published(kind: str, transformer, z, text):
    """One call of the published transformer on latents [B, C, F, h, w]."""
    t = torch.tensor([200])
    if kind == "wan":
        return transformer(z, t, text, return_dict=False)[0]
    rotary = their_pipeline(kind, transformer)._prepare_rotary_positional_embeddings(
        z.shape[3] * 8, z.shape[4] * 8, z.shape[2], torch.device("cpu"))
    return transformer(z.transpose(1, 2), text, t, image_rotary_emb=rotary, return_dict=False)[0].transpose(1, 2)


@torch.no_grad()
def check_equal(kind: str, transformer, mirage: Mirage) -> None:
    """Both compute the same; and the adapter matters, so that a wrong scale would be seen."""
    draws, c = torch.Generator().manual_seed(5), mirage.dit.config
    z = torch.randn(1, c.in_channels, 3, 4, 6, generator=draws, dtype=torch.float64)
    text = torch.randn(mirage.text.shape, generator=draws, dtype=torch.float64)
    ours, wanted = mirage.dit(z, 200, text), published(kind, transformer, z, text)
    transformer.disable_adapters()
    plain = published(kind, transformer, z, text)
    difference, change = (ours - wanted).abs().max() / wanted.std(), (wanted - plain).abs().max() / wanted.std()
    assert difference <= 1e-5, f"ours and diffusers' differ by {difference:.1e} of the output's std, allowed 1e-5"
    assert change > 0.1, f"the adapter changes only {change:.1e} of the output's std: the comparison says nothing"


@pytest.mark.parametrize("by", ["transformer", "pipeline"])
def test_diffusers_reads_the_whole_file_of_stage_h_and_computes_the_same(base, tmp_path, by):
    """Its alpha too, which is not the rank; Harmonisation-LoRA in the same file is no business of diffusers."""
    kind, folder = base
    save_ours(mirage := our_mirage(kind, folder), tmp_path / "stage_h.safetensors", {})
    transformer = their_transformer(kind, folder)
    load = transformer.load_lora_adapter if by == "transformer" else their_pipeline(kind, transformer).load_lora_weights
    load(tmp_path, weight_name="stage_h.safetensors", use_safetensors=True)
    config, = transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    check_equal(kind, transformer, mirage)


@pytest.mark.parametrize("by", ["transformer", "pipeline"])
def test_we_read_what_diffusers_saved_and_compute_the_same(base, tmp_path, by):
    """Its keys are prefixed by the pipeline alone; its alpha is in the metadata."""
    kind, folder = base
    transformer = their_transformer(kind, folder)
    add_theirs(transformer)
    if by == "transformer":
        transformer.save_lora_adapter(tmp_path)
    else:
        PIPELINES[kind].save_lora_weights(tmp_path, get_peft_model_state_dict(transformer),
                                          transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict())
    mirage = our_mirage(kind, folder)
    mirage.load_stage(*weights.load_tensors(tmp_path / "pytorch_lora_weights.safetensors"))
    check_equal(kind, transformer, mirage)
    assert not any(p.requires_grad for p in mirage.parameters())


def test_a_lora_without_metadata_is_on_our_layers_with_alpha_equal_to_its_rank(base, tmp_path):
    """As diffusers has it."""
    kind, folder = base
    add_theirs(theirs := their_transformer(kind, folder), target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    PIPELINES[kind].save_lora_weights(tmp_path, get_peft_model_state_dict(theirs))
    again, mirage = their_transformer(kind, folder), our_mirage(kind, folder)
    again.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    mirage.load_stage(*weights.load_tensors(tmp_path / "pytorch_lora_weights.safetensors"))
    check_equal(kind, again, mirage)


@pytest.mark.parametrize("options, message", [
    ({"use_rslora": True}, "one scale, alpha / rank"),
    ({"alpha_pattern": {"net.2": 5}}, "one scale, alpha / rank"),
    ({"rank_pattern": {"net.2": 5}}, "tensors\\): 2 wrongly shaped: "),
    ({"use_dora": True}, "unexpected: .*lora_magnitude_vector")])
def test_a_lora_that_is_more_than_one_scale_and_two_matrices_is_refused(base, tmp_path, options, message):
    kind, folder = base
    transformer = their_transformer(kind, folder)
    add_theirs(transformer, **options)
    transformer.save_lora_adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        our_mirage(kind, folder).load_stage(*weights.load_tensors(tmp_path / "pytorch_lora_weights.safetensors"))


def test_tensors_of_nothing_that_mirage_has_are_refused(base, tmp_path):
    kind, folder = base
    save_ours(our_mirage(kind, folder), tmp_path / "stage_h.safetensors", {})
    tensors, about = weights.load_tensors(tmp_path / "stage_h.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: text_encoder.q.lora_A.weight"):
        our_mirage(kind, folder).load_stage(tensors | {"text_encoder.q.lora_A.weight": torch.zeros(RANK, 1)}, about)


def test_a_lora_with_a_layer_missing_is_refused(base, tmp_path):
    kind, folder = base
    save_ours(our_mirage(kind, folder), tmp_path / "stage_h.safetensors", {})
    tensors, about = weights.load_tensors(tmp_path / "stage_h.safetensors")
    for name in (TRANSFORMER, HARMONISATION):
        layer = min(key for key in tensors if key.startswith(name)).removesuffix(".lora_A.weight")
        rest = {key: value for key, value in tensors.items() if not key.startswith(layer)}
        with pytest.raises(ValueError, match=f"LoRA '{name}' .* 2 missing"):
            our_mirage(kind, folder).load_stage(rest, about)


def test_the_file_says_what_it_was_made_from_and_how(base, tmp_path):
    kind, folder = base
    making = {"base": "../base", "vae2d": "../vae_2d", "step": "7", "recipe": json.dumps({"lr": 1e-4})}
    save_ours(our_mirage(kind, folder), tmp_path / "stage_h.safetensors", making)
    about = weights.load_tensors(tmp_path / "stage_h.safetensors")[1]
    assert about.items() >= making.items() and len(making) == 4, "the caller's own dict must stay as it is"
    assert about.items() >= {"transformer.rank": "3", "transformer.alpha": "12.0",
                             "harmonisation.rank": "2", "harmonisation.alpha": "1.0"}.items()


@pytest.mark.skipif(not (WEIGHTS / "stage_h.safetensors").exists(), reason="needs the trained model in weights/")
def test_diffusers_computes_the_same_from_the_shipped_stage_h_saved_again(tmp_path):
    """Six layers, more targets than PEFT keeps by their full names; and a file from before there was PEFT metadata."""
    mirage = Mirage.from_pretrained(WEIGHTS, dtype=torch.float64)
    mirage.save_stage(tmp_path / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], {})
    old, new = (weights.load_tensors(folder / "stage_h.safetensors")[0] for folder in (WEIGHTS, tmp_path))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    for folder in (WEIGHTS, tmp_path):
        transformer = their_transformer("cogvideox", WEIGHTS)
        transformer.load_lora_adapter(folder, weight_name="stage_h.safetensors", use_safetensors=True)
        check_equal("cogvideox", transformer, mirage)
